"""LoRA adapters on the shard's side: rows of several adapters and of none share steps, and each gets what the model
that its adapter is merged into would give it."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from router.engine import Engine
from router.launch import LaunchSettings, LocalGroup
from router.text.tokenizer import Tokenizer
from shard.adapters import AdapterFolder, Adapters, find_adapters
from shard.distributed import RankGroup
from shard.errors import LoadError
from shard.families import PLANS
from shard.kernels.packing import Kind
from shard.model import Model, load_model
from tests.engines import collect, engine_over, greedy
from tests.paged_runs import PagedRun
from tests.rank_process import ADAPTERS_OF_PROMPTS, prompts, run_rank
from tests.server import PATIENCE_S, serving
from tests.tiny_adapters import NAMES, save_adapter, save_two
from tests.tiny_models import VOCAB_SIZE, save_tiny
from tests.tiny_tokenizers import byte_level

SAMPLE = ("bloom", "deepseek_v3", "falcon", "gemma2", "gpt2", "llama", "opt", "phi3", "qwen2_moe", "qwen3")
TOLERANCE = 3e-5
"""Of the largest logit. Ones that miss a layer of an adapter differ by a tenth and more."""

pytestmark = pytest.mark.usefixtures("one_thread")


def load(directory: Path, adapters: Sequence[AdapterFolder], **settings: object) -> Model:
    values: dict[str, object] = {"dtype": torch.float32, "device": torch.device("cpu"), "group": RankGroup()}
    values |= {"on_progress": lambda done, total: None, "block_size": 4}
    return load_model(directory, adapters=adapters, **(values | settings))  # type: ignore[arg-type]


def folders(directory: Path) -> list[AdapterFolder]:
    return [AdapterFolder(name, directory / name) for name in NAMES]


@torch.inference_mode()
def assert_logits(actual: Sequence[Tensor], oracles: Sequence[PreTrainedModel]) -> None:
    """Those of the prompts, each by its own adapter."""
    for logits, tokens, number in zip(actual, prompts(VOCAB_SIZE), ADAPTERS_OF_PROMPTS, strict=True):
        wanted = oracles[number](tokens[None], use_cache=False).logits[0]
        assert float((logits - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in SAMPLE else pytest.mark.exhaustive) for f in sorted(PLANS)]
)
def test_rows_of_several_adapters_equal_the_models_they_are_merged_into(family: str, tmp_path: Path) -> None:
    oracles = save_two(tmp_path, save_tiny(tmp_path, family))

    model = load(tmp_path, folders(tmp_path))
    hidden = PagedRun(model, prompts(VOCAB_SIZE), adapters=ADAPTERS_OF_PROMPTS).finish()

    assert_logits([model.logits(states) for states in hidden], oracles)


def test_two_ranks_change_the_same(tmp_path: Path) -> None:
    oracles = {family: save_two(tmp_path / family, save_tiny(tmp_path / family, family)) for family in SAMPLE}

    spawn = multiprocessing.get_context("spawn")
    directories = [tmp_path / family for family in SAMPLE]
    ranks = [spawn.Process(target=run_rank, args=(rank, 2, tmp_path, directories, NAMES)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=5 * PATIENCE_S)

    for family in SAMPLE:
        result = torch.load(tmp_path / f"{family}.0.pt")
        assert "error" not in result, result["error"]
        assert_logits(result["logits"], oracles[family])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """With two adapters in folders below."""
    save_two(tmp_path, save_tiny(tmp_path, "llama"))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_an_adapter_is_bit_for_bit_what_it_is_beside_none(llama: Path, dtype: torch.dtype) -> None:
    model = load(llama, folders(llama), dtype=dtype)

    beside = PagedRun(model, prompts(VOCAB_SIZE), adapters=ADAPTERS_OF_PROMPTS).finish()
    without = PagedRun(model, prompts(VOCAB_SIZE)).finish()

    are_equal = [torch.equal(*both) for both in zip(beside, without, strict=True)]
    assert are_equal == [number == 0 for number in ADAPTERS_OF_PROMPTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_adds_nothing_changes_no_bit(llama: Path, dtype: torch.dtype) -> None:
    tensors = load_file(llama / "first" / "adapter_model.safetensors")
    nothing = {name: tensor * (".lora_A." in name) for name, tensor in tensors.items()}
    model = load(llama, [save_adapter(llama / "nothing", nothing, r=4, lora_alpha=6)], dtype=dtype)

    changed = PagedRun(model, prompts(VOCAB_SIZE), adapters=(1, 1, 0, 1)).finish()
    plain = PagedRun(model, prompts(VOCAB_SIZE)).finish()

    assert all(torch.equal(*both) for both in zip(changed, plain, strict=True))


def test_layers_are_not_fused_where_adapters_are_loaded(llama: Path) -> None:
    assert load(llama, folders(llama), block_size=16)._fused is None
    with pytest.raises(LoadError, match="^quantised weights need fused layers: adapters change"):
        load(llama, folders(llama), block_size=16, dtype=torch.bfloat16, quantize=Kind.INT8)


# What is refused


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"peft_type": "IA3"}, "adapter_config.json does not describe a LoRA adapter"),
        ({"use_dora": True}, "adapter_config.json has `use_dora`: true, which is not served"),
        ({"bias": "all"}, 'adapter_config.json has `bias`: "all", which is not served'),
        ({"modules_to_save": ["lm_head"]}, r"adapter_config.json has `modules_to_save`: \[\"lm_head\"\], which"),
        ({"init_lora_weights": "pissa_niter_4"}, 'adapter_config.json has `init_lora_weights`: "pissa_niter_4"'),
        ({"lora_alpha": "a lot"}, "lora_alpha is 'a lot' for model.layers.0.mlp.down_proj"),
        ({"lora_alpha": math.inf}, "model.layers.0.mlp.down_proj has numbers that are not finite"),
        ({"alpha_pattern": {"(": 1}}, "`alpha_pattern` cannot be read: missing \\)"),
    ],
)
def test_an_adapter_that_is_more_than_low_rank_changes_is_refused(
    llama: Path, config: dict[str, object], cause: str
) -> None:
    path = llama / "first" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | config))

    with pytest.raises(LoadError, match=f"^adapter 'first': .*{cause}"):
        load(llama, folders(llama))


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "cause"),
    [
        ({f"{Q_PROJ}.lora_magnitude_vector": torch.ones(48)}, f"{Q_PROJ}.lora_magnitude_vector is not a matrix of"),
        ({"base_model.model.lm_head.weight": torch.ones(131, 48)}, "base_model.model.lm_head.weight is not a matrix"),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(4, 48).long()}, f"{Q_PROJ}.lora_A.weight is not a matrix of a linear"),
        ({f"{Q_PROJ}.lora_A.weight": torch.full((4, 48), math.nan)}, "q_proj has numbers that are not finite"),
        ({f"{Q_PROJ}.lora_B.weight": torch.ones(48, 3)}, "layers.0.self_attn.q_proj has matrices of rank 4 and 3"),
        (
            {f"{Q_PROJ}.lora_A.weight": torch.ones(0, 48), f"{Q_PROJ}.lora_B.weight": torch.ones(48, 0)},
            "layers.0.self_attn.q_proj has matrices of rank 0 and 0",
        ),
        (
            {f"{Q_PROJ}.lora_B.weight": torch.ones(44, 4)},
            r"q_proj has matrices for a weight of \[44, 48\], .* \[48, 48\]",
        ),
        ({f"{Q_PROJ}x.lora_A.weight": torch.ones(4, 48)}, "model.layers.0.self_attn.q_projx has no lora_B"),
        (
            {f"{Q_PROJ}x.lora_{side}.weight": torch.ones(48, 48) for side in "AB"},
            "the model has no model.layers.0.self_attn.q_projx",
        ),
        (
            {f"base_model.model.model.norm.lora_{side}.weight": torch.ones(48, 48) for side in "AB"},
            "model.norm is no linear layer, and nothing else is served",
        ),
        (
            {
                "base_model.model.lm_head.lora_A.weight": torch.ones(4, 48),
                "base_model.model.lm_head.lora_B.weight": torch.ones(131, 4),
            },
            "lm_head is no layer that all tokens go through, and nothing else is served",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(llama: Path, tensors: dict[str, Tensor], cause: str) -> None:
    path = llama / "first" / "adapter_model.safetensors"
    save_file(load_file(path) | tensors, path)

    with pytest.raises(LoadError, match=f"^adapter 'first': .*{cause}"):
        load(llama, folders(llama))


def test_a_broken_file_is_named(llama: Path) -> None:
    path = llama / "second" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])

    with pytest.raises(LoadError, match=f"^adapter 'second': {path} cannot be read"):
        load(llama, folders(llama))


def test_ranks_with_and_without_adapters_are_no_group(llama: Path) -> None:
    class Uneven(RankGroup):
        def all_reduce(self, tensor: Tensor) -> Tensor:
            return tensor + 1

    with pytest.raises(LoadError, match="^the ranks are given different numbers of LoRA adapters, this one 2$"):
        load(llama, folders(llama), group=Uneven())


def test_without_adapters_nothing_is_run_to_check_them() -> None:
    Adapters().check(lambda: pytest.fail("a pass was run"), num_tokens=19)


def test_adapters_are_found_by_folder(llama: Path) -> None:
    text = ", ".join(f"{name}={llama / name}" for name in NAMES)

    assert find_adapters(text) == folders(llama)
    assert find_adapters("") == []
    with pytest.raises(LoadError, match="^two LoRA adapters have one name: a=/x,a=/y$"):
        find_adapters("a=/x,a=/y")


# The whole way


def greedy_tokens(oracle: PreTrainedModel, prompt: list[int], num_new: int) -> list[int]:
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(num_new):
            tokens = torch.cat([tokens, oracle(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :].tolist()


def test_a_server_is_started_with_adapters(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    _, oracle, _ = save_two(tmp_path, save_tiny(tmp_path, "llama", vocab_size=402))
    flags = ("--dtype", "float32", "--kv-cache-bytes", "10000000", "--lora-adapters", f"poet={tmp_path / NAMES[0]}")
    asked = {"inputs": "abc", "parameters": {"adapter_id": "poet", "details": True, "max_new_tokens": 5}}

    with serving("--model-id", str(tmp_path), *flags) as server:
        answer = httpx.post(f"{server.url}/generate", json=asked, timeout=PATIENCE_S).json()
        listed = httpx.get(f"{server.url}/v1/models", timeout=PATIENCE_S).json()["data"]

    told = [token["id"] for token in answer["details"]["tokens"]]
    assert told == greedy_tokens(oracle, Tokenizer.load(tmp_path).encode("abc"), 5)
    assert [model["id"] for model in listed] == [str(tmp_path), "poet"]


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_tokens_equal_the_merged_models(num_ranks: int, tmp_path: Path, smollm2: Path) -> None:
    """Through the router: in chunks, from the prefix cache, and after a death of the group."""
    oracles = save_two(tmp_path, save_tiny(tmp_path, "llama"))
    whole = [tokens.tolist() for tokens in prompts(VOCAB_SIZE)]
    asked = [(prompt, number) for prompt in whole for number in (0, 1, 2)]
    expected = [greedy_tokens(oracles[number], prompt, 40) for prompt, number in asked]
    text = ",".join(f"{name}={tmp_path / name}" for name in NAMES)
    flags = ("--dtype", "float32", "--kv-cache-bytes", "10000000", "--lora-adapters", text)

    async def generate(engine: Engine) -> list[list[int]]:
        generations = [engine.submit(greedy(prompt, 40, adapter=number)) for prompt, number in asked]
        events = await asyncio.gather(*map(collect, generations))
        return [[event.token.id for event in told] for told in events]

    async def kill_amid(engine: Engine, group: LocalGroup) -> None:
        async for event in engine.submit(greedy(whole[0], 60)):
            if event.index == 10:
                os.kill(group.process_ids[0], signal.SIGKILL)

    async def run() -> None:
        group = LocalGroup(LaunchSettings(tmp_path, num_ranks, flags), on_progress=lambda *_: None)
        try:
            await group.start()
            async with engine_over(
                group.addresses, Tokenizer.load(smollm2), max_step_tokens=24, restart=group.restart
            ) as engine:
                assert await generate(engine) == expected
                num_hits = engine.counters.num_hit_tokens
                assert await generate(engine) == expected
                num_full = sum((len(prompt) - 1) // 16 for prompt, _ in asked)
                assert engine.counters.num_hit_tokens - num_hits == 16 * num_full
                tokens, _ = await asyncio.gather(generate(engine), kill_amid(engine, group))
                assert tokens == expected
                assert engine.counters.num_replays > len(asked) // 2
        finally:
            await group.stop()

    asyncio.run(run())

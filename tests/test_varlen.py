"""FlashAttention over blocks, called as on a GPU, with a plain kernel of the same meaning in its place."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proto import shard_pb2 as pb
from router.core.request import Request, Sampling
from router.core.scheduler import Limits
from shard import attention
from shard.attention import AttentionOptions, PagedAttention, VarlenAttention
from shard.config import ShardConfig
from shard.distributed import RankGroup
from shard.grammar import GrammarCompiler
from shard.kv_cache import LayerShape
from shard.model import Model, load_model
from shard.worker import Worker
from tests import paged_runs, test_attention, test_worker
from tests.paged_runs import PagedRun
from tests.test_attention import dense, make_batch, make_sequences
from tests.test_families import assert_close_to, dense_logits
from tests.test_worker import Run, assert_same
from tests.tiny_models import VOCAB_SIZE, save_tiny
from tests.varlen import provide

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    provide()


@pytest.fixture
def with_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this device had the kernel."""
    monkeypatch.setattr(attention, "flash_dtypes", lambda device: (torch.float32,))


# The call


@pytest.mark.parametrize("window", [None, 1, 6, 256, 300])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_chunks_of_interleaved_sequences_equal_dense(
    window: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_attention, "BLOCK_SIZE", VarlenAttention.PLACES)
    options = AttentionOptions(scaling=0.4, window=window)
    sequences, cache = make_sequences([310, 257, 256, 30, 1], 6, LayerShape(kv_heads, 8, 8), seed=3)
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    draw = random.Random(5)

    while waiting := [i for i, s in enumerate(sequences) if s.fed < len(s)]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        rows = [
            (sequences[i], min(draw.choice((1, 1, 9, 90, 250)), len(sequences[i]) - sequences[i].fed)) for i in chosen
        ]
        query, key, value = (
            torch.cat([getattr(s, name)[s.fed : s.fed + n] for s, n in rows]) for name in ("query", "key", "value")
        )
        with torch.inference_mode():
            output = VarlenAttention(make_batch(rows), cache)(0, query, key, value, options)
        for i, (s, n), part in zip(chosen, rows, output.split([n for _, n in rows]), strict=True):
            s.fed += n
            outputs[i].append(part)

    for s, parts in zip(sequences, outputs, strict=True):
        torch.testing.assert_close(torch.cat(parts), dense(s.query, s.key, s.value, options), rtol=1e-5, atol=1e-5)


PLAIN = AttentionOptions(scaling=0.4)


@pytest.mark.parametrize(
    ("layers", "options", "suits"),
    [
        ([LayerShape(2, 64, 64)], [PLAIN], True),
        ([LayerShape(2, 256, 256)], [replace(PLAIN, window=7)], True),
        ([LayerShape(2, 264, 264)], [PLAIN], False),
        ([LayerShape(2, 20, 20)], [PLAIN], False),
        ([LayerShape(2, 64, 32)], [PLAIN], False),
        ([LayerShape(2, 64, 64)] * 2, [PLAIN, replace(PLAIN, softcap=30.0)], False),
        ([LayerShape(2, 64, 64)] * 2, [PLAIN, replace(PLAIN, sinks=torch.zeros(2))], False),
    ],
)
def test_it_is_for_heads_and_options_that_the_kernel_knows(
    layers: list[LayerShape], options: list[AttentionOptions], suits: bool, with_flash: None
) -> None:
    assert VarlenAttention.suits(layers, options, torch.float32, CPU) == suits


def test_it_is_not_for_numbers_or_devices_without_the_kernel(with_flash: None) -> None:
    assert not VarlenAttention.suits([LayerShape(2, 64, 64)], [PLAIN], torch.float16, CPU)


def test_there_is_no_kernel_for_a_cpu() -> None:
    assert not VarlenAttention.suits([LayerShape(2, 64, 64)], [PLAIN], torch.bfloat16, CPU)


# Whole models


def load(directory: Path, group: RankGroup | None = None) -> Model:
    return load_model(
        directory, dtype=torch.float32, device=CPU, group=group or RankGroup(), on_progress=lambda done, total: None
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "mixtral"])
def test_models_attend_by_it_and_equal_dense(
    family: str, tmp_path: Path, with_flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = {"n_positions" if family == "gpt2" else "max_position_embeddings": 700}
    oracle = save_tiny(tmp_path, family, **longest)
    monkeypatch.setattr(paged_runs, "CHUNKS", (1, 2, 13, 40, 200))
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in (530, 258, 31)]

    model = load(tmp_path)

    assert (model.attention, model.block_size) == (VarlenAttention, 256)
    for tokens, states in zip(sequences, PagedRun(model, sequences).finish(), strict=True):
        assert_close_to(model.logits(states), dense_logits(oracle, tokens))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_models_with_what_the_kernel_does_not_know_keep_small_blocks(
    family: str, tmp_path: Path, with_flash: None
) -> None:
    save_tiny(tmp_path, family)

    model = load(tmp_path)

    assert (model.attention, model.block_size) == (PagedAttention, 16)


def forgets_all_rows_but_the_first(attend: Callable[..., tuple[Tensor, ...]], *given: object) -> tuple[Tensor, ...]:
    """As torch 2.13 does over blocks where it splits the keys."""
    output, *rest = attend(*given)
    starts = given[3]
    assert isinstance(starts, Tensor)
    output[int(starts[1]) :] = torch.nan
    return output, *rest


def looks_ahead(attend: Callable[..., tuple[Tensor, ...]], *given: object) -> tuple[Tensor, ...]:
    return attend(*given[:7], False, given[8], [-1, -1], *given[10:])


def is_missing(attend: Callable[..., tuple[Tensor, ...]], *given: object) -> tuple[Tensor, ...]:
    raise NotImplementedError("no kernel")


@pytest.mark.parametrize("fault", [forgets_all_rows_but_the_first, looks_ahead, is_missing])
def test_a_kernel_that_is_wrong_or_missing_does_not_serve(
    fault: Callable[..., tuple[Tensor, ...]],
    tmp_path: Path,
    with_flash: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    oracle = save_tiny(tmp_path, "llama", max_position_embeddings=700)
    real = torch.ops.torch_attn._varlen_attn
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", lambda *given: fault(real, *given))
    tokens = torch.arange(3, 40)

    model = load(tmp_path)
    (states,) = PagedRun(model, [tokens]).finish()

    assert (model.attention, model.block_size) == (PagedAttention, 16)
    assert model.bytes_per_block == 16 * 2 * 2 * 3 * 8 * 4  # places, layers, keys and values, heads, width, bytes
    assert "attention is not FlashAttention" in caplog.text
    assert_close_to(model.logits(states), dense_logits(oracle, tokens))


def test_a_rank_that_is_lost_within_the_test_is_not_taken_for_a_kernel_that_refuses(
    tmp_path: Path, with_flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loses_a_rank(model: Model, *given: object) -> Tensor:
        if model.attention is VarlenAttention:
            raise RuntimeError("another rank ended")
        return hidden(model, *given)

    save_tiny(tmp_path, "llama", max_position_embeddings=700)
    hidden: Callable[..., Tensor] = Model.hidden
    monkeypatch.setattr(Model, "hidden", loses_a_rank)

    with pytest.raises(RuntimeError, match="another rank ended"):
        load(tmp_path)


def test_no_rank_attends_by_it_if_one_cannot(tmp_path: Path, with_flash: None) -> None:
    class OtherCannot(RankGroup):
        def all_reduce(self, tensor: Tensor) -> Tensor:
            return torch.zeros_like(tensor)

    save_tiny(tmp_path, "llama", max_position_embeddings=700)

    model = load(tmp_path, OtherCannot())

    assert (model.attention, model.block_size) == (PagedAttention, 16)


# Driven by the router


def make_worker(directory: Path, limits: Limits) -> Worker:
    grammars = GrammarCompiler(directory / "tokenizer.json", vocab_size=VOCAB_SIZE, eos_token_ids=())
    worker = Worker(ShardConfig(kv_cache_bytes=1 << 20), load(directory), RankGroup(), "", grammars)
    worker.configure(
        pb.ConfigureRequest(
            epoch=1,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            max_seats=limits.max_seats,
            max_step_tokens=limits.max_step_tokens,
        )
    )
    return worker


def test_sequences_have_the_same_tokens_over_long_blocks_as_over_short_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "llama", max_position_embeddings=700)
    long = Limits(num_blocks=8, block_size=256, max_seats=4, max_step_tokens=300)
    short = Limits(num_blocks=120, block_size=16, max_seats=4, max_step_tokens=300)
    common = tuple(3 + i * 7 % 100 for i in range(520))
    prompts = [common, (*common, 9, 8), (5, 6), common[:250]]
    requests = [Request("r", prompt, 12, Sampling(repetition_penalty=1.2)) for prompt in prompts]
    monkeypatch.setattr(test_worker, "LIMITS", short)
    expected = Run(make_worker(tmp_path, short), requests)
    monkeypatch.setattr(test_worker, "LIMITS", long)
    monkeypatch.setattr(attention, "flash_dtypes", lambda device: (torch.float32,))

    run = Run(make_worker(tmp_path, long), requests, prefix_caching=True)

    assert_same(run.tokens, expected.tokens)
    assert run.scheduler.counters.num_hit_tokens in (256, 512, 768)

"""Two ranks, each in its own process, against one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shard import model as shard_model
from shard.distributed import RankGroup, connect
from shard.errors import LoadError
from shard.families import PLANS, WHOLE, Plan, Rule
from shard.model import load_model
from shard.tensor_parallel import Heads, Sharding, deal, deal_heads
from tests.rank_process import prompts, run_rank
from tests.server import PATIENCE_S
from tests.tiny_models import FALCON_7B, FALCON_RW, VOCAB_SIZE, Setting, save_tiny

CPU = torch.device("cpu")

VARIANTS: Mapping[str, tuple[str, Mapping[str, Setting]]] = {
    "per_head_bigcode": ("gpt_bigcode", {"multi_query": False}),
    "biased_tied_llama": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "one_kv_head_qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "one_kv_head_phi3": ("phi3", {"num_key_value_heads": 1}),
    "alibi_falcon": ("falcon", FALCON_RW),
    "one_kv_head_falcon": ("falcon", FALCON_7B),
    "one_group_falcon": ("falcon", {"num_kv_heads": 1}),
    "normed_heads_stablelm": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "full_query_deepseek": ("deepseek_v3", {"q_lora_rank": None}),
}

Results = Mapping[str, list[dict[str, object]]]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> tuple[Results, Mapping[str, list[Tensor]]]:
    """What both ranks gave for every checkpoint, and what transformers gives for it on its own."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    cases = {**{family: (family, {}) for family in PLANS}, **VARIANTS}
    expected: dict[str, list[Tensor]] = {}
    for name, (family, overrides) in cases.items():
        oracle = save_tiny(folder / name, family, **overrides)
        expected[name] = dense_logits(oracle, VOCAB_SIZE)
    oracle = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager")
    expected[smollm2.name] = dense_logits(oracle, oracle.config.vocab_size)
    del oracle

    checkpoints = [*(folder / name for name in cases), smollm2]
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=run_rank, args=(rank, 2, folder, checkpoints)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=5 * PATIENCE_S)
        assert process.exitcode == 0
    assert all(not torch.load(folder / f"told.{rank}.pt").any() for rank in range(2)), "rank 0 broadcasts zeros"
    results = {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(2)] for name in expected}
    return results, expected


@torch.inference_mode()
def dense_logits(oracle: nn.Module, vocab_size: int) -> list[Tensor]:
    return [oracle(tokens[None], use_cache=False).logits[0] for tokens in prompts(vocab_size)]


@pytest.mark.parametrize("name", [*PLANS, *VARIANTS, "smollm2-135m-instruct"])
def test_two_ranks_equal_one(name: str, two_ranks: tuple[Results, Mapping[str, list[Tensor]]]) -> None:
    results, expected = two_ranks
    first, second = results[name]

    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    logits = first["logits"]
    assert isinstance(logits, list)
    for actual, wanted in zip(logits, expected[name], strict=True):
        assert actual.shape == wanted.shape
        assert float((actual - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_ranks_read_and_hold_their_parts_only(two_ranks: tuple[Results, Mapping[str, list[Tensor]]]) -> None:
    results, _ = two_ranks
    first, second = results["smollm2-135m-instruct"]

    # 3 KV groups: 2 on rank 0, 1 on rank 1. Keys and values of 64 float32 in 30 layers, blocks of 4.
    assert (first["bytes_per_block"], second["bytes_per_block"]) == (2 * 61440, 61440)
    whole = 538_060_032
    assert whole <= first["read_bytes"] + second["read_bytes"] < 1.01 * whole  # type: ignore[operator]
    assert first["read_bytes"] < 0.56 * whole  # type: ignore[operator]


@pytest.mark.parametrize(
    ("count", "world_size", "sizes"), [(6, 2, [3, 3]), (7, 2, [4, 3]), (7, 4, [2, 2, 2, 1]), (1, 2, [1, 0])]
)
def test_things_are_dealt_out_in_order_and_evenly(count: int, world_size: int, sizes: list[int]) -> None:
    ranges = [deal(count, rank, world_size) for rank in range(world_size)]

    assert [len(r) for r in ranges] == sizes
    assert [i for r in ranges for i in r] == list(range(count))


def test_heads_go_in_whole_kv_groups() -> None:
    kept = [deal_heads(Heads(9, 3), rank, 2) for rank in range(2)]

    assert [(k.query, k.key_value) for k in kept] == [(range(6), range(2)), (range(6, 9), range(2, 3))]


def test_fewer_kv_heads_than_ranks_are_kept_by_several() -> None:
    kept = [deal_heads(Heads(8, 2), rank, 4) for rank in range(4)]

    assert [k.query for k in kept] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert [k.key_value for k in kept] == [range(0, 1), range(0, 1), range(1, 2), range(1, 2)]


@pytest.mark.parametrize(("heads", "world_size"), [(Heads(4, 2), 3), (Heads(3, 1), 2), (Heads(6, 2), 4)])
def test_heads_that_cannot_be_dealt_out_are_refused(heads: Heads, world_size: int) -> None:
    with pytest.raises(LoadError, match=f"cannot be dealt out to {world_size} ranks"):
        deal_heads(heads, 0, world_size)


class AloneInTwo(RankGroup):
    """Says it is one of two and meets nobody."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_columns(self, tensor: Tensor, widths: list[int]) -> Tensor:
        return tensor


def load_alone(directory: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_model, "plan_for", lambda *args, **kwargs: plan)
    load_model(
        directory,
        dtype=torch.float32,
        device=CPU,
        group=AloneInTwo(rank=0, world_size=2),
        on_progress=lambda done, total: None,
    )


def test_sharding_that_shrinks_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    nothing: dict[str, Rule] = dict.fromkeys(PLANS["llama"], WHOLE)

    with pytest.raises(LoadError, match="leaves 6 of 6 query heads on rank 0"):
        load_alone(tmp_path, nothing, monkeypatch)


def test_a_matrix_without_a_rule_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    plan = {tail: rule for tail, rule in PLANS["llama"].items() if "up_proj" not in tail}

    with pytest.raises(LoadError, match=r"up_proj\.weight has no rule"):
        load_alone(tmp_path, plan, monkeypatch)


def test_features_that_are_no_multiple_of_the_heads_are_refused() -> None:
    sharding = Sharding(PLANS["llama"], Heads(6, 3), 0, 2)

    with pytest.raises(LoadError, match=r"q_proj\.weight has 50 features"):
        sharding.cut("model.layers.0.self_attn.q_proj.weight", (50, 48))


def test_a_missing_rank_is_reported(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="rank 0 met not all 2 ranks within 1 s"):
        connect(0, 2, str(tmp_path / "store"), CPU, timeout_s=1)


def test_a_file_that_an_earlier_group_met_through_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="met not all"):
        connect(0, 2, str(tmp_path / "store"), CPU, timeout_s=1)

    with pytest.raises(LoadError, match="used by an earlier group: every life of a group needs a new --store-path"):
        connect(0, 2, str(tmp_path / "store"), CPU, timeout_s=PATIENCE_S)


def test_a_lone_rank_needs_no_group() -> None:
    group = connect(0, 1, "", CPU, timeout_s=1)
    tensor = torch.arange(3)

    assert group.all_reduce(tensor) is tensor
    assert group.broadcast(tensor) is tensor
    assert group.gather_columns(tensor, [3]) is tensor
    group.barrier()
    group.close()
    assert not torch.distributed.is_initialized()

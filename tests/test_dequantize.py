"""Quantised checkpoints give what transformers gives with the weights they stand for, on one rank and on two."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from router import config as router_config
from shard import config as shard_config
from shard.codes import Awq, Coding, Flat, Gptq, Mxfp4, Part, Scaled
from shard.dequantize import CodedTensor, Quantization, check_named, decoded, quantization
from shard.distributed import RankGroup
from shard.errors import LoadError
from shard.families import JsonValue
from shard.model import Model, load_model
from shard.weights import Files, open_checkpoint
from tests.packers import (
    SIZES,
    Format,
    awq,
    compressed,
    four_bits_of_bitsandbytes,
    gptq,
    int8_of_bitsandbytes,
    mxfp4,
    pack_quantized,
    save_quantized,
    scaled,
)
from tests.paged_runs import PagedRun
from tests.rank_process import prompts, run_rank
from tests.server import PATIENCE_S
from tests.tiny_models import VOCAB_SIZE, Setting, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [40, 56]}
INVERSE = {"quant_method": "fp8", "weight_scale_method": "row", "weight_scale_semantics": "inverse"}  # by GPTQModel

FORMATS: Mapping[str, Format] = {
    "gptq": gptq(4, symmetric=True),
    "gptq of 8 bits by channel": gptq(8, -1),
    "gptq of 2 bits": gptq(2),
    "gptq in order of activations": gptq(4, act_order=True),
    "gptq without g_idx": gptq(4, g_idx=False),
    "gptq_v2": gptq(4, is_second=True),
    "awq": awq(),
    "fp8 by tensor": scaled(FP8, (0, 0), "weight_scale"),
    "fp8 by block": scaled(BLOCKS, (40, 56), "weight_scale_inv"),
    "fp8 with exponents of scales": scaled(BLOCKS, (40, 56), "weight_scale_inv", scales_are="exponents"),
    "fp8 with inverse scales": scaled(INVERSE, (1, 0), "weight_scale_inv", scales_are="divisors"),
    "fbgemm_fp8": scaled({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, (1, 0), "weight_scale"),
    "pack-quantized": pack_quantized(4, 32),
    "pack-quantized with zeros": pack_quantized(4, 32, asymmetric=True),
    "pack-quantized of 8 bits by channel": pack_quantized(8, 0),
    "pack-quantized of 3 bits": pack_quantized(3, 32, asymmetric=True),
    "pack-quantized in order of activations": pack_quantized(4, 32, act_order=True),
    "int-quantized": scaled(compressed("int-quantized"), (1, 0), "weight_scale", asymmetric=True),
    "int-quantized in order of activations": scaled(
        compressed("int-quantized"), (1, 32), "weight_scale", asymmetric=True, act_order=True
    ),
    "float-quantized": scaled(compressed("float-quantized"), (1, 32), "weight_scale"),
    "naive-quantized by block": scaled(
        compressed("naive-quantized", strategy="block", block_structure=[40, 56]), (40, 56), "weight_scale"
    ),
    "bitsandbytes of 8 bits": int8_of_bitsandbytes(),
    "nf4": four_bits_of_bitsandbytes("nf4", is_nested=False),
    "nested fp4": four_bits_of_bitsandbytes("fp4", is_nested=True),
}

MOE = {**SIZES, "moe_intermediate_size": 32}

FAMILIES: Mapping[str, tuple[str, Format, Mapping[str, Setting]]] = {
    "biased_tied_llama": ("llama", gptq(4), {**SIZES, "attention_bias": True, "tie_word_embeddings": True}),
    "stacked_phi3": ("phi3", gptq(4, act_order=True), SIZES),
    "stacked_awq_phi3": ("phi3", awq(), SIZES),
    "joined_mixtral": ("mixtral", pack_quantized(4, 32, asymmetric=True), SIZES),
    "joined_qwen3_moe": ("qwen3_moe", awq(), MOE),
    "deepseek_v3": ("deepseek_v3", scaled(BLOCKS, (40, 56), "weight_scale_inv"), {}),
    "nf4_qwen2": ("qwen2", four_bits_of_bitsandbytes("nf4", is_nested=True), SIZES),
    "gpt_oss": ("gpt_oss", mxfp4(4), {**SIZES, "head_dim": 8}),
    "three_bits": (
        "llama",
        gptq(3),
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}

Results = Mapping[str, list[dict[str, object]]]


def load(directory: Path, dtype: torch.dtype = torch.float32, named_method: str | None = None) -> Model:
    return load_model(
        directory,
        dtype=dtype,
        device=CPU,
        group=RankGroup(),
        on_progress=lambda done, total: None,
        block_size=4,
        use_native=False,
        named_method=named_method,
    )


@torch.inference_mode()
def dense_logits(oracle: nn.Module) -> list[Tensor]:
    return [oracle(tokens[None], use_cache=False).logits[0] for tokens in prompts(VOCAB_SIZE)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
        assert torch.equal(ours.argmax(dim=-1), theirs.argmax(dim=-1))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_logits_of_its_weights(name: str, tmp_path: Path) -> None:
    oracle = save_quantized(tmp_path, "llama", FORMATS[name], **SIZES)
    model = load(tmp_path)

    hidden = PagedRun(model, prompts(VOCAB_SIZE)).finish()

    assert_all_close([model.logits(states) for states in hidden], dense_logits(oracle))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, list[Tensor]]]:
    """A checkpoint of each, and its logits by transformers."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("quantized")
    return folder, {
        name: dense_logits(save_quantized(folder / name, family, by, **overrides))
        for name, (family, by, overrides) in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def two_ranks(families: tuple[Path, Mapping[str, list[Tensor]]]) -> Results:
    folder, _ = families
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=run_rank, args=(rank, 2, folder, [folder / name for name in FAMILIES])) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=5 * PATIENCE_S)
        assert process.exitcode == 0
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1)] for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_rename_join_and_stack_give_the_logits_of_their_weights(
    name: str, families: tuple[Path, Mapping[str, list[Tensor]]]
) -> None:
    folder, expected = families
    model = load(folder / name)

    hidden = PagedRun(model, prompts(VOCAB_SIZE)).finish()

    assert_all_close([model.logits(states) for states in hidden], expected[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_equal_one(name: str, families: tuple[Path, Mapping[str, list[Tensor]]], two_ranks: Results) -> None:
    _, expected = families
    first, second = two_ranks[name]

    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    logits = first["logits"]
    assert isinstance(logits, list)
    assert_all_close(logits, expected[name])


def test_weights_are_rounded_once(tmp_path: Path) -> None:
    oracle = save_quantized(tmp_path, "llama", gptq(4), **SIZES)

    ours = dict(load(tmp_path, torch.bfloat16)._backbone.named_parameters())

    for name, exact in oracle.base_model.named_parameters():
        assert torch.equal(ours[name], exact.bfloat16()), name


def test_any_part_in_any_number_of_chunks_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for by in FORMATS.values():
        save_quantized(tmp_path, "llama", by, **SIZES, num_hidden_layers=1)
        found = quantization({"quantization_config": by.settings}, tmp_path)  # type: ignore[dict-item]
        assert found is not None
        tensor = decoded(open_checkpoint(tmp_path), found, torch.float32)["model.layers.0.mlp.up_proj.weight"]
        assert isinstance(tensor, CodedTensor)
        whole = tensor.read(Files(), (...,))
        with monkeypatch.context() as patch:
            patch.setattr("shard.dequantize._CHUNK", 1000)
            for _ in range(8):
                rows, columns = (
                    slice(*sorted(torch.randperm(size + 1, generator=generator)[:2].tolist())) for size in whole.shape
                )
                assert torch.equal(tensor.read(Files(), (rows, columns)), whole[rows, columns])


def test_scales_of_what_is_not_quantized_here_go_unnoticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_quantized(tmp_path, "llama", FORMATS["fp8 by tensor"], **SIZES)
    assert any(name.endswith("input_scale") for name in open_checkpoint(tmp_path))

    with caplog.at_level(logging.WARNING):
        load(tmp_path)

    assert caplog.text == ""


def test_progress_counts_to_the_bytes_that_are_stored(tmp_path: Path) -> None:
    save_quantized(tmp_path, "llama", awq(), **SIZES)
    calls: list[tuple[int, int]] = []

    load_model(
        tmp_path,
        dtype=torch.float32,
        device=CPU,
        group=RankGroup(),
        on_progress=lambda done, total: calls.append((done, total)),
        use_native=False,
    )

    total = sum(tensor.num_bytes for tensor in open_checkpoint(tmp_path).values())
    assert (calls[0], calls[-1]) == ((0, total), (total, total))


# What others' packers make


def part_of(tensors: Mapping[str, Tensor]) -> Part:
    def part(name: str, *index: range | None) -> Tensor:
        return tensors[name][tuple(slice(None) if one is None else slice(one.start, one.stop) for one in index) or ...]

    return part


def words(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def halves(*shape: int) -> Tensor:
    return torch.full(shape, 0.5)


NF4 = [-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0]
NF4 += [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0]

# By AutoGPTQ 0.7.1, AutoAWQ 0.2.9, compressed-tensors 0.20.0 and bitsandbytes 0.50.2; mxfp4 read by transformers 5.17.
UPSTREAM: Mapping[str, tuple[Coding, Mapping[str, Tensor], list[list[float]]]] = {
    "gptq of 3 bits": (
        Gptq(3, 32, has_groups=False, zero_offset=1),
        {
            "qweight": words([-1650457022], [-935876458], [-379301666]),
            "qzeros": words([1759130354, 1700081420, 1728652809]),
            "scales": halves(1, 1),
        },
        [
            [-0.5, -1.5, -1.0, 0.0, -1.5, -1.5, -1.5, 1.0, 1.0, 0.0, -0.5, 0.0, -1.0, -1.0, -0.5, 1.0]
            + [2.0, 1.5, -1.5, 0.5, 0.5, 1.0, 2.0, 1.5, -1.5, -0.5, -1.0, -0.5, 1.5, -0.5, -0.5, 2.0]
        ],
    ),
    "gptq of 4 bits": (
        Gptq(4, 32, has_groups=False, zero_offset=1),
        {"qweight": words([464228588, 804899975]), "qzeros": words([1668987012]), "scales": halves(1, 2)},
        [[3.5, 4.5, -2.5, 2.0, 3.0, 2.5, 3.0, -2.0], [-1.0, -0.5, 1.5, 1.5, 0.0, 3.0, 3.0, -3.5]],
    ),
    "awq": (
        Awq(2),
        {"qweight": words([47767433], [-1276616696]), "qzeros": words([2084340000]), "scales": halves(1, 8)},
        [[4.5, 4.0], [-2.0, -2.0], [3.0, -1.0], [5.0, 5.5], [7.0, -0.5], [-5.0, -4.5], [2.5, -1.0], [-3.5, 2.0]],
    ),
    "compressed-tensors of 4 bits": (
        Scaled((1, 8), "weight_scale", 4, zero_dtype=torch.int32),
        {
            "weight_packed": words([-1786167527], [-1079303085]),
            "weight_zero_point": words([131]),
            "weight_scale": halves(2, 1),
        },
        [[3.0, -1.0, 6.0, 0.0, 3.0, 2.5, 1.0, 3.0], [-2.5, -1.5, -2.0, -3.0, 1.5, 1.0, 3.5, 1.5]],
    ),
    "compressed-tensors of 5 bits": (
        Scaled((1, 32), "weight_scale", 5),
        {
            "weight_packed": words([1674143459, -1231548485, 1223900682, -454962245, -655060333]),
            "weight_scale": halves(1, 1),
        },
        [
            [-6.5, 3.5, 4.5, 1.0, 6.0, 0.5, -1.5, 3.5, -0.5, -8.0, -5.0, -1.5, -2.5, -5.5, 4.0, -4.5]
            + [1.5, -4.5, 1.0, 3.0, 5.5, -3.5, -4.5, 6.0, -6.0, 7.5, -6.0, -5.5, -3.5, 5.0, -6.5, 5.5]
        ],
    ),
    "bitsandbytes' nf4": (
        Flat(num_columns=4, blocksize=64, nested_blocksize=0, nested_offset=0.0),
        {
            "weight": torch.tensor([[39], [13], [88], [45]], dtype=torch.uint8),
            "weight.absmax": torch.tensor([2.898725]),
            "weight.quant_map": torch.tensor(NF4),
        },
        [[-1.52204, 0.0, -2.898725, 1.63087], [-0.53561, 0.23068, -1.52204, 1.63087]],
    ),
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_what_the_formats_own_packers_made_is_read(name: str) -> None:
    coding, tensors, expected = UPSTREAM[name]

    weights = coding.decode(part_of(tensors), range(len(expected)), range(len(expected[0])))

    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-4, rtol=0)


def test_mxfp4_is_read_as_by_transformers() -> None:
    blocks = [69, 169, 200, 217, 2, 254, 179, 24, 110, 166, 171, 108, 212, 158, 169, 80]
    tensors = {
        "_blocks": torch.tensor(blocks, dtype=torch.uint8).view(1, 1, 1, 16),
        "_scales": torch.tensor([[[126]]], dtype=torch.uint8),
    }

    weights = Mxfp4().decode(part_of(tensors), range(1), range(32), range(1))

    assert weights.flatten().tolist() == (
        [1.5, 1.0, -0.25, -0.5, -0.0, -1.0, -0.25, -1.5, 0.5, 0.0, -2.0, -3.0, 0.75, -0.75, -0.0, 0.25]
        + [-2.0, 2.0, 2.0, -0.5, -0.75, -0.5, -1.0, 2.0, 1.0, -1.5, -2.0, -0.25, -0.25, -0.5, 0.0, 1.5]
    )


# What is refused


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "exl2"}, "quantised by exl2, and only gptq, awq, fp8, .* are served"),
        ({"quant_method": "torchao"}, "quantised by torchao"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq in the form marlin"),
        ({"quant_method": "awq", "version": "GEMV"}, "awq in the form gemv"),
        (compressed("marlin-24"), "compressed-tensors in the form marlin-24"),
        (compressed("nvfp4-pack-quantized"), "in the form nvfp4-pack-quantized"),
        ({**compressed("pack-quantized"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({**compressed("pack-quantized"), "transform_config": {"config_groups": {"R1": {}}}}, "transformed weights"),
        (["gptq"], "not a JSON object"),
    ],
)
def test_what_is_not_known_is_refused_by_name(settings: object, reason: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))

    with pytest.raises(LoadError, match=reason) as refusal:
        load(tmp_path)

    assert "\n" not in str(refusal.value)


def test_transposed_matrices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="gpt2's matrices are transposed"):
        quantization({"model_type": "gpt2", "quantization_config": {"quant_method": "gptq"}}, tmp_path)


DAMAGE = {
    "missing": ("scales", None, "up_proj.weight is quantised and has no scales"),
    "divided wrongly": ("scales", torch.ones(5, 160), "up_proj.weight is quantised in a way that is not known"),
    "too narrow": ("scales", torch.ones(3, 80), r"up_proj\.weight has shape \[80, 48\]"),
    "groups out of range": ("g_idx", torch.full((96,), 9, dtype=torch.int32), "up_proj.weight does not fit together"),
    "groups from the end": ("g_idx", torch.full((96,), -1, dtype=torch.int32), "there is a group below 0"),
    "a single group": ("g_idx", torch.ones(1, dtype=torch.int32), "up_proj.weight does not fit together: codes are"),
    "a single row": ("qweight", torch.ones(12, 1, dtype=torch.int32), "up_proj.weight does not fit together: codes"),
    "zeros in a line": ("qzeros", torch.ones(20, dtype=torch.int32), "up_proj.weight is quantised in a way"),
    "too few zeros": ("qzeros", torch.ones(1, 20, dtype=torch.int32), "up_proj.weight does not fit together"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_parts_that_cannot_be_right_are_named_in_one_line(damage: str, tmp_path: Path) -> None:
    part, value, reason = DAMAGE[damage]
    save_quantized(tmp_path, "llama", gptq(4), **SIZES)
    stored = load_file(tmp_path / "model.safetensors")
    del stored[f"model.layers.1.mlp.up_proj.{part}"]
    if value is not None:
        stored[f"model.layers.1.mlp.up_proj.{part}"] = value
    save_file(stored, tmp_path / "model.safetensors")

    with pytest.raises(LoadError, match=reason) as refusal:
        load(tmp_path)

    assert "\n" not in str(refusal.value)


SHAPES = {
    "of fractions": ("llama", "mlp.up_proj", torch.tensor([160.0, 96.0])),
    "beyond memory": ("mixtral", "block_sparse_moe.experts.0.w1", torch.tensor([10**13, 96])),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stored_shape_that_cannot_be_right_is_named(shape: str, tmp_path: Path) -> None:
    family, matrix, value = SHAPES[shape]
    save_quantized(tmp_path, family, pack_quantized(4, 32), **SIZES)
    stored = load_file(tmp_path / "model.safetensors")
    assert f"model.layers.1.{matrix}.weight_shape" in stored
    save_file({**stored, f"model.layers.1.{matrix}.weight_shape": value}, tmp_path / "model.safetensors")

    with pytest.raises(LoadError, match=rf"{matrix}\.weight does not fit together"):
        load(tmp_path)


def test_scales_of_activations_are_refused(tmp_path: Path) -> None:
    """awq divides activations by them in families whose MLP has no gate."""
    save_quantized(tmp_path, "llama", awq(), **SIZES)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, "model.layers.0.mlp.act.scales": torch.ones(160)}, tmp_path / "model.safetensors")

    with pytest.raises(LoadError, match=r"mlp\.act\.scales belongs to no quantised parameter"):
        load(tmp_path)


# Where the method is named


def test_settings_of_old_checkpoints_lie_beside_config_json(tmp_path: Path) -> None:
    oracle = save_quantized(tmp_path, "llama", gptq(4), **SIZES)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    model = load(tmp_path)

    hidden = PagedRun(model, prompts(VOCAB_SIZE)).finish()

    assert_all_close([model.logits(states) for states in hidden], dense_logits(oracle))


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "awq"),
        ({"bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
    ],
)
def test_old_settings_name_no_method(settings: dict[str, JsonValue], method: str, tmp_path: Path) -> None:
    found = quantization({"quantization_config": settings}, tmp_path)

    assert found is not None
    assert found.method == method


GPTQ = Quantization("gptq", {})


@pytest.mark.parametrize(
    ("named", "method"),
    [("gptq", "gptq"), ("gptq", "awq"), ("awq", "awq"), ("fp8", "fbgemm_fp8"), ("bitsandbytes-nf4", "bitsandbytes")],
)
def test_the_flag_may_name_the_checkpoints_own_method(named: str, method: str) -> None:
    check_named(named, Quantization(method, {}))


@pytest.mark.parametrize(
    ("named", "found", "reason"),
    [
        ("awq", GPTQ, "--quantize awq: the checkpoint is quantised by gptq"),
        ("bitsandbytes", GPTQ, "--quantize bitsandbytes: the checkpoint is quantised by gptq"),
        ("gptq", None, "--quantize gptq: the checkpoint is not quantised"),
        ("exl2", None, "--quantize exl2: the checkpoint is not quantised"),
    ],
)
def test_the_flag_may_not_name_another_method(named: str, found: Quantization | None, reason: str) -> None:
    with pytest.raises(LoadError, match=reason):
        check_named(named, found)


@pytest.mark.parametrize("named", ["bitsandbytes", "eetq", "fp8"])
def test_what_tgi_would_quantize_at_load_is_served_as_stored_with_a_warning(
    named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, "llama")

    with caplog.at_level(logging.WARNING):
        load(tmp_path, named_method=named)

    assert f"--quantize {named} has no effect" in caplog.text


def test_router_and_shard_know_the_same_values() -> None:
    assert set(router_config.QUANTIZE) == set(shard_config.QUANTIZE)

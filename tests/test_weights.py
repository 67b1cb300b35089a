"""Reading checkpoints: what is damaged is reported by name, what is whole ends up where transformers would put it."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shard.distributed import RankGroup
from shard.errors import LoadError
from shard.families import PLANS
from shard.model import Model, load_model
from shard.weights import open_checkpoint, read_header
from tests.tiny_models import save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")

Header = dict[str, dict[str, object]]


def load(directory: Path, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Model:
    """With its modules, whose weights are looked at here."""
    return load_model(
        directory, dtype=torch.float32, device=CPU, group=RankGroup(), on_progress=on_progress, use_native=False
    )


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("family", PLANS)
def test_weights_and_computed_buffers_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    theirs = named_tensors(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).base_model)

    ours = named_tensors(load(tmp_path)._backbone)

    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_few_parameters_a_family_wants_exact_stay_float32(tmp_path: Path) -> None:
    save_tiny(tmp_path, "deepseek_v3")

    model = load_model(
        tmp_path, dtype=torch.bfloat16, device=CPU, group=RankGroup(), on_progress=lambda done, total: None
    )

    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in named_tensors(model._backbone).items()}
    assert dtypes["e_score_correction_bias"] == torch.float32
    assert dtypes["weight"] == torch.bfloat16


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path: Path) -> None:
    oracle = tiny_model("mixtral")
    oracle.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    ours = named_tensors(load(tmp_path)._backbone)

    for name, tensor in named_tensors(oracle.base_model).items():
        assert torch.equal(ours[name], tensor), name


def test_a_checkpoint_of_the_bare_backbone_loads_with_its_tied_head(tmp_path: Path) -> None:
    """The original gpt2 is stored without the prefix `transformer.` and without a head."""
    oracle = save_tiny(tmp_path, "gpt2")
    stored = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors"
    )

    model = load(tmp_path)

    states = torch.randn(3, 48)
    with torch.inference_mode():
        expected = oracle.lm_head(states)
    torch.testing.assert_close(model.logits(states), expected)


def test_overwriting_the_file_does_not_change_a_loaded_model(tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, "llama")
    model = load(tmp_path)

    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (tmp_path / "model.safetensors").stat().st_size)

    ours = named_tensors(model._backbone)
    for name, tensor in named_tensors(oracle.base_model).items():
        assert torch.equal(ours[name], tensor), name


def test_progress_counts_to_the_bytes_of_the_checkpoint(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mixtral")
    calls: list[tuple[int, int]] = []

    load(tmp_path, lambda done, total: calls.append((done, total)))

    total = sum(tensor.num_bytes for tensor in open_checkpoint(tmp_path).values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert sorted(calls) == calls


# Damage


def edit_header(path: Path, edit: Callable[[Header], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: Header = json.loads(data[8 : 8 + length])
    edit(header)
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + length :])


def shift_first_tensor(header: Header) -> None:
    name = next(name for name in header if name != "__metadata__")
    start, end = header[name]["data_offsets"]  # type: ignore[misc]
    header[name]["data_offsets"] = [start + 8, end]


def set_unknown_dtype(header: Header) -> None:
    next(entry for name, entry in header.items() if name != "__metadata__")["dtype"] = "F4"


def drop_shape(header: Header) -> None:
    del next(entry for name, entry in header.items() if name != "__metadata__")["shape"]


def truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: truncate(path, 0),
    "cut in the length": lambda path: truncate(path, 5),
    "cut in the header": lambda path: truncate(path, 100),
    "cut in the data": lambda path: truncate(path, path.stat().st_size - 1),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"\0") and None,
    "absurd header length": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]) and None,
    "header is no JSON": lambda path: path.write_bytes(path.read_bytes()[:8] + b"x" + path.read_bytes()[9:]) and None,
    "offsets lie": lambda path: edit_header(path, shift_first_tensor),
    "unknown type": lambda path: edit_header(path, set_unknown_dtype),
    "no shape": lambda path: edit_header(path, drop_shape),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name_in_one_line(damage: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    DAMAGE[damage](tmp_path / "model.safetensors")

    with pytest.raises(LoadError, match=r"model\.safetensors is not a readable safetensors file") as refusal:
        load(tmp_path)

    assert "\n" not in str(refusal.value)


def test_a_whole_file_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 2), "b": torch.zeros(0, dtype=torch.int64), "c": torch.zeros((), dtype=torch.bool)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})

    read = {tensor.name: (tensor.dtype, tensor.shape) for tensor in read_header(tmp_path / "x.safetensors")}

    assert read == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_a_missing_file_of_the_index_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    missing = sorted(tmp_path.glob("*.safetensors"))[1]
    missing.unlink()

    with pytest.raises(LoadError, match=f"{missing.name} is missing"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors.index.json").write_text(content)

    with pytest.raises(LoadError, match=r"model\.safetensors\.index\.json"):
        load(tmp_path)


def test_a_tensor_the_index_promises_and_its_file_lacks_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = sorted(tmp_path.glob("*.safetensors"))[0].name
    path.write_text(json.dumps(index))

    with pytest.raises(LoadError, match=r"does not hold model\.extra\.weight"):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(LoadError, match=r"only pytorch_model\.bin: weights are read from safetensors only"):
        load(tmp_path)


@contextlib.contextmanager
def weights_of(directory: Path) -> Iterator[dict[str, Tensor]]:
    """Written back with what is done to them."""
    stored = load_file(directory / "model.safetensors")
    yield stored
    save_file(stored, directory / "model.safetensors")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with weights_of(tmp_path) as stored:
        del stored["model.layers.1.mlp.up_proj.weight"]

    with pytest.raises(LoadError, match=r"holds no model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mixtral")
    with weights_of(tmp_path) as stored:
        del stored[next(name for name in stored if name.endswith("experts.2.w1.weight"))]

    with pytest.raises(LoadError, match=r"gate_up_proj"):
        load(tmp_path)


def test_a_wrong_shape_is_named_with_its_file(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with weights_of(tmp_path) as stored:
        stored["model.norm.weight"] = torch.ones(47)

    with pytest.raises(LoadError, match=r"model\.safetensors: model\.norm\.weight has shape \[47\].*\[48\]"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_a_kind_that_cannot_be_computed_with_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with weights_of(tmp_path) as stored:
        stored["model.norm.weight"] = torch.ones(48).to(dtype)

    with pytest.raises(LoadError, match=rf"model\.norm\.weight.*{dtype}"):
        load(tmp_path)

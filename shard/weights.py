"""From safetensors files to one rank's parameters, reading only what the rank keeps.

    files       headers are checked against the files before anything is read: a copy that stopped half-way, an index
                that names a missing file and a header that lies are reported by name
    sources     transformers' own key mapping says which tensors make up each parameter: renamed keys, a prefix more or
                less, experts that are stored one by one and run as one tensor
    parameters  a sharded parameter is read slice by slice; where several tensors are joined, each is sliced before the
                joining whenever that is the same thing

What is read need not be a tensor of a file: `shard.dequantize` makes others that read alike (`Readable`). This module
knows nothing of what the model computes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType
from typing import Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from shard.errors import LoadError
from shard.tensor_parallel import NOTHING, Cut, Sharding

MAX_HEADER_BYTES: Final = 100_000_000  # safetensors' own limit

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

Index = tuple[slice | EllipsisType, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, unread."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file's data."""

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, files: Files, index: Index) -> Tensor:
        return files.read(self, index)


class Readable(Protocol):
    """A tensor, unread, that a checkpoint holds in one way or another: `StoredTensor` says what the members are."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def read(self, files: Files, index: Index) -> Tensor:
        """A part of it, in memory that may be the file's own."""


class Files:
    """Files that are being read from, each opened once."""

    def __init__(self) -> None:
        self._opened: dict[Path, safe_open] = {}

    def read(self, stored: StoredTensor, index: Index) -> Tensor:
        """Raises `LoadError` naming tensor and file."""
        try:
            if stored.path not in self._opened:
                self._opened[stored.path] = safe_open(stored.path, framework="pt")
            whole = self._opened[stored.path].get_slice(stored.name)  # type: ignore[no-untyped-call]
            read: Tensor = whole[index]
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{stored.path}: {stored.name} cannot be read: {error}") from error
        return read

    def close(self) -> None:
        self._opened.clear()


def open_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name. Raises `LoadError` naming the file that is missing or damaged."""
    index_path = directory / "model.safetensors.index.json"
    if index_path.is_file():
        return _open_indexed(index_path)
    path = directory / "model.safetensors"
    if not path.is_file() and len(only := list(directory.glob("*.safetensors"))) == 1:
        (path,) = only  # AutoGPTQ put its settings into the name
    if not path.is_file():
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in directory.glob(pattern))
        found = f", only {', '.join(others[:3])}" if others else ""
        raise LoadError(f"{directory} holds no model.safetensors{found}: weights are read from safetensors only")
    return {tensor.name: tensor for tensor in read_header(path)}


def _open_indexed(index_path: Path) -> dict[str, StoredTensor]:
    weight_map = _read_weight_map(index_path)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        path = index_path.parent / file_name
        if not path.is_file():
            raise LoadError(f"{path} is missing, though {index_path.name} names it")
        tensors |= {tensor.name: tensor for tensor in read_header(path)}
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        path = index_path.parent / weight_map[missing[0]]
        raise LoadError(f"{path} does not hold {missing[0]}, though {index_path.name} says so")
    return tensors


def _read_weight_map(index_path: Path) -> dict[str, str]:
    """File names by tensor name."""
    try:
        items = json.loads(index_path.read_bytes())["weight_map"].items()
        return {str(name): str(Path(file_name)) for name, file_name in items}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index_path} is not a safetensors index: {error}") from error


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file. Raises `LoadError` when header and file contradict each other."""
    try:
        return list(_read_header(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{path} is not a readable safetensors file: {error}") from error


def _read_header(path: Path) -> Iterator[StoredTensor]:
    """The format: 8 bytes of little-endian header length, a JSON header, then the tensors' bytes without gaps."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(f"its header would be {header_bytes} bytes of a file of {file_bytes}")
        header = json.loads(file.read(header_bytes))
    data_bytes = file_bytes - 8 - header_bytes
    described = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is of type {entry['dtype']}, which is not served")
        start, end = entry["data_offsets"]
        tensor = StoredTensor(path, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
        if not 0 <= start <= end or end - start != tensor.num_bytes:
            raise ValueError(f"{name} of {tensor.num_bytes} bytes is said to lie at {start}..{end}")
        described = max(described, end)
        yield tensor
    if described != data_bytes:
        raise ValueError(f"it should hold {described} bytes of tensors and holds {data_bytes}: it may be truncated")


@dataclass(slots=True)
class _Sources:
    """The stored tensors that make up one parameter, or several if they are split up."""

    tensors: list[tuple[str, Readable]] = field(default_factory=list)
    """With the pattern that matched each, in the order a converter wants them."""
    converter: WeightConverter | None = None


class Loader:
    """Reads this rank's part of a model that was built on the meta device."""

    def __init__(
        self,
        model: PreTrainedModel,
        stored: Mapping[str, Readable],
        sharding: Sharding,
        dtype: torch.dtype,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._model = model
        self._sharding = sharding
        self._meta: dict[str, Tensor] = model.state_dict()
        self._exact = {re.compile(key.replace("*", ".*")): kept for key, kept in model._get_dtype_plan(dtype).items()}
        self._files = Files()
        self._sources, self.unexpected = _map_sources(model, self._meta, stored)
        self._on_progress = on_progress
        self._done_bytes = 0
        self._total_bytes = sum(self._planned_bytes(name, sources) for name, sources in self._sources.items())

    def load(self, device: torch.device) -> dict[str, Tensor]:
        """This rank's part of every parameter and persistent buffer the checkpoint has, by name.

        Raises `LoadError` naming the tensor and its file when one does not fit.
        """
        self._on_progress(0, self._total_bytes)
        loaded: dict[str, Tensor] = {}
        for name, sources in sorted(self._sources.items(), key=_place_on_disk):
            for target, tensor in self._make(name, sources):
                # A copy in any case: safetensors hands out the mapped file, which may be overwritten while we serve.
                loaded[target] = tensor.contiguous().to(device=device, dtype=self._dtype(target), copy=True)
        self._files.close()
        return loaded

    def _make(self, name: str, sources: _Sources) -> Iterator[tuple[str, Tensor]]:
        path = sources.tensors[0][1].path
        made = self._convert(name, sources) if sources.converter else {name: self._copy(name, sources.tensors[0][1])}
        for target, tensor in made.items():
            whole = self._meta[target]
            if not _same_kind(tensor, whole):
                raise LoadError(f"{path}: {target} would be {tensor.dtype}, which is no {whole.dtype}")
            yield target, tensor

    def _copy(self, name: str, stored: Readable) -> Tensor:
        whole = tuple(self._meta[name].shape)
        if stored.shape != whole:
            raise _wrong_shape(stored, stored.name, stored.shape, whole)
        return self._read(stored, self._cut(name))

    def _convert(self, name: str, sources: _Sources) -> dict[str, Tensor]:
        """Joins or splits stored tensors by transformers' own operations."""
        converter = sources.converter
        assert converter is not None, name
        early = _cuts_before_joining(converter, self._cut(name))
        for pattern, stored in sources.tensors:
            read = self._read(stored, early.get(pattern))
            converter.add_tensor(name, stored.name, pattern, _holding(read))
        first = sources.tensors[0][1]
        try:
            converted = converter.convert(name, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise LoadError(f"{first.path}: {first.name} and others do not make up {name}: {error}") from error
        made = {target: value[0] if isinstance(value, list) else value for target, value in converted.items()}
        if not early:
            made = {target: self._kept(target, tensor) for target, tensor in made.items()}
        for target, tensor in made.items():
            wanted = self._kept_shape(target)
            if tuple(tensor.shape) != wanted:
                raise _wrong_shape(first, target, tuple(tensor.shape), wanted)
        return made

    def _read(self, stored: Readable, cut: Cut | None) -> Tensor:
        if cut is NOTHING:
            return torch.zeros(stored.shape, dtype=stored.dtype)
        parts = [stored.read(self._files, index) for index in _indices(cut)]
        read = parts[0] if len(parts) == 1 else torch.cat(parts, dim=cut.dim if cut else 0)
        self._done_bytes += _kept_bytes(stored, cut)
        self._on_progress(self._done_bytes, self._total_bytes)
        return read

    def _planned_bytes(self, name: str, sources: _Sources) -> int:
        cut = self._cut(name)
        if sources.converter is None:
            (_, stored) = sources.tensors[0]
            return _kept_bytes(stored, cut)
        early = _cuts_before_joining(sources.converter, cut)
        return sum(_kept_bytes(stored, early.get(pattern)) for pattern, stored in sources.tensors)

    def _cut(self, name: str) -> Cut | None:
        return self._sharding.cut(name, tuple(self._meta[name].shape))

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        cut = self._cut(name)
        return tensor if cut is None else cut.apply(tensor)

    def _kept_shape(self, name: str) -> tuple[int, ...]:
        cut, whole = self._cut(name), tuple(self._meta[name].shape)
        return whole if cut is None else cut.shape(whole)

    def _dtype(self, name: str) -> torch.dtype:
        """The model's, save for the few parameters a family wants exact."""
        exact = next((dtype for pattern, dtype in self._exact.items() if pattern.search(name)), None)
        return exact or self._meta[name].dtype


def _map_sources(
    model: PreTrainedModel, meta: Mapping[str, Tensor], stored: Mapping[str, Readable]
) -> tuple[dict[str, _Sources], list[str]]:
    """What makes up each parameter, and the names of stored tensors that are part of none."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, _Sources] = {}
    unexpected: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, meta)
        if target not in meta and name in meta:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, meta)
        if target not in meta:
            unexpected.append(name)
            continue
        entry = sources.setdefault(target, _Sources())
        if pattern is not None and entry.converter is None:
            entry.converter = deepcopy(by_pattern[pattern])
        entry.tensors.append((pattern or name, stored[name]))
    return sources, unexpected


def _cuts_before_joining(converter: WeightConverter, cut: Cut | None) -> dict[str, Cut]:
    """By source pattern, how to cut stored tensors so that joining them gives the cut parameter; empty: not possible.

    It is possible for experts: matrices stacked in front, alone or after joining equally long ones in the order of the
    cut's ranges. The stack's dimension d is the matrices' d - 1.
    """
    patterns = converter.source_patterns
    if cut is None or cut.dim == 0 or len(patterns) != len(cut.ranges) or not _only_stacks(converter, cut.dim):
        return {}
    first, last = cut.ranges[0], cut.ranges[-1]
    length = (last.start - first.start) // max(1, len(patterns) - 1)  # of one of the joined matrices
    own = [range(r.start - i * length, r.stop - i * length) for i, r in enumerate(cut.ranges)]
    return {pattern: Cut(cut.dim - 1, (r,)) for pattern, r in zip(patterns, own, strict=True)}


def _only_stacks(converter: WeightConverter, dim: int) -> bool:
    """Whether tensors are stacked in front and at most joined along `dim` of the stack."""
    match converter.operations:
        case [MergeModulelist(dim=0)]:
            return True
        case [MergeModulelist(dim=0), Concatenate() as join]:
            return bool(join.dim == dim)
    return False


def _kept_bytes(stored: Readable, cut: Cut | None) -> int:
    """What the part takes in the file, in proportion."""
    if cut is NOTHING:
        return 0
    if cut is None:
        return stored.num_bytes
    kept, whole = (torch.Size(shape).numel() for shape in (cut.shape(stored.shape), stored.shape))
    return stored.num_bytes * kept // max(1, whole)


def _wrong_shape(stored: Readable, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> LoadError:
    return LoadError(f"{stored.path}: {name} has shape {list(shape)}, the model wants {list(wanted)}")


def _place_on_disk(entry: tuple[str, _Sources]) -> tuple[str, int]:
    stored = entry[1].tensors[0][1]
    return str(stored.path), stored.start


def _same_kind(tensor: Tensor, other: Tensor) -> bool:
    """Eight bits are codes, which mean nothing without a scale."""
    is_code = tensor.is_floating_point() and tensor.itemsize == 1
    return tensor.is_floating_point() == other.is_floating_point() and not is_code


def _indices(cut: Cut | None) -> list[Index]:
    """What to ask a stored tensor for, one piece after the other."""
    if cut is None:
        return [(...,)]
    before = [slice(None)] * cut.dim
    return [(*before, slice(r.start, r.stop)) for r in cut.ranges]


def _holding(tensor: Tensor) -> Callable[[], Tensor]:
    """What a converter calls when it wants a tensor."""
    return lambda: tensor

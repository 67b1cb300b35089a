"""Quantised checkpoints, turned back into floating point part by part while they are read.

    quantization    by which method a checkpoint is quantised, from its config.json; an unknown one is refused by name
    decoded         the checkpoint's tensors, with those that make up a quantised parameter replaced by one of its
                    name, of which any part can be read like that of a stored tensor

So whatever else is done to parameters is done as ever: renaming, joining, splitting among ranks, packing again.

Which parameters are coded, in how many bits and groups, is seen from the tensors and their shapes: lists of modules
left alone and settings by module need no reading. `shard.codes` knows what codes mean.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from shard.codes import Awq, Coding, Flat, Gptq, Mxfp4, Scaled
from shard.errors import LoadError
from shard.families import JsonObject, JsonValue
from shard.weights import Files, Index, Readable, StoredTensor

log = logging.getLogger(__name__)

_CHUNK: Final = 1 << 22
"""Weights decoded at once, which take some hundred MB in all the forms they pass through."""

Parts = Mapping[str, StoredTensor]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A quantised parameter, unread."""

    name: str
    shape: Shape
    dtype: torch.dtype
    """What it is rounded to."""
    coding: Coding
    parts: Parts
    """The codes first."""

    @property
    def path(self) -> Path:
        return next(iter(self.parts.values())).path

    @property
    def start(self) -> int:
        return next(iter(self.parts.values())).start

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts.values())

    def read(self, files: Files, index: Index) -> Tensor:
        part = partial(self._part, files)
        try:
            rows, *others = _ranges(index, self.shape)
            read = torch.empty(len(rows), *map(len, others), dtype=self.dtype)
            step = max(1, _CHUNK // max(1, read[:1].numel()))
            for first in range(0, len(rows), step):
                chunk = rows[first : first + step]
                read[first : first + len(chunk)] = self.coding.decode(part, chunk, *others)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            cause = str(error).partition("\n")[0]
            raise LoadError(f"{self.path}: what makes up {self.name} does not fit together: {cause}") from error
        return read

    def _part(self, files: Files, name: str, *index: range | None) -> Tensor:
        slices = tuple(slice(None) if part is None else slice(part.start, part.stop) for part in index)
        return files.read(self.parts[name], slices or (...,))


def _ranges(index: Index, shape: Shape) -> list[range]:
    given = [one for one in index if isinstance(one, slice)]
    given += [slice(None)] * (len(shape) - len(given))
    return [range(size)[one] for one, size in zip(given, shape, strict=True)]


# What makes up a parameter


@dataclass(frozen=True, slots=True)
class _Layout:
    """The tensors of a parameter: their names begin alike and end in these parts, the first of which holds codes."""

    parts: tuple[str, ...]
    optional: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    """Of codes: a parameter of another type was left alone."""
    describe: Callable[[Parts, JsonObject, Files], tuple[Shape, Coding]]
    """The shape of the parameter and how it is stored. Raises ValueError if it cannot be."""
    parameter: str = "weight"

    def find(self, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, dict[str, str]]]:
        """What is before the parts in the parameters' names, and the names of all parts there are."""
        for name, tensor in stored.items():
            if name.endswith(self.parts[0]) and tensor.dtype in self.dtypes:
                stem = name.removesuffix(self.parts[0])
                yield stem, {part: stem + part for part in (*self.parts, *self.optional) if stem + part in stored}


def _gptq(parts: Parts, settings: JsonObject, files: Files) -> tuple[Shape, Coding]:
    num_groups, rows = parts["scales"].shape
    bits = 32 * parts["qzeros"].shape[1] // rows
    columns = 32 * parts["qweight"].shape[0] // bits
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"codes have {bits} bits")
    group_size = _extent(columns, num_groups, settings.get("group_size"))
    is_first = _variants("gptq", settings) == ["gptq"]
    return (rows, columns), Gptq(bits, group_size, "g_idx" in parts, int(is_first))


def _awq(parts: Parts, settings: JsonObject, files: Files) -> tuple[Shape, Coding]:
    columns, num_words = parts["qweight"].shape
    num_groups, rows = parts["scales"].shape
    if rows != 8 * num_words:
        raise ValueError(f"{num_words} words do not hold {rows} codes of 4 bits")
    return (rows, columns), Awq(_extent(columns, num_groups, settings.get("group_size")))


def _scaled(parts: Parts, settings: JsonObject, files: Files) -> tuple[Shape, Coding]:
    shape = parts["weight"].shape
    scale = next((part for part in _SCALES if part in parts), None)
    if scale is None:
        raise ValueError("it has no scale")
    zero = parts.get("weight_zero_point")
    block = _block(shape, parts[scale].shape, settings)
    return shape, Scaled(
        block,
        scale,
        zero_dtype=zero.dtype if zero else None,
        has_groups="weight_g_idx" in parts,
        is_inverse=settings.get("weight_scale_semantics") == "inverse",
    )


def _packed(parts: Parts, settings: JsonObject, files: Files) -> tuple[Shape, Coding]:
    rows, columns = files.read(parts["weight_shape"], (...,)).tolist()
    num_words = parts["weight_packed"].shape[1]
    bits = 32 * num_words // columns
    if not 1 <= bits <= 8 or num_words != -(-columns * bits // 32):
        raise ValueError(f"{num_words} words are not filled by {columns} codes")
    zero = parts.get("weight_zero_point")
    block = _block((rows, columns), parts["weight_scale"].shape, settings)
    return (rows, columns), Scaled(
        block, "weight_scale", bits, zero_dtype=zero.dtype if zero else None, has_groups="weight_g_idx" in parts
    )


def _int8(parts: Parts, settings: JsonObject, files: Files) -> tuple[Shape, Coding]:
    order = parts.get("weight_format")
    if order and files.read(order, (...,)).any():
        raise ValueError("it is in the order of one kind of GPU")
    shape = parts["weight"].shape
    return shape, Scaled(_block(shape, parts["SCB"].shape, {}), "SCB", factor=1 / 127)


def _flat(parts: Parts, settings: JsonObject, files: Files) -> tuple[Shape, Coding]:
    state_part = next((part for part in parts if part.startswith(_STATE)), None)
    if state_part is None:
        raise ValueError("it has no quant_state")
    state = json.loads(bytes(files.read(parts[state_part], (...,)).tolist()))
    nested = (state["nested_blocksize"], state["nested_offset"]) if "weight.nested_absmax" in parts else (0, 0.0)
    rows, columns = state["shape"]
    return (rows, columns), Flat(columns, state["blocksize"], *nested)


def _mxfp4(parts: Parts, settings: JsonObject, files: Files) -> tuple[Shape, Coding]:
    experts, outputs, num_blocks, _ = parts["_blocks"].shape
    return (experts, 32 * num_blocks, outputs), Mxfp4()


def _block(shape: Shape, scale_shape: Shape, settings: JsonObject) -> tuple[int, int]:
    """How many rows and columns of a matrix share a scale."""
    num_rows, num_columns = (*scale_shape, 1, 1)[:2]
    if len(scale_shape) == 1 and num_rows not in (1, shape[0]):
        raise ValueError(f"it has {num_rows} scales for {shape[0]} rows")
    given = [settings.get("weight_block_size"), *(weights.get("block_structure") for weights in _weights(settings))]
    height, width = next((block for block in given if isinstance(block, list)), (None, None))
    return _extent(shape[0], num_rows, height), _extent(shape[1], num_columns, width)


def _extent(length: int, count: int, configured: JsonValue) -> int:
    """How long each of `count` parts is. All but the last are what is configured, if that can be."""
    if isinstance(configured, int) and configured > 0 and -(-length // configured) == count:
        return configured
    if length % count:
        raise ValueError(f"{length} does not divide by {count}")
    return length // count


_FLOAT8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES: Final = ("weight_scale", "weight_scale_inv")
_STATE: Final = "weight.quant_state.bitsandbytes__"
_NF4: Final = ("weight", "weight.absmax", "weight.quant_map")
_NESTED: Final = ("weight.nested_absmax", "weight.nested_quant_map")
_PACKED: Final = ("weight_packed", "weight_shape", "weight_scale")

_LAYOUTS: Final[Mapping[str, tuple[_Layout, ...]]] = {
    "gptq": (_Layout(("qweight", "qzeros", "scales"), ("g_idx",), (torch.int32,), _gptq),),
    "awq": (_Layout(("qweight", "qzeros", "scales"), (), (torch.int32,), _awq),),
    "fp8": (_Layout(("weight",), _SCALES, _FLOAT8, _scaled),),
    "fbgemm_fp8": (_Layout(("weight",), _SCALES, _FLOAT8, _scaled),),
    "compressed-tensors": (
        _Layout(_PACKED, ("weight_zero_point", "weight_g_idx"), (torch.int32,), _packed),
        _Layout(("weight",), (*_SCALES, "weight_zero_point", "weight_g_idx"), (*_FLOAT8, torch.int8), _scaled),
    ),
    "bitsandbytes": (
        _Layout(("weight", "SCB"), ("weight_format",), (torch.int8,), _int8),
        _Layout(_NF4, (_STATE + "nf4", _STATE + "fp4", *_NESTED), (torch.uint8,), _flat),
    ),
    "mxfp4": (_Layout(("_blocks", "_scales"), (), (torch.uint8,), _mxfp4, parameter=""),),
}

_OF_ACTIVATIONS: Final = re.compile(r"\.(input|output|activation|[qkv]|kv)_(scale|zero_point|global_scale)(_ub)?$")
"""What quantising activations and KV memory would take. They are kept as they are."""


def decoded(stored: Mapping[str, StoredTensor], by: Quantization, dtype: torch.dtype) -> dict[str, Readable]:
    """A checkpoint's tensors by name, with each quantised parameter in the place of its parts, to be read as `dtype`.

    Raises `LoadError` naming the parameter whose parts cannot be right.
    """
    left = {name: tensor for name, tensor in stored.items() if not _OF_ACTIVATIONS.search(name)}
    files = Files()
    coded: dict[str, Readable] = {}
    for layout in _LAYOUTS[by.method]:
        for stem, names in list(layout.find(left)):
            name = stem + layout.parameter
            parts = {part: left.pop(full) for part, full in names.items()}
            coded[name] = _describe(name, layout, parts, by.settings, files, dtype)
    _refuse_orphans(by, left)
    log.info("%d of %d parameters are stored as %s codes", len(coded), len(coded) + len(left), by.method)
    return {**left, **coded}


def _describe(
    name: str, layout: _Layout, parts: Parts, settings: JsonObject, files: Files, dtype: torch.dtype
) -> CodedTensor:
    path = next(iter(parts.values())).path
    missing = [part for part in layout.parts if part not in parts]
    if missing:
        raise LoadError(f"{path}: {name} is quantised and has no {missing[0]}")
    try:
        shape, coding = layout.describe(parts, settings, files)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise LoadError(f"{path}: {name} is quantised in a way that is not known: {error}") from error
    return CodedTensor(name, shape, dtype, coding, parts)


def _refuse_orphans(by: Quantization, left: Mapping[str, StoredTensor]) -> None:
    """Scales without codes may be of activations, as awq has them in some families: nothing is right without them."""
    ends = tuple(part for layout in _LAYOUTS[by.method] for part in layout.parts[1:])
    orphan = next((name for name in left if name.endswith(ends)), None)
    if orphan:
        raise LoadError(f"{left[orphan].path}: {orphan} belongs to no quantised parameter, and is not served")


# What a checkpoint says


@dataclass(frozen=True, slots=True)
class Quantization:
    """By what a checkpoint is quantised."""

    method: str
    settings: JsonObject


_VARIANTS: Final[Mapping[str, tuple[str, ...]]] = {
    "gptq": ("gptq", "gptq_v2"),
    "awq": ("gemm",),
    "compressed-tensors": ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
}
"""Of methods that store codes in several forms, those that are known here."""

_NAMED: Final[Mapping[str, tuple[str | None, ...]]] = {
    "awq": ("awq",),
    "bitsandbytes": (None, "bitsandbytes"),
    "bitsandbytes-fp4": (None, "bitsandbytes"),
    "bitsandbytes-nf4": (None, "bitsandbytes"),
    "compressed-tensors": ("compressed-tensors",),
    "eetq": (None,),
    "exl2": (),
    "fp8": (None, "fp8", "fbgemm_fp8", "compressed-tensors"),
    "gptq": ("gptq", "awq"),
    "marlin": (),
}
"""The checkpoints that TGI serves with a value of --quantize. None: those it would quantise while it loads them."""


def quantization(config: JsonObject, directory: Path) -> Quantization | None:
    """What config.json says, or in old checkpoints a file beside it. Raises `LoadError` naming what is not served."""
    settings = config.get("quantization_config") or config.get("compression_config") or _beside(directory)
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise LoadError("quantization_config is not a JSON object")
    method = str(settings.get("quant_method") or _unnamed(settings))
    if method not in _LAYOUTS:
        raise LoadError(f"the checkpoint is quantised by {method}, and only {', '.join(_LAYOUTS)} are served")
    for variant in _variants(method, settings):
        if variant not in _VARIANTS.get(method, (variant,)):
            raise LoadError(f"the checkpoint is quantised by {method} in the form {variant}, which is not served")
    if config.get("model_type") == "gpt2":
        raise LoadError(f"gpt2's matrices are transposed, and not served quantised by {method}")
    return Quantization(method, settings)


def _unnamed(settings: JsonObject) -> str:
    """The method of settings from before they named it."""
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return "bitsandbytes"
    return "awq" if "zero_point" in settings else "gptq"


def check_named(named: str, found: Quantization | None) -> None:
    """Compares a value of TGI's --quantize with the checkpoint. Raises `LoadError` where they contradict each other."""
    method = found.method if found else None
    if method not in _NAMED[named]:
        raise LoadError(
            f"--quantize {named}: the checkpoint is {f'quantised by {method}' if method else 'not quantised'}"
        )
    if method is None:
        log.warning("--quantize %s has no effect: weights are used as they are stored", named)


def _beside(directory: Path) -> JsonValue:
    """AutoGPTQ's and AutoAWQ's own files, from before config.json had a place for it."""
    path = next(
        (path for name in ("quantize_config.json", "quant_config.json") if (path := directory / name).is_file()), None
    )
    if path is None:
        return None
    try:
        settings: JsonValue = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    return settings


def _variants(method: str, settings: JsonObject) -> list[JsonValue]:
    """In which forms the method stored weights."""
    match method:
        case "gptq":
            return [settings.get("checkpoint_format") or settings.get("format") or "gptq"]
        case "awq":
            return [str(settings.get("version") or settings.get("format") or "gemm").lower()]
        case "compressed-tensors":
            formats = [group.get("format") or settings.get("format") for group in _groups(settings)]
            return [*formats, *_changes(settings)]
    return []


def _changes(settings: JsonObject) -> Iterator[str]:
    """What compressed-tensors may do to weights beside quantising them."""
    sparsity, transform = settings.get("sparsity_config"), settings.get("transform_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        yield str(sparsity["format"])
    if isinstance(transform, dict) and transform.get("config_groups"):
        yield "of transformed weights"


def _weights(settings: JsonObject) -> list[JsonObject]:
    """What compressed-tensors says of weights, by groups of modules."""
    return [weights for group in _groups(settings) if isinstance(weights := group.get("weights"), dict)]


def _groups(settings: JsonObject) -> list[JsonObject]:
    groups = settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []

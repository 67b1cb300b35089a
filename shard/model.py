"""A model on one rank: transformers' own code over our weights, our attention and our KV memory.

    load_model    config.json → modules on the meta device → this rank's weights → joined with the other ranks
                  → probed (what reaches attention?) → self-tested → fused where the CPU can, or else given native
                  attention, on GPUs FlashAttention → tested again → ready
    Model.hidden  the backbone on one packed step: [1, T] tokens, positions restarting at every row
    Model.logits  the rest of the causal model on chosen rows, so that each family's own scaling and capping applies

The model code is unmodified: attention is replaced through transformers' registry (`shard.attention`), and the causal
model's backbone by a stand-in that hands back the hidden states it is given.

This module knows nothing of sequences or sampling: a step comes in as tensors and leaves as tensors.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shard.adapters import NOBODYS, AdapterFolder, Adapters, TokensOf, load_adapters
from shard.attention import (
    NAME,
    Attend,
    AttentionBatch,
    NativeAttention,
    PagedAttention,
    ShapeProbe,
    VarlenAttention,
    attending,
    install,
)
from shard.bridges import bridge, own_attention
from shard.dequantize import check_named, decoded, quantization
from shard.distributed import RankGroup
from shard.errors import LoadError
from shard.families import JsonObject, JsonValue, plan_for, served_config
from shard.fused import FusedDecoder, NotFusable, PackedHead, Source, fuse, pack_head, release_layers
from shard.kernels import native
from shard.kernels.packing import Kind
from shard.kv_cache import KVCache, LayerShape, bytes_per_block
from shard.routes import Routes
from shard.tensor_parallel import Heads, Sharding, deal, join_ranks
from shard.weights import Loader, open_checkpoint

log = logging.getLogger(__name__)

BLOCK_SIZE: Final = 16

SELF_TEST_CHUNKS: Final = (5, 1, 9, 4)
"""Tokens per step of the self-test's prompt: starting, single, crossing a block, ending in one."""

FLASH_TEST_CHUNKS: Final = (250, 1, 9, 4)
"""The same for FlashAttention's longer blocks."""

# Relative distance between all the dense and all the paged hidden states. Right ones differ by rounding, on SmolLM2
# 1e-6 in float32 and 0.03 in bfloat16; wrong positions or lost keys make it 0.2 and more.
_MAX_DISTANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}

# The same between fused layers and dense ones, on SmolLM2 1e-6, 0.05 and 0.09.
_MAX_FUSED_DISTANCE: Final = {Kind.FLOAT32: 1e-4, Kind.BFLOAT16: 0.1, Kind.INT8: 0.25, Kind.INT4: 0.6}

_KINDS: Final = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16}

# These rescale positions by the longest one in a packed step, so rows would change each other past the trained length.
_LENGTH_DEPENDENT_ROPE: Final = ("dynamic", "longrope")


Attention = Callable[[AttentionBatch, KVCache], Attend]
"""How the layers of a step attend."""


def native_attention(batch: AttentionBatch, cache: KVCache) -> Attend:
    return NativeAttention(batch, cache, torch.get_num_threads())


@dataclass(frozen=True, slots=True)
class _HandedBack:
    """All that any family's causal model looks for in what its backbone returns."""

    last_hidden_state: Tensor
    past_key_values: None = None
    hidden_states: None = None
    attentions: None = None
    cross_attentions: None = None
    router_logits: None = None

    def __getitem__(self, index: int) -> Tensor:
        """gpt_bigcode takes it for a tuple."""
        return (self.last_hidden_state,)[index]


class _HandBack(nn.Module):
    """Stands where the backbone was: its hidden states are those it is given as embeddings."""

    def forward(self, *_args: object, inputs_embeds: Tensor, **_kwargs: object) -> _HandedBack:
        return _HandedBack(inputs_embeds)

    @property
    def decoder(self) -> _HandBack:
        """OPT's causal model goes straight to its backbone's decoder."""
        return self


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the checkpoint says about itself."""

    model_type: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_positions: int


class Model:
    """One rank's part of a model. All ranks of a group make the same calls in the same order."""

    def __init__(
        self,
        causal: PreTrainedModel,
        facts: _Facts,
        *,
        layers: list[LayerShape],
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
    ) -> None:
        self.model_type = facts.model_type
        self.vocab_size = facts.vocab_size
        self.eos_token_ids = facts.eos_token_ids
        self.max_positions = facts.max_positions
        self.dtype = dtype
        self.device = device
        self._layers = layers
        self.attend_by(PagedAttention, block_size)
        self._cache: KVCache | None = None
        self._backbone = causal.base_model
        self.adapters = Adapters()
        self._fused: FusedDecoder | None = None
        self._packed_head: PackedHead | None = None
        """All that is between hidden states and logits, if it is no more than that."""
        self.own_columns: range | None = None
        """Of the logits, on each of several ranks that have `own_logits`."""
        self._head = causal
        setattr(causal, causal.base_model_prefix, _HandBack())

    def attend_by(self, attention: Attention, block_size: int) -> None:
        """Says how layers that are not fused attend from the next `allocate` on, and over which blocks."""
        self.attention = attention
        self.block_size = block_size
        self.bytes_per_block = bytes_per_block(self._layers, block_size, self.dtype)

    def allocate(self, num_blocks: int) -> None:
        """Empty KV memory for an epoch, instead of the former."""
        self.release()  # first: there may not be room for both
        self._cache = KVCache(
            self._layers, num_blocks=num_blocks, block_size=self.block_size, dtype=self.dtype, device=self.device
        )

    def release(self) -> None:
        """Gives KV memory back."""
        self._cache = None
        if self._fused is not None:
            self._fused.forget()

    @torch.inference_mode()
    def hidden(
        self, input_ids: Tensor, positions: Tensor, batch: AttentionBatch, adapters: TokensOf = NOBODYS
    ) -> Tensor:
        """Runs one step: `input_ids` and `positions` [T] int64 → last hidden states [T, width]."""
        assert self._cache is not None, "a step before KV memory was allocated"
        if self._fused is not None:
            return self._fused.hidden(input_ids, positions, batch, self._cache)
        with self.adapters.heard(adapters):
            return _run(self._backbone, input_ids, positions, self.attention(batch, self._cache))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [E, width] → [E, vocab_size] float32 on rank 0; on other ranks the columns they hold, or none."""
        if self._packed_head is not None:
            logits: Tensor = self._packed_head(hidden)
            return logits
        whole: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits
        return whole[0].float()

    @torch.inference_mode()
    def own_logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [E, width] → [E, own columns] float32."""
        assert self._packed_head is not None, "own columns of logits where there is more to them"
        return self._packed_head.forward(hidden)

    @torch.inference_mode()
    def dense_hidden(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """One whole sequence by transformers' own eager attention, without KV memory: the oracle of `hidden`."""
        configs = {id(m.config): m.config for m in self._backbone.modules() if hasattr(m, "config")}.values()
        for config in configs:
            config._attn_implementation = own_attention(self.model_type) or "eager"
        try:
            output = self._backbone(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        finally:
            for config in configs:
                config._attn_implementation = NAME
        hidden: Tensor = output.last_hidden_state
        return hidden[0]


def _run(backbone: nn.Module, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    with attending(attend):
        output = backbone(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden[0]


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: RankGroup,
    on_progress: Callable[[int, int], None],
    block_size: int = BLOCK_SIZE,
    use_native: bool = True,
    quantize: Kind | None = None,
    named_method: str | None = None,
    adapters: Sequence[AdapterFolder] = (),
) -> Model:
    """Loads this rank's part and proves on it that paged attention equals dense.

    `on_progress(done_bytes, total_bytes)` counts what this rank reads. With `use_native`, layers are fused where that
    is possible; `quantize` makes their weights int8 or int4, and is refused where it is not. `named_method` is what the
    checkpoint is said to be quantised by, under TGI's names. Raises `LoadError` with a one-line cause.
    """
    raw = _read_json(directory / "config.json")
    config = _config(served_config(raw))
    quantized = quantization(raw, directory)
    if named_method is not None:
        check_named(named_method, quantized)
    tensors = open_checkpoint(directory)
    stored = decoded(tensors, quantized, dtype) if quantized else tensors
    causal = _empty_model(config, dtype)
    sharding = _sharding(config, group)
    loader = Loader(causal, stored, sharding, dtype, on_progress)
    _fill(causal, loader, directory, device)
    join_ranks(causal, sharding, group)
    bridge(causal.base_model, config.model_type, sharding)
    probe = _probe(causal, config, sharding, device)
    layers = [probe.layers[layer] for layer in range(config.num_hidden_layers)]
    facts = _facts(config, directory)
    _agree_on_adapters(len(adapters), group, device)
    joined = load_adapters(adapters, causal, sharding)
    model = Model(causal, facts, layers=layers, dtype=dtype, device=device, block_size=block_size)
    model.adapters = joined
    expected = _self_test(model)
    joined.check(lambda: model.dense_hidden(expected.input_ids, expected.positions), len(expected.input_ids))
    try:
        if not use_native:
            raise NotFusable("native operations are switched off")
        if adapters:
            raise NotFusable("adapters change what single matrices do")
        _fuse(model, probe, expected, quantize or _KINDS.get(dtype), group)
    except NotFusable as reason:
        if quantize is not None:
            raise LoadError(f"quantised weights need fused layers: {reason}") from reason
        log.info("layers are not fused: %s", reason)
        if use_native:
            _attend_natively(model, probe, expected)
        _attend_by_flash(model, probe, group)
    return model


def _agree_on_adapters(number: int, group: RankGroup, device: torch.device) -> None:
    """Ranks with and without would from here on run collectives that do not belong together. Raises `LoadError`."""
    if int(group.all_reduce(torch.tensor([number], device=device))) != number * group.world_size:
        raise LoadError(f"the ranks are given different numbers of LoRA adapters, this one {number}")


def _read_json(path: Path) -> JsonObject:
    try:
        loaded: JsonValue = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise LoadError(f"{path} is not a JSON object")
    return loaded


def _config(values: dict[str, JsonValue]) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # transformers' configs check themselves and raise what they like
        raise LoadError(f"config.json does not make a {values['model_type']} model: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    first, *further = str(error).splitlines() or [type(error).__name__]
    return " ".join((first, *(line.strip() for line in further[:1]))) if first.endswith(":") else first


def _empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The modules with parameters that have shapes and no memory."""
    install()
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=own_attention(config.model_type) or NAME,
                experts_implementation="eager",  # the grouped kernels want widths a rank's part need not have
            )
    except Exception as error:  # any constructor of any family
        raise LoadError(f"config.json does not make a {config.model_type} model: {_first_line(error)}") from error
    model.config._attn_implementation = NAME  # whose name no mask is known by
    return model.eval().requires_grad_(False)


def _sharding(config: PreTrainedConfig, group: RankGroup) -> Sharding:
    query: int = config.num_attention_heads
    key_value: int = getattr(config, "num_key_value_heads", None) or query
    multi_query = bool(getattr(config, "multi_query", True))
    if config.model_type == "falcon" and config.new_decoder_architecture:
        key_value, multi_query = config.num_kv_heads, False
    elif config.model_type in ("falcon", "gpt_bigcode"):
        key_value = 1 if multi_query else query
    plan = plan_for(config.model_type, multi_query=multi_query)
    return Sharding(plan, Heads(query, key_value), group.rank, group.world_size)


def _fill(model: PreTrainedModel, loader: Loader, directory: Path, device: torch.device) -> None:
    """Puts loaded tensors in place, ties what is tied, computes what no checkpoint holds (rotary frequencies)."""
    names = set(model.state_dict())
    full_bytes = sum(parameter.nbytes for parameter in model.parameters())
    loaded = loader.load(device)
    for name, tensor in loaded.items():
        _place(model, name, tensor)
    missing = names - set(loaded)
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    _compute_buffers(model, device)
    left = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
    if left:
        raise LoadError(f"{directory} holds no {left[0]}" + (f" and {len(left) - 1} more" if left[1:] else ""))
    ignored = [name for name in loader.unexpected if not _is_leftover(model, name)]
    if ignored:
        log.warning("%d tensors of the checkpoint are not part of the model, among them %s", len(ignored), ignored[0])
    kept_bytes = sum(parameter.nbytes for parameter in model.parameters())
    log.info("%.1f MB of weights, of %.1f MB", kept_bytes / 1e6, full_bytes / 1e6)


def _place(model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fills the buffers no checkpoint holds by transformers' own initialisation, which leaves alone what is flagged."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        _place(model, name, torch.empty_like(buffer, device=device))
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for module in model.modules():  # youtu clears the row of its padding token, which on this rank may be another's
        module._is_hf_initialized = not module._non_persistent_buffers_set
    model.initialize_weights()


def _is_leftover(model: PreTrainedModel, name: str) -> bool:
    """Whether older versions of the family stored such a tensor and newer ones compute it."""
    known = (r"rotary_emb\.inv_freq", r"\.(attn|attention)\.(masked_)?bias$")
    patterns = (*(model._keys_to_ignore_on_load_unexpected or ()), *known)
    return any(re.search(pattern, name) for pattern in patterns)


def _facts(config: PreTrainedConfig, directory: Path) -> _Facts:
    return _Facts(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        eos_token_ids=_eos_token_ids(config, directory),
        max_positions=_max_positions(config),
    )


def _eos_token_ids(config: PreTrainedConfig, directory: Path) -> tuple[int, ...]:
    """Those of the generation config; those of the model's config where it names none."""
    path = directory / "generation_config.json"
    given = _read_json(path).get("eos_token_id") if path.is_file() else None
    given = config.eos_token_id if given is None else given
    tokens = given if isinstance(given, list) else [given]
    return tuple(token for token in tokens if isinstance(token, int))


def _max_positions(config: PreTrainedConfig) -> int:
    """Longest sequence the model computes the same in any batch; 0 when it names none."""
    positions: int = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 0
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_kind = [of_kind for of_kind in rope.values() if isinstance(of_kind, dict)]  # of layers, if they differ
    for parameters in by_kind or [rope]:
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            trained = parameters.get("original_max_position_embeddings")
            trained = trained or getattr(config, "original_max_position_embeddings", 0)
            positions = min(positions, int(trained)) if trained else positions
    return positions


def _probe(causal: PreTrainedModel, config: PreTrainedConfig, sharding: Sharding, device: torch.device) -> ShapeProbe:
    """Runs one token to see what reaches attention on this rank. Raises `LoadError` if it is not what it should be."""
    probe = ShapeProbe()
    token = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.inference_mode():
        _run(causal.base_model, token, token, probe)
    num_layers: int = config.num_hidden_layers
    if sorted(probe.layers) != list(range(num_layers)):
        raise LoadError(f"attention was called by {len(probe.layers)} of {num_layers} layers")
    _check_windows(config, probe)
    _check_shrunk(sharding, probe)
    return probe


def _check_windows(config: PreTrainedConfig, probe: ShapeProbe) -> None:
    """A window that only the mask would know is lost, as there is no mask."""
    kinds: list[str] = getattr(config, "layer_types", None) or []
    for layer, kind in enumerate(kinds):
        if kind == "sliding_attention" and probe.options[layer].window is None:
            raise LoadError(f"layer {layer} should attend within a window, which does not reach attention")


def _check_shrunk(sharding: Sharding, probe: ShapeProbe) -> None:
    if sharding.world_size == 1:
        return
    kept = len(sharding.kept.query)
    for layer, heads in probe.query_heads.items():
        if heads != kept or heads == sharding.heads.query:
            raise LoadError(
                f"sharding over {sharding.world_size} ranks leaves {heads} of {sharding.heads.query} query heads "
                f"on rank {sharding.rank} in layer {layer}, where {kept} are meant"
            )


@dataclass(frozen=True, slots=True)
class _Expected:
    """A short prompt, and its dense hidden states by transformers' own attention."""

    input_ids: Tensor  # [n] int64
    positions: Tensor  # [n] int64
    hidden: Tensor  # [n, width]
    routes: Routes

    def distance(self, hidden: Tensor) -> float:
        """Relative, of [rows, n, width]; not below any limit when something is not finite."""
        return float((self.hidden - hidden).float().norm() / self.hidden.expand_as(hidden).float().norm())


def _self_test(model: Model) -> _Expected:
    """A short prompt, dense by transformers' own attention against paged in odd chunks, on the loaded weights."""
    expected = _expected(model, SELF_TEST_CHUNKS)
    distance = expected.distance(_paged_hidden(model, expected, SELF_TEST_CHUNKS))
    limit = _MAX_DISTANCE[model.dtype]
    if not distance <= limit:
        raise LoadError(
            f"self-test failed: paged attention differs from dense by {distance:.2g} on the loaded weights, "
            f"more than {limit:g}"
        )
    log.info("self-test: paged attention differs from dense by %.1e", distance)
    return expected


def _expected(model: Model, chunks: Sequence[int]) -> _Expected:
    num_tokens = min(sum(chunks), model.max_positions or sum(chunks))
    input_ids = (torch.arange(num_tokens, device=model.device) * 7919 + 11) % model.vocab_size
    positions = torch.arange(num_tokens, device=model.device)
    routes = Routes(model._backbone)
    with routes.noted():
        return _Expected(input_ids, positions, model.dense_hidden(input_ids, positions), routes)


@torch.inference_mode()
def _fuse(model: Model, probe: ShapeProbe, expected: _Expected, kind: Kind | None, group: RankGroup) -> None:
    """Puts native layers in the modules' place if they do the same on the loaded weights. Raises `NotFusable`."""
    library = native.library()
    if kind is None or model.device.type != "cpu" or library is None:
        raise NotFusable(f"no native operations for {model.dtype} on {model.device.type} here")
    if kind not in library.kinds:
        raise NotFusable(f"this processor has no {kind.name.lower()} products")
    if kind.is_quantized and model.dtype != torch.bfloat16:
        raise NotFusable(f"activations are {model.dtype}, not bfloat16")
    if group.world_size > 1 and group.peers is None:
        raise NotFusable("the ranks share no memory")
    threads = native.threads(torch.get_num_threads())
    source = Source(model.model_type, model._backbone, probe, model.dtype, model.block_size)
    fused = fuse(source, kind, threads, group.peers)
    # Four bits are too few for the logits themselves.
    head_kind = Kind.INT8 if kind is Kind.INT4 else kind
    head = pack_head(getattr(model._head, "lm_head", None), head_kind, threads)
    model._fused = fused
    distance = expected.distance(_paged_hidden(model, expected, SELF_TEST_CHUNKS))
    if not distance <= _MAX_FUSED_DISTANCE[kind]:
        model._fused = None
        raise NotFusable(f"they differ from the modules by {distance:.2g}, more than {_MAX_FUSED_DISTANCE[kind]:g}")
    model._head.lm_head = head
    hidden = expected.hidden[-1:]
    # The way through transformers' causal model takes 0.2 ms of Python, a tenth of a small model's step.
    model._packed_head = head if torch.equal(head(hidden), model.logits(hidden)) else None
    model.own_columns = _own_columns(model, head, group)
    release_layers(model._backbone)
    log.info("layers are fused (%s): they differ from the modules by %.1e", kind.name.lower(), distance)


def _own_columns(model: Model, head: PackedHead, group: RankGroup) -> range | None:
    """This rank's of the logits, if the packed head is all there is to them on every rank."""
    if group.world_size == 1:
        return None
    columns = deal(model.vocab_size, group.rank, group.world_size)
    is_all = model._packed_head is not None and len(columns) == head.num_outputs
    able = group.all_reduce(torch.tensor([int(is_all)]))
    return columns if int(able) == group.world_size else None


def _attend_natively(model: Model, probe: ShapeProbe, expected: _Expected) -> None:
    """Lets the modules attend by the native operation if that does the same on the loaded weights."""
    suits = NativeAttention.suits(model._layers, probe.options.values(), model.block_size, model.dtype)
    if model.device.type == "cpu" and native.library() is not None and suits:
        _attend_better(model, "native", native_attention, model.block_size, expected, SELF_TEST_CHUNKS)


def _attend_by_flash(model: Model, probe: ShapeProbe, group: RankGroup) -> None:
    """Lets the modules attend by FlashAttention if all ranks can and it does the same on the loaded weights."""
    suits = VarlenAttention.suits(model._layers, probe.options.values(), model.dtype, model.device)
    refusal = _flash_refusal(model, probe) if suits else ""
    if refusal:
        log.warning("attention is not FlashAttention: %s", refusal)
    able = group.all_reduce(torch.tensor([int(suits and not refusal)], device=model.device))
    if int(able) == group.world_size:
        expected = _expected(model, FLASH_TEST_CHUNKS)
        _attend_better(model, "FlashAttention", VarlenAttention, VarlenAttention.PLACES, expected, FLASH_TEST_CHUNKS)


@torch.inference_mode()
def _flash_refusal(model: Model, probe: ShapeProbe) -> str:
    """What the kernel says if it is missing here or refuses the layers' heads. It is called outside the model: a rank
    that gave up within would leave the others waiting, and a lost rank would look like a kernel that refuses."""
    block_size, dtype, device = VarlenAttention.PLACES, model.dtype, model.device
    cache = KVCache(model._layers, num_blocks=3, block_size=block_size, dtype=dtype, device=device)
    batch = AttentionBatch.build(
        slots=torch.tensor([block_size, block_size + 1, 2 * block_size]),
        query_starts=[0, 2, 3],
        context_lens=[2, 1],
        block_tables=torch.tensor([[1], [2]]),
        block_size=block_size,
        device=device,
    )
    attend = VarlenAttention(batch, cache)
    try:
        for layer, shape in enumerate(model._layers):
            query = torch.zeros(3, probe.query_heads[layer], shape.key_dim, dtype=dtype, device=device)
            key = torch.zeros(3, shape.kv_heads, shape.key_dim, dtype=dtype, device=device)
            attend(layer, query, key, key, probe.options[layer])
    except RuntimeError as error:
        return _first_line(error)
    return ""


def _attend_better(
    model: Model, name: str, attention: Attention, block_size: int, expected: _Expected, chunks: Sequence[int]
) -> None:
    """Changes how the modules attend, or leaves it with a warning: what is replaced has proved right and serves on."""
    proved = model.attention, model.block_size
    model.attend_by(attention, block_size)
    distance = expected.distance(_paged_hidden(model, expected, chunks))
    if distance <= _MAX_DISTANCE[model.dtype]:
        log.info("attention is %s: it differs from dense by %.1e", name, distance)
    else:
        model.attend_by(*proved)
        log.warning("attention is not %s: it differs from dense by %.2g", name, distance)


def _paged_hidden(model: Model, expected: _Expected, chunks: Sequence[int]) -> Tensor:
    """[2, n, width]: the prompt in chunks, and the same in a second row, which is a chunk behind the first. Tokens take
    the experts that they took in the dense pass."""
    stops = [min(stop, len(expected.input_ids)) for stop in accumulate(chunks, initial=0)]
    spans = [(start, stop) for start, stop in pairwise(stops) if start < stop]
    num_blocks = -(-stops[-1] // model.block_size)
    tables = torch.arange(2 * num_blocks, 0, -1).view(2, num_blocks)  # backwards: a block's place must not matter
    model.allocate(2 * num_blocks + 1)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in range(len(spans) + 1):
        rows = [row for row in (0, 1) if 0 <= step - row < len(spans)]
        fed = [slice(*spans[step - row]) for row in rows]
        slots = [_slots(tables[row], span, model.block_size) for row, span in zip(rows, fed, strict=True)]
        batch = AttentionBatch.build(
            slots=torch.cat(slots),
            query_starts=list(accumulate(map(len, slots), initial=0)),
            context_lens=[span.stop for span in fed],
            block_tables=tables[rows],
            block_size=model.block_size,
            device=model.device,
        )
        input_ids = torch.cat([expected.input_ids[span] for span in fed])
        positions = torch.cat([expected.positions[span] for span in fed])
        with expected.routes.taken_again(positions):
            hidden = model.hidden(input_ids, positions, batch)
        for row, part in zip(rows, torch.split(hidden, [len(of_row) for of_row in slots]), strict=True):
            parts[row].append(part)
    model.release()
    return torch.stack([torch.cat(of_row) for of_row in parts])


def _slots(table: Tensor, span: slice, block_size: int) -> Tensor:
    """Where a row's tokens at those positions are written."""
    at = torch.arange(span.start, span.stop)
    return table[at // block_size] * block_size + at % block_size

"""A family's plan made real on one rank: which part of each parameter it keeps, and where the ranks' results meet.

Parameters become plain local tensors and the model code runs unmodified on them, so a rank's module is simply a smaller
one; forward hooks do what the ranks must do together. Heads are dealt out in whole KV groups, as evenly as they go
(3 KV heads on 2 ranks: 2 and 1). With fewer KV heads than ranks, each is kept by several ranks, which share its
query heads. Features and vocabulary rows are dealt out evenly.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from shard.distributed import RankGroup
from shard.errors import LoadError
from shard.families import EMBEDDING, FIRST, HEAD, SUM, Plan, Rule, Split


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a parameter a rank keeps: `ranges` of dimension `dim`, one per stacked matrix, joined."""

    dim: int
    ranges: tuple[range, ...]

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part, given the whole's."""
        if not self.ranges:
            return full
        return (*full[: self.dim], sum(map(len, self.ranges)), *full[self.dim + 1 :])

    def apply(self, full: Tensor) -> Tensor:
        if not self.ranges:
            return torch.zeros_like(full)
        return torch.cat([full.narrow(self.dim, r.start, len(r)) for r in self.ranges], dim=self.dim)


NOTHING: Final = Cut(dim=0, ranges=())
"""The parameter is zero on this rank, in its full shape, and never read."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Numbers of attention heads, of a model or of a rank's part."""

    query: int
    key_value: int

    @property
    def group(self) -> int:
        return self.query // self.key_value


@dataclass(frozen=True, slots=True)
class HeadRanges:
    """The heads of a rank, as indices into the model's."""

    query: range
    key_value: range

    @property
    def heads(self) -> Heads:
        return Heads(len(self.query), len(self.key_value))


def deal(count: int, rank: int, world_size: int) -> range:
    """A rank's share of `count` things in order; the first ranks take what does not divide."""
    each, left = divmod(count, world_size)
    start = rank * each + min(rank, left)
    return range(start, start + each + (rank < left))


def deal_heads(heads: Heads, rank: int, world_size: int) -> HeadRanges:
    """Whole KV groups where there are enough, else equal parts of a group. Raises `LoadError` when neither goes."""
    group = heads.group
    if heads.key_value >= world_size:
        key_value = deal(heads.key_value, rank, world_size)
        return HeadRanges(range(key_value.start * group, key_value.stop * group), key_value)
    sharers = world_size // heads.key_value
    if world_size % heads.key_value or group % sharers:
        raise LoadError(
            f"{heads.query} query heads in {heads.key_value} KV groups cannot be dealt out to {world_size} ranks"
        )
    share = group // sharers
    return HeadRanges(range(rank * share, (rank + 1) * share), range(rank // sharers, rank // sharers + 1))


class Sharding:
    """A plan for one rank of a group of `world_size`."""

    def __init__(self, plan: Plan, heads: Heads, rank: int, world_size: int) -> None:
        self.heads = heads
        self.rank = rank
        self.world_size = world_size
        self.kept = deal_heads(heads, rank, world_size)
        self._rules = [(_tail_pattern(tail), rule) for tail, rule in plan.items()]

    def rule(self, path: str) -> Split | Rule | None:
        """The rule of a module or parameter named by itself."""
        return next((rule for pattern, rule in self._rules if pattern.search(path)), None)

    def cut(self, name: str, shape: tuple[int, ...]) -> Cut | None:
        """What this rank keeps of a parameter of full `shape`; None: all. Raises `LoadError` for unplanned matrices."""
        if self.world_size == 1:
            return None
        module, _, leaf = name.rpartition(".")
        rule = self.rule(name) or self.rule(module)
        if (rule is None or rule is SUM) and len(shape) > 1:
            raise LoadError(f"{name} has no rule for more than one rank")
        if rule is FIRST or (isinstance(rule, Split) and rule.axis == "in" and leaf == "bias"):
            return None if self.rank == 0 else NOTHING
        if rule is EMBEDDING or rule is HEAD:
            return Cut(0, (self.vocabulary(shape[0]),))
        return self._cut(name, rule, shape) if isinstance(rule, Split) else None

    def vocabulary(self, size: int) -> range:
        return deal(size, self.rank, self.world_size)

    def vocabulary_sizes(self, size: int) -> list[int]:
        return [len(deal(size, rank, self.world_size)) for rank in range(self.world_size)]

    def _cut(self, name: str, split: Split, shape: tuple[int, ...]) -> Cut:
        dim = _dimension(split, len(shape))
        if split.units == "group":
            num_heads = self.heads.query + 2 * self.heads.key_value
            return Cut(dim, self._kept_groups(_width(name, shape[dim], num_heads)))
        units = split.units.split("+")
        # Heads stacked in one matrix are equally wide; stacks of features are equally long.
        counts = [self._num_units(unit, shape[dim] // len(units)) for unit in units]
        width = _width(name, shape[dim], sum(counts))
        ranges, start = [], 0
        for unit, count in zip(units, counts, strict=True):
            kept = self._kept_units(unit, count)
            ranges.append(range(start + kept.start * width, start + kept.stop * width))
            start += count * width
        return Cut(dim, tuple(ranges))

    def _kept_groups(self, width: int) -> tuple[range, ...]:
        """Of KV heads that each lie behind their query heads, as key and value; all heads are `width` features wide."""
        kept, size, ranges = self.kept.query, self.heads.group, []
        for head in self.kept.key_value:
            first, end = max(kept.start, head * size), min(kept.stop, (head + 1) * size)
            key = (head + 1) * size
            before = 2 * head  # keys and values of other heads
            ranges += [(first + before, end + before), (key + before, key + before + 2)]
        return tuple(range(first * width, end * width) for first, end in ranges)

    def _num_units(self, unit: str, features: int) -> int:
        return {"q": self.heads.query, "kv": self.heads.key_value, "ffn": features, "pair": features // 2}[unit]

    def _kept_units(self, unit: str, count: int) -> range:
        if unit == "q":
            return self.kept.query
        if unit == "kv":
            return self.kept.key_value
        return deal(count, self.rank, self.world_size)


def _tail_pattern(tail: str) -> re.Pattern[str]:
    return re.compile(r"(?:^|\.)" + re.escape(tail).replace(r"\*", r"\d+") + "$")


def _width(name: str, features: int, num_units: int) -> int:
    width, left = divmod(features, num_units)
    if left:
        raise LoadError(f"{name} has {features} features, not a multiple of its {num_units} units")
    return width


def _dimension(split: Split, ndim: int) -> int:
    """Outputs come before inputs in a matrix, unless it is transposed; experts are stacked in front."""
    if ndim == 1:
        return 0
    return ndim - 1 if (split.axis == "in") != split.transposed else ndim - 2


def join_ranks(model: nn.Module, sharding: Sharding, group: RankGroup) -> None:
    """Makes modules that hold this rank's part work as one with those of the other ranks."""
    if group.world_size == 1:
        return
    for path, module in list(model.named_modules()):
        rule = sharding.rule(path)
        if rule is SUM or (isinstance(rule, Split) and rule.axis == "in" and not isinstance(module, nn.ModuleList)):
            module.register_forward_hook(partial(_sum_over_ranks, group))
        if isinstance(rule, Split) and rule.axis == "in" and rule.units == "q":
            _localise(model.get_submodule(path.rpartition(".")[0]), sharding)
        if hasattr(module, "nf"):  # GPT-2's linear layer shapes its output by a number of its own
            module.nf = module.weight.shape[1]
        if isinstance(rule, Split) and rule.wide:
            _widen(model, path, group)
        if rule is EMBEDDING:
            _VocabularyEmbedding(module, sharding, group)
        if rule is HEAD and isinstance(module, nn.Linear):
            module.register_forward_hook(partial(_gather_logits, group, sharding.vocabulary_sizes(module.out_features)))


def _sum_over_ranks(group: RankGroup, module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
    return group.all_reduce(output.contiguous())


def _gather_logits(
    group: RankGroup, widths: list[int], module: nn.Module, args: tuple[object, ...], output: Tensor
) -> Tensor:
    return group.gather_columns(output, widths)


class _VocabularyEmbedding:
    """Hooks around an embedding of some of the vocabulary: other tokens give zeros, then the ranks are summed."""

    def __init__(self, module: nn.Module, sharding: Sharding, group: RankGroup) -> None:
        assert isinstance(module, nn.Embedding), type(module)
        self._rows = sharding.vocabulary(module.num_embeddings)
        self._group = group
        self._elsewhere = torch.empty(0)
        module.padding_idx = None  # only matters to gradients, and may lie outside our rows
        module.register_forward_pre_hook(self._to_local)
        module.register_forward_hook(self._sum)

    def _to_local(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        local = args[0] - self._rows.start
        self._elsewhere = (local < 0) | (local >= len(self._rows))
        return (local.masked_fill(self._elsewhere, 0),)

    def _sum(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return self._group.all_reduce(output.masked_fill(self._elsewhere[..., None], 0))


def is_shared_at_most(embedding: nn.Module) -> bool:
    """Whether hooks do no more to it than to share the vocabulary out to the ranks."""
    hooks = (*embedding._forward_pre_hooks.values(), *embedding._forward_hooks.values())
    return all(isinstance(getattr(hook, "__self__", None), _VocabularyEmbedding) for hook in hooks)


class WideNorm(nn.Module):
    """RMS norm over a width that is spread over the ranks, of which this one holds `weight`."""

    def __init__(self, weight: nn.Parameter, width: int, eps: float, group: RankGroup) -> None:
        super().__init__()
        self.weight = weight
        self.width = width
        self.eps = eps
        self._group = group

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., this rank's width]"""
        exact = hidden.float()
        squares = self._group.all_reduce(exact.square().sum(dim=-1, keepdim=True))
        return (self.weight * (exact * torch.rsqrt(squares / self.width + self.eps))).to(hidden.dtype)


def _widen(model: nn.Module, path: str, group: RankGroup) -> None:
    parent, _, leaf = path.rpartition(".")
    norm = model.get_submodule(path)
    weight, eps = norm.weight, norm.variance_epsilon
    assert isinstance(weight, nn.Parameter), path
    assert isinstance(eps, float), path
    width = torch.tensor(float(weight.numel()), device=weight.device)
    setattr(model.get_submodule(parent), leaf, WideNorm(weight, int(group.all_reduce(width)), eps, group))


def _localise(attention: nn.Module, sharding: Sharding) -> None:
    """Attention modules that remember how many heads they have are told how many they have here."""
    full, local = sharding.heads, sharding.kept.heads
    head_dim = getattr(attention, "head_dim", 0)
    remembered = {
        "num_heads": (full.query, local.query),
        "num_attention_heads": (full.query, local.query),
        "n_heads": (full.query, local.query),
        "num_key_value_heads": (full.key_value, local.key_value),
        "kv_heads": (full.key_value, local.key_value),
        "num_kv_heads": (full.key_value, local.key_value),
        "num_key_value_groups": (full.group, local.group),
        "split_size": (full.query * head_dim, local.query * head_dim),
        "embed_dim": (full.query * head_dim, local.query * head_dim),
        "kv_dim": (full.key_value * head_dim, local.key_value * head_dim),
    }
    for name, (was, now) in remembered.items():
        if hasattr(attention, name):
            assert getattr(attention, name) == was, f"{name} is {getattr(attention, name)}, not {was}"
            setattr(attention, name, now)
    for name, kept in (("q_layernorm", sharding.kept.query), ("k_layernorm", sharding.kept.key_value)):
        norm = getattr(attention, name, None)
        if norm is not None and hasattr(norm, "norms"):  # one for each head
            norm.norms = norm.norms[kept.start : kept.stop]
    if hasattr(attention, "qkv_proj"):  # splits its output by the counts in its config
        config = copy.copy(attention.config)
        vars(config).update(num_attention_heads=local.query, num_key_value_heads=local.key_value)
        attention.config = config

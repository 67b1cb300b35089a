"""Random numbers as a function of (seed, position), and the draws made with them.

A replay, another batch or another rank must draw what was drawn before, so there is no generator with a state. A row
needs one number per token: it is hashed on the host from two integers the host has, and spent by inverting the
cumulative distribution. Noise on every logit (Gumbel) would draw the same distribution at the cost of a random number
and a logarithm per vocabulary entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in the open interval (0, 1), a multiple of 2**-53, for the token at `position` of a seeded sequence."""
    bits = _mix(_mix(seed) + (position + 1) * _GOLDEN)
    return ((bits >> 12) + 0.5) * 2.0**-52


def _mix(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    z &= _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Index of the weight in which the fraction u of a row's mass falls: [R, W] float64, [R] float64 -> [R].

    The sums run from the left one by one, so zeros that follow change nothing; an index of weight 0 is never drawn. A
    NaN in a row's logits may leave it no mass: then it is the last.
    """
    sums = weights.cumsum(-1)
    return (sums <= u.unsqueeze(1) * sums[:, -1:]).sum(-1).clamp_(max=weights.shape[1] - 1)


def draw_from_vocabulary(probabilities: Tensor, u: Tensor, block: int = 256) -> Tensor:
    """`draw` for a whole vocabulary: [R, V] float32, [R] float64 -> [R] token ids.

    First the block, then the token in it: in float64, without a float64 copy of the vocabulary, and without losing the
    unlikeliest tokens to the rounding of one long sum.
    """
    vocab_size = probabilities.shape[1]
    num_whole = vocab_size // block * block
    masses = probabilities[:, :num_whole].view(probabilities.shape[0], num_whole // block, block).sum(-1)
    if num_whole < vocab_size:
        masses = torch.cat([masses, probabilities[:, num_whole:].sum(-1, keepdim=True)], dim=1)
    masses = masses.double()
    drawn = draw(masses, u).unsqueeze(1)
    sums = masses.cumsum(-1)
    before, mass = (sums - masses).gather(1, drawn), masses.gather(1, drawn)
    inside = (u.unsqueeze(1) * sums[:, -1:] - before) / mass
    inside = inside.clamp(0.0, 1.0 - 2.0**-53).squeeze(1)  # rounding may step over an end
    ids = drawn * block + torch.arange(block, device=u.device)  # [R, block]
    weights = probabilities.gather(1, ids.clamp(max=vocab_size - 1)).double()
    weights = weights.masked_fill(ids >= vocab_size, 0.0)
    return (drawn.squeeze(1) * block + draw(weights, inside)).clamp(max=vocab_size - 1)

"""Which tokens the sequences in seats have, for the rules that look back at them: penalties, and to come only once.

A table of the vocabulary for each seat: what a rule asks of it is one look per token, however long the sequence, and
the same whether torch looks or a native operation. What was chosen is noted by whoever has chosen it: by a native
operation in the tables themselves, else by `note`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shard.memory import zeros
from shard.transfer import to_device


class KnownTokens:
    """The tables are made when first needed: many deployments never see a penalty."""

    def __init__(self, max_seats: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (max_seats, vocab_size)
        self._device = device
        self.known: Tensor | None = None  # [max_seats, V] bool
        self.counts: Tensor | None = None  # [max_seats, V] int32: how often each token was generated

    def open(self, seat: int, *, counting: bool) -> None:
        """Begins a seat that has no tokens yet."""
        self.known = self._with_empty_row(self.known, torch.bool, seat)
        if counting:
            self.counts = self._with_empty_row(self.counts, torch.int32, seat)

    def learn(self, seat: int, tokens: Sequence[int], num_from_prompt: int, *, counting: bool) -> None:
        """Adds tokens that came from the router, the first of them of the prompt."""
        assert self.known is not None, f"seat {seat} is not open"
        ids = to_device(torch.tensor(tokens, dtype=torch.int64), self._device)
        self.known[seat].index_fill_(0, ids, True)
        if counting:
            assert self.counts is not None, f"seat {seat} does not count"
            generated = ids[num_from_prompt:]
            self.counts[seat].index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))

    def note(self, seats: Tensor, tokens: Tensor, *, counting: bool) -> None:
        """Adds a token that was chosen in each of some seats: [R], [R]."""
        assert self.known is not None, "no seat is open"
        self.known.index_put_((seats, tokens), torch.ones_like(tokens, dtype=torch.bool))
        if counting:
            assert self.counts is not None, "no seat counts"
            self.counts.index_put_((seats, tokens), torch.ones_like(tokens, dtype=torch.int32), accumulate=True)

    def _with_empty_row(self, table: Tensor | None, dtype: torch.dtype, seat: int) -> Tensor:
        if table is None:
            return zeros(self._shape, dtype, self._device)
        table[seat].zero_()
        return table

"""Runs sequences through a paged model the hard way: odd chunks, rows that come and go, scattered blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from shard.attention import AttentionBatch
from shard.model import Model

CHUNKS = (1, 1, 1, 2, 5, 9, 13)


class PagedRun:
    """Sequences of one epoch, fed step by step. Block tables are dealt out in random order; block 0 is nobody's.

    `adapters` has the number of each sequence's adapter; without it they are the model's alone.
    """

    def __init__(
        self, model: Model, sequences: Sequence[Tensor], seed: int = 0, adapters: Sequence[int] | None = None
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.adapters = adapters or [0] * len(sequences)
        self.fed = [0] * len(sequences)
        self.hidden: list[list[Tensor]] = [[] for _ in sequences]
        self.random = random.Random(seed)
        needed = [-(-len(tokens) // model.block_size) for tokens in sequences]
        blocks = list(range(1, sum(needed) + 1))
        self.random.shuffle(blocks)
        model.allocate(len(blocks) + 1)
        self.tables = torch.zeros(len(sequences), max(needed), dtype=torch.int32)
        for index, count in enumerate(needed):
            self.tables[index, :count] = torch.tensor(blocks[:count])
            del blocks[:count]

    def finish(self) -> list[Tensor]:
        """Feeds all that is left; [length, width] hidden states of every sequence."""
        while rows := self._rows():
            self.step(rows)
        return [torch.cat(parts) for parts in self.hidden]

    def _rows(self) -> list[tuple[int, int]]:
        waiting = [i for i, tokens in enumerate(self.sequences) if self.fed[i] < len(tokens)]
        chosen = self.random.sample(waiting, self.random.randint(1, len(waiting))) if waiting else []
        return [(i, min(self.random.choice(CHUNKS), len(self.sequences[i]) - self.fed[i])) for i in chosen]

    def step(self, rows: list[tuple[int, int]]) -> None:
        """One packed pass over (sequence, number of tokens) rows."""
        spans = [torch.arange(self.fed[i], self.fed[i] + n) for i, n in rows]
        size = self.model.block_size
        slots = [
            self.tables[i].long()[span // size] * size + span % size for (i, _), span in zip(rows, spans, strict=True)
        ]
        starts = [0]
        for _, n in rows:
            starts.append(starts[-1] + n)
        batch = AttentionBatch.build(
            slots=torch.cat(slots),
            query_starts=starts,
            context_lens=[self.fed[i] + n for i, n in rows],
            block_tables=self.tables[[i for i, _ in rows]],
            block_size=size,
            device=self.model.device,
        )
        ids = torch.cat([self.sequences[i][span] for (i, _), span in zip(rows, spans, strict=True)])
        adapters = torch.cat([torch.full((n,), self.adapters[i]) for i, n in rows])
        tokens_of = {number: (adapters == number).nonzero()[:, 0] for number in set(adapters.tolist()) - {0}}
        hidden = self.model.hidden(ids, torch.cat(spans), batch, tokens_of)
        for (i, n), part in zip(rows, hidden.split([n for _, n in rows]), strict=True):
            self.hidden[i].append(part)
            self.fed[i] += n

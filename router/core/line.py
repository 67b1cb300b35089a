"""Sequences in the order they are served: higher priority first, then earlier arrival.

A sorted list: finding a place is a bisection, and what it moves behind that place is pointers (10,000 of them take a
few microseconds). A heap would be as quick to fill but could neither be walked in order nor lose one from its middle.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter
from typing import Final

from router.core.request import Sequence

ORDER: Final = attrgetter("order")


class Line:
    """A line that sequences may join and leave anywhere, by their own `order`."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._sequences)

    @property
    def first(self) -> Sequence | None:
        return self._sequences[0] if self._sequences else None

    def join(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=ORDER)

    def leave(self, sequence: Sequence) -> None:
        place = bisect_left(self._sequences, sequence.order, key=ORDER)
        assert self._sequences[place] is sequence, f"sequence {sequence.arrival} is not in the line"
        del self._sequences[place]

"""Whole answers, kept to be given again: the least recently used ones leave when they take too many bytes together.

This module knows neither HTTP nor what makes two requests equal; a key stands for everything an answer depends on.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

PART_OVERHEAD_BYTES: Final = 64
"""What Python keeps beside the bytes of one part: a `bytes` object's head and its place in a tuple, rounded up."""

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """A successful answer as it is written: its headers, and its body in the pieces it was written in."""

    headers: tuple[Header, ...]
    parts: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        pieces = [*self.parts, *(piece for header in self.headers for piece in header)]
        return sum(map(len, pieces)) + PART_OVERHEAD_BYTES * len(pieces)


class ResponseCache:
    """Answers by key, within `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._answers: OrderedDict[bytes, StoredAnswer] = OrderedDict()
        """From the least to the most recently used."""
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: bytes) -> StoredAnswer | None:
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: bytes, answer: StoredAnswer) -> None:
        """Keeps an answer, unless it alone is larger than the cache."""
        self._drop(key)
        if answer.num_bytes > self._max_bytes:
            return
        self._answers[key] = answer
        self.num_bytes += answer.num_bytes
        while self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._answers)))

    def _drop(self, key: bytes) -> None:
        answer = self._answers.pop(key, None)
        if answer is not None:
            self.num_bytes -= answer.num_bytes

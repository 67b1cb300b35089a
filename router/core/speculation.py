"""Guesses at how a sequence goes on: as it did after an earlier place that read like its end.

Answers copy: code from the prompt, names, numbers, whole paragraphs that are to be mended. The last tokens are looked
up among the earlier ones, and the tokens that followed there are the draft. Whoever verifies it samples at every
position of the draft as if it were emitted, and keeps what agrees: so a wrong guess costs time and changes nothing.

It costs the most where text does not copy, and so every new token is compared with the one that would have been
guessed, whether or not it was. Guesses are given away while most of the latest would have been right.

The search is that of Lempel and Ziv's compressors: positions with equal pairs of tokens are linked, latest first, and
of the first few of them that with the longest common past wins; it is followed for as long as it is right. A token
costs the same whatever the length of the sequence. The module knows tokens only, neither plans nor requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

MAX_CANDIDATES: Final = 8
MAX_COMMON: Final = 16
"""Tokens of common past beyond which a candidate is not better."""
MAX_INDEXED_AT_ONCE: Final = 4096
"""A long prompt is indexed in parts of this size, a millisecond or two each, one per call."""

MIN_RATE: Final = 0.6
"""Share of right guesses from which they are worth verifying. With a half, as in "1, 2, 3, ", they are not."""
MEMORY: Final = 0.75
"""Weight of the past in that share: three right guesses after many wrong ones make for enough."""


class Speculation:
    """The guesses for one sequence."""

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}  # a pair of tokens -> the index behind its latest occurrence
        self._earlier = array("q", (0, 0))  # for each index, the one before it that has the same pair; 0: none
        self._num_compared = 0
        self._follows = 0  # index of the token that is guessed to come next; 0: none
        self._rate = MIN_RATE  # so the first guess has its chance

    def drafts(self, tokens: Sequence[int], max_drafts: int) -> list[int]:
        """What may follow the tokens, which are those of the call before and more."""
        if not self._index(tokens):
            return []
        self._compare(tokens)
        if max_drafts < 1 or not self._follows or self._rate < MIN_RATE:
            return []
        period = len(tokens) - self._follows  # a guess that reaches the end of the tokens goes on with itself
        return [tokens[self._follows + i % period] for i in range(max_drafts)]

    def _index(self, tokens: Sequence[int]) -> bool:
        """Links the pairs that something follows. False: there are more than one call may take."""
        start = len(self._earlier)
        end = min(len(tokens), start + MAX_INDEXED_AT_ONCE)
        for index in range(start, end):
            pair = _pair(tokens, index)
            self._earlier.append(self._latest.get(pair, 0))
            self._latest[pair] = index
        return end == len(tokens)

    def _compare(self, tokens: Sequence[int]) -> None:
        """Takes the tokens since the last call; at the first one there are no guesses to compare them with."""
        num_known = len(tokens)
        for index in range(self._num_compared or num_known, num_known):
            if self._follows:
                is_right = tokens[self._follows] == tokens[index]
                self._rate = MEMORY * self._rate + (1.0 - MEMORY) * is_right
                self._follows = self._follows + 1 if is_right else 0
            if not self._follows:
                self._follows = self._find(tokens, index + 1)
        if not self._num_compared:
            self._follows = self._find(tokens, num_known)
        self._num_compared = num_known

    def _find(self, tokens: Sequence[int], end: int) -> int:
        """The index behind the place that has most in common with what precedes `end`; 0: none."""
        if end < 2:
            return 0
        best = most_common = num_seen = 0
        candidate = self._latest.get(_pair(tokens, end), 0)
        while candidate and num_seen < MAX_CANDIDATES:
            if candidate < end:
                num_seen += 1
                common = _num_common(tokens, candidate, end)
                if common > most_common:
                    best, most_common = candidate, common
            candidate = self._earlier[candidate]
        return best


def _pair(tokens: Sequence[int], end: int) -> int:
    """The two tokens before `end` as one number, which takes a third of the memory of two."""
    return tokens[end - 2] << 32 | tokens[end - 1]


def _num_common(tokens: Sequence[int], candidate: int, end: int) -> int:
    """How many tokens before the two indices are equal, at most `MAX_COMMON`."""
    num = 0
    while num < MAX_COMMON and num < candidate and tokens[candidate - 1 - num] == tokens[end - 1 - num]:
        num += 1
    return num

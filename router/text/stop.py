"""Finds stop strings in a text that arrives in pieces, in time linear in the text.

One Knuth-Morris-Pratt automaton per stop string: its state is the length of the longest beginning of the stop string
that the text so far ends with. The state says both when a stop string is complete, wherever the pieces were cut, and
how much of the text's end may still become one. This module knows characters only, no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """Where the first complete stop string lies, in characters from the start of the whole text."""

    start: int
    end: int


class StopMatcher:
    """Fed the text piece by piece until a stop string is complete; must not be fed afterwards."""

    __slots__ = ("_automata", "_num_fed")

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._num_fed = 0

    def feed(self, piece: str) -> Match | None:
        """The stop string that is complete first; of several that end together, the longest."""
        if not self._automata:
            return None
        longest = 0
        for index, char in enumerate(piece):
            for automaton in self._automata:
                if automaton.advance(char):
                    longest = max(longest, len(automaton.stop))
            if longest:
                end = self._num_fed + index + 1
                return Match(end - longest, end)
        self._num_fed += len(piece)
        return None

    @property
    def num_held(self) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        return max((automaton.state for automaton in self._automata), default=0)


def num_begun(text: str, marker: str) -> int:
    """How many characters at the end of the text may be the beginning of the marker, which is not in it."""
    longest = min(len(text), len(marker) - 1)
    return next((num for num in range(longest, 0, -1) if text.endswith(marker[:num])), 0)


class _Automaton:
    """One stop string, not empty. `borders[i]`: longest proper beginning of stop[:i + 1] that also ends it."""

    __slots__ = ("borders", "state", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        self.borders = _borders(stop)

    def advance(self, char: str) -> bool:
        """Whether the stop string is complete with this character."""
        state = self.state
        while state and self.stop[state] != char:
            state = self.borders[state - 1]
        self.state = state + (self.stop[state] == char)
        return self.state == len(self.stop)


def _borders(stop: str) -> list[int]:
    borders = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[length] != stop[index]:
            length = borders[length - 1]
        length += stop[length] == stop[index]
        borders[index] = length
    return borders

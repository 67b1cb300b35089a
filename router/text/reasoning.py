"""Tells what a model thinks from what it answers: `<think>` ... `</think>`, then the answer.

Some templates end the prompt with `<think>` themselves, so that the text begins inside. Knows neither tokens nor HTTP.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, NamedTuple

from router.text.stop import num_begun

OPENING: Final = "<think>"
CLOSING: Final = "</think>"
MARKERS: Final = frozenset({OPENING, CLOSING})
BLANKS: Final = " \t\r\n"
MAX_BLANKS: Final = 16
"""More in front of the text, and it is an answer."""


class Thought(NamedTuple):
    """What a piece of text turned out to be."""

    reasoning: str
    content: str


class _State(Enum):
    START = auto()
    THINKING = auto()
    ANSWERING = auto()


def has_begun(prompt: str) -> bool:
    """Whether the answer to a prompt begins inside a thought."""
    return prompt.rstrip(BLANKS).endswith(OPENING)


class ReasoningSplitter:
    """Reads one text, piece by piece; `prompt` stands before it. Line ends directly behind a mark are left out."""

    def __init__(self, prompt: str) -> None:
        self._state = _State.THINKING if has_begun(prompt) else _State.START
        self._pending = ""
        self._at_line_start = True

    def feed(self, text: str) -> Thought:
        self._pending += text
        if self._state is _State.START:
            self._begin()
        reasoning = self._take_reasoning() if self._state is _State.THINKING else ""
        content = self._take(len(self._pending)) if self._state is _State.ANSWERING else ""
        return Thought(reasoning, content)

    def close(self) -> Thought:
        """The text ends here: what was held back is what it seems to be."""
        self._at_line_start = False
        rest = self._take(len(self._pending))
        return Thought(rest, "") if self._state is _State.THINKING else Thought("", rest)

    def _begin(self) -> None:
        """Whether the text begins with a thought is known once it cannot be the beginning of the mark any more."""
        rest = self._pending.lstrip(BLANKS)
        if rest.startswith(OPENING):
            self._pending = rest.removeprefix(OPENING)
            self._state = _State.THINKING
        elif not OPENING.startswith(rest) or len(self._pending) - len(rest) > MAX_BLANKS:
            self._at_line_start = False
            self._state = _State.ANSWERING

    def _take_reasoning(self) -> str:
        at = self._pending.find(CLOSING)
        if at < 0:
            return self._take(len(self._pending) - num_begun(self._pending, CLOSING))
        reasoning = self._take(at)
        self._pending = self._pending.removeprefix(CLOSING)
        self._at_line_start = True
        self._state = _State.ANSWERING
        return reasoning

    def _take(self, num_chars: int) -> str:
        """The next characters, without line ends directly behind a mark."""
        piece, self._pending = self._pending[:num_chars], self._pending[num_chars:]
        if self._at_line_start:
            piece = piece.lstrip("\n")
            self._at_line_start = not piece
        return piece

"""What one sequence's tokens say: text, cut where a stop string ends it.

Joins the detokenizer and the stop matcher. Special tokens have a literal text, which a client sees with the token but
which never is part of the sequence's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from router.text.detokenize import Detokenizer
from router.text.stop import StopMatcher
from router.text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A token's text for its client. `stopped`: with it a stop string is complete and the sequence ends."""

    text: str
    special: bool
    stopped: bool


class OutputText:
    """The growing text of one sequence.

    With `keep_stop` the text ends behind the first complete stop string and nothing is ever held back. Without, it ends
    before it, and characters that may be the beginning of one wait until that is decided.

    The pieces of tokens that are not special add up to `text`, with one exception: when the last token is special,
    what waited for a decision goes to `text` alone.
    """

    __slots__ = (
        *("_detokenizer", "_keep_stop", "_matcher", "_num_shown"),
        *("_pending", "_shown", "_stop", "_tokenizer", "_whole_texts"),
    )

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: tuple[str, ...], keep_stop: bool) -> None:
        self._tokenizer = tokenizer
        self._whole_texts = tokenizer.whole_texts
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop = stop
        self._keep_stop = keep_stop
        self._matcher = StopMatcher([s for s in stop if s])
        self._shown: list[str] = []
        self._num_shown = 0
        self._pending = ""

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._shown) + self._pending

    def push(self, token_id: int, *, last: bool) -> Piece:
        """Takes the next token; `last`: the sequence ends with it whatever the text says."""
        if not (self._stop or last or self._detokenizer.begun):  # as nearly always: nothing can end here, nothing waits
            text = self._whole_texts[token_id]
            if text:
                self._shown.append(text)
                return Piece(text, False, False)
        return self._push(token_id, last)

    def _push(self, token_id: int, last: bool) -> Piece:
        if self._tokenizer.is_special(token_id):
            return self._push_special(token_id, last)
        new = self._detokenizer.push(token_id)
        stopped = self._append(new)
        if last and not stopped:
            stopped = self._append(self._detokenizer.flush())
        return Piece(self._release(everything=last or stopped), special=False, stopped=stopped)

    def _push_special(self, token_id: int, last: bool) -> Piece:
        """A special token is compared with the stop strings as it is written, by itself."""
        literal = self._tokenizer.special_text(token_id)
        stopped = any(stop in literal for stop in self._stop)
        if last or stopped:
            self._append(self._detokenizer.flush())
        return Piece(literal, special=True, stopped=stopped)

    def _append(self, new: str) -> bool:
        """Whether the text ends here, cut; an empty stop string ends it with its first token."""
        self._pending += new
        match = self._matcher.feed(new)
        if match is None:
            return "" in self._stop
        cut = match.end if self._keep_stop else match.start
        self._pending = self._pending[: cut - self._num_shown]
        return True

    def _release(self, *, everything: bool) -> str:
        """Shows what is pending, without what may still become a stop string that must not be shown."""
        num_held = 0 if everything or self._keep_stop else self._matcher.num_held
        cut = len(self._pending) - num_held
        piece, self._pending = self._pending[:cut], self._pending[cut:]
        self._shown.append(piece)
        self._num_shown += len(piece)
        return piece

"""Token ids to text, one at a time: text leaves as soon as it is certain, never in the middle of a character.

Works on bytes, because tokens may hold parts of characters. An incomplete character at the end of everything, or one
that the next bytes cannot continue, becomes U+FFFD, as in a decode of the whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Final

from router.text.tokenizer import Tokenizer

MAX_CHAR_BYTES: Final = 4
"""UTF-8's longest character, so at most this many tokens at the prompt's end matter."""


class Detokenizer:
    """The text behind one prompt. A leading space is kept, since the prompt's last token stands before it."""

    __slots__ = ("_bytes_of", "_decoder")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in prompt[-MAX_CHAR_BYTES:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that has become certain; empty inside a character and for special tokens."""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """U+FFFD for what is left of a character that will not be completed."""
        return self._decoder.decode(b"", final=True)

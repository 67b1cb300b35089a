"""Token ids to text, one at a time: text leaves as soon as it is certain, never in the middle of a character.

Works on bytes, because tokens may hold parts of characters. An incomplete character at the end of everything, or one
that the next bytes cannot continue, becomes U+FFFD, as in a decode of the whole.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Final

from router.text.tokenizer import Tokenizer

MAX_CHAR_BYTES: Final = 4
"""UTF-8's longest character, so at most this many tokens at the prompt's end matter."""


class Detokenizer:
    """The text behind one prompt. A leading space is kept, since the prompt's last token stands before it."""

    __slots__ = ("_bytes_of", "begun")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._bytes_of = tokenizer.bytes_of
        self.begun = b""
        """Of a character that is not complete."""
        for token_id in prompt[-MAX_CHAR_BYTES:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that has become certain; empty inside a character and for special tokens."""
        new = self.begun + self._bytes_of(token_id)
        text, num_decoded = utf_8_decode(new, "replace", False)
        self.begun = new[num_decoded:]
        return text

    def flush(self) -> str:
        """U+FFFD for what is left of a character that will not be completed."""
        text, _ = utf_8_decode(self.begun, "replace", True)
        self.begun = b""
        return text

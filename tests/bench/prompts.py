"""Texts of an exact number of tokens, made of made-up words, so that no two are alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from tests.bench.client import BenchError

MAX_ATTEMPTS: Final = 20
CONSONANTS: Final = "bdfgklmnprstvz"
VOWELS: Final = "aeiou"

TokenEnds = Callable[[str], list[int]]
"""Where each token of a text ends, in characters."""


class Prompts:
    """Draws texts from `rng`; `token_ends` counts their tokens."""

    def __init__(self, token_ends: TokenEnds, rng: random.Random) -> None:
        self._token_ends = token_ends
        self._rng = rng

    def text(self, num_tokens: int, beginning: str = "") -> str:
        """`num_tokens` in all, those of `beginning` included. Raises `BenchError` if luck runs out."""
        for _ in range(MAX_ATTEMPTS):
            words = (self._word() for _ in range(num_tokens))
            text = f"{beginning} {' '.join(words)}".strip()
            text = text[: self._token_ends(text)[num_tokens - 1]]
            # Cut there, the last token may fall into several.
            if len(self._token_ends(text)) == num_tokens:
                return text
        raise BenchError(f"no text of {num_tokens} tokens found in {MAX_ATTEMPTS} attempts")

    def _word(self) -> str:
        return "".join(self._rng.choice(CONSONANTS) + self._rng.choice(VOWELS) for _ in range(3))

"""Random walks through a compiled grammar: texts that it allows, without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer as FastTokenizer

CLOSES = frozenset(b'"}],:\n')
MAX_TOKENS = 300
PATIENCE = 0.5
"""Of its tokens, a walk spends this share as it likes; then it makes for the end."""


@dataclass(frozen=True, slots=True)
class Walk:
    """A text that was allowed token by token. `ended`: the grammar allowed it to end there."""

    text: str
    ended: bool


class Walker:
    """Walks with one tokenizer's vocabulary, whose only end token is `eos`."""

    def __init__(self, fast: FastTokenizer, eos: str) -> None:
        self._eos_id = fast.token_to_id(eos)
        self._vocab_size = fast.get_vocab_size()
        self.tokenizer = LLTokenizer(fast.to_str(), n_vocab=self._vocab_size, eos_token=self._eos_id)
        self._texts = [self._text_of(fast, token_id) for token_id in range(self._vocab_size)]
        self._closes = numpy.array([not CLOSES.isdisjoint(text) for text in self._texts])
        self._closes[self._eos_id] = True

    def _text_of(self, fast: FastTokenizer, token_id: int) -> bytes:
        """A special token, too, as it is written."""
        is_special = self.tokenizer.is_special_token(token_id)
        return fast.id_to_token(token_id).encode() if is_special else self.tokenizer.decode_bytes([token_id])

    def compile(self, source: str) -> LLMatcher:
        """At its beginning; a copy of it is walked."""
        matcher = LLMatcher(self.tokenizer, source, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def walk(self, start: LLMatcher, seed: int) -> Walk:
        """Tokens that may close something are favoured, more so the longer it takes."""
        matcher, chance, tokens = start.deep_copy(), random.Random(seed), list[int]()
        favour = chance.choice((0.1, 0.4, 0.8))
        for step in range(MAX_TOKENS):
            if matcher.is_stopped():
                break
            token_id = self._choose(matcher, chance, max(favour, step / MAX_TOKENS / PATIENCE))
            if token_id == self._eos_id:
                break
            assert matcher.consume_token(token_id), matcher.get_error()
            tokens.append(token_id)
        assert not matcher.is_error(), matcher.get_error()
        text = b"".join(self._texts[token_id] for token_id in tokens)
        return Walk(text.decode(errors="replace"), matcher.is_accepting())

    def _choose(self, matcher: LLMatcher, chance: random.Random, favour: float) -> int:
        bits = numpy.frombuffer(matcher.compute_bitmask(), dtype=numpy.uint8)
        allowed = numpy.unpackbits(bits, bitorder="little")[: self._vocab_size].nonzero()[0]
        assert len(allowed), f"nothing may follow: {matcher.get_error()}"
        closing = allowed[self._closes[allowed]]
        choices = closing if len(closing) and chance.random() < favour else allowed
        return int(choices[chance.randrange(len(choices))])

    def documents(self, source: str, num_walks: int) -> Iterator[object]:
        """The JSON values of those walks that came to an end."""
        start = self.compile(source)
        for seed in range(num_walks):
            walk = self.walk(start, seed)
            if walk.ended:
                yield json.loads(walk.text)

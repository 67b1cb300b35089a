"""Log-probabilities as OpenAI's clients read them: per token in chat, in four parallel lists in completions.

All are of the model's raw logits, whatever sampling made of them, and are written as float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from router.api.render import float32
from router.engine import Token, TokenEvent
from router.text.detokenize import Detokenizer
from router.text.tokenizer import Tokenizer

Json = Mapping[str, object]
Scored = tuple[int, float | None, Sequence[Token]]
"""A token, its log-probability if it has one, and the likeliest tokens in its place."""


def chat_logprobs(tokenizer: Tokenizer, events: Iterable[TokenEvent]) -> Json:
    """One entry per generated token, special ones included."""
    return {"content": [_entry(tokenizer, event) for event in events]}


def _entry(tokenizer: Tokenizer, event: TokenEvent) -> Json:
    tops = [_named(tokenizer, top.id, top.logprob) for top in event.top_tokens]
    return {**_named(tokenizer, event.token.id, event.token.logprob), "top_logprobs": tops}


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> Json:
    written = _bytes_of(tokenizer, token_id)
    return {"token": written.decode(errors="replace"), "logprob": float32(logprob), "bytes": list(written)}


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    if tokenizer.is_special(token_id):
        return tokenizer.special_text(token_id).encode()
    return tokenizer.bytes_of(token_id)


def prompt_scores(token_ids: Sequence[int], event: TokenEvent) -> list[Scored]:
    """The prompt's tokens, from the first event of a sequence that was asked to score them."""
    logprobs = event.prompt_logprobs or [None] * len(token_ids)
    tops = event.prompt_tops or [()] * len(token_ids)
    return list(zip(token_ids, logprobs, tops, strict=True))


def token_scores(event: TokenEvent) -> Scored:
    return event.token.id, event.token.logprob, event.top_tokens


class CompletionLogprobs:
    """The lists of one choice. A token's offset is that of its first character in the choice's whole text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._offset = 0

    def write(self, scores: Iterable[Scored]) -> Json:
        """The next tokens' part of the lists."""
        tokens, logprobs, tops, offsets = [], [], [], []
        for token_id, logprob, likeliest in scores:
            tokens.append(token_name(self._tokenizer, token_id))
            logprobs.append(float32(logprob))
            tops.append(self._tops(token_id, logprob, likeliest))
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push(token_id))
        top_logprobs = tops if self._num_top else None
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top_logprobs, "text_offset": offsets}

    def _tops(self, token_id: int, logprob: float | None, likeliest: Sequence[Token]) -> Json | None:
        """By name, the token itself among them; where two have the same name, the likelier one counts."""
        if logprob is None:
            return None
        named: dict[str, object] = {}
        for top_id, value in (*((top.id, top.logprob) for top in likeliest), (token_id, logprob)):
            named.setdefault(token_name(self._tokenizer, top_id), float32(value))
        return named


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's own text, or `bytes:\\xe6\\x9d` where it is only part of a character."""
    written = _bytes_of(tokenizer, token_id)
    try:
        return written.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


def written_out(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """A prompt that came as tokens, special ones as they are written."""
    return b"".join(_bytes_of(tokenizer, token_id) for token_id in token_ids).decode(errors="replace")

"""Answers as bytes: compact JSON with the contract's keys in the contract's order.

Log-probabilities are float32 and are written as such: the fewest digits that give the same float32 again, laid out as
Rust's ryu does (-0.34, -2.5839844, 1e-7). Python would print the float64 with that value, and twice the digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import pack
from typing import Final

import orjson

from router.api.sse import frame, one_line
from router.core.request import Request
from router.engine import Finish, Token, TokenEvent
from router.errors import Loading, RouterError
from router.text.tokenizer import TextToken

FEWEST_DIGITS: Final = ("%.6g", "%.7g", "%.8g")
"""A float32 keeps 6 digits, and 9 always name it."""
MIN_PLAIN: Final = 2.0**-13
MAX_PLAIN: Final = 2.0**9
"""Between them orjson lays out a float64 as ryu does a float32, and its product with any of the scales is exact."""
SCALES: Final[Mapping[int, float]] = {
    exponent: 10.0 ** (5 - math.floor(math.log10(math.nextafter(2.0**exponent, 0.0)))) for exponent in range(-12, 10)
}
"""By a number's binary exponent (`math.frexp`): multiplied by it, it has at most 6 digits before the point."""
TOKENS_PER_SLICE: Final = 1_000

Json = dict[str, object]

PLAIN_FRAME: Final = frame(
    b'{"index":%d,"token":{"id":%d,"text":%b,"logprob":%b,"special":%b},"generated_text":null,"details":null}'
)


@dataclass(frozen=True, slots=True)
class PrefillToken:
    """A token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


@dataclass(frozen=True, slots=True)
class Result:
    """One finished sequence."""

    request: Request
    tokens: Sequence[Token]
    top_tokens: Sequence[Sequence[Token]]
    prefill: Sequence[PrefillToken]
    finish: Finish

    @property
    def mean_logprob(self) -> float:
        return math.fsum(token.logprob for token in self.tokens) / len(self.tokens)


def to_bytes(value: object) -> bytes:
    return orjson.dumps(value)


def error(error_: RouterError) -> Json:
    """An ErrorResponse; `error` comes first, some clients look for `{"error":`."""
    body: Json = {"error": str(error_)}
    if isinstance(error_, Loading):
        body["estimated_time"] = error_.estimated_time_s
    return body if error_.error_type is None else body | {"error_type": error_.error_type}


def response(best: Result, others: Sequence[Result], *, prefix: str, details: bool) -> Json:
    """A GenerateResponse; `prefix` stands before every text, empty or the prompt."""
    body: Json = {"generated_text": prefix + best.finish.text}
    if details:
        body["details"] = _details(best, others, prefix)
    return body


def _details(best: Result, others: Sequence[Result], prefix: str) -> Json:
    details = _sequence(best)
    if others:
        details["best_of_sequences"] = [
            {"generated_text": prefix + other.finish.text} | _sequence(other) | _top_tokens(other) for other in others
        ]
    return details | _top_tokens(best) | {"prompt_tokens": len(best.request.prompt)}


def _sequence(result: Result) -> Json:
    finish = result.finish
    return {
        "finish_reason": finish.reason.value,
        "generated_tokens": finish.num_generated,
        "seed": _seed(result.request),
        "prefill": [{"id": t.id, "text": t.text, "logprob": float32(t.logprob)} for t in result.prefill],
        "tokens": [token(t) for t in result.tokens],
    }


def _top_tokens(result: Result) -> Json:
    return {"top_tokens": [[token(t) for t in tops] for tops in result.top_tokens]} if result.top_tokens else {}


def plain_frame(index: int, token_: Token) -> bytes:
    """The frame of a StreamResponse that is not the last one and has no likeliest tokens. This runs for every token."""
    token_id, text, logprob, is_special = token_
    written, special = one_line(orjson.dumps(text)), b"true" if is_special else b"false"
    return PLAIN_FRAME % (index, token_id, written, orjson.dumps(float32(logprob)), special)


def full_stream_event(event: TokenEvent, end: Mapping[str, object] | None) -> Json:
    """Any StreamResponse; `end` is the last one's `stream_end`."""
    body: Json = {"index": event.index, "token": token(event.token)}
    if event.top_tokens:
        body["top_tokens"] = [token(t) for t in event.top_tokens]
    return body | dict(end or {"generated_text": None, "details": None})


def stream_end(request: Request, finish: Finish, *, prefix: str, details: bool) -> Json:
    """What the last StreamResponse says beyond its token."""
    num_prompt = len(request.prompt)
    end: Json = {"generated_text": prefix + finish.text, "details": None}
    if details:
        end["details"] = {
            "finish_reason": finish.reason.value,
            "generated_tokens": finish.num_generated,
            "seed": _seed(request),
            "input_length": num_prompt,
            "prompt_tokens": num_prompt,
        }
    return end


def token(token_: Token) -> Json:
    return {"id": token_.id, "text": token_.text, "logprob": float32(token_.logprob), "special": token_.special}


def simple_tokens(tokens: Sequence[TextToken]) -> bytes:
    """The answer of /tokenize, in slices: writing a million tokens in one call would keep the GIL too long."""
    slices = (tokens[start : start + TOKENS_PER_SLICE] for start in range(0, len(tokens), TOKENS_PER_SLICE))
    return b"[" + b",".join(to_bytes([_simple_token(t) for t in part])[1:-1] for part in slices) + b"]"


def _simple_token(token_: TextToken) -> Json:
    return {"id": token_.id, "text": token_.text, "start": token_.start, "stop": token_.stop}


def _seed(request: Request) -> int | None:
    """Greedy requests have drawn nothing."""
    return request.sampling.seed if request.sampling.do_sample else None


def float32(value: float | None) -> float | orjson.Fragment | None:
    """JSON for a float32; null for what is none, infinite or not a number."""
    if value is not None and MIN_PLAIN <= abs(value) < MAX_PLAIN:
        return _shortest_plain(value)
    if value is None or not math.isfinite(value):
        return None
    return orjson.Fragment(format_float32(value))


def format_float32(value: float) -> str:
    """ryu's text for the float32 nearest to a finite `value`."""
    mantissa, _, exponent = f"{_shortest(value):.8e}".partition("e")
    sign = "-" if mantissa[0] == "-" else ""
    digits = mantissa.removeprefix("-").replace(".", "").rstrip("0")
    return sign + _lay_out(digits or "0", int(exponent) + 1)


def _shortest(value: float) -> float:
    """The number of fewest digits that is the same float32."""
    packed = pack("<f", value)
    for digits in FEWEST_DIGITS:
        shorter = float(digits % value)
        if pack("<f", shorter) == packed:
            return shorter
    return float(f"{value:.9g}")


def _shortest_plain(value: float) -> float:
    """The same of a number that is neither small nor large, in half the time: this runs for every token."""
    packed = pack("<f", value)
    scale = SCALES[math.frexp(value)[1]]
    while pack("<f", shorter := round(value * scale) / scale) != packed:
        scale *= 10.0
    return shorter


def _lay_out(digits: str, point: int) -> str:
    """Puts the decimal point behind `point` digits; far from zero on either side in scientific notation."""
    if digits == "0":
        return "0.0"
    if len(digits) <= point <= 13:
        return f"{digits:0<{point}}.0"
    if 0 < point <= 13:
        return f"{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{digits[0]}{fraction}e{point - 1}"

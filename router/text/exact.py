"""Assertions of JSON Schema said so that what llguidance enforces is no more than what validators accept.

    numbers     are compared as decimals there and as floats by validators: 0.99999999999999999999 is below 1 in
                one world and 1 in the other. Limits move inwards, by less than anybody can mean.
    dates       have no 30 February there, but a 29 February in every year.
    expressions differ between Rust, whose `[a&&[b]` is an operation on sets, ECMA-262, and Python, whose `\\W` knows
                letters outside ASCII. What is generated matches by the rules of all three.

Each function takes what a schema says and gives back what to enforce; they know nothing of schemas as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Final

NUM_DIGITS: Final = 12
"""Significant digits of a limit; llguidance errs from 15 on."""

MAX_STEP: Final = 2**32 - 1
"""llguidance multiplies steps that stand together, with that many at most."""

YEAR: Final = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
LEAP_YEAR: Final = (
    "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # 0000 is no year
)
MONTH_DAY: Final = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
DATE: Final = f"(?:{YEAR}-{MONTH_DAY}|{LEAP_YEAR}-02-29)"
TIME: Final = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
EXACT_FORMATS: Final[Mapping[str, str]] = {"date": f"^{DATE}$", "time": f"^{TIME}$", "date-time": f"^{DATE}T{TIME}$"}
"""Without leap seconds and small letters, which RFC 3339 allows and many readers do not understand."""

NOT_ESCAPED: Final[Mapping[str, str]] = {
    "W": r"[^\p{L}\p{N}_]",
    "D": r"[^\p{N}]",
    "S": r"[^\s\x1c-\x1f\x{feff}]",
}
"""What no dialect takes for a word's character, a digit, or a blank."""

ANY_ESCAPED: Final[Mapping[str, str]] = {"w": r"\p{L}\p{N}_", "d": r"\p{N}", "s": r"\s\x1c-\x1f\x{feff}"}
"""What any dialect takes for one; to be left out by a negated class."""

LOOKING_AROUND: Final = ("(?=", "(?!", "(?<=", "(?<!")
NEEDS_MEMORY: Final = frozenset("bBk123456789")
"""Escapes that depend on more than the next character: a word's bounds, and what a group has matched."""


class ExpressionRefused(Exception):
    """An expression asks for what no automaton can do."""


def exact_limits(schema: Mapping[str, object]) -> dict[str, object]:
    """The limits of a number, inclusive and with few digits; a schema of integers is exact as it is."""
    if schema.get("type") == "integer":
        return dict(schema)
    exact = {name: value for name, value in schema.items() if name not in ("exclusiveMinimum", "exclusiveMaximum")}
    lows = list(_limits(schema, "minimum", "exclusiveMinimum", is_low=True))
    highs = list(_limits(schema, "maximum", "exclusiveMaximum", is_low=False))
    if lows:
        exact["minimum"] = max(lows)
    if highs:
        exact["maximum"] = min(highs)
    return exact


def _limits(schema: Mapping[str, object], inclusive: str, exclusive: str, *, is_low: bool) -> Iterator[int | float]:
    for name in (inclusive, exclusive):
        limit = schema.get(name)
        if isinstance(limit, int | float):
            yield _inwards(limit, is_low=is_low, is_exclusive=name == exclusive)


def _inwards(limit: int | float, *, is_low: bool, is_exclusive: bool) -> int | float:
    exact = Decimal(str(limit))
    quantum = Decimal(1).scaleb(max(exact.adjusted(), 0) + 1 - NUM_DIGITS)
    inside = exact.quantize(quantum, ROUND_CEILING if is_low else ROUND_FLOOR)
    if is_exclusive and inside == exact:
        inside += quantum if is_low else -quantum
    return limit if inside == exact else float(inside)


def is_exact_step(step: int | float) -> bool:
    """Whether floats that are multiples by their digits are multiples by division too, as for 0.25 but not for 0.1."""
    return Decimal(str(step)) == Decimal(step)


def steps_fit(steps: Iterable[int | float]) -> bool:
    """Whether numbers that are multiples of all of them can be told; more would overflow unnoticed."""
    digits = [Decimal(str(step)).normalize() for step in set(steps)]
    num_decimals = max((-int(step.as_tuple().exponent) for step in digits), default=0)
    return math.prod(int(step.scaleb(max(num_decimals, 0))) for step in digits) <= MAX_STEP


def exact_format(schema: Mapping[str, object]) -> dict[str, object]:
    """A date's or a time's format as a pattern beside whatever pattern there is."""
    pattern = EXACT_FORMATS.get(str(schema.get("format")))
    if pattern is None:
        return dict(schema)
    rest = {name: value for name, value in schema.items() if name != "format"}
    if "pattern" not in rest:
        return {**rest, "pattern": pattern}
    others = rest.get("allOf")
    return {**rest, "allOf": [*(others if isinstance(others, list) else []), {"pattern": pattern}]}


def exact_expression(expression: str) -> str:
    """A regular expression in Rust's dialect. Raises `ExpressionRefused`."""
    return "".join(_translated(expression))


def _translated(expression: str) -> Iterator[str]:
    """Escapes and whole classes at a time, everything else by the character."""
    at = 0
    while at < len(expression):
        end = _end_of_class(expression, at) if expression[at] == "[" else at + 1 + (expression[at] == "\\")
        piece = expression[at:end]
        if piece[0] == "[":
            yield "".join(_translated_class(piece))
        elif piece[0] == "\\":
            yield _translated_escape(piece)
        elif expression.startswith(LOOKING_AROUND, at):
            raise ExpressionRefused("expressions that look around are not supported")
        else:
            yield piece
        at = end


def _translated_escape(escape: str) -> str:
    letter = escape[1:]
    if letter in NEEDS_MEMORY:
        raise ExpressionRefused(f"`{escape}` is not supported")
    return NOT_ESCAPED.get(letter, escape)


def _end_of_class(expression: str, start: int) -> int:
    """Behind the bracket that closes the class; a bracket that comes first does not."""
    at = start + 1 + expression.startswith("^", start + 1)
    at += expression.startswith("]", at)
    while at < len(expression) and expression[at] != "]":
        at += 1 + (expression[at] == "\\")
    return at + 1


def _translated_class(piece: str) -> Iterator[str]:
    """What is no operator outside Rust is escaped: a bracket, and the second of `&&`, `--` or `~~`."""
    opening = "[^" if piece.startswith("[^") else "["
    letters = ANY_ESCAPED if opening == "[^" else NOT_ESCAPED
    yield opening
    at, before = len(opening), ""
    while at < len(piece):
        char = piece[at]
        if char == "\\":
            yield letters.get(piece[at + 1 : at + 2], piece[at : at + 2])
            at, before = at + 2, ""
            continue
        is_operator = char == "[" or (char in "&-~" and char == before)
        yield f"\\{char}" if is_operator else char
        at, before = at + 1, char

"""Nothing is enforced that validators would not accept: numbers, dates and expressions that are read in two ways."""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from datetime import date, timedelta

import pytest
from jsonschema import Draft202012Validator

from router.text.exact import (
    ExpressionRefused,
    exact_expression,
    exact_format,
    exact_limits,
    is_exact_step,
    steps_fit,
)
from router.text.grammar import Grammar, GrammarKind, InvalidGrammar, to_source
from tests.tiny_tokenizers import byte_level
from tests.walks import Walker

WALKER = Walker(byte_level(), "<|end|>")
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")


def source(schema: object) -> str:
    return to_source(Grammar(GrammarKind.JSON, schema))


class Recognizer:
    """Tells which texts a grammar allows."""

    def __init__(self, source: str) -> None:
        self._start = WALKER.compile(source)

    def takes(self, text: str) -> bool:
        matcher = self._start.deep_copy()
        tokens = [token for char in text for token in WALKER.tokenizer.tokenize_str(char)]
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


# Numbers


@pytest.mark.parametrize(
    ("given", "exact"),
    [
        ({"exclusiveMaximum": 1}, {"maximum": 0.99999999999}),
        ({"exclusiveMinimum": 0}, {"minimum": 1e-11}),
        ({"exclusiveMinimum": 0, "minimum": 2}, {"minimum": 2}),
        ({"maximum": 94.62231042801955}, {"maximum": 94.6223104280}),
        ({"minimum": -94.62231042801955}, {"minimum": -94.6223104280}),
        ({"minimum": 1234567, "maximum": 2.5}, {"minimum": 1234567, "maximum": 2.5}),
        ({"type": "integer", "exclusiveMaximum": 5}, {"type": "integer", "exclusiveMaximum": 5}),
    ],
)
def test_limits_are_inclusive_and_have_few_digits(given: dict[str, object], exact: dict[str, object]) -> None:
    assert exact_limits(given) == exact


def limits(chance: random.Random) -> dict[str, object]:
    """With up to sixteen decimals, or none."""
    low = round(chance.choice([chance.uniform(-3, 3), chance.uniform(-200, 200), 0, 1, 10]), chance.randrange(17))
    high = low + round(chance.choice([chance.uniform(0, 3), 1, 10]), chance.randrange(17))
    low = int(low) if chance.random() < 0.3 else low
    names = chance.choice(["minimum", "exclusiveMinimum", ""]), chance.choice(["maximum", "exclusiveMaximum", ""])
    return {name: limit for name, limit in zip(names, (low, high), strict=True) if name}


def numbers_around(limit: int | float, chance: random.Random) -> set[str]:
    shifts = (0, *(sign * 10.0**exponent for sign in (1, -1) for exponent in (0, -1, -3, -9, -13, -16)))
    texts = {repr(limit + shift) for shift in shifts} | {repr(chance.uniform(limit - 2, limit + 2)) for _ in range(5)}
    digits = repr(limit) if isinstance(limit, float) else f"{limit}."
    return texts | {digits + "1", digits + "9", digits + "0" * 25 + "1"}


def test_no_number_outside_of_its_limits_is_taken() -> None:
    num_taken = 0
    for seed in range(150):
        chance = random.Random(seed)
        schema = {"type": chance.choice(["number", "integer", ["number", "null"]]), **limits(chance)}
        low, high = (
            next((v for k, v in schema.items() if k.lower().endswith(end)), 0) for end in ("minimum", "maximum")
        )
        if math.floor(high) - math.ceil(low) < 2:
            continue  # maybe there is no such integer
        recognizer, validator = Recognizer(source(schema)), Draft202012Validator(schema)
        texts = numbers_around(low, chance) | numbers_around(high, chance) | {"0." + "9" * 20, "-0." + "9" * 20, "-0"}
        for text in sorted(filter(NUMBER.fullmatch, texts)):
            if recognizer.takes(text):
                num_taken += 1
                validator.validate(json.loads(text))
    assert num_taken > 500


@pytest.mark.parametrize(("step", "is_exact"), [(3, True), (0.25, True), (1.5, True), (0.1, False), (1e-7, False)])
def test_steps_are_exact_where_floats_hold_them(step: float, is_exact: bool) -> None:
    assert is_exact_step(step) is is_exact


@pytest.mark.parametrize(
    ("steps", "fit"),
    [((), True), ((3, 5), True), ((65_536, 65_537), False), ((0.25, 1e9), False), ((2e9, 2e9), True)],
)
def test_steps_together_are_refused_where_they_would_overflow(steps: tuple[float, ...], fit: bool) -> None:
    assert steps_fit(steps) is fit


@pytest.mark.parametrize("steps", [(65_536, 65_537), (1.5, 0.1)])
def test_a_schema_with_steps_that_cannot_be_told_is_refused(steps: tuple[float, float]) -> None:
    first, second = steps
    schema = {"type": "number", "multipleOf": first, "allOf": [{"multipleOf": second}]}

    with pytest.raises(InvalidGrammar, match="the keyword `multipleOf` at #/allOf/0 cannot be enforced"):
        source(schema)


# Dates


def test_dates_are_those_of_the_calendar() -> None:
    recognizer = Recognizer(source({"type": "string", "format": "date"}))
    for year in (1, 100, 400, 1900, 1999, 2000, 2023, 2024, 9999):
        for day in ("02-28", "02-29", "02-30", "04-31", "12-31", "13-01", "00-10", "10-00"):
            text = f"{year:04}-{day}"
            assert recognizer.takes(f'"{text}"') == is_date(text), text
    first = date(2023, 1, 1)
    assert all(recognizer.takes(f'"{first + timedelta(days=index)}"') for index in range(0, 800, 7))
    assert not recognizer.takes('"0000-01-01"')


def is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "is_time"),
    [
        ("2024-02-29T23:59:59Z", True),
        ("2024-02-29T23:59:59.123456+05:30", True),
        ("2023-02-29T23:59:59Z", False),
        ("2024-02-29T24:00:00Z", False),
        ("2024-02-29T23:59:60Z", False),
        ("2024-02-29T23:59:59", False),
    ],
)
def test_times_have_a_zone_and_no_leap_second(text: str, is_time: bool) -> None:
    assert Recognizer(source({"type": "string", "format": "date-time"})).takes(f'"{text}"') is is_time
    assert Recognizer(source({"type": "string", "format": "time"})).takes(f'"{text.partition("T")[2]}"') is (
        is_time or text.startswith("2023")
    )


def test_a_format_stands_beside_a_pattern_and_other_rules() -> None:
    both = exact_format({"format": "date", "pattern": "^2023", "allOf": [{"maxLength": 10}]})

    assert both["pattern"] == "^2023"
    assert [list(rule) for rule in both["allOf"]] == [["maxLength"], ["pattern"]]  # type: ignore[attr-defined]
    recognizer = Recognizer(source({"type": "string", "format": "date", "pattern": "^2023"}))
    assert recognizer.takes('"2023-05-01"')
    assert not recognizer.takes('"2024-05-01"')
    assert not recognizer.takes('"2023-02-29"')


# Expressions

EXPRESSIONS = [
    r"^[^\w]{2}$", r"^\W\D\S$", r"^[\D\s]{2}$", r"^[^\d\s]{2}$", r"^[()[\]{}]$", r"^[[a]]$", r"^[a&&b]$", r"^[+--]$",
    r"^[[:alpha:]]$", r"^[a-c~~b]$", r"^[]a]$", r"^[^]a]$", r"^\[a\]$", r"^[\[a\]\\]$", r"^\\[b]$", r"^[\w.]+@\S+$",
]  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_matches_here_matches_for_python_too(expression: str) -> None:
    texts = list(WALKER.documents(source({"type": "string", "pattern": expression}), 60))

    assert texts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Python may read these classes as Rust does, one day
        assert all(re.search(expression, str(text)) for text in texts)


@pytest.mark.parametrize(
    ("expression", "exact"),
    [
        (r"[^]\w]", r"[^]\p{L}\p{N}_]"),
        (r"[]\W]\W", r"[][^\p{L}\p{N}_]][^\p{L}\p{N}_]"),
        (r"\[\w\]\\W", r"\[\w\]\\W"),
        (r"[a[b]&&[^\d&&]", r"[a\[b]&&[^\p{N}&\&]"),
    ],
)
def test_classes_and_escapes_are_told_apart(expression: str, exact: str) -> None:
    assert exact_expression(expression) == exact


@pytest.mark.parametrize(
    "expression", ["", "a", r"[a-z]+\d*", "[^a]", "[", "[a\\", "\\", "a{2,3}|(b)?", r"\u00e9", "[]"]
)
def test_expressions_that_all_read_alike_stay_as_they_are(expression: str) -> None:
    assert exact_expression(expression) == expression


@pytest.mark.parametrize("expression", ["(?=a)b", "a(?!b)", "(?<=a)b", "(?<!a)b", r"\bfoo", r"(a)\1", r"(?P<n>a)\k<n>"])
def test_expressions_that_need_more_than_an_automaton_are_refused(expression: str) -> None:
    with pytest.raises(ExpressionRefused):
        exact_expression(expression)

"""Objects whose schema lists properties get no others, unless something else in the schema could be asking for them."""

from __future__ import annotations

import pytest

from router.text.schema import boil_down

NAMED = {"type": "object", "properties": {"name": {"type": "string"}}}
AGED = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
REFERENCE = {"$ref": "#/$defs/named"}
CLOSED = {"additionalProperties": False}


def test_an_object_gets_the_properties_that_are_listed() -> None:
    assert boil_down(NAMED) == NAMED | CLOSED


@pytest.mark.parametrize(
    "schema",
    [
        NAMED | {"additionalProperties": True},
        NAMED | {"patternProperties": {"^x": {"type": "string"}}},
        NAMED | {"required": ["other"]},
        {"type": "object"},
        {"allOf": [NAMED, AGED]},
        NAMED | {"anyOf": [{"required": ["x"]}, {"required": ["y"]}]},
    ],
)
def test_an_object_that_may_need_others_stays_open(schema: dict[str, object]) -> None:
    assert boil_down(schema) == schema


def test_alternatives_are_closed_where_nothing_else_speaks_of_the_value() -> None:
    assert boil_down({"anyOf": [NAMED, AGED, {"type": "null"}]}) == {
        "anyOf": [NAMED | CLOSED, AGED | CLOSED, {"type": "null"}]
    }


def test_alternatives_beside_properties_stay_open() -> None:
    schema = NAMED | {"anyOf": [AGED, {"type": "object", "properties": {"size": {"type": "integer"}}}]}

    assert boil_down(schema) == schema


def test_what_a_reference_leads_to_is_closed_where_it_always_stands_alone() -> None:
    definitions = {"$defs": {"named": NAMED}}
    alone = {"type": "array", "items": REFERENCE}
    combined = {"type": "array", "items": {"allOf": [REFERENCE, AGED]}, "prefixItems": [REFERENCE]}

    assert boil_down(alone | definitions)["$defs"] == {"named": NAMED | CLOSED}
    assert boil_down(combined | definitions)["$defs"] == {"named": NAMED}

"""More than four hundred JSON schemas that use every keyword of draft 2020-12, alone and with others.

Built from a table: a keyword and what is tried with it. Nothing here says which of them can be enforced, only that the
first one of the keywords in `ENFORCED` must be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Final

Schema = dict[str, object]

STRING: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
BOOLEAN: Final[Schema] = {"type": "boolean"}
NULL: Final[Schema] = {"type": "null"}
SHORT: Final[Schema] = {"type": "string", "maxLength": 4}
SMALL: Final[Schema] = {"type": "integer", "minimum": 0, "maximum": 9}
POINT: Final[Schema] = {
    "type": "object", "properties": {"x": INTEGER, "y": INTEGER}, "required": ["x", "y"], "additionalProperties": False
}  # fmt: skip


def a_string(**more: object) -> Schema:
    return {"type": "string", **more}


def an_integer(**more: object) -> Schema:
    return {"type": "integer", **more}


def a_number(**more: object) -> Schema:
    return {"type": "number", **more}


def an_array(items: object = SMALL, **more: object) -> Schema:
    return {"type": "array", "items": items, **more}


def closed(properties: Mapping[str, object], *required: str, **more: object) -> Schema:
    """An object with these properties and no others; all of them, if none is named."""
    names = list(required or properties)
    return {
        "type": "object", "properties": dict(properties), "required": names, "additionalProperties": False, **more
    }  # fmt: skip


def an_object(**more: object) -> Schema:
    return {"type": "object", **more}


def tree() -> Schema:
    node = closed({"v": SMALL, "next": {"anyOf": [{"$ref": "#/$defs/node"}, NULL]}}, "v")
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


SCALARS: Final = (STRING, INTEGER, NUMBER, BOOLEAN, NULL)
VALUES: Final = ("a", "", 'q"u\\o\n', "é☃", 0, -1, 1.5, 1e3, True, False, None, [], [1, "a"], {}, {"a": {"b": [None]}})
NUMERIC_LIMITS: Final = (-7, 0, 1, 10, 255, 2.5, -0.125)
PATTERNS: Final = (
    "^a+$", "^[A-Z]{3}-[0-9]{2,4}$", "b", "^x", "y$", "", "^(foo|ba[rz])$", "^\\d{3}$", "^\\w{1,3}$", "^[^a-z]{2}$",
    "^.{0,3}$", "^\\S+@\\S+$", "^\\u00e9+$", "a|b|^c$", "^(?:ab)*$", "(?=a)a", "^(a)\\1$", "(?i)^ab$", "^[^\\w]{2}$",
    "^\\W\\D\\S$", "^[\\D\\s]{2}$", "^[()[\\]{}]$", "^[[a]]$", "^[a&&b]$", "^[+--]$", "^[[:alpha:]]$", "^[a-c~~b]$",
    "^a{,3}$", "^\\bfoo$", "a$b", "^[^\\n\\x00-\\x1f]{2}$",
)  # fmt: skip
FORMATS: Final = (
    "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri",
    "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer", "regex",
    "color",
)  # fmt: skip

TABLE: Final[Mapping[str, tuple[object, ...]]] = {
    "type": (
        *SCALARS, an_object(), {"type": "array"}, {"type": ["string", "null"]}, {"type": ["integer", "boolean"]},
        {"type": ["object", "array"]}, {"type": ["number", "integer"]},
        {"type": ["null", "boolean", "object", "array", "number", "string"]}, {}, {"type": []},
    ),
    "const": tuple({"const": value} for value in VALUES),
    "enum": (
        *({"enum": list(VALUES[start : start + 5])} for start in range(0, len(VALUES), 2)),
        {"type": "string", "enum": ["a", "b", "c"]}, {"type": "integer", "enum": [1, "a", 2]},
        {"enum": ["ab", "abc", "b"], "minLength": 2}, {"enum": [1, 5, 9], "minimum": 3}, {"enum": []},
        {"type": "string", "enum": [1, 2]}, {"enum": [1, 1.0, "1"]},
        {"enum": [1e100, 2**53 + 1, 12345678901234567890, -0.0]},
    ),
    "minimum": (
        *(an_integer(minimum=limit) for limit in NUMERIC_LIMITS),
        *(a_number(minimum=limit) for limit in NUMERIC_LIMITS),
    ),
    "maximum": (
        *(an_integer(maximum=limit) for limit in NUMERIC_LIMITS),
        *(a_number(maximum=limit) for limit in NUMERIC_LIMITS),
        *(an_integer(minimum=low, maximum=low + 12) for low in (-20, -5, 0, 8, 95, 999)),
        *(a_number(minimum=low, maximum=low + 0.5) for low in (-2, -0.25, 0, 9.75)), {"minimum": 3, "maximum": 5},
        an_integer(minimum=5, maximum=4), a_number(minimum=1, maximum=1), a_number(maximum=94.62231042801955),
        a_number(minimum=10, maximum=12.783999999999999), an_integer(maximum=2**63), an_integer(minimum=-1e21),
        a_number(maximum=1e300), a_number(minimum=1e-300, maximum=1),
    ),
    "exclusiveMinimum": (
        *(an_integer(exclusiveMinimum=limit) for limit in NUMERIC_LIMITS),
        *(a_number(exclusiveMinimum=limit) for limit in NUMERIC_LIMITS), a_number(exclusiveMinimum=0, minimum=2),
    ),
    "exclusiveMaximum": (
        *(an_integer(exclusiveMaximum=limit) for limit in NUMERIC_LIMITS),
        *(a_number(exclusiveMaximum=limit) for limit in NUMERIC_LIMITS),
        a_number(exclusiveMinimum=0, exclusiveMaximum=1), an_integer(exclusiveMinimum=0, exclusiveMaximum=2),
    ),
    "multipleOf": (
        *(an_integer(multipleOf=step) for step in (1, 2, 3, 5, 7, 10, 100)),
        *(a_number(multipleOf=s) for s in (0.5, 0.01, 3)), an_integer(multipleOf=3, minimum=10, maximum=30),
        a_number(multipleOf=0.25, minimum=0, maximum=2), {"multipleOf": 4}, an_integer(multipleOf=2.5),
        a_number(multipleOf=0.1), a_number(multipleOf=1e-7), a_number(multipleOf=1.5),
        {"allOf": [an_integer(multipleOf=65_536), {"multipleOf": 65_537}]},
    ),
    "minLength": (
        *(a_string(minLength=size) for size in (0, 1, 2, 7)), {"minLength": 2}, a_string(minLength=3, pattern="^a"),
    ),
    "maxLength": (
        *(a_string(maxLength=size) for size in (0, 1, 2, 7)),
        *(a_string(minLength=size, maxLength=size) for size in (1, 3)), a_string(minLength=4, maxLength=2),
        a_string(maxLength=3, pattern="^[a-c]*$"), {"maxLength": 2}, a_string(maxLength=2.0),
    ),
    "pattern": (*(a_string(pattern=pattern) for pattern in PATTERNS), {"pattern": "^a$"}),
    "format": (
        *(a_string(format=name) for name in FORMATS), {"format": "date"}, a_string(format="date", pattern="^2023-02"),
        a_string(format="uuid", maxLength=36),
    ),
    "properties": (
        closed({"a": SMALL}), closed({"a": SHORT, "b": SMALL, "c": BOOLEAN}), closed({"b": SMALL, "a": SMALL}, "a"),
        an_object(properties={"a": SMALL}), an_object(properties={}), {"properties": {"a": SMALL}},
        closed({'q"\\': SMALL, "é": NULL, "": SMALL}), closed({"a": closed({"b": closed({"c": SMALL})})}),
        closed({"a": True}), an_object(properties={"a": False}), closed({"a": False}),
        *(closed({"a": schema}) for schema in SCALARS), closed({f"p{index}": SMALL for index in range(20)}),
        closed({"$ref": SMALL, "type": SHORT, "enum": NULL}), closed({"default": SMALL, "not": SHORT}),
    ),
    "required": (
        closed({"a": SMALL, "b": SMALL}, "b"), an_object(required=["a"]),
        an_object(required=["a"], additionalProperties=SMALL), {"required": ["a"], "properties": {"a": SMALL}},
        closed({"a": SMALL}, "b"), an_object(properties={"a": SMALL}, required=[]),
        an_object(required=["b", "a"], properties={"a": SMALL, "b": NULL}),
    ),
    "additionalProperties": (
        closed({}), an_object(additionalProperties=SMALL), an_object(additionalProperties=POINT),
        an_object(additionalProperties=True), an_object(properties={"a": SMALL}, additionalProperties=SHORT),
        {"additionalProperties": SMALL}, an_object(additionalProperties=an_array(SHORT, maxItems=2)),
    ),
    "patternProperties": (
        an_object(patternProperties={"^a": SMALL}, additionalProperties=False),
        an_object(patternProperties={"^a": SMALL}),
        an_object(patternProperties={"^a": SMALL, "^b": SHORT}, additionalProperties=False),
        an_object(patternProperties={"^a": SMALL, "a$": SHORT}, additionalProperties=False),
        an_object(patternProperties={"^a": SMALL}, properties={"ab": SHORT}, additionalProperties=False),
        an_object(patternProperties={"x": NULL}, properties={"a": SMALL}, additionalProperties=BOOLEAN),
    ),
    "minProperties": (
        *(an_object(minProperties=size, additionalProperties=SMALL) for size in (0, 1, 2, 3)), {"minProperties": 1},
        closed({"a": SMALL, "b": SMALL}, "a", minProperties=2), closed({"a": SMALL}, minProperties=1),
        an_object(properties={"a": SMALL}, minProperties=1), an_object(minProperties=2, propertyNames={"maxLength": 1}),
    ),
    "maxProperties": (
        *(an_object(maxProperties=size, additionalProperties=SMALL) for size in (0, 1, 2)), {"maxProperties": 1},
        an_object(minProperties=2, maxProperties=2, additionalProperties=SMALL),
        closed({"a": SMALL, "b": SMALL}, "a", maxProperties=1), an_object(minProperties=2, maxProperties=1),
    ),
    "items": (
        *(an_array(schema, maxItems=3) for schema in (*SCALARS, POINT, an_array(SMALL, maxItems=2), True, {}, False)),
        {"items": SMALL}, {"type": "array", "items": SMALL}, {"type": "array", "items": [SMALL, SHORT]},
    ),
    "prefixItems": (
        {"type": "array", "prefixItems": [SMALL, SHORT]},
        {"type": "array", "prefixItems": [SMALL, SHORT], "items": False},
        {"type": "array", "prefixItems": [SMALL, SHORT], "items": NULL, "maxItems": 4},
        {"prefixItems": [SMALL], "items": False},
        {"type": "array", "prefixItems": [SMALL, SHORT], "items": False, "minItems": 2},
        {"type": "array", "prefixItems": [SMALL], "items": SHORT, "minItems": 3, "maxItems": 3},
    ),
    "minItems": (*(an_array(minItems=size) for size in (0, 1, 2, 5)), {"minItems": 2}, an_array(False, minItems=1)),
    "maxItems": (
        *(an_array(maxItems=size) for size in (0, 1, 2, 5)),
        *(an_array(minItems=size, maxItems=size) for size in (1, 4)), {"maxItems": 1}, an_array(minItems=3, maxItems=2),
        an_array(an_array(SMALL, maxItems=1), maxItems=2),
    ),
    "uniqueItems": (
        an_array(uniqueItems=True), an_array(uniqueItems=False),
        an_array({"enum": [1, 2, 3]}, uniqueItems=True, minItems=3),
    ),
    "contains": (an_array(contains={"const": 5}), {"type": "array", "contains": STRING}, {"contains": STRING}),
    "minContains": (
        an_array(contains={"const": 5}, minContains=2), an_array(contains={"const": 5}, minContains=0),
        an_array(minContains=2),
    ),
    "maxContains": (an_array(contains={"const": 5}, maxContains=1), an_array(maxContains=1)),
    "propertyNames": (
        an_object(propertyNames={"pattern": "^[a-z]{1,3}$"}, additionalProperties=SMALL), an_object(propertyNames=True),
    ),
    "unevaluatedItems": (
        {"type": "array", "prefixItems": [SMALL], "unevaluatedItems": False}, an_array(unevaluatedItems=False),
    ),
    "unevaluatedProperties": (
        an_object(properties={"a": SMALL}, unevaluatedProperties=False),
        {"allOf": [an_object(properties={"a": SMALL})], "unevaluatedProperties": False},
        closed({"a": SMALL}, unevaluatedProperties=False),
    ),
    "allOf": (
        {"allOf": [STRING, {"maxLength": 3}]}, {"allOf": [INTEGER, {"minimum": 1}, {"maximum": 3}]},
        {"allOf": [STRING, INTEGER]},
        {"allOf": [closed({"a": SMALL}, additionalProperties=True), closed({"b": SHORT}, additionalProperties=True)]},
        {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]}, {"allOf": [True, SMALL]},
        {"type": "integer", "allOf": [{"minimum": 5}]}, {"allOf": [a_string(pattern="^a"), a_string(pattern="b$")]},
        {"allOf": [{"multipleOf": 2}, {"multipleOf": 3}, INTEGER]},
        {"allOf": [an_array(SMALL), an_array(an_integer(minimum=5), maxItems=2)]},
        {"allOf": [{"$ref": "#/$defs/p"}], "$defs": {"p": POINT}},
        {"allOf": [closed({"a": SMALL}), closed({"a": SMALL, "b": SMALL}, "a")]}, {"allOf": [SMALL, False]},
    ),
    "anyOf": (
        {"anyOf": [SHORT, SMALL]}, {"anyOf": [SHORT, NULL]}, {"anyOf": [POINT, closed({"z": SMALL})]},
        {"anyOf": [{"const": 1}, {"const": 12}]}, {"anyOf": [False, SMALL]}, {"anyOf": [False]},
        {"type": "string", "anyOf": [{"maxLength": 1}, {"pattern": "^ab$"}]},
        {"type": "object", "properties": {"a": SMALL, "b": SMALL}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"anyOf": [an_array(SMALL, maxItems=2), an_array(SHORT, maxItems=1)]},
        {"anyOf": [{"anyOf": [SMALL, NULL]}, BOOLEAN]}, {"anyOf": [a_number(maximum=-1), a_number(minimum=1)]},
    ),
    "oneOf": (
        {"oneOf": [SHORT, SMALL]}, {"oneOf": [{"const": "a"}, {"const": "b"}]}, {"oneOf": [NUMBER, INTEGER]},
        {"oneOf": [SMALL, SMALL]},
        {"oneOf": [closed({"kind": {"const": "a"}, "v": SMALL}), closed({"kind": {"const": "b"}, "v": SHORT})]},
        {"oneOf": [closed({"a": SMALL}), closed({"b": SMALL})]},
        {"oneOf": [an_integer(multipleOf=2), an_integer(multipleOf=3)]},
        {"oneOf": [an_object(properties={"a": SMALL}), an_object(properties={"b": SMALL})]}, {"oneOf": [STRING]},
        {"oneOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]},
        {"oneOf": [an_integer(maximum=5), an_integer(minimum=5)]},
        {"oneOf": [a_string(maxLength=2), a_string(minLength=2)]}, {"oneOf": [an_array(SMALL), an_array(SHORT)]},
    ),
    "not": (
        {"not": STRING}, {"type": "string", "not": {"const": "a"}}, {"not": {}},
        {"type": "integer", "not": {"multipleOf": 2}},
    ),
    "if": (
        {"type": "integer", "if": {"minimum": 5}, "then": {"multipleOf": 2}},
        {"if": True, "then": SMALL, "else": SHORT},
        closed({"a": SMALL, "b": SMALL}, **{"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}}),
    ),
    "then": ({"type": "integer", "then": {"minimum": 5}},),
    "else": (
        {"type": "integer", "else": {"minimum": 5}},
        {"type": "integer", "if": {"minimum": 5}, "else": {"multipleOf": 2}},
    ),
    "dependentRequired": (
        closed({"a": SMALL, "b": SMALL}, "a", dependentRequired={"a": ["b"]}), {"dependentRequired": {}},
    ),
    "dependentSchemas": (an_object(properties={"a": SMALL}, dependentSchemas={"a": {"required": ["b"]}}),),
    "dependencies": (an_object(properties={"a": SMALL}, dependencies={"a": ["b"]}),),
    "additionalItems": (
        {"type": "array", "prefixItems": [SMALL], "additionalItems": False}, an_array(additionalItems=False),
    ),
    "$ref": (
        {"$ref": "#/$defs/p", "$defs": {"p": POINT}},
        closed({"a": {"$ref": "#/$defs/s"}, "b": {"$ref": "#/$defs/s"}}, **{"$defs": {"s": SHORT}}), tree(),
        {"$ref": "#/definitions/p", "definitions": {"p": POINT}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": SMALL}},
        {"$ref": "#/$defs/p", "$defs": {"p": INTEGER}, "minimum": 3, "maximum": 8},
        {"$ref": "https://example.com/schema.json"}, {"$ref": "other.json#/a"}, {"$ref": "#/$defs/nothing"},
        {"$ref": "#"}, closed({"child": {"$ref": "#"}, "v": SMALL}, "v"),
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": SMALL}}, {"$ref": "#/properties/a", "properties": {"a": SMALL}},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$ref": "#/$defs/a%25b", "$defs": {"a%b": SMALL}},
        an_array({"$ref": "#/$defs/p"}, maxItems=2, **{"$defs": {"p": POINT}}),
    ),
    "$anchor": ({"$ref": "#here", "$defs": {"p": {"$anchor": "here", **SMALL}}}, {"$anchor": "a", **SMALL}),
    "$id": (
        {"$id": "https://example.com/root", **POINT},
        {"$id": "https://example.com/root", "$ref": "item", "$defs": {"i": {"$id": "item", **SMALL}}},
        {"$id": "https://example.com/root", "$ref": "#/$defs/i", "$defs": {"i": SMALL}},
        {"$id": "https://example.com/root", "$ref": "https://example.com/root#/$defs/i", "$defs": {"i": SMALL}},
        closed({"a": {"$id": "inner", "$ref": "#/$defs/i", "$defs": {"i": SMALL}}}, **{"$defs": {"i": SHORT}}),
    ),
    "$schema": (
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **POINT},
        {"$schema": "http://json-schema.org/draft-07/schema#", **POINT},
        {"$schema": "https://example.com/own", **POINT},
    ),
    "$dynamicRef": ({"$dynamicRef": "#node", "$defs": {"n": {"$dynamicAnchor": "node", **SMALL}}},),
    "$dynamicAnchor": ({"$dynamicAnchor": "node", **SMALL},),
    "$vocabulary": ({"$vocabulary": {"https://json-schema.org/draft/2020-12/vocab/core": True}, **SMALL},),
    "$comment": ({"$comment": "why", **SMALL},),
    "$defs": ({"$defs": {}, **POINT}, {"$defs": {"unused": {"not": {}}}, **SMALL}),
    "title": ({"title": "T", **POINT}, closed({"title": {"title": "t", **SHORT}})),
    "description": ({"description": "d", **SMALL},),
    "default": ({"default": 3, **SMALL}, {"default": {"not": 1}, **SMALL}),
    "deprecated": ({"deprecated": True, **SMALL},),
    "readOnly": ({"readOnly": True, **SMALL},),
    "writeOnly": ({"writeOnly": True, **SMALL},),
    "examples": ({"examples": [{"if": 1}], **SMALL},),
    "contentEncoding": (a_string(contentEncoding="base64", maxLength=4),),
    "contentMediaType": (a_string(contentMediaType="application/json", maxLength=4),),
    "contentSchema": (a_string(contentMediaType="application/json", contentSchema=INTEGER, maxLength=4),),
    "nullable": ({"nullable": True, **SHORT},),
    "unknown": (
        {"x-vendor": 1, **SMALL}, {"discriminator": {"propertyName": "a"}, **POINT},
        {"x-guidance": {"lenient": True}, "not": {}},
    ),
}  # fmt: skip

ENFORCED: Final = frozenset(
    {
        *("type", "const", "enum", "format", "pattern", "minLength", "maxLength"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
        *("items", "prefixItems", "minItems", "maxItems", "allOf", "anyOf", "oneOf", "$ref", "$id", "$schema"),
        *("$comment", "$defs", "title", "description", "default", "deprecated", "readOnly", "writeOnly", "examples"),
    }
)
"""Keywords that people use."""


def corpus() -> Iterator[tuple[str, Schema]]:
    """Every schema with a name: those of the table, then pairs of keywords in the properties of one object."""
    for keyword, schemas in TABLE.items():
        for index, schema in enumerate(schemas):
            assert isinstance(schema, dict)
            yield f"{keyword}-{index}", schema
    parts = [
        schemas[1 if len(schemas) > 1 else 0]
        for keyword, schemas in TABLE.items()
        if keyword in ENFORCED and keyword[0] != "$"
    ]
    for index, (left, right) in enumerate(product(parts[:14:2], parts[1:14:2])):
        yield (
            f"pair-{index}",
            closed({"left": left, "right": right, "list": an_array(left, maxItems=2)}, "left", "list"),
        )

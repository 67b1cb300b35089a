"""A hundred schemas, expressions and grammars that were made to hurt: each is small enough to be sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Final

Json = dict[str, object]

EXPRESSIONS: Final[Mapping[str, str]] = {
    "nested plus": "(a+)+$",
    "nested plus, more of it": "^((a+)+)+b$",
    "equal branches": "(a|a)*b",
    "overlapping branches": "(a|aa|aaa|aaaa)+$",
    "words of words": "^([a-zA-Z]+)*$",
    "two runs": "(x+x+)+y",
    "mail": r"^([a-zA-Z0-9])(([-.]|[_]+)?([a-zA-Z0-9]+))*(@){1}[a-z0-9]+[.]{1}(([a-z]{2,3})|([a-z]{2}[.]{1}[a-z]{2}))$",
    "many middles": "(.*a){20}",
    "many optional middles": "(.*,){50}.*z",
    "a long way back": "(a|b)*a(a|b){30}",
    "a way back in a loop": "((a|b)*a(a|b){14}c)+",
    "a billion": "a{1000000000}",
    "up to a billion": "a{0,1000000000}",
    "a billion and more": "a{1000000000,}",
    "counted thrice": "((a{1000}){1000}){1000}",
    "counted four times": "(((a{99}){99}){99}){99}",
    "counted letters": r"\p{L}{5000}",
    "counted words": r"(\w{1,500}\s?){1,500}",
    "all of unicode, counted": r"[^\x00]{60000}",
    "two to the twentieth": "(a|b)" * 20 + "(c|d)*" * 20,
    "optional after optional": "a?" * 3000 + "a" * 3000,
    "deep groups": "(" * 900 + "a" + ")" * 900,
    "very deep groups": "(" * 20_000 + "a" + ")" * 20_000,
    "deep stars": "(" * 200 + "a" + "*)" * 200,
    "many branches": "|".join(f"foo{index}.*bar{index}" for index in range(2000)),
    "long branches": "|".join("x" * size for size in range(330)),
    "ignoring case": "(?i)(" + "ſtraße" * 500 + ")+",
    "look ahead": "(?=a*)*b",
    "look behind": "(?<=a{100})b",
    "memory": r"(a+)\1\1\1",
    "unclosed": "(((((",
    "nothing": "[^\\x00-\\x{10FFFF}]",
    "empty star": "()*",
    "recursion": "(?R)",
    "sixty thousand characters": "ab" * 30_000,
}
LARKS: Final[Mapping[str, str]] = {
    "itself": "start: start",
    "two in a ring": "start: a\na: b\nb: a",
    "left and right": 'start: start start | "a" | ',
    "ambiguous": 'start: a+\na: b* \nb: "x" | a a',
    "a billion": 'start: "a"{1000000000}',
    "a billion rules": 'start: a{1000000000}\na: "x" b\nb: "y"',
    "nested counts": "start: a{1000}\na: b{1000}\nb: c{1000}\nc: /[a-z]/ d\nd: /[0-9]/",
    "deep parentheses": "start: " + "(" * 2000 + '"a"' + ")" * 2000,
    "many rules": "start: r0\n" + "\n".join(f'r{index}: "a" r{index + 1} | ' for index in range(2000)) + '\nr2000: "b"',
    "doubling": "start: r0\n" + "\n".join(f"r{index}: r{index + 1} r{index + 1}" for index in range(40)) + '\nr40: "b"',
    "negated": "start: A\nA: ~/(.*a){10}/ & ~/(.*b){10}/ & /[ab]{100,}/",
    "any token": "start: <[*]>*",
    "no such token": "start: <[99999999]>",
    "no such special": "start: <|nothing|>",
    "no such rule": "start: nothing",
    "no start": 'a: "b"',
    "substring": 'start: S\nS: %regex {"substring_chars": ' + json.dumps("abcdefgh" * 2000) + "}",
    "a remote schema": 'start: %json {"$ref": "http://127.0.0.1:9/schema.json"}',
    "half a schema": 'start: %json {"type": ',
    "an option": 'start: %json {"not": {}, "x-guidance": {"lenient": true}}',
    "sixty thousand characters": "start: " + '"ab" ' * 12_000,
}


def nested(depth: int, wrap: Callable[[object], object]) -> object:
    schema: object = {"type": "string"}
    for _ in range(depth):
        schema = wrap(schema)
    return schema


def chain(length: int) -> Json:
    defs: Json = {f"d{index}": {"$ref": f"#/$defs/d{index + 1}"} for index in range(length)}
    return {"$defs": {**defs, f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def doubling(keyword: str, depth: int) -> Json:
    """Each definition uses the next one twice."""
    defs: Json = {f"d{index}": {keyword: [{"$ref": f"#/$defs/d{index + 1}"}] * 2} for index in range(depth)}
    return {"$defs": {**defs, f"d{depth}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def doubling_objects(depth: int) -> Json:
    defs: Json = {
        f"d{index}": {
            "type": "object",
            "properties": {name: {"$ref": f"#/$defs/d{index + 1}"} for name in "ab"},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
        for index in range(depth)
    }
    return {"$defs": {**defs, f"d{depth}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def schemas() -> Iterator[tuple[str, object]]:
    for depth in (40, 60, 200, 400):
        yield f"objects in objects, {depth}", nested(depth, lambda s: {"type": "object", "properties": {"a": s}})
    for depth in (45, 200):
        yield f"arrays in arrays, {depth}", nested(depth, lambda s: {"type": "array", "items": s})
        yield f"alternatives in alternatives, {depth}", nested(depth, lambda s: {"anyOf": [s, {"type": "null"}]})
        yield f"allOf in allOf, {depth}", nested(depth, lambda s: {"allOf": [s, {"maxLength": 9}]})
    yield "five thousand properties", {"type": "object", "properties": {f"p{index}": {} for index in range(5000)}}
    names = [f"p{index}" for index in range(3000)]
    yield (
        "three thousand required properties",
        {"type": "object", "properties": dict.fromkeys(names, {}), "required": names},
    )
    yield "a thousand optional strings", {"properties": {f"p{index}": {"type": "string"} for index in range(1000)}}
    yield "sixty thousand letters", {"type": "object", "properties": {"x" * 60_000: {"type": "null"}}}
    yield "five thousand values", {"enum": [f"value {index}" for index in range(3500)]}
    yield "twenty thousand numbers", {"enum": list(range(10_000))}
    yield "values in values", {"enum": [nested(100, lambda s: [s])]}
    for keyword in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
        yield f"{keyword} of a billion", {keyword: 1_000_000_000}
    yield (
        "a million items",
        {"type": "array", "items": {"type": "object"}, "minItems": 1_000_000, "maxItems": 1_000_001},
    )
    yield "strings in counted arrays", nested(4, lambda s: {"type": "array", "items": s, "minItems": 1000})
    yield "a long number", {"type": "number", "minimum": float("1" * 300), "maximum": 1e308}
    yield "a short number", {"type": "number", "minimum": 1e-300, "multipleOf": 1e-300}
    yield "a large step", {"type": "integer", "multipleOf": 99_999_989}
    yield "steps of steps", {"allOf": [{"type": "integer", "multipleOf": step} for step in (97, 89, 83, 79)]}
    yield "itself", {"$ref": "#"}
    yield "a ring", {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    yield "a ring of alternatives", {"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}, {"type": "null"}]}]}
    yield (
        "a tree of any depth",
        {"type": "object", "additionalProperties": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    )
    for place in (
        "http://127.0.0.1:9/a.json",
        "https://example.com/a.json",
        "file:///etc/passwd",
        "//a/b",
        "a.json#/x",
    ):
        yield f"from {place}", {"properties": {"a": {"$ref": place}}}
    yield "a chain of references", chain(1500)
    yield "doubled all", doubling("allOf", 24)
    yield "doubled any", doubling("anyOf", 24)
    yield "doubled objects", doubling_objects(24)
    kinds = [{"properties": {f"k{index}": {"const": value} for index in range(3)}} for value in range(8)]
    yield "a product of alternatives", {"allOf": [{"anyOf": kinds}] * 8}
    yield (
        "five hundred of which one",
        {"oneOf": [{"properties": {f"p{index}": {"type": "null"}}} for index in range(500)]},
    )
    yield "overlapping names", {"patternProperties": {f"^.*{'ab'[index % 2]}.{{{index}}}$": {} for index in range(60)}}
    yield "what is not", nested(40, lambda s: {"not": s})
    yield "hidden leniency", {"x-guidance": {"lenient": True, "whitespace_pattern": "(a+)+$"}, "not": {}}
    yield (
        "control characters",
        {"type": "object", "properties": {"\x00\x1f\x7f": {"const": "\x00"}}, "required": ["\x00\x1f\x7f"]},
    )


def hostile() -> Iterator[tuple[str, Json]]:
    """Fields of a chat's body, by name."""
    for name, schema in schemas():
        yield f"schema: {name}", {"response_format": {"type": "json_object", "value": schema}}
    for name, expression in EXPRESSIONS.items():
        yield f"expression: {name}", {"response_format": {"type": "regex", "value": expression}}
    for name in (
        "nested plus",
        "a billion",
        "counted thrice",
        "a long way back",
        "counted words",
        "optional after optional",
    ):
        schema = {"type": "string", "pattern": EXPRESSIONS[name]}
        yield f"pattern: {name}", {"response_format": {"type": "json_object", "value": schema}}
    parameters = {"properties": {"a": {"type": "string", "pattern": EXPRESSIONS["many middles"]}, "b": {"$ref": "#"}}}
    tools = [{"type": "function", "function": {"name": f"f{index}", "parameters": parameters}} for index in range(9)]
    yield "tools: many", {"tools": tools, "tool_choice": "required"}
    deep = {"type": "object", "properties": {"a": nested(300, lambda s: {"type": "array", "items": s})}}
    yield (
        "tools: deep",
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}], "tool_choice": "f"},
    )

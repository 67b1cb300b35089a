"""What of JSON Schema can be enforced while a text is written, and a schema boiled down to that.

A keyword that asserts something is either enforced or refused by its name, never passed over; annotations are dropped.
The notation is draft 2020-12's, whatever `$schema` says, and a schema must be valid by its metaschema before it
comes here. One walk in linear time, over places where a schema may stand: the names of properties and the values of
`enum` are data. What llguidance does not do is known here and nowhere else; what it does not do exactly, in `exact`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, cast
from urllib.parse import unquote

from router.text.exact import ExpressionRefused, exact_expression, exact_format, exact_limits, is_exact_step, steps_fit

Schema = Mapping[str, object] | bool
Pointer = tuple[str, ...]
"""The keys on the way from the root to a place in a schema."""

MAX_DEPTH: Final = 50
"""Schemas inside schemas. What compiles them reads no more than 128 levels of JSON."""

MAX_EXACT: Final = 2**53
"""Numbers beyond it are rounded when they are compiled."""

MAX_HOPS: Final = 16
"""Longest way through references that lead to references."""

HOLDS_SCHEMA: Final = frozenset({"additionalProperties", "items"})
HOLDS_LIST: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
HOLDS_MAP: Final = frozenset({"$defs", "definitions", "patternProperties", "properties"})
NUMBERS: Final = frozenset({"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"})
HOLDS_NUMBERS: Final = NUMBERS | {"const", "enum"}
ASSERTIONS: Final = HOLDS_NUMBERS | {
    *("$ref", "format", "pattern", "required", "type"),
    *("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"),
}
REFUSED: Final = frozenset(
    {
        *("$dynamicRef", "$recursiveRef", "dependencies", "dependentRequired", "dependentSchemas"),
        *("contains", "else", "if", "not", "propertyNames", "then"),
        *("unevaluatedItems", "unevaluatedProperties", "uniqueItems"),
    }
)
SAYS_NOTHING: Final[Mapping[str, object]] = {"propertyNames": True, "uniqueItems": False}
"""Values with which these refused keywords assert nothing."""

IN_PLACE: Final = frozenset({"allOf", "anyOf", "oneOf"})
SAY_NOTHING_OF_OBJECTS: Final = frozenset({"$defs", "definitions", "type"})
SAY_WHAT_ELSE: Final = frozenset({*IN_PLACE, "$ref", "additionalProperties", "patternProperties"})

FORMATS: Final = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
)


class SchemaRefused(Exception):
    """Something in a schema cannot be enforced; names the keyword and where it stands."""


def boil_down(schema: Mapping[str, object]) -> dict[str, object]:
    """The same schema with nothing in it but what is enforced. Raises `SchemaRefused`.

    An object whose schema lists properties, and says nothing of others, gets no others: what is written stays valid,
    and a model that could go on inventing properties might never come to an end.
    """
    return _Walk(schema).run()


class _Walk:
    """One pass over a schema. Keywords keep their order, because it decides the order of an object's properties."""

    def __init__(self, root: Mapping[str, object]) -> None:
        self._root = root
        self._visited: set[Pointer] = set()
        self._references: list[tuple[Pointer, Pointer]] = []
        self._steps: dict[float, Pointer] = {}
        self._objects: dict[Pointer, dict[str, object]] = {}
        self._parts: defaultdict[Pointer, list[Pointer]] = defaultdict(list)
        """Schemas that speak of the same value as the one they belong to."""

    def run(self) -> dict[str, object]:
        schema = self._object(self._root, ())
        for pointer, target in self._references:
            if target not in self._visited:
                raise _refusal(pointer, "$ref", "it leads to no schema of this document")
        if not steps_fit(self._steps):
            raise _refusal([*self._steps.values()][-1], "multipleOf", "together with the others it is too large")
        self._close_objects()
        return schema

    def _schema(self, schema: object, pointer: Pointer, depth: int) -> dict[str, object] | bool:
        if depth > MAX_DEPTH:
            raise SchemaRefused(f"it is nested more than {MAX_DEPTH} schemas deep")
        if isinstance(schema, bool):
            self._visited.add(pointer)
            return schema
        return self._object(cast(Mapping[str, object], schema), pointer, depth)

    def _object(self, schema: Mapping[str, object], pointer: Pointer, depth: int = 0) -> dict[str, object]:
        self._visited.add(pointer)
        _check_counts(schema, pointer)
        boiled: dict[str, object] = {}
        for keyword, value in schema.items():
            if keyword in REFUSED and value != SAYS_NOTHING.get(keyword, ...):
                raise _refusal(pointer, keyword, "it is not supported")
            if keyword == "$id" and pointer:
                raise _refusal(pointer, keyword, "it is only supported at the root")
            if keyword in ASSERTIONS:
                self._check(keyword, value, pointer)
                boiled[keyword] = _expression(cast(str, value), pointer, keyword) if keyword == "pattern" else value
            elif keyword in HOLDS_SCHEMA:
                boiled[keyword] = self._schema(value, (*pointer, keyword), depth + 1)
            elif keyword in HOLDS_LIST:
                boiled[keyword] = self._list(keyword, value, pointer, depth + 1)
            elif keyword in HOLDS_MAP:
                boiled[keyword] = self._map(keyword, value, pointer, depth + 1)
        boiled = self._objects[pointer] = _without_one_of(exact_format(exact_limits(boiled)), self._root)
        return boiled

    def _list(self, keyword: str, value: object, pointer: Pointer, depth: int) -> list[object]:
        schemas = cast(Sequence[object], value)
        if keyword in IN_PLACE:
            self._parts[pointer] += [(*pointer, keyword, str(i)) for i in range(len(schemas))]
        return [self._schema(schema, (*pointer, keyword, str(i)), depth) for i, schema in enumerate(schemas)]

    def _map(self, keyword: str, value: object, pointer: Pointer, depth: int) -> dict[str, object]:
        schemas = cast(Mapping[str, object], value)
        boiled = {name: self._schema(schema, (*pointer, keyword, name), depth) for name, schema in schemas.items()}
        if keyword != "patternProperties":
            return dict(boiled)
        return {_expression(name, pointer, keyword): schema for name, schema in boiled.items()}

    def _check(self, keyword: str, value: object, pointer: Pointer) -> None:
        """What has the right type by the metaschema, but a meaning that is not enforced as it should be."""
        if keyword == "$ref":
            target = _target(cast(str, value), pointer)
            self._references.append((pointer, target))
            self._parts[pointer].append(target)
        elif keyword == "format" and value not in FORMATS:
            raise _refusal(pointer, keyword, f"{str(value)[:60]!r} is not one of {', '.join(sorted(FORMATS))}")
        elif keyword == "multipleOf":
            self._steps[cast(float, value)] = pointer
            if not is_exact_step(cast(float, value)):
                raise _refusal(pointer, keyword, "only integers and sums of halves, quarters, ... are supported")
        elif keyword in HOLDS_NUMBERS and any(abs(number) > MAX_EXACT for number in _numbers(value)):
            raise _refusal(pointer, keyword, f"numbers beyond {MAX_EXACT} are not supported")

    def _close_objects(self) -> None:
        pending = [
            part for pointer, parts in self._parts.items() if _says_more(self._objects[pointer]) for part in parts
        ]
        combined: set[Pointer] = set()
        while pending:
            pointer = pending.pop()
            if pointer not in combined:
                combined.add(pointer)
                pending += self._parts.get(pointer, ())
        for pointer, schema in self._objects.items():
            if pointer not in combined and _lists_all(schema):
                schema["additionalProperties"] = False


def _says_more(schema: Mapping[str, object]) -> bool:
    """Whether the schema's parts have to hold together with something else, instead of one of them alone."""
    all_of = cast(Sequence[object], schema.get("allOf", ()))
    return len(schema.keys() - SAY_NOTHING_OF_OBJECTS) > 1 or len(all_of) > 1


def _lists_all(schema: Mapping[str, object]) -> bool:
    """Whether an object can do with the properties that are listed, and nothing is said of others."""
    listed = schema.get("properties")
    if not isinstance(listed, dict) or not SAY_WHAT_ELSE.isdisjoint(schema):
        return False
    required = cast(Sequence[str], schema.get("required", ()))
    return listed.keys() >= set(required) and len(listed) >= cast(int, schema.get("minProperties", 0))


def _refusal(pointer: Pointer, keyword: str, why: str) -> SchemaRefused:
    place = "/".join(("#", *pointer))
    return SchemaRefused(f"the keyword `{keyword}` at {place[:200]} cannot be enforced: {why}")


def _check_counts(schema: Mapping[str, object], pointer: Pointer) -> None:
    """Names that are not among `properties` may be written twice, and then count once.

    So at most one of those that `minProperties` demands may be of that kind.
    """
    least = cast(int, schema.get("minProperties", 0))
    num_distinct = len(set(cast(Sequence[str], schema.get("required", ()))))
    if least > num_distinct + 1:
        raise _refusal(pointer, "minProperties", f"no more than one property beyond the {num_distinct} required ones")


def _expression(expression: str, pointer: Pointer, keyword: str) -> str:
    try:
        return exact_expression(expression)
    except ExpressionRefused as error:
        raise _refusal(pointer, keyword, str(error)) from error


def _numbers(value: object) -> Iterator[int | float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))


def _target(reference: str, pointer: Pointer) -> Pointer:
    """A JSON pointer in a fragment, taken apart. What a schema refers to elsewhere is never fetched."""
    if reference == "#":
        return ()
    if not reference.startswith("#/"):
        raise _refusal(pointer, "$ref", "only `#` and `#/...`, which lead into the same document, are supported")
    keys = unquote(reference[2:]).split("/")
    return tuple(key.replace("~1", "/").replace("~0", "~") for key in keys)


# Of several alternatives, llguidance enforces "any of them" and proves only the simplest cases of "exactly one".


def _without_one_of(schema: dict[str, object], root: Mapping[str, object]) -> dict[str, object]:
    """`oneOf` says the same as `anyOf` if no value fits two of its schemas."""
    alternatives = schema.get("oneOf")
    if alternatives is None or "anyOf" in schema or not _are_disjoint(cast(Sequence[Schema], alternatives), root):
        return schema
    return {"anyOf" if keyword == "oneOf" else keyword: value for keyword, value in schema.items()}


def _are_disjoint(alternatives: Sequence[Schema], root: Mapping[str, object]) -> bool:
    """Whether they certainly are: by their types, or by a property that all require and each gives other values."""
    schemas = [_resolve(schema, root) for schema in alternatives]
    if _all_differ(_types(schema) for schema in schemas):
        return True
    if any(_types(schema) != ["object"] for schema in schemas):
        return False
    names = cast(Sequence[str], schemas[0].get("required", ()))
    return any(_all_differ(_values(schema, name, root) for schema in schemas) for name in names[:MAX_HOPS])


def _resolve(schema: object, root: Mapping[str, object]) -> Mapping[str, object]:
    """The schema that a reference leads to; one that allows everything where that is not clear."""
    for _ in range(MAX_HOPS):
        if not isinstance(schema, dict):
            return {}
        if "$ref" not in schema:
            return schema
        found: object = root
        for key in _target(schema["$ref"], ()):
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                found = found.get(key) if isinstance(found, dict) else None
        schema = found
    return {}


def _types(schema: Mapping[str, object]) -> list[str] | None:
    types = schema.get("type")
    if isinstance(types, str):
        types = [types]
    return ["number" if name == "integer" else name for name in types] if isinstance(types, list) else None


def _values(schema: Mapping[str, object], name: str, root: Mapping[str, object]) -> list[str] | None:
    """The strings that a required property may hold; None: not known."""
    properties = schema.get("properties")
    if not isinstance(properties, dict) or name not in cast(Sequence[str], schema.get("required", ())):
        return None
    rule = _resolve(properties.get(name), root)
    values = [rule["const"]] if "const" in rule else rule.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return None
    return values


def _all_differ(groups: Iterator[list[str] | None]) -> bool:
    """Whether all groups are known and nothing is in two of them."""
    seen: set[str] = set()
    for group in groups:
        if group is None or not seen.isdisjoint(group):
            return False
        seen.update(group)
    return True

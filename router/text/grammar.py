"""What a text must look like: as a client says it, and as the shards are told.

A schema is measured by the metaschema of JSON Schema draft 2020-12; what a schema refers to is never fetched. JSON is
written on one line, with a space behind commas and colons, as models are used to; with any more freedom a small model
can lose itself in white space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn

import orjson
from jsonschema_rs import Draft202012Validator
from jsonschema_rs import ValidationError as SchemaError
from llguidance import regex_to_lark

from router.text.schema import SchemaRefused, boil_down

MAX_GRAMMAR_BYTES: Final = 65_536
"""Comparing the items of a schema's lists with each other takes a tenth of a second at this size, and ten at twenty
times it."""

MAX_SOURCE_BYTES: Final = 2 * MAX_GRAMMAR_BYTES
"""Schemas grow when they are boiled down, text when it is escaped; and one plan may open hundreds of sequences, each
with its source, in a single message of bounded size."""

METASCHEMA: Final = Draft202012Validator({"$ref": "https://json-schema.org/draft/2020-12/schema"})
JSON_STYLE: Final[Mapping[str, object]] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""llguidance's options; the separators are regular expressions."""

LARK_TOKEN: Final = re.compile(
    r'"(?:\\.|[^"\\\n])*"|//[^\n]*|\#[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<json>%json\b)\s*', re.DOTALL
)
"""Where `%json` may not be looked for, and where it stands."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


JSON_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


class GrammarKind(Enum):
    JSON = "json"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """`value` is a JSON schema (or a string that holds one), a regular expression, or a grammar in Lark's notation with
    schemas behind `%json`."""

    kind: GrammarKind
    value: object
    needs_properties: bool = False
    """TGI's own routes take no schema without `properties`."""


class UnsupportedGrammar(Exception):
    """It is neither of the forms that a grammar takes."""


class InvalidGrammar(Exception):
    """It has the form of a grammar, but does not mean one, or nothing that can be enforced."""


def to_source(grammar: Grammar) -> str:
    """The grammar in llguidance's notation. Raises `UnsupportedGrammar` or `InvalidGrammar`.

    What it says of JSON is enforced or refused here; whether the rest can be compiled is not known yet.
    """
    if grammar.kind is GrammarKind.JSON:
        return _sources(json_schema=_styled(_read_schema(grammar)))
    if not isinstance(grammar.value, str):
        raise UnsupportedGrammar
    _check_size(len(grammar.value.encode(errors="replace")))
    if grammar.kind is GrammarKind.REGEX:
        return _sources(lark_grammar=f"start: EXPRESSION\nEXPRESSION: /{regex_to_lark(grammar.value, '')}/")
    return _sources(lark_grammar=_with_styled_schemas(grammar.value))


def _sources(**grammar: object) -> str:
    try:
        source = orjson.dumps({"grammars": [grammar]})
    except orjson.JSONEncodeError as error:  # a lone surrogate
        raise InvalidGrammar(str(error)) from error
    if len(source) > MAX_SOURCE_BYTES:
        raise InvalidGrammar(f"it is longer than {MAX_SOURCE_BYTES} bytes in the notation of what enforces it")
    return source.decode()


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidGrammar(f"it is longer than {MAX_GRAMMAR_BYTES} bytes")


def _read_schema(grammar: Grammar) -> object:
    schema = grammar.value
    if not isinstance(schema, str | dict) and (grammar.needs_properties or not isinstance(schema, bool)):
        raise UnsupportedGrammar
    try:
        if isinstance(schema, str):
            schema = orjson.loads(schema)
        _check_size(len(orjson.dumps(schema)))
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:  # the latter: nested too deeply
        raise InvalidGrammar(str(error)) from error
    _check_schema(schema)
    if grammar.needs_properties and not (isinstance(schema, dict) and "properties" in schema):
        raise InvalidGrammar("Grammar must have a 'properties' field")
    return schema


def _check_schema(schema: object) -> None:
    try:
        METASCHEMA.validate(schema)
    except SchemaError as error:
        raise InvalidGrammar(error.message) from error


def _styled(schema: object) -> dict[str, object]:
    """A valid schema, boiled down, with our way to write JSON. Raises `InvalidGrammar`."""
    if not isinstance(schema, dict):
        schema = {} if schema else {"enum": []}
    try:
        return {**boil_down(schema), "x-guidance": JSON_STYLE}
    except SchemaRefused as error:
        raise InvalidGrammar(str(error)) from error


def _with_styled_schemas(text: str) -> str:
    """The schemas in a Lark grammar are treated as if they came alone. Raises `InvalidGrammar`."""
    parts: list[str] = []
    copied = position = 0
    while (token := LARK_TOKEN.search(text, position)) is not None:
        position = token.end()
        if token["json"] is None:
            continue
        try:
            schema, end = JSON_DECODER.raw_decode(text, position)
            orjson.dumps(schema)
        except (ValueError, orjson.JSONEncodeError, RecursionError) as error:  # some numbers are no JSONDecodeError
            raise InvalidGrammar(f"%json is followed by something else than a schema: {error}") from error
        _check_schema(schema)
        parts += [text[copied:position], orjson.dumps(_styled(schema)).decode()]
        copied = position = end
    return "".join([*parts, text[copied:]])

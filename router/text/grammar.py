"""What a text must look like, as a client says it, and whether that can be meant.

A schema is measured by the metaschema of JSON Schema draft 2020-12; what a schema refers to is never fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

import orjson
from jsonschema_rs import Draft202012Validator
from jsonschema_rs import ValidationError as SchemaError

MAX_SCHEMA_BYTES: Final = 65_536
"""Comparing the items of a list with each other takes a tenth of a second at this size, and ten at twenty times it."""

METASCHEMA: Final = Draft202012Validator({"$ref": "https://json-schema.org/draft/2020-12/schema"})


class GrammarKind(Enum):
    JSON = "json"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Grammar:
    """`value` is a JSON schema (an object, or a string that holds one) or a regular expression."""

    kind: GrammarKind
    value: object


class UnsupportedGrammar(Exception):
    """It is neither of the forms that a grammar takes."""


class InvalidGrammar(Exception):
    """It has the form of a grammar, but does not mean one."""


def read_schema(grammar: Grammar) -> dict[str, object]:
    """The schema of a JSON grammar. Raises `UnsupportedGrammar` or `InvalidGrammar`."""
    schema = grammar.value
    if not isinstance(schema, str | dict):
        raise UnsupportedGrammar
    try:
        if isinstance(schema, str):
            schema = orjson.loads(schema)
        if len(orjson.dumps(schema)) > MAX_SCHEMA_BYTES:
            raise InvalidGrammar(f"it is longer than {MAX_SCHEMA_BYTES} bytes")
        METASCHEMA.validate(schema)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:  # the latter: nested too deeply
        raise InvalidGrammar(str(error)) from error
    except SchemaError as error:
        raise InvalidGrammar(error.message) from error
    if not isinstance(schema, dict) or "properties" not in schema:
        raise InvalidGrammar("Grammar must have a 'properties' field")
    return schema

"""`response_format` in every shape that clients send, and `text.format` of /v1/responses; both become a `Grammar`.

OpenAI's shapes, TGI's, and what Hugging Face's and LangChain's clients make of them differ in where the schema is:

    json, json_object    in `value` or `schema`, or nowhere: any object
    json_schema          in `schema` of `json_schema`, of `value`, or of the format itself
    regex                an expression in `value`

`name` and `strict` change nothing: what is accepted is always enforced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from router.api.schemas import mismatch, refusal
from router.text.grammar import Grammar, GrammarKind

ANY_OBJECT: Final[Mapping[str, object]] = {"type": "object"}
KINDS: Final = "`text`, `json`, `json_object`, `json_schema`, `regex`"


def read_format(value: object) -> Grammar | None:
    """None: free text. Raises pydantic's error in serde's words."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise mismatch(value, "struct ResponseFormat")
    match value.get("type"):
        case "text":
            return None
        case "json" | "json_object":
            schema = _first_given(value, "value", "schema")
            return Grammar(GrammarKind.JSON, dict(ANY_OBJECT) if schema is None else schema)
        case "json_schema":
            return Grammar(GrammarKind.JSON, _inner_schema(value))
        case "regex":
            return Grammar(GrammarKind.REGEX, _expression(value.get("value")))
        case None:
            raise refusal("missing field `type`")
    raise refusal(f"unknown variant in `type`, expected one of {KINDS}")


def _inner_schema(format_: Mapping[str, object]) -> object:
    holder = _first_given(format_, "json_schema", "value")
    holder = format_ if holder is None else holder
    if not isinstance(holder, dict):
        raise mismatch(holder, "struct JsonSchemaConfig")
    if holder.get("schema") is None:
        raise refusal("missing field `schema`")
    return holder["schema"]


def _expression(value: object) -> str:
    if not isinstance(value, str):
        raise refusal("missing field `value`") if value is None else mismatch(value, "a string")
    return value


def _first_given(holder: Mapping[str, object], *names: str) -> object:
    return next((holder[name] for name in names if holder.get(name) is not None), None)

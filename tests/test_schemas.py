"""Every keyword of JSON Schema is enforced or refused by name: what a grammar lets through, `jsonschema` accepts."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import pytest
from jsonschema import Draft202012Validator

from router.text.grammar import Grammar, GrammarKind, InvalidGrammar
from router.text.grammar_compiler import GrammarCompiler
from tests.schemas import ENFORCED, TABLE, Schema, corpus
from tests.tiny_tokenizers import byte_level
from tests.walks import Walker

FAST = byte_level()
WALKER = Walker(FAST, "<|end|>")
CORPUS = dict(corpus())
NUM_WALKS = 25
CONTRADICTS_ITSELF = re.compile("Unsatisfiable|no text conforms|not valid under any|is not of type")
KEYWORDS_OF_2020_12 = frozenset(
    {
        *("$schema", "$id", "$ref", "$anchor", "$dynamicRef", "$dynamicAnchor", "$vocabulary", "$comment", "$defs"),
        *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "prefixItems", "items"),
        *("contains", "properties", "patternProperties", "additionalProperties", "propertyNames"),
        *("unevaluatedItems", "unevaluatedProperties", "type", "enum", "const", "multipleOf", "maximum"),
        *("exclusiveMaximum", "minimum", "exclusiveMinimum", "maxLength", "minLength", "pattern", "maxItems"),
        *("minItems", "uniqueItems", "maxContains", "minContains", "maxProperties", "minProperties", "required"),
        *("dependentRequired", "format", "contentEncoding", "contentMediaType", "contentSchema", "title"),
        *("description", "default", "deprecated", "readOnly", "writeOnly", "examples"),
    }
)

Verdict = str | InvalidGrammar
"""A schema's source, or why it is refused."""


async def judge(schemas: dict[str, Schema]) -> dict[str, Verdict]:
    compiler = GrammarCompiler(FAST.to_str, FAST.get_vocab_size(), [FAST.token_to_id("<|end|>")])

    async def compiled(schema: Schema) -> Verdict:
        try:
            return await compiler.compile(Grammar(GrammarKind.JSON, schema))
        except InvalidGrammar as error:
            return error

    return {name: await compiled(schema) for name, schema in schemas.items()}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    return asyncio.run(judge(CORPUS))


def keywords_in(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from keywords_in(item)
    if isinstance(value, list):
        for item in value:
            yield from keywords_in(item)


def test_the_corpus_has_every_keyword() -> None:
    assert len(CORPUS) > 400
    assert len({json.dumps(schema) for schema in CORPUS.values()}) > 400
    assert set(TABLE) >= KEYWORDS_OF_2020_12


@pytest.mark.parametrize("keyword", sorted(ENFORCED))
def test_what_people_use_is_enforced(keyword: str, verdicts: dict[str, Verdict]) -> None:
    assert isinstance(verdicts[f"{keyword}-0"], str), verdicts[f"{keyword}-0"]


def test_most_schemas_are_enforced(verdicts: dict[str, Verdict]) -> None:
    assert sum(isinstance(verdict, str) for verdict in verdicts.values()) > 0.75 * len(CORPUS)


@pytest.mark.filterwarnings("ignore:Possible (nested set|set):FutureWarning")  # of Python's, about expressions
@pytest.mark.parametrize("name", CORPUS)
def test_a_schema_is_enforced_or_refused_by_name(name: str, verdicts: dict[str, Verdict]) -> None:
    schema, verdict = CORPUS[name], verdicts[name]
    if isinstance(verdict, InvalidGrammar):
        is_named = any(keyword in str(verdict) for keyword in keywords_in(schema))
        assert is_named or CONTRADICTS_ITSELF.search(str(verdict)), verdict
        return
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)

    documents = list(WALKER.documents(verdict, NUM_WALKS))

    assert documents
    for document in documents:
        validator.validate(document)

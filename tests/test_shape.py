"""Answers of a given shape: whatever a grammar lets through, the parsers read as what it was meant to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer as FastTokenizer

from router.text.grammar import Grammar, GrammarKind, InvalidGrammar
from router.text.reasoning import ReasoningSplitter
from router.text.shape import Calls, shape_answer
from router.text.tools import FORMATS, MISTRAL_HEADER_FORM, ToolFormat, ToolParser
from tests.tiny_tokenizers import byte_level, tokenizer_of
from tests.walks import Walker

WEATHER: Final = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 9},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["c", "f"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOW: Final = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS: Final[Mapping[str, object]] = {"weather": WEATHER, "tools/now.2": NOW}
EMPTY_OBJECT: Final = Grammar(GrammarKind.JSON, {"type": "object", "maxProperties": 0})
FORMS: Final = {**{name: format_.form for name, format_ in FORMATS.items()}, "mistral headers": MISTRAL_HEADER_FORM}


def a_tokenizer() -> FastTokenizer:
    """With markers as special tokens, as added ones, and (`</tool_call>`) as text like any other."""
    fast = byte_level()
    fast.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"])
    fast.add_tokens(["<tool_call>", "</think>"])
    return fast


FAST = a_tokenizer()
WALKER = Walker(FAST, "<|end|>")
TOKENIZER = tokenizer_of(FAST)


def shape(structure: Grammar | None = None, calls: Calls | None = None, behind: str | None = None) -> str:
    grammar = shape_answer(structure, calls, thinks_behind=behind, marker_id=TOKENIZER.marker_id)
    assert grammar is not None
    assert grammar.kind is GrammarKind.LARK
    return str(grammar.value)


def family_of(form: str) -> ToolFormat:
    return FORMATS[form.split()[0]]


def read(form: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolParser(family_of(form), FUNCTIONS)
    deltas = [parser.feed(text), parser.close()]
    calls: list[tuple[str, str]] = []
    for piece in (call for delta in deltas for call in delta.calls):
        if piece.name is not None:
            calls.append((piece.name, piece.arguments))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return "".join(delta.content for delta in deltas), calls


@pytest.mark.parametrize("form", FORMS)
def test_calls_that_must_be_are_read_and_fit_their_schemas(form: str) -> None:
    start = WALKER.compile(shape(calls=Calls(FORMS[form], FUNCTIONS, allows_several=True)))
    seen, most = set(), 0

    for seed in range(60):
        walk = WALKER.walk(start, seed)
        if not walk.ended:
            continue
        content, calls = read(form, walk.text)
        assert content == ""
        assert calls
        for name, arguments in calls:
            Draft202012Validator(FUNCTIONS[name]).validate(json.loads(arguments))
            seen.add(name)
        most = max(most, len(calls))

    assert seen == set(FUNCTIONS)
    assert most > 1


@pytest.mark.parametrize("form", FORMS)
def test_one_call_where_several_are_not_allowed(form: str) -> None:
    start = WALKER.compile(shape(calls=Calls(FORMS[form], FUNCTIONS, allows_several=False)))

    walks = [WALKER.walk(start, seed) for seed in range(40)]

    counts = {len(read(form, walk.text)[1]) for walk in walks if walk.ended}

    assert counts == {1}


def takes(source: str, text: str) -> bool:
    """Whether a grammar allows exactly this text, with markers as tokens of their own."""
    matcher = WALKER.compile(source)
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_the_calls_are_written_as_each_family_is_trained_to() -> None:
    texts = {
        "hermes": '<tool_call>\n{"name": "tools/now.2", "arguments": {}}\n</tool_call>',
        "llama": '{"name": "tools/now.2", "parameters": {}}',
        "mistral": '[TOOL_CALLS][{"name": "tools/now.2", "arguments": {}}]',
        "mistral headers": "[TOOL_CALLS]tools/now.2[ARGS]{}",
    }

    for form, text in texts.items():
        source = shape(calls=Calls(FORMS[form], FUNCTIONS, allows_several=True))
        assert takes(source, text)
        assert not takes(source, text + "x")
        assert not takes(source, "{}")


def test_a_structure_and_calls_leave_the_choice() -> None:
    source = shape(EMPTY_OBJECT, Calls(FORMS["hermes"], FUNCTIONS, allows_several=False))

    assert takes(source, "{}")
    assert takes(source, '<tool_call>\n{"name": "tools/now.2", "arguments": {}}\n</tool_call>')
    assert not takes(source, "yes")


@pytest.mark.parametrize(
    ("structure", "answer"),
    [
        (EMPTY_OBJECT, "{}"),
        (Grammar(GrammarKind.JSON, '{"enum": ["a/b"]}'), '"a/b"'),
        (Grammar(GrammarKind.REGEX, "a/b+\\n"), "a/bb\n"),
    ],
)
@pytest.mark.parametrize(
    ("prompt", "thought"),
    [
        ("Q", "<think>\nHm. </thin </think>\n\n"),
        ("Q", "<think></think>"),
        ("Q", ""),
        ("Q<think>\n", "Hm.\n</think>\n\n"),
        ("Q<think>", "</think>"),
    ],
)
def test_a_model_that_thinks_may_do_so_before_it_answers(
    structure: Grammar, answer: str, prompt: str, thought: str
) -> None:
    source = shape(structure, behind=prompt)
    splitter = ReasoningSplitter(prompt)
    content = splitter.feed(thought + answer).content + splitter.close().content

    assert takes(source, thought + answer)
    assert not takes(source, thought + "x")
    assert content == answer


def test_the_closing_mark_may_be_text_like_any_other() -> None:
    plain = byte_level()
    grammar = shape_answer(EMPTY_OBJECT, None, thinks_behind="Q<think>", marker_id=tokenizer_of(plain).marker_id)
    walker = Walker(plain, "<|end|>")
    assert grammar is not None
    tokens = tokenizer_of(plain).encode("a </think b </think>\n{}")

    matcher = walker.compile(str(grammar.value))

    assert matcher.try_consume_tokens(tokens) == len(tokens)
    assert matcher.is_accepting()


def test_what_is_structured_and_nothing_else_stays_as_it_is() -> None:
    expression = Grammar(GrammarKind.REGEX, "a+")

    for grammar in (None, EMPTY_OBJECT, expression, Grammar(GrammarKind.LARK, 'start: "a"')):
        assert shape_answer(grammar, None, thinks_behind=None, marker_id=TOKENIZER.marker_id) is grammar
    assert shape_answer(None, None, thinks_behind="Q", marker_id=TOKENIZER.marker_id) is None


def test_a_grammar_of_a_whole_text_leaves_no_room_for_thoughts() -> None:
    with pytest.raises(InvalidGrammar):
        shape_answer(Grammar(GrammarKind.LARK, 'start: "a"'), None, thinks_behind="Q", marker_id=TOKENIZER.marker_id)


@pytest.mark.parametrize(
    ("name", "parameters", "sentence"),
    [
        ('a"b', NOW, """the function name 'a"b' does not match"""),
        ("a b", NOW, "the function name 'a b' does not match"),
        ("a[ARGS]", NOW, "does not match"),
        ("f", {"type": "string"}, "the parameters of f are not the schema of an object"),
        ("f", {"type": ["string", "null"]}, "the parameters of f are not the schema of an object"),
        ("f", True, "the parameters of f are not the schema of an object"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(name: str, parameters: object, sentence: str) -> None:
    calls = Calls(FORMS["hermes"], {name: parameters}, allows_several=True)

    with pytest.raises(InvalidGrammar) as refusal:
        shape_answer(None, calls, thinks_behind=None, marker_id=TOKENIZER.marker_id)

    assert sentence in str(refusal.value)


def test_functions_by_the_thousand_are_refused() -> None:
    calls = Calls(FORMATS["hermes"].form, {f"f{index}": {} for index in range(1_001)}, True)

    with pytest.raises(InvalidGrammar, match="there are more than 1000 functions"):
        shape(calls=calls)


def test_arguments_are_an_object_whatever_the_schema_leaves_open() -> None:
    loose = {"a": {}, "b": {"type": ["object", "null"]}, "c": {"properties": {"x": {"type": "null"}}}}
    source = shape(calls=Calls(FORMS["llama"], loose, allows_several=False))

    for name in loose:
        assert takes(source, f'{{"name": "{name}", "parameters": {{}}}}')
        assert not takes(source, f'{{"name": "{name}", "parameters": null}}')

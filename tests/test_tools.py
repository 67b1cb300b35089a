"""Tool calls and thoughts in a model's text: the same whatever pieces it comes in, and nothing lost."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence

import pytest

from router.text.reasoning import ReasoningSplitter
from router.text.tools import FORMATS, MISTRAL_FORM, MISTRAL_HEADER_FORM, ToolParser, describe_tools, find_format

NAMES = frozenset({"weather", "now"})
TRICKY = {"city": 'Zürich "\\" }]', "nested": {"a": [1, {"b": "</tool_call>"}], "c": None}, "n": -1.5e3, "ok": True}

Call = tuple[str, str]
"""Name and arguments."""


def pieces(text: str, seed: int) -> Iterator[str]:
    chance = random.Random(seed)
    while text:
        size = chance.choice((1, 1, 2, 3, 7, 30))
        yield text[:size]
        text = text[size:]


def parse(family: str, parts: Sequence[str] | Iterator[str], max_calls: int | None = None) -> tuple[str, list[Call]]:
    """Content and calls, put together as a client does."""
    parser = ToolParser(FORMATS[family], NAMES, max_calls=max_calls)
    deltas = [*map(parser.feed, parts), parser.close()]
    calls: list[list[str]] = []
    for piece in (call for delta in deltas for call in delta.calls):
        if piece.index == len(calls):
            assert piece.name, "the first piece of a call names it"
            assert piece.call_id
            calls.append([piece.name, piece.arguments])
        else:
            assert (piece.index, piece.name, piece.call_id) == (len(calls) - 1, None, None)
            calls[-1][1] += piece.arguments
    return "".join(delta.content for delta in deltas), [(name, arguments) for name, arguments in calls]


def parse_alike(family: str, text: str) -> tuple[str, list[Call]]:
    """Whole, by characters and in random pieces; all must say the same."""
    whole = parse(family, [text])
    assert parse(family, list(text)) == whole
    for seed in range(20):
        assert parse(family, pieces(text, seed)) == whole
    return whole


A = json.dumps(TRICKY)
B = '{"city": "Bern"}'
CALLS = [
    ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {A}}}\n</tool_call>', "", [("weather", A)]),
    ("hermes", f'<tool_call>{{"arguments": {B}, "name": "weather"}}</tool_call>', "", [("weather", B)]),
    (
        "hermes",
        f'I look.\n<tool_call>\n{{"name": "weather", "arguments": {B}}}\n</tool_call>\n<tool_call>\n'
        f'{{"name": "now", "arguments": {{}}}}\n</tool_call>',
        "I look.\n",
        [("weather", B), ("now", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", "{}")]),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {json.dumps(B)}}}</tool_call>', "", [("weather", B)]),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {B}</tool_call>', "", [("weather", B)]),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')]),
    ("hermes", '<tool_call>{"name": "now"}</tool_c', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> Done.', "Done.", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>\n<tool_call>\n{"name": "wea', "", [("now", "{}")]),
    ("llama", f'{{"name": "weather", "parameters": {A}}}', "", [("weather", A)]),
    ("llama", f'{{"type": "function", "name": "weather", "parameters": {B}}}', "", [("weather", B)]),
    ("llama", f'<|python_tag|>{{"name": "other", "parameters": {B}}}', "", [("other", B)]),
    (
        "llama",
        f'{{"name": "now", "parameters": {{}}}}; {{"name": "weather", "parameters": {B}}}',
        "",
        [("now", "{}"), ("weather", B)],
    ),
    ("mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {A}, "id": "a1b2c3d4e"}}]', "", [("weather", A)]),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "now", "arguments": {{}}}}, {{"arguments": {B}, "name": "weather"}}]',
        "",
        [("now", "{}"), ("weather", B)],
    ),
    ("mistral", f"Well. [TOOL_CALLS]weather[ARGS]{A}", "Well. ", [("weather", A)]),
    (
        "mistral",
        f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{B}[TOOL_CALLS]now{{}}",
        "",
        [("weather", B), ("now", "{}")],
    ),
]


@pytest.mark.parametrize(("family", "text", "content", "calls"), CALLS)
def test_calls_are_found_however_they_arrive(family: str, text: str, content: str, calls: list[Call]) -> None:
    assert parse_alike(family, text) == (content, calls)


ANSWERS = [
    ("hermes", "Just text with < and <tool and <b>."),
    ("hermes", "<tool_call>not JSON</tool_call>"),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}'),
    ("hermes", '<tool_call>\n{"arguments": {"a": 1}}'),
    ("hermes", '<tool_call>{"name": "wea'),
    ("hermes", '{"name": "weather", "arguments": {}}'),
    ("hermes", "It ends with <tool_c"),
    ("llama", '{"city": "Bern"}'),
    ("llama", '{"name": "Ada", "parameters": {}}'),
    ("llama", '  \n {"name": '),
    ("llama", "Text, then a brace {"),
    ("llama", "{"),
    ("mistral", "[TOOL_CALLS] no call here {}"),
    ("mistral", "[TOOL_CALLS]" + "x" * 500),
    ("mistral", "a [list] of things"),
]


@pytest.mark.parametrize(("family", "text"), ANSWERS)
def test_what_is_no_call_is_given_back_whole(family: str, text: str) -> None:
    assert parse_alike(family, text) == (text, [])


def test_arguments_are_passed_on_while_they_are_written() -> None:
    parser = ToolParser(FORMATS["hermes"], NAMES)
    parser.feed('<tool_call>{"name": "weather", "arguments": ')

    first, second = parser.feed('{"city": "Z'), parser.feed('ürich"')

    assert [call.arguments for call in first.calls + second.calls] == ['{"city": "Z', 'ürich"']


def test_content_waits_only_for_what_may_become_a_marker() -> None:
    parser = ToolParser(FORMATS["hermes"], NAMES)

    assert parser.feed("a <tool").content == "a "
    assert parser.feed("s").content == "<tools"


def test_json_that_is_an_answer_is_not_held_back() -> None:
    parser = ToolParser(FORMATS["llama"], NAMES)

    assert parser.feed('{"city"').content == '{"city"'


def test_calls_beyond_the_allowed_are_left_out() -> None:
    text = '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>'

    assert parse("hermes", text, max_calls=1) == ("", [("now", "{}")])


def test_ids_have_the_form_that_the_family_takes_back() -> None:
    ids = {}
    for family, text in (("hermes", '<tool_call>{"name": "now"}'), ("mistral", "[TOOL_CALLS]now{}")):
        ids[family] = [ToolParser(FORMATS[family], NAMES).feed(text).calls[0].call_id for _ in range(2)]

    assert all(re.fullmatch(r"call_[0-9a-f]{24}", str(call_id)) for call_id in ids["hermes"])
    assert all(re.fullmatch(r"[A-Za-z0-9]{9}", str(call_id)) for call_id in ids["mistral"])
    assert all(len(set(pair)) == 2 for pair in ids.values())


@pytest.mark.parametrize("family", FORMATS)
def test_random_text_is_never_lost_or_invented(family: str) -> None:
    """Whatever is not in a call comes out as it went in, apart from markers and blanks around calls."""
    words = [
        *FORMATS[family].markers,
        '{"name": "',
        "now",
        '"',
        ', "arguments": {',
        "}",
        "}",
        " ",
        "\n",
        "[",
        "]",
        ";",
        "é",
    ]
    for seed in range(300):
        chance = random.Random(seed)
        text = "".join(chance.choice(words) for _ in range(30))
        content, calls = parse_alike(family, text)
        if not calls:
            assert content == text


def test_long_runs_of_anything_take_linear_time() -> None:
    """A parser that looked at its text again and again would not come to an end here."""
    for family in FORMATS:
        opening = FORMATS[family].opening
        for run in ("{", "[", '"', "\\", " ", "<", "a", opening):
            for start in ("", opening, opening + '{"name": "now", "arguments": {"a": "'):
                parse(family, [start, *([run] * 6_000)])


def test_the_family_is_read_off_the_templates() -> None:
    assert find_format(["{{ '[TOOL_CALLS]' }}"]) is FORMATS["mistral"]
    assert find_format(["plain", "{{ '<|python_tag|>' }}"]) is FORMATS["llama"]
    assert find_format(["{{ '<tool_call>' }}"]) is FORMATS["hermes"]
    assert find_format([]) is FORMATS["hermes"]


def test_a_family_may_be_named_and_its_form_is_still_read_off_the_templates() -> None:
    headers = ["{{ '[TOOL_CALLS]' }}{{ name }}[ARGS]{{ arguments }}"]

    assert find_format(["{{ '[TOOL_CALLS]' }}"], "llama") is FORMATS["llama"]
    assert find_format(headers).form is find_format(headers, "mistral").form is MISTRAL_HEADER_FORM
    assert find_format([], "mistral").form is MISTRAL_FORM


def test_an_answer_that_had_to_be_calls_has_no_content() -> None:
    parser = ToolParser(FORMATS["hermes"], NAMES, only_calls=True)

    delta = parser.feed('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>\n{"na')

    assert [call.name for call in delta.calls] == ["now"]
    assert delta.content == parser.close().content == ""
    cut = ToolParser(FORMATS["hermes"], NAMES, only_calls=True)
    assert cut.feed("<tool_call>\n{").content + cut.close().content == ""


def test_tools_are_described_behind_the_last_message() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}]

    *before, last = describe_tools(messages, [{"type": "function"}], "Use them.")

    assert before == messages[:1]
    assert last == {"role": "user", "content": 'What?\n---\n{"type": "function"}\nUse them.'}


# Thoughts


def split(parts: Sequence[str] | Iterator[str], prompt: str) -> tuple[str, str]:
    splitter = ReasoningSplitter(prompt)
    thoughts = [*map(splitter.feed, parts), splitter.close()]
    return "".join(t.reasoning for t in thoughts), "".join(t.content for t in thoughts)


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("Q", "<think>\nHm. 1 < 2</think>\n\nYes.\n", "Hm. 1 < 2", "Yes.\n"),
        ("Q", "\n<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("Q<think>\n", "Hm.\n</think>\n\nYes.", "Hm.\n", "Yes."),
        ("Q", "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
        ("Q", "<think>cut <of", "cut <of", ""),
        ("Q", "<thi", "", "<thi"),
        ("Q", "\n", "", "\n"),
        ("Q", " " * 40 + "x", "", " " * 40 + "x"),
        ("Q<think>", "</think>a</think>", "", "a</think>"),
    ],
)
def test_thoughts_are_told_from_answers(prompt: str, text: str, reasoning: str, content: str) -> None:
    assert split([text], prompt) == (reasoning, content)
    assert split(list(text), prompt) == (reasoning, content)
    assert split(pieces(text, 1), prompt) == (reasoning, content)

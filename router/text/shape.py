"""The shape of a chat answer as one grammar: a thought, then tool calls or text of a given structure.

    answer ─► thought? (calls | structured text)

Calls are written in the model's own words (`tools.CallForm`), so that the parser which reads free answers reads these
too, and their arguments follow each function's schema. Thoughts are free text: a model that had to begin with its
answer would not think. What a schema or an expression may say is `grammar`'s business; here they are put together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import orjson
from llguidance import regex_to_lark

from router.text.grammar import Grammar, GrammarKind, InvalidGrammar
from router.text.reasoning import CLOSING, OPENING, has_begun
from router.text.tools import CallForm

FUNCTION_NAME: Final = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
"""OpenAI's names and the longer ones of tool servers; none of them needs an escape in any model's words."""

MAX_CALLS: Final = 32
"""Small models repeat themselves, and a call is a place to do so for ever."""

MAX_FUNCTIONS: Final = 1_000
"""More never fit into a grammar, and writing the rules of many thousands would keep the event loop."""

FREE_TEXT: Final = r"/(?s:.*)/"
BEHIND_THOUGHT: Final = r"/\n{0,2}/"
"""As many line ends as models are trained to write there; who reads thoughts takes them for part of the mark."""

Json = Mapping[str, object]
MarkerId = Callable[[str], int | None]
"""The id of the token that is written like this, if a grammar has to name it by its id."""


@dataclass(frozen=True, slots=True)
class Calls:
    """The functions, at least one of which is called; by name, with the schema of their arguments."""

    form: CallForm
    parameters: Mapping[str, object]
    allows_several: bool


def shape_answer(
    structure: Grammar | None, calls: Calls | None, *, thinks_behind: str | None, marker_id: MarkerId
) -> Grammar | None:
    """What all of an answer looks like; None: anything. With both `structure` and `calls` the model may choose.

    `thinks_behind` is the prompt, of a model whose thoughts are told from its answers. Raises `InvalidGrammar`.
    """
    if calls is None and (structure is None or thinks_behind is None):
        return structure
    parts = [name for name, is_there in (("calls", calls), ("structure", structure)) if is_there is not None]
    lines = [f"body: {' | '.join(parts)}"]
    if thinks_behind is None:
        lines.append("start: body")
    else:
        lines += _thought_rules(has_begun(thinks_behind), marker_id)
    if structure is not None:
        lines.append(f"structure: {_structure(structure)}")
    if calls is not None:
        lines += _call_rules(calls, marker_id)
    return Grammar(GrammarKind.LARK, "\n".join(lines))


def _thought_rules(has_begun: bool, marker_id: MarkerId) -> Iterator[str]:
    """A thought ends with the first closing mark; where none has begun the model need not have one."""
    yield f"start: thought {BEHIND_THOUGHT} body" if has_begun else f"start: (opening thought {BEHIND_THOUGHT})? body"
    if not has_begun:
        yield f"opening: {_terminal(OPENING, marker_id)}"
    if marker_id(CLOSING) is None:
        yield f"thought[suffix={json.dumps(CLOSING)}]: {FREE_TEXT}"
    else:
        yield f"thought: {FREE_TEXT} {_terminal(CLOSING, marker_id)}"


def _structure(grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON:
            return _json_rule(grammar.value)
        case GrammarKind.REGEX:
            return f"/{regex_to_lark(str(grammar.value), '')}/"
    raise InvalidGrammar("a Lark grammar describes a whole text, not an answer with thoughts or tool calls")


def _call_rules(calls: Calls, marker_id: MarkerId) -> Iterator[str]:
    form = calls.form
    if len(calls.parameters) > MAX_FUNCTIONS:
        raise InvalidGrammar(f"there are more than {MAX_FUNCTIONS} functions")
    separator = _sequence(form.separator, marker_id)
    more = f" ({separator} call){{0,{MAX_CALLS - 1}}}" if calls.allows_several else ""
    yield f"calls: {_sequence(form.opening, marker_id)} call{more} {_sequence(form.closing, marker_id)}"
    yield "call: " + " | ".join(f"call_{index}" for index in range(len(calls.parameters)))
    for index, (name, parameters) in enumerate(calls.parameters.items()):
        if not FUNCTION_NAME.fullmatch(name):
            raise InvalidGrammar(f"the function name {name[:60]!r} does not match {FUNCTION_NAME.pattern}")
        before = _sequence((*form.before_name, name, *form.behind_name), marker_id)
        yield f"call_{index}: {before} arguments_{index} {_sequence(form.behind_arguments, marker_id)}"
        yield f"arguments_{index}: {_json_rule(_object_schema(name, parameters))}"


def _object_schema(name: str, parameters: object) -> Json:
    """Arguments are an object whatever a schema leaves open."""
    if isinstance(parameters, dict):
        kinds = parameters.get("type", "object")
        if kinds == "object" or (isinstance(kinds, list) and "object" in kinds):
            return {**parameters, "type": "object"}
    raise InvalidGrammar(f"the parameters of {name} are not the schema of an object")


def _json_rule(schema: object) -> str:
    """A schema, or a string that holds one."""
    try:
        schema = orjson.loads(schema) if isinstance(schema, str) else schema
        return f"%json {orjson.dumps(schema).decode()}"
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:  # the latter: nested too deeply
        raise InvalidGrammar(str(error)) from error


def _sequence(texts: Sequence[str], marker_id: MarkerId) -> str:
    return " ".join(_terminal(text, marker_id) for text in texts)


def _terminal(text: str, marker_id: MarkerId) -> str:
    """A marker that is a token of its own is not made of characters."""
    token_id = marker_id(text)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"

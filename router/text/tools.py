"""Tool calls in a model's own words, found while they are being written.

    text ─► ToolParser: content, or a call's name and then its arguments, piece by piece

Three families of models are understood, whose calls are JSON behind a marker:

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>          Hermes, Qwen
    llama    <|python_tag|>{"name": ..., "parameters": {...}}; {...}           Llama 3.x, the marker may be missing
    mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]              and name[ARGS]{...} since 2025

Every character is looked at once, by an automaton. What turns out not to be a call is given back as content, so that
nothing a model says is lost. Arguments are passed on as the model wrote them. Knows neither tokens nor HTTP.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from router.text.stop import num_begun

NAME_KEY: Final = "name"
ARGUMENTS_KEYS: Final = ("arguments", "parameters")
FIRST_KEYS: Final = frozenset({NAME_KEY, *ARGUMENTS_KEYS, "type", "id"})
"""With what a call may begin; JSON that begins otherwise is an answer."""

BLANKS: Final = " \t\r\n"
SCALAR_ENDS: Final = BLANKS + ",}]"
MAX_HEADER_CHARS: Final = 256
"""Mistral's `name[CALL_ID]id[ARGS]` before the arguments."""
MISTRAL_ID_CHARS: Final = 9
"""Mistral's templates take no other ids when they show a call of the past."""

INSTRUCTIONS: Final = (
    "The functions above can be called. If one of them helps with the request, answer with nothing but\n"
    '<tool_call>{"name": "the function\'s name", "arguments": {"each argument": "its value"}}</tool_call>\n'
    "and with one such line per call. Otherwise answer in plain text."
)

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class CallForm:
    """How calls are written where they must be, piece by piece; pieces that are markers may be special tokens."""

    before_name: tuple[str, ...]
    behind_name: tuple[str, ...]
    behind_arguments: tuple[str, ...] = ()
    opening: tuple[str, ...] = ()
    """Before the first call; `closing` stands behind the last one."""
    separator: tuple[str, ...] = ()
    closing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls."""

    form: CallForm
    """What is written; everything else here is about what is read."""
    opening: str
    closing: str = ""
    fillers: str = BLANKS
    """Characters that may stand around calls."""
    may_begin_bare: bool = False
    """A text that begins with a call needs no opening."""
    has_headers: bool = False
    """A call may be its name, then its arguments alone."""
    literals: tuple[str, ...] = ()
    """Further tokens that are part of a call, though they are special and not part of the text."""

    @property
    def markers(self) -> frozenset[str]:
        """Special tokens the parser has to see."""
        return frozenset({self.opening, self.closing, *self.literals} - {""})


NAMED: Final = ('{"name": "',)
WITH_ARGUMENTS: Final = ('", "arguments": ',)
HERMES_FORM: Final = CallForm(
    ("<tool_call>", '\n{"name": "'), WITH_ARGUMENTS, ("}\n", "</tool_call>"), separator=("\n",)
)
LLAMA_FORM: Final = CallForm(NAMED, ('", "parameters": ',), ("}",), separator=("; ",))
MISTRAL_FORM: Final = CallForm(
    NAMED, WITH_ARGUMENTS, ("}",), opening=("[TOOL_CALLS]", "["), separator=(", ",), closing=("]",)
)
MISTRAL_HEADER_FORM: Final = CallForm(("[TOOL_CALLS]",), ("[ARGS]",))

FORMATS: Final[Mapping[str, ToolFormat]] = {
    "hermes": ToolFormat(HERMES_FORM, "<tool_call>", "</tool_call>"),
    "llama": ToolFormat(LLAMA_FORM, "<|python_tag|>", fillers=BLANKS + ";", may_begin_bare=True),
    "mistral": ToolFormat(
        MISTRAL_FORM, "[TOOL_CALLS]", fillers=BLANKS + "[],", has_headers=True, literals=("[ARGS]", "[CALL_ID]")
    ),
}


def find_format(templates: Iterable[str], family: str | None = None) -> ToolFormat:
    """The family whose marker a model's chat templates use, hermes's where they show none; or the one that is named."""
    source = "".join(templates)
    if family is None:
        marked = (name for name in ("mistral", "llama") if FORMATS[name].opening in source)
        family = next(marked, "hermes")
    found = FORMATS[family]
    return replace(found, form=MISTRAL_HEADER_FORM) if found.has_headers and "[ARGS]" in source else found


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of call number `index`; only its first piece has an id and a name."""

    index: int
    arguments: str
    call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """What a piece of text turned out to say."""

    content: str
    calls: Sequence[CallDelta]


class _State(Enum):
    START = auto()  # nothing but blanks so far
    TEXT = auto()
    BETWEEN = auto()  # behind an opening, or behind a call
    CALL = auto()


class ToolParser:
    """Reads one answer. `names` are the tools' names; calls above `max_calls` are left out.

    With `only_calls` there is no content: an answer that had to be calls has nothing else, only a call that was cut.
    """

    def __init__(
        self, format_: ToolFormat, names: Collection[str], *, max_calls: int | None = None, only_calls: bool = False
    ) -> None:
        self.num_calls = 0
        self._format = format_
        self._names = names
        self._max_calls = max_calls
        self._only_calls = only_calls
        self._state = _State.START if format_.may_begin_bare else _State.TEXT
        self._pending = ""
        self._doubtful: list[str] = []  # taken for part of a call, but no call has been found in it yet
        self._reader = _CallReader()
        self._content: list[str] = []
        self._calls: list[CallDelta] = []

    def feed(self, text: str) -> ToolDelta:
        """Takes the next piece of the answer."""
        self._pending += text
        while self._pending and self._advance():
            pass
        return self._take_delta()

    def close(self) -> ToolDelta:
        """The answer ends here: what was held back is content now, unless it belongs to a call or begins one more."""
        is_cut_call = self._state in (_State.BETWEEN, _State.CALL) and self.num_calls > 0
        if not is_cut_call:
            self._give_back()
            self._content.append(self._pending)
        return self._take_delta()

    def _take_delta(self) -> ToolDelta:
        delta = ToolDelta("" if self._only_calls else "".join(self._content), self._calls)
        self._content, self._calls = [], []
        return delta

    def _advance(self) -> bool:
        """Takes something from what is pending. False: more has to come first."""
        match self._state:
            case _State.START:
                return self._advance_start()
            case _State.TEXT:
                return self._advance_text()
            case _State.BETWEEN:
                return self._advance_between()
            case _State.CALL:
                return self._advance_call()

    def _advance_start(self) -> bool:
        rest = self._pending.lstrip(BLANKS)
        self._content.append(self._pending[: len(self._pending) - len(rest)])
        self._pending = rest
        if rest:
            self._state = _State.BETWEEN if rest[0] == "{" else _State.TEXT
        return bool(rest)

    def _advance_text(self) -> bool:
        """Content up to an opening; what may become one waits."""
        opening = self._format.opening
        at = self._pending.find(opening)
        if at < 0:
            num_sure = len(self._pending) - num_begun(self._pending, opening)
            self._content.append(self._cut(num_sure))
            return False
        self._content.append(self._cut(at))
        self._doubt(len(opening))
        self._state = _State.BETWEEN
        return True

    def _advance_between(self) -> bool:
        for marker in (self._format.opening, self._format.closing):
            if marker and self._pending.startswith(marker):
                self._doubt(len(marker))
                return True
            if marker.startswith(self._pending):
                return False
        if self._pending[0] in self._format.fillers:
            self._doubt(1)
            return True
        if self._pending[0] == "{":
            accepts = self._names if self._is_bare else None
            self._reader = _CallReader(accepts=accepts)
            self._state = _State.CALL
            return True
        return self._advance_header() if self._format.has_headers else self._back_to_text()

    @property
    def _is_bare(self) -> bool:
        """Without a marker, only a known tool's name tells a call from an answer in JSON."""
        return self._format.may_begin_bare and not self._doubtful

    def _advance_header(self) -> bool:
        at = self._pending.find("{", 0, MAX_HEADER_CHARS)
        if at < 0:
            return len(self._pending) >= MAX_HEADER_CHARS and self._back_to_text()
        name = self._pending[:at].partition("[")[0].strip()
        if not name or any(char in BLANKS for char in name):
            return self._back_to_text()
        self._doubt(at)
        self._reader = _CallReader(name=name)
        self._state = _State.CALL
        return True

    def _advance_call(self) -> bool:
        reader, was_call = self._reader, self._reader.is_call
        num_taken = reader.feed(self._pending)
        self._doubt(num_taken)
        if reader.is_call:
            self._doubtful.clear()
            self._report(reader, begins=not was_call)
        if not reader.has_ended:
            return False
        if not reader.is_call:
            return self._back_to_text()
        self._state = _State.BETWEEN
        return True

    def _report(self, reader: _CallReader, *, begins: bool) -> None:
        if begins:
            self.num_calls += 1
        arguments = reader.take_arguments()
        if self._max_calls is not None and self.num_calls > self._max_calls:
            return
        index = self.num_calls - 1
        if begins:
            self._calls.append(CallDelta(index, arguments, self._new_id(), reader.name))
        elif arguments:
            self._calls.append(CallDelta(index, arguments))

    def _new_id(self) -> str:
        if not self._format.has_headers:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(MISTRAL_ID_CHARS))

    def _cut(self, num_chars: int) -> str:
        head, self._pending = self._pending[:num_chars], self._pending[num_chars:]
        return head

    def _doubt(self, num_chars: int) -> None:
        self._doubtful.append(self._cut(num_chars))

    def _back_to_text(self) -> bool:
        self._give_back()
        self._state = _State.TEXT
        return True

    def _give_back(self) -> None:
        """Blanks and separators behind a call are not what the model has to say."""
        doubtful = "".join(self._doubtful)
        self._doubtful.clear()
        if doubtful.strip(self._format.fillers) not in ("", self._format.closing):
            self._content.append(doubtful)


class _Phase(Enum):
    OPEN = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    NEXT = auto()
    DONE = auto()
    BROKEN = auto()


class _CallReader:
    """One call as a JSON object, read character by character; if `name` is given, as its arguments alone.

    It `is_call` as soon as it has a name, one of `accepts` if that is given, and its arguments have begun. They may be
    an object, JSON text in a string, or missing.
    """

    def __init__(self, *, name: str | None = None, accepts: Collection[str] | None = None) -> None:
        self.name = name
        self.phase = _Phase.OPEN if name is None else _Phase.VALUE
        self._is_lone = name is not None
        self._accepts = accepts
        self._key = "" if name is None else ARGUMENTS_KEYS[0]
        self._value = _JsonValue()
        self._has_arguments = False
        self._arguments: list[str] = []

    @property
    def is_call(self) -> bool:
        return self.name is not None and self._has_arguments

    @property
    def has_ended(self) -> bool:
        return self.phase in (_Phase.DONE, _Phase.BROKEN)

    def take_arguments(self) -> str:
        """What has been read of them since the last time."""
        arguments = "".join(self._arguments)
        self._arguments.clear()
        return arguments

    def feed(self, text: str) -> int:
        """Takes as many characters as belong to the call and says how many these are."""
        for index, char in enumerate(text):
            if self.has_ended or not self._take(char):
                return index
        return len(text)

    def _take(self, char: str) -> bool:
        """False: with this character it is broken."""
        if not self._value.text and char in BLANKS:
            return True
        match self.phase:
            case _Phase.OPEN:
                return self._expect(char, {"{": _Phase.KEY})
            case _Phase.KEY:
                return self._take_key(char)
            case _Phase.COLON:
                return self._expect(char, {":": _Phase.VALUE})
            case _Phase.VALUE:
                return self._take_value(char)
        if char == "}" and not self._has_arguments:
            self._give_arguments("{}")
        return self._expect(char, {",": _Phase.KEY, "}": _Phase.DONE if self.is_call else _Phase.BROKEN})

    def _expect(self, char: str, phases: Mapping[str, _Phase]) -> bool:
        self.phase = phases.get(char, _Phase.BROKEN)
        return char in phases

    def _take_key(self, char: str) -> bool:
        if not self._value.text and char != '"':
            return self._expect(char, {})
        self._value.take(char)
        if self._value.is_complete:
            before, self._key = self._key, str(self._end_value())
            self.phase = _Phase.COLON if before or self._key in FIRST_KEYS else _Phase.BROKEN
        return True

    def _take_value(self, char: str) -> bool:
        value, is_arguments = self._value, self._key in ARGUMENTS_KEYS
        if is_arguments and char == "{" and not value.text and not self._has_arguments:
            self._has_arguments = value.is_passed_on = True
        taken = value.take(char)
        if taken and value.is_passed_on:
            self._arguments.append(char)
        if value.is_complete:
            self._use_value(self._end_value(), passed_on=value.is_passed_on)
        return taken or (self.phase is not _Phase.BROKEN and self._take(char))

    def _end_value(self) -> object:
        text, self._value = "".join(self._value.text), _JsonValue()
        try:
            decoded: object = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            return _NOT_JSON
        return decoded

    def _use_value(self, value: object, *, passed_on: bool) -> None:
        """What the key before it makes of a value."""
        self.phase = _Phase.DONE if self._is_lone else _Phase.NEXT
        if passed_on:
            return
        if self._key == NAME_KEY:
            is_known = isinstance(value, str) and value and (self._accepts is None or value in self._accepts)
            self.name = str(value) if is_known else None
            self.phase = self.phase if is_known else _Phase.BROKEN
        elif self._key in ARGUMENTS_KEYS and not self._has_arguments:
            if value is None or isinstance(value, str):
                self._give_arguments(value or "{}")
            else:
                self.phase = _Phase.BROKEN

    def _give_arguments(self, text: str) -> None:
        self._has_arguments = True
        self._arguments.append(text)


_NOT_JSON: Final = object()


class _JsonValue:
    """Finds the end of one JSON value, without a look at what is inside."""

    __slots__ = ("_depth", "_is_escaped", "_is_quoted", "is_complete", "is_passed_on", "text")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.is_complete = False
        self.is_passed_on = False
        self._depth = 0
        self._is_quoted = False
        self._is_escaped = False

    def take(self, char: str) -> bool:
        """False: the value had ended before this character."""
        if self._is_quoted:
            self._take_quoted(char)
        elif self._depth == 0 and self.text and char in SCALAR_ENDS:
            self.is_complete = True
            return False
        elif char == '"':
            self._is_quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_complete = self._depth <= 0
        self.text.append(char)
        return True

    def _take_quoted(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_quoted = False
            self.is_complete = self._depth == 0


def describe_tools(messages: Sequence[Json], tools: Sequence[Json], instructions: str | None) -> list[Json]:
    """The messages with the tools written into the last one, for templates that do not show tools themselves."""
    *before, last = messages
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = f"{last.get('content') or ''}\n---\n{listed}\n{instructions or INSTRUCTIONS}"
    return [*before, {**last, "content": text}]


def describe_call(function: Json) -> str:
    """A call of the past as `INSTRUCTIONS` ask for it, for templates that do not show calls themselves."""
    call = {NAME_KEY: function[NAME_KEY], "arguments": function["arguments"]}
    return f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>"

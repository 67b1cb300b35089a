"""The OpenAI routes: the wire over a scripted engine, then the real client against a real server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import httpx
import openai
import pydantic
import pytest
from jsonschema import Draft202012Validator

from router.api.app import create_app
from router.core.request import FinishReason
from router.engine import Token
from router.errors import GenerationFailed, NotReady
from router.metrics import Metrics
from router.text.chat import ChatTemplate
from router.validate import Capacity, Limits, Validator
from tests.engines import engine_over
from tests.ghost import GhostSettings, ghost_group
from tests.http_app import CONFIG, PARIS, Client, FakeEngine, Json, Script
from tests.server import Server, serving
from tests.tiny_tokenizers import byte_level, sentencepiece, tokenizer_of

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO: list[Json] = [{"role": "user", "content": "Hi"}]
TOKENIZER = tokenizer_of(byte_level())
WEATHER: Json = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
)

TOOLING: Json = {"template_source": TOOL_TEMPLATE, "max_total_tokens": 400, "max_input_tokens": 399}


def tokens(*texts: str, special: Sequence[str] = ()) -> tuple[Token, ...]:
    return tuple(Token(40 + index, text, -0.5, text in special) for index, text in enumerate(texts))


def saying(*texts: str, reason: FinishReason = FinishReason.EOS_TOKEN, special: Sequence[str] = ()) -> FakeEngine:
    return FakeEngine([Script(tokens(*texts, special=special), reason=reason)])


def chat(client: Client, **fields: object) -> Json:
    answer = client.post(CHAT, {"messages": HELLO, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks(response: httpx.Response) -> list[Json]:
    """A stream's payloads; its bytes must be exactly frames, the last of them [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    *frames, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(frame.startswith("data: {") and "\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def stream(client: Client, path: str = CHAT, **fields: object) -> list[Json]:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "Hi"}
    return chunks(client.post(path, {**body, "stream": True, **fields}))


def deltas(client: Client, **fields: object) -> list[Json]:
    return [chunk["choices"][0]["delta"] for chunk in stream(client, **fields)]


def refusal(path: str, **fields: object) -> tuple[int, str]:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "Hi"}
    answer = Client().post(path, {**body, **fields})
    return answer.status_code, answer.json()["error"]


def masked(text: str) -> str:
    text = re.sub(r'"created":\d{10,}', '"created":0', text)
    return re.sub(r'"id":"([a-z]+)-[0-9a-f]{32}"', r'"id":"\1-X"', text)


# Chat


def test_chat_answers_in_the_order_of_the_contract() -> None:
    answer = Client().post(CHAT, {"messages": HELLO})

    num_prompt = len(TOKENIZER.encode("<user>Hi<assistant>"))
    assert masked(answer.text) == (
        '{"object":"chat.completion","id":"chatcmpl-X","created":0,"model":"smollm2-135m-instruct",'
        '"system_fingerprint":"0.1.0-native","choices":[{"index":0,"message":{"role":"assistant","content":" Paris"},'
        '"logprobs":null,"finish_reason":"stop"}],'
        f'"usage":{{"prompt_tokens":{num_prompt},"completion_tokens":2,"total_tokens":{num_prompt + 2}}}}}'
    )


def test_chat_streams_a_role_once_and_every_chunk_has_a_content() -> None:
    answer = Client().post(CHAT, {"messages": HELLO, "stream": True})

    start = (
        'data: {"object":"chat.completion.chunk","id":"chatcmpl-X","created":0,"model":"smollm2-135m-instruct",'
        '"system_fingerprint":"0.1.0-native","choices":[{"index":0,"delta":'
    )
    assert masked(answer.text) == (
        start + '{"role":"assistant","content":" Paris"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        + start + '{"content":""},"logprobs":null,"finish_reason":"stop"}],"usage":null}\n\ndata: [DONE]\n\n'
    )  # fmt: skip


def test_ids_are_unique_and_shared_by_the_chunks_of_one_answer() -> None:
    client = Client()

    streams = [stream(client), stream(client)]

    ids = [{str(chunk["id"]) for chunk in chunks_} for chunks_ in streams]
    assert [len(set_) for set_ in ids] == [1, 1]
    assert ids[0] != ids[1]


def test_chat_renders_the_template_and_adds_nothing_to_it() -> None:
    client = Client()

    chat(client, messages=[{"role": "system", "content": "S"}, *HELLO])

    [request] = client.engine.requests
    assert request.prompt == tuple(TOKENIZER.encode("<system>S<user>Hi<assistant>", add_special_tokens=False))


def test_special_tokens_are_added_to_prompts_but_not_to_what_a_template_wrote() -> None:
    engine, tokenizer = FakeEngine(), tokenizer_of(sentencepiece())
    limits = Limits.derive(CONFIG, Capacity(tokenizer.vocab_size, (2,), 100), tokenizer)
    metrics = Metrics(max_input_tokens=40, max_total_tokens=64)
    template = ChatTemplate({"default": "the"}, {})
    app = create_app(CONFIG, engine, Validator(limits, tokenizer), tokenizer, metrics, template=template)
    client = Client(engine)
    client.app = app

    client.post(CHAT, {"messages": HELLO})
    client.post(COMPLETIONS, {"prompt": "the"})
    client.post("/v1/responses", {"input": "Hi"})

    [bos, *rest] = tokenizer.encode("the")
    assert tokenizer.is_special(bos)
    written = tuple(rest)
    assert [request.prompt for request in engine.requests] == [written, (bos, *written), written]


def test_usage_ends_a_stream_on_demand() -> None:
    *before, last = stream(Client(), stream_options={"include_usage": True})

    assert [chunk["usage"] for chunk in before] == [None, None]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 2


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"stream_options": {"include_usage": True}}], ids=["", "n", "usage"])
def test_chunks_differ_in_nothing_but_their_text(path: str, fields: Json) -> None:
    texts = ("first", "é", " plain", '"\\\t\x00', "\u2028", "\x7f{}", "%d")
    body = {"messages": HELLO, "prompt": "Hi", "stream": True, **fields}
    response = Client(saying(*texts, "end")).post(path, body)

    chunks(response)
    frames = [frame for frame in response.text.split("\n\n") if '"index":0' in frame]
    [template] = [frame for frame in frames if '"é"' in frame]
    written = [json.dumps(text, ensure_ascii=text == "\u2028").replace("\\u007f", "\x7f") for text in texts]
    assert frames[1:-1] == [template.replace('"é"', text) for text in written[1:]]


def test_usage_may_come_with_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}

    given = stream(Client(saying("a", "b", "c")), stream_options=options)

    assert [chunk["usage"]["completion_tokens"] for chunk in given] == [1, 2, 3, 3]


@pytest.mark.parametrize(("path", "fields"), [(CHAT, {"logprobs": True}), (COMPLETIONS, {"logprobs": 0})])
def test_logprobs_come_with_every_chunk(path: str, fields: Json) -> None:
    given = stream(Client(saying("a", "b", "c")), path, **fields)

    assert [chunk["choices"][0]["logprobs"] is not None for chunk in given] == [True] * 3


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_parameters_in_openais_forms_reach_the_request(path: str) -> None:
    client = Client(max_stop_sequences=4)
    body = {"messages": HELLO} if path == CHAT else {"prompt": "Hi"}
    limit = {"max_completion_tokens": 7, "max_tokens": 9} if path == CHAT else {"max_tokens": 7}

    answer = client.post(
        path,
        {
            **body, **limit, "temperature": 0.5, "top_p": 1, "top_k": -1, "min_p": 0.25, "stop": "END", "seed": -1,
            "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": -100}, "ignore_eos": True,
            "user": "u", "parallel_tool_calls": True, "model": "http://127.0.0.1:8080", "n": None, "stream": None,
        },
    )  # fmt: skip

    assert answer.status_code == 200, answer.text
    [request] = client.engine.requests
    sampling = request.sampling
    assert (sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k) == (True, 0.5, 1.0, 0)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.25, 0.5, -0.5)
    assert sampling.logit_bias == ((5, -100.0),)
    assert sampling.seed == 2**64 - 1
    assert (request.stop, request.keep_stop, request.max_new_tokens) == (("END",), False, 7)
    assert request.eos_token_ids == ()


@pytest.mark.parametrize(
    ("fields", "do_sample"),
    [({}, True), ({"temperature": 0, "top_p": 0.5}, False), ({"temperature": 1}, True), ({"do_sample": False}, False)],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_tokens_are_drawn_unless_the_temperature_is_zero(path: str, fields: Json, do_sample: bool) -> None:
    client = Client()

    client.post(path, {"messages": HELLO, "prompt": "Hi", **fields})

    assert client.engine.requests[0].sampling.do_sample is do_sample


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_null_is_the_same_as_nothing(path: str) -> None:
    names = (
        *("model", "frequency_penalty", "logit_bias", "max_tokens", "n", "presence_penalty", "seed", "stop", "stream"),
        *("stream_options", "temperature", "top_p", "logprobs", "echo", "best_of", "suffix", "user", "tools"),
        *(
            "tool_choice",
            "tool_prompt",
            "response_format",
            "top_logprobs",
            "generation_config",
            "max_completion_tokens",
        ),
    )
    answer = Client().post(path, {"messages": HELLO, "prompt": "Hi", **dict.fromkeys(names)})

    assert answer.status_code == 200, answer.text


def test_the_end_token_is_an_end_even_where_tokens_run_out() -> None:
    assert (
        chat(Client(FakeEngine([Script(PARIS, reason=FinishReason.LENGTH)])))["choices"][0]["finish_reason"] == "stop"
    )
    assert chat(Client(saying("a", reason=FinishReason.LENGTH)))["choices"][0]["finish_reason"] == "length"
    assert chat(Client(saying("a", reason=FinishReason.STOP_SEQUENCE)))["choices"][0]["finish_reason"] == "stop"


def test_several_choices_have_seeds_of_their_own() -> None:
    client = Client(FakeEngine([Script(tokens("a")), Script(tokens("b")), Script(tokens("c", "d"))]))

    answer = chat(client, n=3, seed=2**64 - 1)

    assert [(c["index"], c["message"]["content"]) for c in answer["choices"]] == [(0, "a"), (1, "b"), (2, "cd")]
    assert [request.sampling.seed for request in client.engine.requests] == [2**64 - 1, 0, 1]
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["prompt_tokens"] == len(client.engine.requests[0].prompt)


def test_several_choices_are_streamed_side_by_side() -> None:
    client = Client(FakeEngine([Script(tokens("a", "b")), Script(tokens("c"))]))

    given = [chunk["choices"][0] for chunk in stream(client, n=2)]

    texts = ["".join(c["delta"].get("content", "") for c in given if c["index"] == index) for index in (0, 1)]
    assert texts == ["ab", "c"]
    assert [c["finish_reason"] for c in given if c["index"] == 1] == ["stop"]


def test_chat_logprobs_have_an_entry_per_token_with_its_bytes() -> None:
    euro = TOKENIZER.encode("é")[0]
    top = (Token(euro, "", -0.25, False), Token(34, "C", -1.5, False))
    engine = FakeEngine([Script((Token(euro, "", -0.25, False), Token(34, "éC", -2.5839844, False)), top_tokens=top)])

    answer = Client(engine).post(CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 2})

    [first, second] = answer.json()["choices"][0]["logprobs"]["content"]
    raw = list(TOKENIZER.bytes_of(euro))
    assert first["bytes"] == raw
    assert first["top_logprobs"][0] == {"token": bytes(raw).decode(errors="replace"), "logprob": -0.25, "bytes": raw}
    assert len(first["top_logprobs"]) == 2
    assert '"logprob":-2.5839844' in answer.text
    assert second["token"] == TOKENIZER.token_text(34)
    assert engine.requests[0].sampling.top_n_tokens == 2


def test_what_a_stop_string_held_back_comes_with_the_end() -> None:
    """The engine shows nothing of a text that may still become a stop string."""
    client = Client(FakeEngine([Script((Token(50, "", -1.0, False), PARIS[1]))]))
    client.engine.scripts = [HeldBack((Token(50, "", -1.0, False), PARIS[1]))]

    assert chat(client)["choices"][0]["message"]["content"] == "held"
    assert [delta.get("content") for delta in deltas(client)] == ["", "held"]


class HeldBack(Script):
    def _finish(self) -> object:  # type: ignore[override]
        return replace(super()._finish(), text="held")


def test_generation_config_of_transformers_counts_where_the_body_says_nothing() -> None:
    client = Client()
    config = {"do_sample": False, "max_new_tokens": 5, "repetition_penalty": 1.5, "temperature": 0.7, "x": 1}

    chat(client, generation_config=json.dumps(config))
    chat(client, generation_config=config, max_tokens=6, temperature=0.9)

    first, second = client.engine.requests
    assert (first.max_new_tokens, first.sampling.do_sample, first.sampling.repetition_penalty) == (5, False, 1.5)
    assert (second.max_new_tokens, second.sampling.do_sample) == (6, True)
    assert second.sampling.temperature == pytest.approx(0.9)


def test_content_may_come_in_parts() -> None:
    client = Client()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    chat(client, messages=[{"role": "user", "content": parts}])

    assert client.engine.requests[0].prompt == tuple(TOKENIZER.encode("<user>ab<assistant>"))


def test_a_last_message_of_the_assistants_is_gone_on_with() -> None:
    client = Client()
    messages = [*HELLO, {"role": "assistant", "content": "I am "}]

    chat(client, messages=messages)
    chat(client, messages=messages, continue_final_message=False)

    continued, answered = (request.prompt for request in client.engine.requests)
    assert continued == tuple(TOKENIZER.encode("<user>Hi<assistant>I am"))
    assert answered == tuple(TOKENIZER.encode("<user>Hi<assistant>I am <assistant>"))


def test_a_developer_speaks_as_the_system_where_the_template_knows_none() -> None:
    developer = [{"role": "developer", "content": "D"}]
    plain, knowing = Client(), Client(template_source="{# developer #}{{ messages[0].role }}")

    chat(plain, messages=developer)
    chat(knowing, messages=developer)

    assert plain.engine.requests[0].prompt == tuple(TOKENIZER.encode("<system>D<assistant>"))
    assert knowing.engine.requests[0].prompt == tuple(TOKENIZER.encode("developer"))


def test_template_variables_and_documents_are_passed_on() -> None:
    source = "{{ enable_thinking }} {{ reasoning_effort }} {{ documents[0].text }}"
    client = Client(template_source=source)
    more = {"chat_template_kwargs": {"enable_thinking": False}, "documents": [{"text": "d"}]}

    chat(client, reasoning_effort="low", **more)

    assert client.engine.requests[0].prompt == tuple(TOKENIZER.encode("False low d"))


def test_a_request_brings_a_template_only_where_that_is_allowed() -> None:
    assert refusal(CHAT, chat_template="x")[0] == 422
    client = Client(trust_request_chat_template=True)

    chat(client, chat_template="own {{ messages[0].content }}")

    assert client.engine.requests[0].prompt == tuple(TOKENIZER.encode("own Hi"))


def test_a_requests_own_template_shows_past_calls_itself() -> None:
    source = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    client = Client(trust_request_chat_template=True, template_source="{{ messages[0].content }}")
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]

    chat(client, messages=messages, chat_template=source + "{% endfor %}{% endfor %}")

    assert client.engine.requests[0].prompt == tuple(TOKENIZER.encode("Hiweather"))


def test_reasoning_is_told_from_content_where_a_flag_says_so() -> None:
    thinking = saying("<think>", "\nHm", ".</th", "ink>\n\nYes")
    client = Client(thinking, reasoning_parser="think")

    message = chat(client)["choices"][0]["message"]

    assert message == {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}
    assert [d for d in deltas(client) if "reasoning_content" in d] == [
        {"reasoning_content": "Hm"}, {"reasoning_content": "."}
    ]  # fmt: skip
    assert chat(Client(thinking))["choices"][0]["message"]["content"] == "<think>\nHm.</think>\n\nYes"


# Tools

CALL = (
    "Let me see.\n",
    "<tool_call>",
    '\n{"name": "wea',
    'ther", "arguments": {"ci',
    'ty": "Bern"}}',
    "\n</tool_call>",
)


def test_a_call_is_answered_as_openai_does() -> None:
    answer = chat(Client(saying(*CALL), **TOOLING), tools=[WEATHER])

    [choice] = answer["choices"]
    [call] = choice["message"].pop("tool_calls")
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {"role": "assistant", "content": "Let me see.\n"}
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}


def test_a_call_is_streamed_with_its_id_and_name_once() -> None:
    client = Client(saying(*CALL, *CALL[1:]), **TOOLING)

    given = stream(client, tools=[WEATHER])

    calls = [call for chunk in given for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 0, 1, 1, 1]
    first, more = ["function", "id", "index", "type"], ["function", "index"]
    assert [sorted(call) for call in calls] == [first, more, first, more, more]
    assert [call["function"].get("name") for call in calls] == ["weather", None, "weather", None, None]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bern"}' * 2
    assert calls[0]["id"] != calls[2]["id"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in given[-2:]] == [None, "tool_calls"]


def test_a_stream_that_must_call_has_a_call_and_no_content_in_every_chunk() -> None:
    given = deltas(
        Client(saying(*CALL[1:], "</s>", special=["</s>"]), **TOOLING), tools=[WEATHER], tool_choice="required"
    )

    assert ["role" in delta for delta in given] == [True, *[False] * (len(given) - 1)]
    assert all("content" not in delta for delta in given)
    arguments = [call["function"]["arguments"] for delta in given for call in delta["tool_calls"]]
    assert len(arguments) == len(given)
    assert ("".join(arguments), arguments[-1]) == ('{"city": "Bern"}', "")


def test_every_chunk_has_a_content_though_text_is_held_back() -> None:
    client = Client(saying("a", "ST", "ART", "z"))

    given = deltas(client, stop=["STOP"], logprobs=True)

    assert ["content" in delta for delta in given] == [True] * 4


def test_a_call_alone_has_no_content() -> None:
    message = chat(Client(saying(*CALL[1:]), **TOOLING), tools=[WEATHER])["choices"][0]["message"]

    assert message["content"] is None


def test_a_call_that_was_cut_off_ended_by_length() -> None:
    client = Client(saying(*CALL[:-2], reason=FinishReason.LENGTH), **TOOLING)

    assert chat(client, tools=[WEATHER])["choices"][0]["finish_reason"] == "length"


def test_only_one_call_where_no_parallel_ones_are_wanted() -> None:
    client = Client(saying(*CALL, *CALL[1:]), **TOOLING)

    message = chat(client, tools=[WEATHER], parallel_tool_calls=False)["choices"][0]["message"]

    assert len(message["tool_calls"]) == 1


def test_markers_that_are_special_tokens_are_seen() -> None:
    engine = saying("[TOOL_CALLS]", '[{"name": "weather", "arguments": {}}]', "</s>", special=["[TOOL_CALLS]", "</s>"])
    client = Client(engine, **TOOLING, tool_call_parser="mistral")

    message = chat(client, tools=[WEATHER])["choices"][0]["message"]

    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}
    assert message["content"] is None


@pytest.mark.parametrize("fields", [{"tool_choice": "none", "tools": [WEATHER]}, {}])
def test_without_tools_a_call_is_text(fields: Json) -> None:
    client = Client(saying(*CALL), **TOOLING)

    message = chat(client, **fields)["choices"][0]["message"]

    assert message == {"role": "assistant", "content": "".join(CALL)}
    assert client.engine.requests[0].prompt == tuple(TOKENIZER.encode("<user>Hi"))


def test_the_template_gets_tools_and_past_calls_as_transformers_has_them() -> None:
    client = Client(**TOOLING)
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    spoken: list[Json] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]

    chat(client, messages=spoken, tools=[{"type": "function", "function": {"name": "now", "arguments": {"b": 2}}}])

    assert client.engine.requests[0].prompt == tuple(
        TOKENIZER.encode(
            '[{"type": "function", "function": {"name": "now", "parameters": {"b": 2}}}]<user>Hi<assistant>'
            '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call><tool>noon'
        )
    )


@pytest.mark.parametrize(("content", "before"), [(None, ""), ("Let me see.", "Let me see.\n")])
def test_a_template_that_shows_no_calls_gets_them_as_text(content: str | None, before: str) -> None:
    client = Client(max_total_tokens=400, max_input_tokens=399)
    calls = [{"id": id_, "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}} for id_ in "cd"]

    chat(client, messages=[*HELLO, {"role": "assistant", "content": content, "tool_calls": calls}, *HELLO])

    written = '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
    assert client.engine.requests[0].prompt == tuple(
        TOKENIZER.encode(f"<user>Hi<assistant>{before}{written}\n{written}<user>Hi<assistant>")
    )


def test_a_template_that_shows_no_tools_gets_them_in_the_last_message() -> None:
    client = Client(max_total_tokens=400, max_input_tokens=399)

    chat(client, tools=[WEATHER], tool_prompt="Call!")

    text = f"<user>Hi\n---\n{json.dumps(WEATHER)}\nCall!<assistant>"
    assert client.engine.requests[0].prompt == tuple(TOKENIZER.encode(text))


# Structure

CITY: Json = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NAMED: Json = {"name": "n", "schema": CITY, "strict": True}
FORMATS: list[Json] = [
    {"type": "json_schema", "json_schema": NAMED},
    {"type": "json_schema", "json_schema": {"schema": CITY}},
    {"type": "json_schema", "value": NAMED},
    {"type": "json_schema", **NAMED},
    {"type": "json_object", "value": CITY},
    {"type": "json_object", "value": json.dumps(CITY)},
    {"type": "json_object", "schema": CITY},
    {"type": "json", "value": CITY},
]


def grammar_of(path: str, **fields: object) -> str:
    """What a request's text must conform to."""
    client = Client(**TOOLING)
    answer = client.post(path, {"messages": HELLO, "prompt": "Hi", **fields})
    assert answer.status_code == 200, answer.text
    return client.engine.requests[0].grammar


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_format_may_come_in_every_shape_that_clients_know(path: str) -> None:
    [grammar] = {grammar_of(path, response_format=format_) for format_ in FORMATS}

    assert json.loads(grammar)["grammars"][0]["json_schema"]["required"] == ["city"]


def test_a_format_without_a_schema_is_any_object() -> None:
    grammars = {grammar_of(CHAT, response_format=format_) for format_ in ({"type": "json_object"}, {"type": "json"})}

    assert grammars == {grammar_of(CHAT, response_format={"type": "json_object", "value": {"type": "object"}})}


def test_a_text_of_no_format_is_free() -> None:
    for format_ in (None, {"type": "text"}):
        assert grammar_of(CHAT, response_format=format_) == ""


def test_a_format_may_be_an_expression() -> None:
    assert "[a-f]{3}" in grammar_of(CHAT, response_format={"type": "regex", "value": "[a-f]{3}"})


def test_every_choice_has_the_format() -> None:
    client = Client()

    chat(client, n=3, response_format=FORMATS[0])

    assert len({request.grammar for request in client.engine.requests}) == 1
    assert client.engine.requests[0].grammar


@pytest.mark.parametrize(
    "choice",
    ["required", "weather", {"type": "function", "function": {"name": "weather"}}, {"function": {"name": "weather"}}],
)
def test_a_call_that_must_be_is_enforced_and_answered_as_any_call(choice: object) -> None:
    client = Client(saying(*CALL[1:]), **TOOLING)

    answer = chat(client, tools=[WEATHER], tool_choice=choice)["choices"][0]
    given = stream(client, tools=[WEATHER], tool_choice=choice)

    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["weather"]
    calls = [call for chunk in given for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [call["function"].get("name") for call in calls] == ["weather", None, None]
    assert given[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert [("weather" in request.grammar, "%json" in request.grammar) for request in client.engine.requests] == [
        (True, True)
    ] * 2


def test_a_call_that_must_be_and_was_cut_off_ended_by_length() -> None:
    client = Client(saying(*CALL[1:-2], reason=FinishReason.LENGTH), **TOOLING)

    [choice] = chat(client, tools=[WEATHER], tool_choice="weather")["choices"]

    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'


def test_a_call_that_was_cut_off_in_its_name_is_not_content() -> None:
    client = Client(saying(*CALL[1:3], reason=FinishReason.LENGTH), **TOOLING)

    [choice] = chat(client, tools=[WEATHER], tool_choice="required")["choices"]

    assert choice["finish_reason"] == "length"
    assert choice["message"] == {"role": "assistant", "content": ""}


def test_only_the_named_function_may_be_called() -> None:
    tools = [WEATHER, {"type": "function", "function": {"name": "now"}}]

    grammar = grammar_of(CHAT, tools=tools, tool_choice="now")

    assert "now" in grammar
    assert "weather" not in grammar
    assert "{0,31}" not in grammar, "there is one call of a named function"


@pytest.mark.parametrize(("asked", "several"), [({}, False), ({"parallel_tool_calls": None}, False),
    ({"parallel_tool_calls": False}, False), ({"parallel_tool_calls": True}, True)])  # fmt: skip
def test_where_there_must_be_a_call_there_are_several_only_on_demand(asked: Json, several: bool) -> None:
    client = Client(saying(*CALL[1:], *CALL[1:]), **TOOLING)

    message = chat(client, tools=[WEATHER], tool_choice="required", **asked)["choices"][0]["message"]

    assert ("{0,31}" in client.engine.requests[0].grammar) is several
    assert len(message["tool_calls"]) == 1 + several


def test_any_is_a_call_of_whichever_function_unless_one_has_that_name() -> None:
    tools = [WEATHER, {"type": "function", "function": {"name": "now"}}]
    choice = {"type": "function", "function": {"name": "any"}}

    required, any_, named = (
        grammar_of(CHAT, tools=tools, tool_choice="required"),
        grammar_of(CHAT, tools=tools, tool_choice=choice),
        grammar_of(CHAT, tools=[*tools, choice], tool_choice=choice),
    )

    assert any_ == required
    assert "weather" not in named
    assert refusal(CHAT, tool_choice=choice) == (422, "Tool error: `tool_choice` is required, but there are no tools")


@pytest.mark.parametrize("fields", [{"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": None}])
def test_free_text_is_not_restricted_by_tools(fields: Json) -> None:
    assert grammar_of(CHAT, tools=[WEATHER], **fields) == ""


def test_a_format_holds_beside_tools() -> None:
    """An answer is a call or has the format; the format alone where calls are ruled out, calls where they must be."""
    format_: Json = {"type": "regex", "value": "q{3}"}
    both, text, calls = (
        grammar_of(CHAT, tools=[WEATHER], tool_choice=choice, response_format=format_)
        for choice in ("auto", "none", "required")
    )

    assert ["weather" in grammar for grammar in (both, text, calls)] == [True, False, True]
    assert ["q{3}" in grammar for grammar in (both, text, calls)] == [True, True, False]


def test_parameters_that_cannot_be_enforced_are_refused_where_they_would_have_to_be() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "uniqueItems": True}}}
    client = Client(**TOOLING)
    messages = {"messages": HELLO, "tools": [tool]}

    refused = client.post(CHAT, {**messages, "tool_choice": "f"})

    assert refused.status_code == 422
    assert "`uniqueItems`" in refused.json()["error"]
    assert client.post(CHAT, messages).status_code == 200


def test_thoughts_come_before_what_is_structured() -> None:
    client = Client(saying("<think>Hm</think>", "{}"), reasoning_parser="think")

    message = chat(client, response_format={"type": "json_object"})["choices"][0]["message"]

    assert message == {"role": "assistant", "content": "{}", "reasoning_content": "Hm"}
    wrong = client.post(CHAT, {"messages": HELLO, "response_format": {"type": "json_object", "value": "{"}})
    assert wrong.json()["error"].startswith("Input validation error: grammar is not valid: ")
    assert "</think>" in client.engine.requests[0].grammar


# What is refused

REFUSALS: list[tuple[str, Json, str]] = [
    (CHAT, {"messages": []}, "Template error: `messages` cannot be empty"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages: missing field `content`"),
    (CHAT, {"messages": [{"content": "a"}]}, "messages: missing field `role`"),
    (CHAT, {"messages": "Hi"}, 'messages: invalid type: string "Hi", expected a sequence'),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 'content of type "image_url" is not'),
    (CHAT, {"response_format": "json"}, 'response_format: invalid type: string "json", expected struct ResponseFormat'),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format: unknown variant in `type`, expected one of `text`"),
    (CHAT, {"response_format": {}}, "response_format: missing field `type`"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format: missing field `schema`"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "missing field `schema`"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": []}}, "expected struct JsonSchemaConfig"),
    (CHAT, {"response_format": {"type": "regex"}}, "response_format: missing field `value`"),
    (CHAT, {"response_format": {"type": "regex", "value": 5}}, "invalid type: integer `5`, expected a string"),
    (CHAT, {"response_format": {"type": "json_object", "value": 5}}, "grammar is not supported"),
    (CHAT, {"response_format": {"type": "json_object", "value": "{"}}, "grammar is not valid"),
    (CHAT, {"response_format": {"type": "regex", "value": "a("}}, "error: unclosed group"),
    (COMPLETIONS, {"response_format": {"type": "json", "schema": {"type": "a"}}}, "grammar is not valid"),
    (
        COMPLETIONS,
        {"response_format": {"type": "json_object", "schema": {"properties": {"a": {"not": {}}}}}},
        "grammar is not valid: the keyword `not` at #/properties/a cannot be enforced",
    ),
    (CHAT, {"tool_choice": "required"}, "Tool error: `tool_choice` is required, but there are no tools"),
    (CHAT, {"tools": [WEATHER], "tool_choice": "now"}, "Tool error: Tool with name now not found"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "now"}}}, "Tool with name now not found"),
    (CHAT, {"tool_choice": {"type": "allowed_tools"}}, "expected auto, none, required, or a function"),
    (CHAT, {"tool_choice": 5, "tools": [WEATHER]}, "expected auto, none, required, or a function"),
    (CHAT, {"tools": [{"type": "retrieval"}]}, "tools: invalid `tools`"),
    (CHAT, {"chat_template": "x"}, "`chat_template` is not allowed"),
    (CHAT, {"generation_config": "{"}, "generation_config: invalid `generation_config`"),
    (CHAT, {"logprobs": True, "top_logprobs": 6}, "`top_logprobs` must be >= 0 and <= 5. Given: 6"),
    (CHAT, {"n": 0}, "`n` must be > 0 and <= 128. Given: 0"),
    (CHAT, {"n": 129}, "`n` must be > 0 and <= 128. Given: 129"),
    (CHAT, {"top_p": 1.5}, "`top_p` must be > 0.0 and < 1.0"),
    (CHAT, {"temperature": -1}, "`temperature` must be strictly positive"),
    (CHAT, {"temperature": 0, "top_p": 2}, "`top_p` must be > 0.0 and < 1.0"),
    (CHAT, {"stop": 5}, "stop: invalid type: integer `5`, expected a string or a sequence of strings"),
    (CHAT, {"logit_bias": {"1": "a"}}, "logit_bias: invalid value in `logit_bias`"),
    (COMPLETIONS, {"prompt": []}, "Empty array detected. Do not use an empty array for the prompt."),
    (COMPLETIONS, {"prompt": ""}, "`inputs` cannot be empty"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "expected a string, token ids, or a sequence of either"),
    (COMPLETIONS, {"prompt": [10**6]}, "not in the model's vocabulary"),
    (COMPLETIONS, {"prompt": ["a"] * 5}, "Number of prompts exceeds the maximum allowed batch size of 4"),
    (COMPLETIONS, {"suffix": "x"}, "Suffix is not supported and can be achieved by preprocessing the prompt."),
    (COMPLETIONS, {"max_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    (COMPLETIONS, {"logprobs": 6}, "`logprobs` must be >= 0 and <= 5. Given: 6"),
    (COMPLETIONS, {"n": 3, "best_of": 2}, "`best_of` must be >= `n` and <= 3. Given: 2"),
    (COMPLETIONS, {"best_of": 3}, "`best_of` must be >= `n` and <= 2. Given: 3"),
    (COMPLETIONS, {"best_of": 2, "stream": True}, "`best_of` above `n` is not supported when streaming"),
    (COMPLETIONS, {"n": 2, "stream": True, "echo": True, "logprobs": 1}, "`echo` with `logprobs` is not supported"),
]


@pytest.mark.parametrize(("path", "fields", "sentence"), REFUSALS)
def test_what_cannot_be_served_is_refused_by_name(path: str, fields: Json, sentence: str) -> None:
    status, error = refusal(path, **fields)

    assert status == 422
    assert sentence in error


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_fails_before_the_first_token_has_its_status(path: str) -> None:
    client = Client(FakeEngine([Script((), error=GenerationFailed("gone"))]))

    for wants_stream in (False, True):
        answer = client.post(path, {"messages": HELLO, "prompt": "Hi", "stream": wants_stream})
        assert answer.status_code == 424
        assert answer.json() == {"error": "Request failed during generation: gone", "error_type": "generation"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("n", [1, 2])
def test_what_fails_later_is_told_in_the_stream(path: str, n: int) -> None:
    client = Client(FakeEngine([Script(PARIS[:1], error=GenerationFailed("gone"))]))

    given = stream(client, path, n=n)

    error = {"message": "Request failed during generation: gone", "http_status_code": 424}
    assert given[-1] == {"error": error}
    assert client.engine.cancelled == []


def test_a_choice_that_fails_cancels_the_others() -> None:
    hanging = Script(PARIS[:1], hangs=True)
    client = Client(FakeEngine([hanging, Script((), error=GenerationFailed("gone"))]))

    stream(client, n=2)

    assert len(client.engine.cancelled) == 1


# Completions


def completion(client: Client, **fields: object) -> Json:
    answer = client.post(COMPLETIONS, {"prompt": "Hi", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_completion_answers_in_the_order_of_the_contract() -> None:
    answer = Client().post(COMPLETIONS, {"prompt": "Hi"})

    assert masked(answer.text) == (
        '{"object":"text_completion","id":"cmpl-X","created":0,"model":"smollm2-135m-instruct",'
        '"system_fingerprint":"0.1.0-native","choices":[{"index":0,"text":" Paris","logprobs":null,'
        '"finish_reason":"stop"}],"usage":{"prompt_tokens":2,"completion_tokens":2,"total_tokens":4}}'
    )


def test_completion_streams_text_without_special_tokens() -> None:
    given = stream(Client(), COMPLETIONS, stream_options={"include_usage": True})

    assert [chunk["choices"] for chunk in given] == [
        [{"index": 0, "text": " Paris", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}],
        [],
    ]
    assert [chunk["usage"] for chunk in given[:-1]] == [None, None]
    assert given[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert all("usage" not in chunk for chunk in stream(Client(), COMPLETIONS))


def test_completion_ends_after_sixteen_tokens_by_default() -> None:
    client = Client()

    completion(client)

    assert client.engine.requests[0].max_new_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [tuple(TOKENIZER.encode("Hi"))]),
        (["Hi", "a"], [tuple(TOKENIZER.encode("Hi")), tuple(TOKENIZER.encode("a"))]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
    ],
)
def test_prompts_come_as_text_or_tokens_alone_or_in_lists(prompt: object, expected: list[tuple[int, ...]]) -> None:
    client = Client()

    answer = completion(client, prompt=prompt, n=2)

    assert [request.prompt for request in client.engine.requests] == [p for p in expected for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["completion_tokens"] == 2 * 2 * len(expected)


def test_best_of_gives_the_likeliest() -> None:
    def script(text: str, logprob: float) -> Script:
        return Script((Token(50, text, logprob, False),))

    client = Client(FakeEngine([script("a", -2.0), script("b", -1.0), script("c", -3.0)]), max_best_of=3)

    answer = completion(client, n=2, best_of=3)

    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "b"), (1, "a")]
    assert answer["usage"]["completion_tokens"] == 3


def test_echo_begins_with_the_prompt() -> None:
    assert completion(Client(), prompt="Hé", echo=True)["choices"][0]["text"] == "Hé Paris"
    ids = TOKENIZER.encode("Hé")
    assert completion(Client(), prompt=ids, echo=True)["choices"][0]["text"] == "Hé Paris"
    given = stream(Client(), COMPLETIONS, echo=True)
    assert [chunk["choices"][0]["text"] for chunk in given] == ["Hi Paris", ""]


def test_every_prompt_is_echoed_in_its_own_choice() -> None:
    texts = [choice["text"] for choice in completion(Client(), prompt=["Hi", "a"], echo=True)["choices"]]

    assert texts == ["Hi Paris", "a Paris"]


def test_a_prompt_is_scored_in_four_lists_of_equal_length() -> None:
    client = Client(FakeEngine([Script((Token(34, "C", -0.25, False),), top_tokens=(Token(34, "C", -0.25, False),))]))

    [choice] = completion(client, prompt="Hé", echo=True, logprobs=1, max_tokens=1)["choices"]

    ids = TOKENIZER.encode("Hé")
    logprobs = choice["logprobs"]
    names = ["H", *(f"bytes:\\x{TOKENIZER.bytes_of(token_id)[0]:02x}" for token_id in ids[1:])]
    assert len(ids) == 3, "é is two tokens, so that names and offsets are put to the test"
    assert logprobs["tokens"] == [*names, TOKENIZER.token_text(34)]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -0.25]
    best = TOKENIZER.token_text(33)
    assert logprobs["top_logprobs"] == [
        None, {best: -0.5, names[1]: -1.0}, {best: -0.5, names[2]: -1.0}, {TOKENIZER.token_text(34): -0.25}
    ]  # fmt: skip
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert client.engine.requests[0].sampling.prompt_top_n_tokens == 1


def test_only_the_first_of_several_choices_scores_the_prompt_and_all_show_it() -> None:
    client = Client()

    answer = completion(client, prompt="Hi", n=2, echo=True, logprobs=0)

    assert [request.prompt_logprobs for request in client.engine.requests] == [True, False]
    scores = [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]]
    assert scores[0] == scores[1] == [None, -1.0, -0.25, -2.5839844]
    assert answer["choices"][0]["logprobs"]["top_logprobs"] is None


def test_a_prompt_may_be_scored_and_nothing_else() -> None:
    for wants_stream in (False, True):
        answer = Client().post(
            COMPLETIONS, {"prompt": "Hi", "echo": True, "logprobs": 0, "max_tokens": 0, "stream": wants_stream}
        )
        choice = (chunks(answer)[0] if wants_stream else answer.json())["choices"][0]
        assert choice["text"] == "Hi"
        assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
        if not wants_stream:
            assert answer.json()["usage"]["completion_tokens"] == 0


# The other routes


def test_the_served_model_is_listed_and_found_by_its_name() -> None:
    client = Client(served_model_name="org/m")
    model = {"id": "org/m", "object": "model", "created": 0, "owned_by": "org/m"}

    assert client.get("/v1/models").json() == {"object": "list", "data": [model]}
    assert client.get("/v1/models/org/m").json() == client.get("/v1/models/org%2Fm").json() == model
    missing = client.get("/v1/models/org/n")
    assert (missing.status_code, missing.json()) == (404, {"error": "Model org/n does not exist"})


def test_chat_tokenize_shows_prompt_and_tokens() -> None:
    answer = Client().post("/chat_tokenize", {"messages": HELLO}).json()

    assert answer["templated_text"] == "<user>Hi<assistant>"
    assert [token["id"] for token in answer["tokenize_response"]] == TOKENIZER.encode("<user>Hi<assistant>")
    assert answer["tokenize_response"][0]["start"] == 0


def test_invocations_take_conversations_and_prompts() -> None:
    client = Client()

    assert client.post("/invocations", {"messages": HELLO}).json()["object"] == "chat.completion"
    assert client.post("/invocations", {"prompt": "Hi"}).json()["object"] == "text_completion"
    assert chunks(client.post("/invocations", {"messages": HELLO, "stream": True}))[-1]["choices"]


def test_load_model_is_answered_for_transformers_chat() -> None:
    answer = Client().post("/load_model", {"model": "org/m"})

    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.text == 'data: {"status":"ready","model":"org/m","cached":true}\n\n'
    assert Client(FakeEngine(ready=False)).post("/load_model", {}).status_code == NotReady.status


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses", "/chat_tokenize", "/load_model"])
def test_the_key_is_asked_for(path: str) -> None:
    assert Client(api_key="k").post(path, {}).status_code == 401


def test_headers_tell_of_times_and_tokens() -> None:
    headers = Client().post(CHAT, {"messages": HELLO}).headers

    assert headers["x-generated-tokens"] == "2"
    assert headers["x-compute-characters"] == str(len("<user>Hi<assistant>"))
    assert headers["x-total-time"].isdecimal()
    streamed = Client().post(CHAT, {"messages": HELLO, "stream": True}).headers
    assert "x-total-time" not in streamed
    assert streamed["x-compute-type"] == "gpu+optimized"


# Responses


def test_a_response_is_one_message() -> None:
    client = Client()

    answer = client.post("/v1/responses", {"input": "Hi", "instructions": "S", "max_output_tokens": 5}).json()

    assert client.engine.requests[0].prompt == tuple(TOKENIZER.encode("<system>S<user>Hi<assistant>"))
    assert client.engine.requests[0].max_new_tokens == 5
    assert (answer["object"], answer["status"]) == ("response", "completed")
    [item] = answer["output"]
    assert (item["role"], item["content"][0]["text"]) == ("assistant", " Paris")
    assert answer["usage"]["output_tokens"] == 2


def test_a_response_is_streamed_as_named_events() -> None:
    answer = Client().post("/v1/responses", {"input": HELLO, "stream": True})

    *frames, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    payloads = [json.loads(frame.partition("\ndata: ")[2]) for frame in frames]
    kinds = [payload["type"] for payload in payloads]
    assert [frame.partition("\n")[0] for frame in frames] == [f"event: {kind}" for kind in kinds]
    assert [kind.removeprefix("response.") for kind in kinds] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [payload["sequence_number"] for payload in payloads] == list(range(len(payloads)))
    assert payloads[-1]["response"]["output"][0]["content"][0]["text"] == " Paris"


@pytest.mark.parametrize(
    ("name", "value"),
    [("previous_response_id", "r"), ("tools", [WEATHER]), ("background", True), ("text.verbosity", "low")],
)
def test_a_response_refuses_what_is_more_than_text(name: str, value: object) -> None:
    field, _, part = name.partition(".")

    answer = Client().post("/v1/responses", {"input": "Hi", field: {part: value} if part else value})

    assert answer.status_code == 422
    assert answer.json()["error"] == f"Input validation error: `{name}` is not supported"


def test_a_responses_text_may_have_a_format() -> None:
    client = Client()
    format_: Json = {"type": "json_schema", "name": "n", "schema": CITY, "strict": True}

    answer = client.post("/v1/responses", {"input": "Hi", "text": {"format": format_, "verbosity": "medium"}})
    chat(client, response_format={"type": "json_object", "value": CITY})

    assert answer.json()["text"] == {"format": format_}
    assert client.engine.requests[0].grammar == client.engine.requests[1].grammar != ""
    wrong = client.post("/v1/responses", {"input": "Hi", "text": {"format": {"type": "xml"}}})
    assert wrong.status_code == 422
    assert "text.format: unknown variant in `type`" in wrong.json()["error"]


def test_a_response_accepts_what_asks_for_nothing_more() -> None:
    harmless = {"tools": [], "background": False, "text": {"format": {"type": "text"}}, "previous_response_id": None}
    harmless |= {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}}

    assert Client().post("/v1/responses", {"input": "Hi", **harmless}).status_code == 200


def test_a_response_refuses_to_include_logprobs() -> None:
    answer = Client().post("/v1/responses", {"input": "Hi", "include": ["message.output_text.logprobs"]})

    assert answer.status_code == 422
    assert "message.output_text.logprobs" in answer.json()["error"]


def test_a_responses_effort_is_for_the_template_and_its_thoughts_are_forgotten() -> None:
    client = Client(
        template_source="{{ reasoning_effort }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}

    client.post("/v1/responses", {"input": [*HELLO, thought], "reasoning": {"effort": "low"}})

    [request] = client.engine.requests
    assert request.prompt == tuple(TOKENIZER.encode("low<user>Hi", add_special_tokens=False))
    assert Client().post("/v1/responses", {"input": "Hi", "reasoning": {"effort": 1}}).status_code == 422


# Blocks


def test_choices_share_the_prompts_blocks() -> None:
    """42 tokens are ten full blocks of four, found by every choice but the first."""

    async def run() -> int:
        settings = GhostSettings(num_blocks=200, block_size=4, vocab_size=TOKENIZER.vocab_size)
        metrics = Metrics(max_input_tokens=100, max_total_tokens=100)
        async with (
            ghost_group(settings) as group,
            engine_over(group.addresses, TOKENIZER, metrics=metrics) as engine,
        ):
            config = replace(CONFIG, max_total_tokens=128, max_input_tokens=100)
            limits = Limits.derive(config, Capacity(TOKENIZER.vocab_size, (), 796), TOKENIZER)
            app = create_app(config, engine, Validator(limits, TOKENIZER), TOKENIZER, metrics)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                answer = await client.post(COMPLETIONS, json={"prompt": "z" * 42, "n": 4, "max_tokens": 3})
            assert len(answer.json()["choices"]) == 4
            return engine.counters.num_hit_tokens

    assert asyncio.run(run()) == 3 * 40


# The real client, a real server


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    flags = ("--dtype", "float32", "--kv-cache-bytes", "200000000", "--served-model-name", "org/m")
    with serving("--model-id", str(smollm2), *flags) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def test_openai_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="x", messages=QUESTION, temperature=0, max_tokens=20)
    parts = client.chat.completions.create(model="x", messages=QUESTION, temperature=0, max_tokens=20, stream=True)
    pieces = [part.choices[0].delta.content or "" for part in parts]

    assert answer.choices[0].message.content == "".join(pieces) == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert len(pieces) == answer.usage.completion_tokens


def test_openais_stream_helper_puts_the_answer_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="x", messages=QUESTION, temperature=0, max_tokens=20) as events:
        final = events.get_final_completion()

    assert final.choices[0].message.content == ANSWER
    assert final.choices[0].message.role == "assistant"


def test_openai_stops_before_the_stop_string(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="x", messages=QUESTION, temperature=0, max_tokens=20, stop="e is")

    assert answer.choices[0].message.content == "The capital of Franc"
    assert answer.choices[0].finish_reason == "stop"


def test_openai_finds_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["org/m"]
    assert client.models.retrieve("org/m").id == "org/m"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/n")


def test_openai_names_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        client.completions.create(model="x", prompt="a", top_p=2)

    assert raised.value.body == "Input validation error: `top_p` must be > 0.0 and < 1.0"


def test_openai_reads_responses(client: openai.OpenAI) -> None:
    asked = {"model": "x", "input": QUESTION[0]["content"], "temperature": 0, "max_output_tokens": 20}

    assert client.responses.create(**asked).output_text == ANSWER
    with client.responses.stream(**asked) as events:
        assert events.get_final_response().output_text == ANSWER


CITY_REPORT: Json = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["city", "days", "tags"],
    "additionalProperties": False,
}
REPORT_TOOL: Json = {"type": "function", "function": {"name": "report", "parameters": CITY_REPORT}}
NOW_TOOL: Json = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_openai_gets_the_structure_it_asked_for(client: openai.OpenAI, temperature: float) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "report", "schema": CITY_REPORT, "strict": True}}

    answer = client.chat.completions.create(
        model="x", messages=QUESTION, temperature=temperature, seed=5, n=4, max_tokens=150, response_format=format_
    )

    assert len(answer.choices) == 4
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        Draft202012Validator(CITY_REPORT).validate(json.loads(choice.message.content))


def test_an_answer_is_cut_short_only_where_tokens_run_out(client: openai.OpenAI) -> None:
    format_ = {"type": "json_object", "value": CITY_REPORT}
    asked = {"model": "x", "messages": QUESTION, "temperature": 0, "response_format": format_}
    whole = client.chat.completions.create(**asked, max_tokens=200)
    num_tokens = whole.usage.completion_tokens

    for limit in (*range(1, num_tokens, 6), num_tokens - 1):
        choice = client.chat.completions.create(**asked, max_tokens=limit).choices[0]
        assert choice.finish_reason == "length"
        assert whole.choices[0].message.content.startswith(choice.message.content)
    assert whole.choices[0].finish_reason == "stop"
    Draft202012Validator(CITY_REPORT).validate(json.loads(whole.choices[0].message.content))
    assert client.chat.completions.create(**asked, max_tokens=num_tokens).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_openai_gets_the_calls_it_asked_for(client: openai.OpenAI, temperature: float) -> None:
    for seed, choice in enumerate(["required", {"type": "function", "function": {"name": "report"}}, "report"]):
        answer = client.chat.completions.create(
            model="x",
            messages=QUESTION,
            tools=[REPORT_TOOL, NOW_TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=temperature,
            seed=seed,
            max_tokens=300,
        ).choices[0]

        [call] = answer.message.tool_calls
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        if choice != "required":
            assert call.function.name == "report"
        arguments = json.loads(call.function.arguments)
        assert isinstance(arguments, dict)
        if call.function.name == "report":
            Draft202012Validator(CITY_REPORT).validate(arguments)


def test_openais_stream_helper_puts_calls_together(client: openai.OpenAI) -> None:
    asked = {
        "model": "x", "messages": QUESTION, "tools": [REPORT_TOOL], "tool_choice": "required", "max_tokens": 300,
        "temperature": 0, "parallel_tool_calls": False,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as events:
        kinds = [event.type for event in events]
        final = events.get_final_completion().choices[0]

    [call], [expected] = final.message.tool_calls, whole.choices[0].message.tool_calls
    assert call.function.name == expected.function.name
    assert call.function.arguments == expected.function.arguments
    assert len(call.id) == len(expected.id)
    assert final.finish_reason == "tool_calls"
    assert kinds.count("tool_calls.function.arguments.delta") > 3


def test_openai_parses_into_its_own_models(client: openai.OpenAI) -> None:
    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=20)
        population: int = pydantic.Field(gt=0, lt=10_000_000)
        kind: Literal["capital", "other"]
        share: float | None = pydantic.Field(ge=0, le=1)

    answer = client.chat.completions.parse(
        model="x", messages=QUESTION, response_format=City, temperature=1.2, seed=1, max_tokens=200
    )

    assert isinstance(answer.choices[0].message.parsed, City)


def test_openai_reads_structured_responses(client: openai.OpenAI) -> None:
    format_ = {"type": "json_schema", "name": "report", "schema": CITY_REPORT, "strict": True}

    answer = client.responses.create(
        model="x", input="Report!", temperature=0, max_output_tokens=200, text={"format": format_}
    )

    assert answer.status == "completed"
    Draft202012Validator(CITY_REPORT).validate(json.loads(answer.output_text))


def test_scores_are_those_of_transformers(client: openai.OpenAI, smollm2: Path) -> None:
    """As lm-eval asks for them: token ids in, a greedy token told by exact equality with the best."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    ids = [504, 3575, 282, 4649, 314, 7042, 30, 198]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)

    answer = client.completions.create(
        model="x", prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )

    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    scores = torch.tensor(logprobs.token_logprobs[1:-1])
    assert torch.allclose(scores, expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-4)
    best = [max(top.values()) for top in logprobs.top_logprobs[1:-1]]
    assert torch.allclose(torch.tensor(best), expected[:-1].amax(-1), atol=1e-4)
    greedy = [score == likeliest for score, likeliest in zip(logprobs.token_logprobs[1:-1], best, strict=True)]
    assert greedy == (expected[:-1].argmax(-1) == torch.tensor(ids[1:])).tolist()
    assert True in greedy
    assert False in greedy

"""`huggingface_hub`'s InferenceClient in conversations."""

from __future__ import annotations

import json
import re
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.inference._generated.types import (
    ChatCompletionInputFunctionName,
    ChatCompletionInputToolChoiceClass,
)
from rows import ANSWER, CITY, QUESTION, WEATHER, Servers, check_city, check_weather, run

GREEDY = {"temperature": 0.0, "max_tokens": 20}
REGEX = r"[A-Z][a-z]{2,8}, in \d{4}"


def row_34_every_form_of_url_reaches_the_same(servers: Servers) -> None:
    for path in ("", "/", "/v1", "/v1/", "/v1/chat/completions"):
        client = InferenceClient(base_url=servers.plain + path)
        output = client.chat.completions.create(QUESTION, **GREEDY)

        assert output.choices[0].message.content == ANSWER, path
        assert output.choices[0].message.role == "assistant"
        assert output.choices[0].finish_reason == "stop"


def row_34_a_model_may_be_a_url_or_any_name(servers: Servers) -> None:
    for client in (InferenceClient(servers.plain), InferenceClient(base_url=servers.plain, provider="hf-inference")):
        assert client.chat_completion(QUESTION, **GREEDY).choices[0].message.content == ANSWER
        assert client.chat_completion(QUESTION, model="tgi", **GREEDY).model == "smollm2-135m-instruct"


async def row_34_the_asynchronous_client_sees_the_same(servers: Servers) -> None:
    output = await AsyncInferenceClient(servers.plain).chat_completion(QUESTION, **GREEDY)

    assert output.choices[0].message.content == ANSWER


def row_35_usage_comes_alone_and_last(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    options = {"include_usage": True}
    *chunks, last = client.chat_completion(QUESTION, stream=True, stream_options=options, **GREEDY)

    assert last.choices == []
    assert last.usage.completion_tokens == client.chat_completion(QUESTION, **GREEDY).usage.completion_tokens
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == ANSWER


def row_35_no_usage_unless_asked_for(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    chunks = list(client.chat_completion(QUESTION, stream=True, **GREEDY))

    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"


def row_36_logprobs_tell_of_every_token(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    output = client.chat_completion(QUESTION, logprobs=True, top_logprobs=5, **GREEDY)
    content = output.choices[0].logprobs.content

    assert len(content) == output.usage.completion_tokens
    assert "".join(entry.token for entry in content).startswith(ANSWER)
    for entry in content:
        assert len(entry.top_logprobs) == 5
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)


def row_36_logprobs_are_streamed_token_by_token(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    whole = client.chat_completion(QUESTION, logprobs=True, top_logprobs=5, **GREEDY)
    chunks = client.chat_completion(QUESTION, logprobs=True, top_logprobs=5, stream=True, **GREEDY)
    streamed = [entry.token for chunk in chunks for entry in chunk.choices[0].logprobs.content]

    assert streamed == [entry.token for entry in whole.choices[0].logprobs.content]


def row_37_tools_may_be_left_alone_or_called(servers: Servers) -> None:
    client = InferenceClient(servers.plain)

    for choice in ("auto", None):
        output = client.chat_completion(QUESTION, tools=[WEATHER], tool_choice=choice, **GREEDY)
        message = output.choices[0].message
        assert bool(message.tool_calls) == (output.choices[0].finish_reason == "tool_calls")
        assert message.tool_calls or message.content


def row_37_no_tool_is_called_where_none_is_wanted(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    output = client.chat_completion(QUESTION, tools=[WEATHER], tool_choice="none", **GREEDY)

    assert output.choices[0].message.content == ANSWER
    assert output.choices[0].message.tool_calls is None


def row_37_a_tool_is_called_where_one_is_required(servers: Servers) -> None:
    named = ChatCompletionInputToolChoiceClass(function=ChatCompletionInputFunctionName(name="get_weather"))
    for choice in ("required", "get_weather", {"type": "function", "function": {"name": "get_weather"}}, named):
        output = InferenceClient(servers.plain).chat_completion(
            QUESTION, tools=[WEATHER], tool_choice=choice, temperature=0.0, max_tokens=200
        )
        (choice_,) = output.choices
        assert choice_.finish_reason == "tool_calls"
        for call in choice_.message.tool_calls:
            assert call.id
            assert call.type == "function"
            assert call.function.name == "get_weather"
            check_weather(call.function.arguments)


def row_37_a_required_call_is_streamed(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    chunks = list(
        client.chat_completion(
            QUESTION, tools=[WEATHER], tool_choice="get_weather", stream=True, temperature=0.0, max_tokens=200
        )
    )
    deltas = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks]

    assert all(chunk.choices[0].delta.content is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert [delta.function.name for delta in deltas] == ["get_weather"] + [None] * (len(deltas) - 1)
    check_weather("".join(delta.function.arguments for delta in deltas))


def row_38_an_answer_follows_a_schema(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    for form in (
        {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
        {"type": "json", "value": CITY},
        {"type": "json_object", "value": CITY},
    ):
        output = client.chat_completion(QUESTION, response_format=form, temperature=0.0, max_tokens=200)
        assert output.choices[0].finish_reason == "stop"
        check_city(output.choices[0].message.content)


def row_38_an_answer_follows_a_regular_expression(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    output = client.chat_completion(QUESTION, response_format={"type": "regex", "value": REGEX}, **GREEDY)

    assert re.fullmatch(REGEX, output.choices[0].message.content)
    assert output.choices[0].finish_reason == "stop"


def row_38_an_answer_may_be_any_json_object(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    asked = {"response_format": {"type": "json_object"}, "temperature": 0.0, "max_tokens": 300}
    output = client.chat_completion(QUESTION, **asked)

    if output.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(output.choices[0].message.content), dict)
    else:
        assert output.usage.completion_tokens == 300


if __name__ == "__main__":
    run(sys.modules[__name__])

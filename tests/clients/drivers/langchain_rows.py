"""LangChain's HuggingFaceEndpoint and ChatHuggingFace, over the huggingface_hub they bring."""

from __future__ import annotations

import json
import sys

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint
from rows import ANSWER, CITY, PROMPT, QUESTION, WEATHER, Servers, check_city, check_weather, run


def connect(servers: Servers, **settings: object) -> HuggingFaceEndpoint:
    """With its own defaults for sampling, which draw; a seed makes the answers comparable."""
    return HuggingFaceEndpoint(endpoint_url=servers.plain, max_new_tokens=20, seed=7, **settings)


def row_58_invokes(servers: Servers) -> None:
    text = connect(servers).invoke(PROMPT)

    assert text
    assert not text.startswith(PROMPT)
    assert connect(servers).invoke(PROMPT) == text
    assert connect(servers, streaming=True).invoke(PROMPT) == text


def row_58_streams(servers: Servers) -> None:
    pieces = list(connect(servers).stream(PROMPT))

    assert len(pieces) > 1
    assert "".join(pieces) == connect(servers).invoke(PROMPT)


async def row_58_invokes_and_streams_asynchronously(servers: Servers) -> None:
    endpoint = connect(servers)
    pieces = [piece async for piece in endpoint.astream(PROMPT)]

    assert await endpoint.ainvoke(PROMPT) == "".join(pieces) == endpoint.invoke(PROMPT)


def row_58_stops_before_a_stop_sequence(servers: Servers) -> None:
    greedy = connect(servers, temperature=None, top_p=None, typical_p=None)

    assert greedy.invoke(PROMPT, stop=["\n"]) == " Paris."
    assert "".join(greedy.stream(PROMPT, stop=["\n"])) == " Paris."


def connect_chat(servers: Servers, **settings: object) -> ChatHuggingFace:
    """Greedy, unless the settings say otherwise."""
    # Its streams ask with the endpoint's temperature, which must not be 0.
    endpoint = HuggingFaceEndpoint(endpoint_url=servers.plain, max_new_tokens=20, temperature=0.001)
    return ChatHuggingFace(llm=endpoint, model_id="org/m", temperature=0.0, **{"max_tokens": 20, **settings})


def row_58_chats(servers: Servers) -> None:
    message = connect_chat(servers).invoke(QUESTION)

    assert message.content == ANSWER
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.usage_metadata["output_tokens"] > 0


def row_58_streams_chats(servers: Servers) -> None:
    pieces = [piece.content for piece in connect_chat(servers).stream(QUESTION)]

    assert len(pieces) > 5
    assert "".join(pieces) == ANSWER


async def row_58_chats_and_streams_asynchronously(servers: Servers) -> None:
    chat = connect_chat(servers)

    assert (await chat.ainvoke(QUESTION)).content == ANSWER
    assert "".join([piece.content async for piece in chat.astream(QUESTION)]) == ANSWER


def row_58_calls_tools(servers: Servers) -> None:
    chat = connect_chat(servers, max_tokens=200)
    for choice in ("required", "any", "get_weather"):
        message = chat.bind_tools([WEATHER], tool_choice=choice).invoke(QUESTION)

        assert message.invalid_tool_calls == []
        (call,) = message.tool_calls
        assert call["name"] == "get_weather"
        check_weather(json.dumps(call["args"]))


def row_58_goes_on_from_what_tools_told(servers: Servers) -> None:
    call = {"name": "get_weather", "args": {"city": "Paris", "unit": "celsius"}, "id": "call_1", "type": "tool_call"}
    told = [
        HumanMessage("What is the weather in Paris?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("21 degrees, sunny", tool_call_id="call_1"),
    ]

    assert connect_chat(servers).bind_tools([WEATHER]).invoke(told).content


def row_58_structures_answers(servers: Servers) -> None:
    chat = connect_chat(servers, max_tokens=200)
    for method in ("json_schema", "function_calling"):
        schema = {"title": "city", "description": "A city", **CITY}
        check_city(json.dumps(chat.with_structured_output(schema, method=method).invoke(QUESTION)))


if __name__ == "__main__":
    run(sys.modules[__name__])

"""Haystack's generator for Hugging Face's APIs."""

from __future__ import annotations

import sys

from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.tools import Tool
from haystack_integrations.components.generators.huggingface_api import HuggingFaceAPIChatGenerator
from rows import ANSWER, QUESTION, WEATHER, Servers, run

MESSAGES = [ChatMessage.from_user(QUESTION[0]["content"])]


def connect(servers: Servers, **settings: object) -> HuggingFaceAPIChatGenerator:
    return HuggingFaceAPIChatGenerator(
        api_type="text_generation_inference",
        api_params={"url": servers.plain},
        generation_kwargs={"temperature": 0.0, "max_tokens": 20},
        **settings,
    )


def row_59_chats(servers: Servers) -> None:
    (reply,) = connect(servers).run(MESSAGES)["replies"]

    assert reply.text == ANSWER
    assert reply.meta["finish_reason"] == "stop"
    assert reply.meta["usage"]["completion_tokens"] > 0


def row_59_streams_chats(servers: Servers) -> None:
    chunks: list[StreamingChunk] = []
    (reply,) = connect(servers, streaming_callback=chunks.append).run(MESSAGES)["replies"]

    assert reply.text == "".join(chunk.content for chunk in chunks) == ANSWER
    assert reply.meta["finish_reason"] == "stop"
    assert reply.meta["usage"]["completion_tokens"] > 0


async def row_59_chats_asynchronously(servers: Servers) -> None:
    (reply,) = (await connect(servers).run_async(MESSAGES))["replies"]

    assert reply.text == ANSWER


def row_59_stops_at_stop_words(servers: Servers) -> None:
    (reply,) = connect(servers, stop_words=[" is"]).run(MESSAGES)["replies"]

    assert reply.text == "The capital of France"


def row_59_calls_tools(servers: Servers) -> None:
    function = WEATHER["function"]
    tool = Tool(function["name"], function["description"], function["parameters"], function=lambda **_: "sunny")
    wanted = {"tool_choice": "required", "max_tokens": 200}
    (reply,) = connect(servers).run(MESSAGES, tools=[tool], generation_kwargs=wanted)["replies"]

    assert reply.meta["finish_reason"] == "tool_calls"
    assert reply.tool_calls
    for call in reply.tool_calls:
        assert call.tool_name == "get_weather"
        assert call.arguments.keys() == {"city", "unit"}


if __name__ == "__main__":
    run(sys.modules[__name__])

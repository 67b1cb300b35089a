"""smolagents' model over huggingface_hub, whose messages are always lists of parts."""

from __future__ import annotations

import json
import sys

from rows import ANSWER, QUESTION, Servers, check_weather, run
from smolagents import ChatMessage, InferenceClientModel, Tool

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]


class Weather(Tool):
    """Of the same shape as the weather of all drivers."""

    name = "get_weather"
    description = "Get the weather in a city"
    inputs = {
        "city": {"type": "string", "description": "its name", "maxLength": 20},
        "unit": {"type": "string", "description": "of temperatures", "enum": ["celsius", "fahrenheit"]},
    }
    output_type = "string"

    def forward(self, city: str, unit: str) -> str:
        return f"20 {unit} in {city}"


def connect(servers: Servers, **settings: object) -> InferenceClientModel:
    return InferenceClientModel(servers.plain, token="x", temperature=0.0, **{"max_tokens": 20, **settings})


def row_59_chats(servers: Servers) -> None:
    message = connect(servers).generate([ChatMessage.from_dict(message) for message in MESSAGES])

    assert message.content == ANSWER
    assert message.token_usage.output_tokens > 0


def row_59_streams_chats(servers: Servers) -> None:
    deltas = list(connect(servers).generate_stream([ChatMessage.from_dict(message) for message in MESSAGES]))

    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    assert deltas[-1].token_usage.output_tokens > 0


def row_59_stops_at_stop_sequences(servers: Servers) -> None:
    messages = [ChatMessage.from_dict(message) for message in MESSAGES]

    assert connect(servers).generate(messages, stop_sequences=[" is"]).content == "The capital of France"


def row_59_calls_tools(servers: Servers) -> None:
    """It asks with `tool_choice: required`, as its agents do."""
    messages = [ChatMessage.from_dict(message) for message in MESSAGES]
    message = connect(servers, max_tokens=200).generate(messages, tools_to_call_from=[Weather()])

    assert message.tool_calls
    for call in message.tool_calls:
        assert call.function.name == "get_weather"
        arguments = call.function.arguments
        check_weather(arguments if isinstance(arguments, str) else json.dumps(arguments))


if __name__ == "__main__":
    run(sys.modules[__name__])

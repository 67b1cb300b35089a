"""litellm, by its Hugging Face, OpenAI and text completion providers."""

from __future__ import annotations

import os
import sys

# Read at import: without it litellm first waits for a list of prices from the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from rows import ANSWER, PROMPT, QUESTION, WEATHER, Servers, check_weather, occupied, raises, run

# It would print its advice between our lines.
litellm.suppress_debug_info = True

GREEDY = {"temperature": 0.0, "max_tokens": 20, "api_key": "x", "max_retries": 0}
CHAT_MODELS = ("huggingface/tgi", "openai/tgi")


def url_of(model: str, base: str) -> str:
    """Its Hugging Face provider finds the route itself."""
    return base if model.startswith("huggingface/") else f"{base}/v1"


def row_59_chats(servers: Servers) -> None:
    for model in CHAT_MODELS:
        answer = litellm.completion(model=model, api_base=url_of(model, servers.plain), messages=QUESTION, **GREEDY)

        assert answer.choices[0].message.content == ANSWER
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens > 0


def row_59_streams_chats(servers: Servers) -> None:
    for model in CHAT_MODELS:
        base = url_of(model, servers.plain)
        chunks = litellm.completion(model=model, api_base=base, messages=QUESTION, stream=True, **GREEDY)

        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


async def row_59_chats_asynchronously(servers: Servers) -> None:
    for model in CHAT_MODELS:
        base = url_of(model, servers.plain)
        answer = await litellm.acompletion(model=model, api_base=base, messages=QUESTION, **GREEDY)
        chunks = await litellm.acompletion(model=model, api_base=base, messages=QUESTION, stream=True, **GREEDY)

        assert answer.choices[0].message.content == ANSWER
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == ANSWER


def row_59_completes_prompts(servers: Servers) -> None:
    asked = {"model": "text-completion-openai/tgi", "api_base": f"{servers.plain}/v1", "prompt": PROMPT, **GREEDY}
    whole = litellm.text_completion(**asked)
    pieces = [chunk.choices[0].text or "" for chunk in litellm.text_completion(stream=True, **asked)]

    assert "".join(pieces) == whole.choices[0].text
    assert whole.choices[0].text.startswith(" Paris.")


def row_59_calls_tools(servers: Servers) -> None:
    for model in CHAT_MODELS:
        answer = litellm.completion(
            model=model,
            api_base=url_of(model, servers.plain),
            messages=QUESTION,
            tools=[WEATHER],
            tool_choice="required",
            **{**GREEDY, "max_tokens": 200},
        )

        assert answer.choices[0].finish_reason == "tool_calls"
        for call in answer.choices[0].message.tool_calls:
            assert call.function.name == "get_weather"
            check_weather(call.function.arguments)


def row_59_refusals_have_classes(servers: Servers) -> None:
    for model in CHAT_MODELS:
        asked = {"model": model, "messages": QUESTION, **GREEDY}
        with raises(litellm.AuthenticationError, ""):
            litellm.completion(api_base=url_of(model, servers.strict), **asked)
        with raises(litellm.ServiceUnavailableError, ""):
            litellm.completion(api_base=url_of(model, servers.unready), **asked)
        with occupied(servers), raises(litellm.RateLimitError, ""):
            litellm.completion(api_base=url_of(model, servers.strict), **{**asked, "api_key": servers.key})


if __name__ == "__main__":
    run(sys.modules[__name__])

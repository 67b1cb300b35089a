"""LangChain's HuggingFaceEndpoint, over the huggingface_hub it brings."""

from __future__ import annotations

import sys

from langchain_huggingface import HuggingFaceEndpoint
from rows import PROMPT, Servers, run


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


if __name__ == "__main__":
    run(sys.modules[__name__])

"""llama-index's HuggingFaceInferenceAPI, in its text generation task and in conversations."""

from __future__ import annotations

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.huggingface_api import HuggingFaceInferenceAPI
from rows import ANSWER, PROMPT, QUESTION, Servers, run


def connect(servers: Servers) -> HuggingFaceInferenceAPI:
    return HuggingFaceInferenceAPI(
        model_name=servers.plain, task="text-generation", provider="hf-inference", num_output=20, temperature=1.0
    )


def row_59_completes(servers: Servers) -> None:
    llm = connect(servers)

    assert llm.context_window == 2047
    assert llm.complete(PROMPT).text.startswith(f"{PROMPT} Paris.")


def row_59_streams(servers: Servers) -> None:
    llm = connect(servers)
    pieces = [part.delta for part in llm.stream_complete(PROMPT)]

    assert len(pieces) == 20
    assert PROMPT + "".join(pieces) == llm.complete(PROMPT).text


async def row_59_completes_and_streams_asynchronously(servers: Servers) -> None:
    llm = connect(servers)
    # In this order: behind a stream, huggingface_hub 2.4 closes its asynchronous client for all but further streams.
    whole = await llm.acomplete(PROMPT)
    pieces = [part.delta async for part in await llm.astream_complete(PROMPT)]

    assert PROMPT + "".join(pieces) == whole.text == llm.complete(PROMPT).text


def connect_chat(servers: Servers) -> HuggingFaceInferenceAPI:
    return HuggingFaceInferenceAPI(
        model_name=servers.plain, task="conversational", provider="hf-inference", num_output=20, temperature=0.001
    )


def messages() -> list[ChatMessage]:
    return [ChatMessage(**message) for message in QUESTION]


def row_59_chats(servers: Servers) -> None:
    llm = connect_chat(servers)

    assert llm.chat(messages()).message.content == ANSWER
    assert llm.complete(QUESTION[0]["content"]).text == ANSWER


def row_59_streams_chats(servers: Servers) -> None:
    *_, last = parts = list(connect_chat(servers).stream_chat(messages()))

    assert "".join(part.delta for part in parts) == last.message.content == ANSWER


async def row_59_chats_and_streams_asynchronously(servers: Servers) -> None:
    llm = connect_chat(servers)

    assert (await llm.achat(messages())).message.content == ANSWER
    assert "".join([part.delta async for part in await llm.astream_chat(messages())]) == ANSWER


if __name__ == "__main__":
    run(sys.modules[__name__])

"""`lorax-client`, which insists on `prompt_tokens` in the details and sends parameters of its own."""

from __future__ import annotations

import sys

from lorax import AsyncClient, Client
from rows import PROMPT, PROMPT_IDS, Servers, run


def row_64_generates(servers: Servers) -> None:
    response = Client(servers.plain).generate(PROMPT, max_new_tokens=20, decoder_input_details=True)

    assert response.generated_text.startswith(" Paris.")
    assert response.details.prompt_tokens == len(PROMPT_IDS)
    assert [token.id for token in response.details.prefill] == PROMPT_IDS
    assert response.details.generated_tokens == len(response.details.tokens) == 20


def row_64_streams(servers: Servers) -> None:
    client = Client(servers.plain)
    responses = list(client.generate_stream(PROMPT, max_new_tokens=20))

    text = "".join(response.token.text for response in responses)
    assert text == responses[-1].generated_text == client.generate(PROMPT, max_new_tokens=20).generated_text
    assert responses[-1].details.prompt_tokens == len(PROMPT_IDS)


async def row_64_generates_and_streams_asynchronously(servers: Servers) -> None:
    client = AsyncClient(servers.plain)
    responses = [response async for response in client.generate_stream(PROMPT, max_new_tokens=20)]
    whole = await client.generate(PROMPT, max_new_tokens=20)

    assert whole.generated_text == responses[-1].generated_text == "".join(r.token.text for r in responses)


if __name__ == "__main__":
    run(sys.modules[__name__])

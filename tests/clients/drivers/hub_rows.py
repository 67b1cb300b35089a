"""`huggingface_hub`'s InferenceClient, of today and of the days of the hosted Inference API."""

from __future__ import annotations

import inspect
import re
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, ValidationError
from huggingface_hub.inference._generated.types import TextGenerationOutput, TextGenerationStreamOutput
from rows import PROMPT, PROMPT_IDS, Servers, occupied, raises, run

GREEDY = {"max_new_tokens": 20, "return_full_text": False}
EVERYTHING = {
    "do_sample": True,
    "frequency_penalty": 0.1,
    "max_new_tokens": 20,
    "repetition_penalty": 1.1,
    "return_full_text": True,
    "seed": 7,
    "stop": ["never said"],
    "temperature": 0.9,
    "top_k": 50,
    "top_n_tokens": 2,
    "top_p": 0.9,
    "truncate": 4,
    "typical_p": 0.9,
    "watermark": True,
}


def row_31_takes_every_argument(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    output = client.text_generation(PROMPT, details=True, decoder_input_details=True, **EVERYTHING)

    assert isinstance(output, TextGenerationOutput)
    assert output.generated_text.startswith(PROMPT)
    assert output.details.seed == 7
    assert [token.id for token in output.details.prefill] == PROMPT_IDS[-4:]
    assert output.details.generated_tokens == len(output.details.tokens) == len(output.details.top_tokens)
    assert client.text_generation(PROMPT, **EVERYTHING) == output.generated_text


def row_31_takes_best_of(servers: Servers) -> None:
    output = InferenceClient(servers.plain).text_generation(PROMPT, best_of=2, do_sample=True, details=True, **GREEDY)

    assert len(output.details.best_of_sequences) == 1


def row_31_takes_a_grammar(servers: Servers) -> None:
    pattern = r"\d{3}-[a-f]{4}"
    text = InferenceClient(servers.plain).text_generation(PROMPT, grammar={"type": "regex", "value": pattern}, **GREEDY)

    assert re.fullmatch(pattern, text)


def row_31_answers_without_an_adapter_that_is_not_loaded(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    text = client.text_generation(PROMPT, adapter_id="org/adapter", **GREEDY)

    assert text == client.text_generation(PROMPT, **GREEDY)


def row_31_echoes_the_prompt_by_default_as_tgi(servers: Servers) -> None:
    sends_no_default = "provider" in inspect.signature(InferenceClient).parameters
    text = InferenceClient(servers.plain).text_generation(PROMPT, max_new_tokens=5)

    assert text.startswith(PROMPT) == sends_no_default


def row_32_streams_texts(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    pieces = list(client.text_generation(PROMPT, stream=True, **GREEDY))

    assert len(pieces) == 20
    assert "".join(pieces) == client.text_generation(PROMPT, **GREEDY)


def row_32_streams_details(servers: Servers) -> None:
    client = InferenceClient(servers.plain)
    check_events(list(client.text_generation(PROMPT, stream=True, details=True, **GREEDY)))


def check_events(events: list[TextGenerationStreamOutput]) -> None:
    assert all(isinstance(event, TextGenerationStreamOutput) for event in events)
    assert [event.index for event in events] == [*range(1, 21)]
    assert events[-1].generated_text == "".join(event.token.text for event in events)
    assert events[-1].details.input_length == len(PROMPT_IDS)
    assert events[-1].details.finish_reason == "length"


async def row_33_the_asynchronous_client_sees_the_same(servers: Servers) -> None:
    client = AsyncInferenceClient(servers.plain)
    text = await client.text_generation(PROMPT, **GREEDY)
    pieces = [piece async for piece in await client.text_generation(PROMPT, stream=True, **GREEDY)]
    events = [event async for event in await client.text_generation(PROMPT, stream=True, details=True, **GREEDY)]

    assert text == "".join(pieces) == InferenceClient(servers.plain).text_generation(PROMPT, **GREEDY)
    check_events(events)


def row_39_endpoint_info_and_health(servers: Servers) -> None:
    knows_providers = "provider" in inspect.signature(InferenceClient).parameters
    client = InferenceClient(servers.plain, **({"provider": "hf-inference"} if knows_providers else {}))
    info = client.get_endpoint_info()

    assert info["model_id"] == "smollm2-135m-instruct"
    assert info["max_input_tokens"] == 2047
    assert client.health_check() is True


def row_40_a_validation_error(servers: Servers) -> None:
    client = InferenceClient(servers.plain)

    with raises(ValidationError, "`max_new_tokens` must be <= 2048"):
        client.text_generation(PROMPT, max_new_tokens=10_000)
    with raises(ValidationError, "`max_new_tokens` must be <= 2048"):
        list(client.text_generation(PROMPT, max_new_tokens=10_000, stream=True))


def row_40_a_generation_error(servers: Servers) -> None:
    client = InferenceClient(servers.failing)

    with raises(GenerationError, "Request failed during generation: out of luck"):
        client.text_generation(PROMPT)


def row_40_a_generation_error_within_a_stream(servers: Servers) -> None:
    client = InferenceClient(servers.failing)
    pieces = []

    with raises(GenerationError, "Request failed during generation: out of luck"):
        pieces.extend(client.text_generation(PROMPT, stream=True))
    assert pieces == [" Paris", "</s>"]


def row_40_an_overload(servers: Servers) -> None:
    client = InferenceClient(servers.strict, token=servers.key)

    with occupied(servers), raises(OverloadedError, "Model is overloaded"):
        client.text_generation(PROMPT)


if __name__ == "__main__":
    run(sys.modules[__name__])

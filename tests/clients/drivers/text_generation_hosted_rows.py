"""`text_generation` and `requests` as their users called the hosted Inference API, whose host they know by heart."""

from __future__ import annotations

import json
import sys

import requests
from rows import PROMPT, Servers, behind, raises, reimport, run
from text_generation import InferenceAPIClient
from text_generation.errors import NotFoundError
from text_generation.inference_api import check_model_support, deployed_models

MODEL = "smollm2-135m-instruct"
TIMEOUT_S = 60


def row_20_lists_the_model(servers: Servers) -> None:
    with behind(servers.front, servers):
        (model,) = deployed_models()

    assert model.model_id == MODEL
    assert len(model.sha) == 40


def row_21_knows_which_model_it_can_use(servers: Servers) -> None:
    with behind(servers.front, servers):
        assert check_model_support(MODEL) is True
        with raises(NotFoundError, "Model fake/model does not exist"):
            check_model_support("fake/model")


def row_22_generates_by_the_models_name(servers: Servers) -> None:
    with behind(servers.front, servers):
        client = InferenceAPIClient(MODEL, token="hf_something", timeout=TIMEOUT_S)
        response = client.generate(PROMPT)
        events = list(client.generate_stream(PROMPT))

    assert response.generated_text.startswith(" Paris")
    assert response.details.generated_tokens == len(events)
    assert events[-1].generated_text == response.generated_text


def row_22_refuses_other_models(servers: Servers) -> None:
    with behind(servers.front, servers), raises(NotFoundError, "Model google-bert/bert does not exist"):
        InferenceAPIClient("google-bert/bert")


async def row_22_the_asynchronous_client_generates_too(servers: Servers) -> None:
    """It heeds no proxy, but the endpoint's variable."""
    package = reimport("text_generation", HF_INFERENCE_ENDPOINT=servers.plain)
    with behind(servers.front, servers):
        client = package.InferenceAPIAsyncClient(MODEL, timeout=TIMEOUT_S)
    response = await client.generate(PROMPT)
    events = [event async for event in client.generate_stream(PROMPT)]

    assert response.generated_text.startswith(" Paris")
    assert events[-1].generated_text == response.generated_text


def row_62_the_documentations_own_lines(servers: Servers) -> None:
    with behind(servers.alias_front, servers):
        API_URL = "https://api-inference.huggingface.co/models/google/gemma-2-2b-it"
        headers = {"Authorization": "Bearer hf_***"}
        payload = {"inputs": "Can you please let us know more details about your "}
        response = requests.post(API_URL, headers=headers, json=payload)

    assert response.status_code == 200
    assert response.json() == [{"generated_text": payload["inputs"] + " Paris"}]


def row_62_older_lines_that_declare_no_json(servers: Servers) -> None:
    with behind(servers.alias_front, servers):
        API_URL = "https://api-inference.huggingface.co/models/google/gemma-2-2b-it"
        headers = {"Authorization": "Bearer hf_***"}
        data = json.dumps({"inputs": "Can you please let us know more details about your "})
        response = requests.request("POST", API_URL, headers=headers, data=data)

    assert "content-type" not in response.request.headers
    assert response.status_code == 200


if __name__ == "__main__":
    run(sys.modules[__name__])

"""`huggingface_hub` of the days of the hosted Inference API, which is where the environment says."""

from __future__ import annotations

import sys
from types import ModuleType

import requests
from rows import ANSWER, PROMPT, QUESTION, Servers, raises, reimport, run

MODEL = "smollm2-135m-instruct"
GREEDY = {"max_new_tokens": 20, "return_full_text": False}


def hub(endpoint: str) -> ModuleType:
    return reimport("huggingface_hub", HF_INFERENCE_ENDPOINT=endpoint, HF_ENDPOINT=endpoint)


def row_42_lists_the_model_by_its_task(servers: Servers) -> None:
    client = hub(servers.plain).InferenceClient()

    assert client.list_deployed_models("text-generation-inference") == {"text-generation": [MODEL]}
    assert client.list_deployed_models() == {"text-generation": [MODEL]}


def row_43_tells_the_status_of_the_model(servers: Servers) -> None:
    client = hub(servers.plain).InferenceClient()

    status = client.get_model_status(MODEL)
    assert (status.state, status.loaded, status.framework) == ("Loaded", True, "text-generation-inference")
    assert hub(servers.absent).InferenceClient().get_model_status(MODEL).loaded is False


def row_43_other_models_do_not_exist(servers: Servers) -> None:
    client = hub(servers.plain).InferenceClient()

    with raises(client_error(), "404 Client Error"):
        client.get_model_status("fake/model")
    with raises(client_error(), "404 Client Error"):
        client.text_generation(PROMPT, model="fake/model", **GREEDY)


def client_error() -> type[Exception]:
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError


def row_43_generates_and_chats_by_the_models_name(servers: Servers) -> None:
    client = hub(servers.plain).InferenceClient(MODEL)
    text = client.text_generation(PROMPT, **GREEDY)
    answer = client.chat_completion(QUESTION, max_tokens=20, temperature=0)

    assert text.startswith(" Paris")
    assert text == "".join(client.text_generation(PROMPT, stream=True, **GREEDY))
    assert text == hub(servers.plain).InferenceClient(servers.plain).text_generation(PROMPT, **GREEDY)
    assert answer.choices[0].message.content == ANSWER
    assert client.get_endpoint_info()["model_id"] == MODEL
    assert client.health_check(servers.plain) is True


def row_43_the_older_client_generates(servers: Servers) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        api = hub(servers.restarting).InferenceApi(MODEL, task="text-generation")
    (answer,) = api(PROMPT)

    assert answer["generated_text"] == f"{PROMPT} Paris"


def row_44_asks_once_more_and_waits(servers: Servers) -> None:
    package, seen = hub(servers.restarting), []

    def note(response: requests.Response, *args: object, **kwargs: object) -> None:
        seen.append((response.status_code, response.request.headers.get("x-wait-for-model"), response.json()))

    def session() -> requests.Session:
        made = requests.Session()
        made.hooks["response"].append(note)
        return made

    package.configure_http_backend(session)
    text = package.InferenceClient(MODEL).text_generation(PROMPT)

    refusal, answer = seen
    assert refusal[:2] == (503, None)
    assert refusal[2] == {"error": f"Model {MODEL} is currently loading", "estimated_time": 20.0}
    assert answer[:2] == (200, "1")
    assert text == " Paris"


def row_45_waits_no_longer_than_it_wants_to(servers: Servers) -> None:
    package = hub(servers.unready)

    with raises(package.InferenceTimeoutError, "Model not loaded on the server"):
        package.InferenceClient(MODEL, timeout=2).text_generation(PROMPT)


async def row_45_is_kept_waiting_no_longer_than_it_wants_to(servers: Servers) -> None:
    package = hub(servers.absent)

    with raises(package.InferenceTimeoutError, "Inference call timed out"):
        await package.AsyncInferenceClient(MODEL, timeout=2).text_generation(PROMPT)


if __name__ == "__main__":
    run(sys.modules[__name__])

"""Today's `huggingface_hub` with the name of a model, which it asks of hosts that nobody can tell it otherwise."""

from __future__ import annotations

import sys

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from rows import ANSWER, PROMPT, QUESTION, Servers, behind, raises, run

MODEL = "smollm2-135m-instruct"
GREEDY = {"max_new_tokens": 20, "return_full_text": False}


def client(model: str) -> InferenceClient:
    return InferenceClient(model, provider="hf-inference", token="hf_something")


def row_41_generates_by_the_models_name(servers: Servers) -> None:
    with behind(servers.front, servers):
        kept = client(MODEL)
        text = kept.text_generation(PROMPT, max_new_tokens=20)
        pieces = list(kept.text_generation(PROMPT, max_new_tokens=20, stream=True))

    assert text == PROMPT + "".join(pieces)
    assert text.startswith(f"{PROMPT} Paris")


def row_41_chats_by_the_models_name(servers: Servers) -> None:
    with behind(servers.front, servers):
        answer = client(MODEL).chat_completion(QUESTION, max_tokens=20, temperature=0)

    assert answer.choices[0].message.content == ANSWER


def row_41_other_models_do_not_exist(servers: Servers) -> None:
    with behind(servers.front, servers), raises(HfHubHTTPError, "404"):
        client("fake/model").text_generation(PROMPT)


if __name__ == "__main__":
    run(sys.modules[__name__])

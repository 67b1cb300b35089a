"""The native routes from a shell, as every page of documentation shows them."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from tests.server import Server

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")

ASK = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 5}}
TEXT = " Paris.\n\nThe"


def curl(url: str, body: object = None) -> str:
    """Fails for every status but 2xx, which the test then shows."""
    posted = () if body is None else ("-H", "content-type: application/json", "-d", json.dumps(body))
    command = ["curl", "--fail-with-body", "--silent", "--show-error", "--no-buffer", *posted, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_row_63_generate(plain_server: Server) -> None:
    assert json.loads(curl(f"{plain_server.url}/generate", ASK)) == {"generated_text": TEXT}


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_row_63_a_list_with_the_prompt(plain_server: Server, path: str) -> None:
    assert json.loads(curl(plain_server.url + path, ASK)) == [{"generated_text": ASK["inputs"] + TEXT}]


def test_row_63_generate_stream(plain_server: Server) -> None:
    lines = curl(f"{plain_server.url}/generate_stream", ASK).split("\n\n")

    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert lines[-1] == ""
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == TEXT


def test_row_63_tokenize(plain_server: Server) -> None:
    tokens = json.loads(curl(f"{plain_server.url}/tokenize", {"inputs": "Hello 7"}))

    assert "".join(token["text"] for token in tokens) == "Hello 7"
    assert [(token["start"], token["stop"]) for token in tokens] == [(0, 5), (5, 6), (6, 7)]


def test_row_63_chat_tokenize(plain_server: Server) -> None:
    answer = json.loads(curl(f"{plain_server.url}/chat_tokenize", {"messages": [{"role": "user", "content": "Hi"}]}))

    assert answer["templated_text"].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert [token["text"] for token in answer["tokenize_response"]][-3:] == ["ass", "istant", "\n"]


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_row_63_health(plain_server: Server, path: str) -> None:
    assert curl(plain_server.url + path) == ""


def test_row_63_info(plain_server: Server) -> None:
    info = json.loads(curl(f"{plain_server.url}/info"))

    assert info["model_id"] == "smollm2-135m-instruct"
    assert info["max_total_tokens"] == 2048


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
def test_row_63_metrics_are_clean(plain_server: Server) -> None:
    metrics = curl(f"{plain_server.url}/metrics")
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, timeout=60, check=False
    )

    assert "tgi_request_count" in metrics
    assert (checked.returncode, checked.stderr) == (0, "")

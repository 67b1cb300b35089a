"""LoRA adapters on the router's side: which are loaded, who asks for which, and what is said of them."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest

from router.adapters import AdapterSource, parse_adapters
from router.config import Config, load_config
from router.console import ready_message
from router.errors import StartupError
from router.group.client import Demands, GroupClient
from router.metrics import Gauges, Metrics
from tests.engines import collect, engine_over, greedy
from tests.ghost import GhostSettings, ghost_group, oracle
from tests.http_app import Client, Json
from tests.server import PATIENCE_S
from tests.tiny_tokenizers import byte_level, tokenizer_of

NAMES = ("org/poet", "clerk")
MESSAGES = [{"role": "user", "content": "Hello"}]
DEMANDS = Demands(max_seats=4, max_step_tokens=64)

# What the flag says


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("org/poet", AdapterSource("org/poet", "org/poet", None)),
        ("org/poet@v1", AdapterSource("org/poet", "org/poet", "v1")),
        ("poet=/models/poet", AdapterSource("poet", "/models/poet", None)),
        ("poet=/models/poet@v1", AdapterSource("poet", "/models/poet", "v1")),
    ],
)
def test_an_adapter_is_given_by_place_name_and_revision(text: str, source: AdapterSource) -> None:
    assert parse_adapters([text]) == [source]


@pytest.mark.parametrize("text", ["a=b=c", "a@b@c", "=b", "a=", "a@", "@v1"])
def test_another_form_is_refused_in_tgis_words(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--lora-adapters", f"fine,{text}"], {})

    assert capsys.readouterr().err == f"python -m router: error: Invalid LoRA adapter format: {text}\n"


def test_names_are_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    for adapters, cause in (
        ("a=/x,a=/y", "two LoRA adapters are called a"),
        ("a,org/model", "a LoRA adapter and the model are both called org/model"),
    ):
        with pytest.raises(SystemExit):
            load_config(["--model-id", "org/model"], {"LORA_ADAPTERS": adapters})
        assert capsys.readouterr().err == f"python -m router: error: {cause}\n"


# Who asks for which


def client(response_cache_bytes: int = 0) -> Client:
    return Client(adapters=NAMES, model_id="org/model", response_cache_bytes=response_cache_bytes)


@pytest.mark.parametrize(
    ("asked", "number"), [("org/poet", 1), ("clerk", 2), ("poet", 0), ("tgi", 0), ("org/model", 0), ("", 0), (None, 0)]
)
def test_an_adapter_is_asked_for_by_its_name_and_any_other_means_the_model(asked: str | None, number: int) -> None:
    parameters = {"parameters": {"adapter_id": asked}}
    bodies: dict[str, Json] = {
        "/generate": {"inputs": "a", **parameters},
        "/generate_stream": {"inputs": "a", **parameters},
        "/": {"inputs": "a", **parameters},
        "/invocations": {"inputs": "a", **parameters},
        "/models/org/model": {"inputs": "a", **parameters},
        "/vertex": {"instances": [{"messages": MESSAGES, "model": asked}]},
        "/v1/completions": {"prompt": "a", "model": asked},
        "/v1/chat/completions": {"messages": MESSAGES, "model": asked},
        "/v1/responses": {"input": "a", "model": asked},
        "/models/org/model/v1/chat/completions": {"messages": MESSAGES, "model": asked},
    }

    answering = client()
    for num_before, (path, body) in enumerate(bodies.items()):
        response = answering.post(path, body)

        assert response.status_code == 200, (path, response.text)
        assert [request.adapter for request in answering.engine.requests[num_before:]] == [number], path


def test_all_sequences_of_a_call_have_its_adapter() -> None:
    answering = client()

    answering.post("/generate", {"inputs": "a", "parameters": {"adapter_id": "clerk", "best_of": 2, "do_sample": True}})

    assert [request.adapter for request in answering.engine.requests] == [2, 2]


@pytest.mark.parametrize(("asked", "named"), [("clerk", "clerk"), ("tgi", "org/model"), ("dummy", "org/model")])
def test_a_conversations_answer_names_the_adapter(asked: str, named: str) -> None:
    """Completions name the model, as TGI's do."""
    answering = client()
    for path, body, expected in (
        ("/v1/chat/completions", {"messages": MESSAGES}, named),
        ("/v1/responses", {"input": "a"}, named),
        ("/v1/completions", {"prompt": "a"}, "org/model"),
    ):
        assert answering.post(path, body | {"model": asked}).json()["model"] == expected
        streamed = answering.post(path, body | {"model": asked, "stream": True}).text
        assert set(re.findall(r'"model":"([^"]*)"', streamed)) == {expected}


def test_adapters_are_listed_as_models() -> None:
    answering = client()

    listed = answering.get("/v1/models").json()["data"]

    assert [model["id"] for model in listed] == ["org/model", *NAMES]
    for model in listed:
        assert answering.get(f"/v1/models/{model['id']}").json() == model
    assert answering.get("/v1/models/poet").status_code == 404


def test_answers_of_different_adapters_are_cached_apart() -> None:
    answering = client(response_cache_bytes=1_000_000)

    for name in ("clerk", "org/poet", "clerk", None):
        answering.post("/generate", {"inputs": "a", "parameters": {"adapter_id": name}})
        answering.post("/v1/completions", {"prompt": "a", "temperature": 0, "model": name})

    assert [request.adapter for request in answering.engine.requests] == [2, 2, 1, 1, 0, 0]


# The group


def test_ranks_must_have_the_same_adapters() -> None:
    async def run() -> None:
        async with ghost_group(GhostSettings(world_size=2, adapters=NAMES)) as group:
            group.hosts[1].settings = replace(group.hosts[1].settings, adapters=NAMES[::-1])
            await group.revive()
            client = GroupClient(group.addresses, DEMANDS)
            with pytest.raises(StartupError, match=r"the ranks disagree on adapters: \[\['org/poet', 'clerk'\], "):
                await client.connect(find_s=PATIENCE_S, load_s=PATIENCE_S)
            await client.close(goodbye=False)

    asyncio.run(run())


def test_a_group_that_comes_back_with_other_adapters_is_given_up() -> None:
    async def run() -> None:
        async with ghost_group(GhostSettings(adapters=NAMES)) as group:
            client = GroupClient(group.addresses, DEMANDS)
            info = await client.connect(find_s=PATIENCE_S, load_s=PATIENCE_S)
            assert "\n  adapters     org/poet, clerk\n" in ready_message(Config(), info, 80)
            group.hosts[0].settings = replace(group.hosts[0].settings, adapters=NAMES[:1])
            await group.revive()
            with pytest.raises(StartupError, match="the shards came back with another model: adapters$"):
                await client.connect(find_s=PATIENCE_S, load_s=PATIENCE_S)
            await client.close(goodbye=False)

    asyncio.run(run())


def test_adapters_in_use_are_told_to_gateways() -> None:
    metrics = Metrics(max_input_tokens=100, max_total_tokens=100)
    prompts = {number: list(range(1 + number, 12)) for number in (0, 1, 2)}

    async def run() -> None:
        async with (
            ghost_group(GhostSettings(adapters=NAMES)) as group,
            engine_over(group.addresses, tokenizer_of(byte_level()), max_seats=2, metrics=metrics) as engine,
        ):
            generations = [engine.submit(greedy(p, 40, adapter=number)) for number, p in prompts.items()]
            async for first in generations[1]:
                assert first.token.id == oracle(prompts[1], 1, adapter=1)[0]
                break
            assert lora_info(metrics, engine.gauges) == ("2", "org/poet", "clerk")
            told = await asyncio.gather(*map(collect, generations))
            assert [event.token.id for event in told[2]] == oracle(prompts[2], 40, adapter=2)
            assert lora_info(metrics, engine.gauges) == ("2", "", "")

    asyncio.run(run())
    assert "lora" not in metrics.render(Gauges()).decode()


def lora_info(metrics: Metrics, gauges: Gauges) -> tuple[str, ...]:
    text = metrics.render(gauges).decode()
    label = r'="([^"]*)"'
    found = re.findall(
        rf"^vllm:lora_requests_info{{max_lora{label},running_lora_adapters{label},waiting_lora_adapters{label}}} \d",
        text,
        re.MULTILINE,
    )
    assert len(found) == 1, text
    names: tuple[str, ...] = found[0]
    return names

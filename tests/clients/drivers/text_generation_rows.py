"""`text_generation`, Hugging Face's own client of TGI: its pydantic models are the contract."""

from __future__ import annotations

import asyncio
import math
import re
import sys

import requests
from rows import (
    ANSWER,
    CITY,
    PROMPT,
    PROMPT_IDS,
    QUESTION,
    WEATHER,
    Servers,
    check_city,
    check_weather,
    occupied,
    raises,
    run,
)
from text_generation import AsyncClient, Client
from text_generation.errors import NotFoundError, OverloadedError, UnknownError, ValidationError
from text_generation.types import ChatComplete, Grammar, GrammarType, Message, Tool

TIMEOUT_S = 60


def connect(servers: Servers) -> Client:
    return Client(servers.plain, timeout=TIMEOUT_S)


def row_1_generates_with_the_defaults(servers: Servers) -> None:
    response = connect(servers).generate("x")

    details = response.details
    assert response.generated_text
    assert details.generated_tokens == len(details.tokens)
    assert details.generated_tokens == 20 or details.finish_reason == "eos_token"
    assert details.prefill == []
    assert details.seed is None


def row_2_equal_seeds_draw_equal_texts(servers: Servers) -> None:
    client = Client(servers.plain, headers={"x-use-cache": "false"}, timeout=TIMEOUT_S)
    first, second = (client.generate(PROMPT, do_sample=True, seed=7) for _ in range(2))
    other = client.generate(PROMPT, do_sample=True, seed=8)

    assert first.details.seed == 7
    assert first == second
    assert other.generated_text != first.generated_text


def row_3_best_of_returns_the_likelier_first(servers: Servers) -> None:
    details = connect(servers).generate(PROMPT, best_of=2, do_sample=True).details

    (other,) = details.best_of_sequences
    assert details.seed is not None
    assert other.seed is not None
    assert details.seed != other.seed
    assert mean_logprob(details.tokens) >= mean_logprob(other.tokens)


def mean_logprob(tokens: list) -> float:
    return math.fsum(token.logprob for token in tokens) / len(tokens)


def row_4_prefill_tells_of_every_prompt_token(servers: Servers) -> None:
    prefill = connect(servers).generate(PROMPT, decoder_input_details=True).details.prefill

    assert [token.id for token in prefill] == PROMPT_IDS
    assert "".join(token.text for token in prefill) == PROMPT
    assert prefill[0].logprob is None
    assert all(token.logprob < 0 for token in prefill[1:])


def row_5_a_stop_sequence_ends_the_text(servers: Servers) -> None:
    response = connect(servers).generate(PROMPT, stop_sequences=["answer"])

    assert response.details.finish_reason == "stop_sequence"
    assert response.generated_text.endswith("answer")
    assert response.generated_text.count("answer") == 1


def row_6_full_text_begins_with_the_prompt(servers: Servers) -> None:
    client = connect(servers)

    full = client.generate(PROMPT, return_full_text=True).generated_text
    assert full == PROMPT + client.generate(PROMPT).generated_text


def row_7_top_tokens_contain_the_chosen_one(servers: Servers) -> None:
    details = connect(servers).generate(PROMPT, top_n_tokens=3).details

    assert len(details.top_tokens) == details.generated_tokens
    for chosen, top in zip(details.tokens, details.top_tokens, strict=True):
        assert len(top) >= 3
        assert chosen.id == top[0].id
        assert chosen.logprob == max(token.logprob for token in top)


def row_8_truncate_keeps_the_last_tokens(servers: Servers) -> None:
    details = connect(servers).generate(PROMPT, truncate=4, decoder_input_details=True).details

    assert [token.id for token in details.prefill] == PROMPT_IDS[-4:]


def row_9_a_regular_expression_is_matched(servers: Servers) -> None:
    pattern = r"\d{3}-[a-f]{4}( ok)?"
    response = connect(servers).generate(PROMPT, grammar=Grammar(type=GrammarType.Regex, value=pattern))

    assert re.fullmatch(pattern, response.generated_text)


def row_9_a_schema_is_followed(servers: Servers) -> None:
    grammar = Grammar(type=GrammarType.Json, value=CITY)
    greedy = connect(servers).generate(PROMPT, max_new_tokens=200, grammar=grammar)
    drawn = connect(servers).generate(PROMPT, max_new_tokens=200, grammar=grammar, do_sample=True, seed=7)

    for response in (greedy, drawn):
        assert response.details.finish_reason == "eos_token"
        check_city(response.generated_text)


def row_10_every_further_parameter_is_taken(servers: Servers) -> None:
    client = connect(servers)
    plain = client.generate(PROMPT).generated_text

    assert client.generate(PROMPT, watermark=True).generated_text != plain
    assert client.generate(PROMPT, repetition_penalty=1.5).generated_text != plain
    assert client.generate(PROMPT, frequency_penalty=1.5).generated_text != plain
    assert client.generate(PROMPT, typical_p=0.5).details.seed is not None


def row_11_streams_what_it_generates(servers: Servers) -> None:
    client = connect(servers)

    check_stream(list(client.generate_stream(PROMPT)), client.generate(PROMPT))


def check_stream(responses: list, whole: object) -> None:
    *before, last = responses
    text = "".join(response.token.text for response in responses if not response.token.special)
    assert last.generated_text == text == whole.generated_text
    assert [response.token.id for response in responses] == [token.id for token in whole.details.tokens]
    assert last.details.generated_tokens == len(responses)
    assert all(response.details is None and response.generated_text is None for response in before)


async def row_12_the_asynchronous_client_sees_the_same(servers: Servers) -> None:
    client = AsyncClient(servers.plain, timeout=TIMEOUT_S)
    whole = await client.generate(PROMPT)

    assert whole == connect(servers).generate(PROMPT)
    check_stream([response async for response in client.generate_stream(PROMPT)], whole)


async def row_13_company_changes_no_greedy_text(servers: Servers) -> None:
    client = AsyncClient(servers.plain, timeout=TIMEOUT_S)
    alone = await client.generate(PROMPT)
    together = await asyncio.gather(*(client.generate(PROMPT) for _ in range(20)))

    assert {response.generated_text for response in together} == {alone.generated_text}


async def row_14_too_many_tokens_are_refused(servers: Servers) -> None:
    await all_four_raise(servers.plain, ValidationError, "`max_new_tokens` must be <= 2048", max_new_tokens=10_000)


async def row_15_an_unknown_path_is_not_found(servers: Servers) -> None:
    await all_four_raise(f"{servers.plain}/no/such/path", NotFoundError, "Not Found")


async def all_four_raise(url: str, kind: type[Exception], message: str, **parameters: int) -> None:
    """Both clients, streaming and not."""
    client, asynchronous = Client(url, timeout=TIMEOUT_S), AsyncClient(url, timeout=TIMEOUT_S)
    with raises(kind, message):
        client.generate(PROMPT, **parameters)
    with raises(kind, message):
        list(client.generate_stream(PROMPT, **parameters))
    with raises(kind, message):
        await asynchronous.generate(PROMPT, **parameters)
    with raises(kind, message):
        [response async for response in asynchronous.generate_stream(PROMPT, **parameters)]


def row_16_what_the_client_refuses_itself_the_server_refuses_too(servers: Servers) -> None:
    for body, rule in (
        ({"inputs": ""}, "`inputs` cannot be empty"),
        ({"inputs": PROMPT, "parameters": {"top_p": 1.5}}, "`top_p` must be > 0.0 and < 1.0"),
    ):
        refusal = requests.post(servers.plain, json=body, timeout=TIMEOUT_S)
        assert refusal.status_code == 422
        assert refusal.json() == {"error": f"Input validation error: {rule}", "error_type": "validation"}


def row_17_no_room_is_an_overload(servers: Servers) -> None:
    client = Client(servers.strict, headers={"Authorization": f"Bearer {servers.key}"}, timeout=TIMEOUT_S)

    with occupied(servers):
        with raises(OverloadedError, "Model is overloaded"):
            client.generate(PROMPT)
        with raises(OverloadedError, "Model is overloaded"):
            list(client.generate_stream(PROMPT))


def row_18_chats(servers: Servers) -> None:
    answer = connect(servers).chat(
        [Message(**message) for message in QUESTION], max_tokens=20, seed=1, temperature=0.01
    )

    assert isinstance(answer, ChatComplete)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage["completion_tokens"] > 0


async def row_18_the_asynchronous_client_chats(servers: Servers) -> None:
    client = AsyncClient(servers.plain, timeout=TIMEOUT_S)
    answer = await client.chat([Message(**message) for message in QUESTION], max_tokens=20, seed=1, temperature=0.01)

    assert answer.choices[0].message.content == ANSWER


def row_18_calls_the_tool_it_is_told_to(servers: Servers) -> None:
    answer = connect(servers).chat(
        [Message(**message) for message in QUESTION],
        max_tokens=200,
        seed=1,
        tools=[Tool(**WEATHER)],
        tool_choice="get_weather",
    )

    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    for call in choice.message.tool_calls:
        assert call["function"]["name"] == "get_weather"
        check_weather(call["function"]["arguments"])


async def row_19_a_wrong_key_is_told_in_words(servers: Servers) -> None:
    await all_four_raise(servers.strict, UnknownError, "the API key is missing or wrong")


def row_62_a_bare_post_returns_a_list(servers: Servers) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 20}}
    headers = {"Authorization": "Bearer hf_something"}
    (answer,) = requests.post(servers.plain, headers=headers, json=body, timeout=TIMEOUT_S).json()

    assert answer["generated_text"].startswith(PROMPT)


if __name__ == "__main__":
    run(sys.modules[__name__])

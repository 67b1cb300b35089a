"""OpenAI's own Python client."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import openai
from openai import OpenAI
from pydantic import BaseModel, Field
from rows import ANSWER, PROMPT, PROMPT_IDS, QUESTION, WEATHER, Servers, check_weather, occupied, raises, run

GREEDY = {"model": "tgi", "temperature": 0, "max_tokens": 20}
PARIS_ID = 7042
TIMEOUT_S = 60.0


def connect(url: str, key: str = "x") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S)


class City(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    country: Annotated[str, Field(max_length=20)]
    is_capital: bool


def row_51_completes_prompts_in_every_form(servers: Servers) -> None:
    client = connect(servers.plain)
    (alone,) = client.completions.create(prompt=PROMPT, **GREEDY).choices
    assert alone.text.startswith(" Paris.")
    assert alone.finish_reason == "length"

    for prompt, count in ((PROMPT_IDS, 1), ([PROMPT, PROMPT], 2), ([PROMPT_IDS, PROMPT_IDS[:2]], 2)):
        answer = client.completions.create(prompt=prompt, **GREEDY)
        assert [choice.index for choice in answer.choices] == [*range(count)]
        assert answer.choices[0].text == alone.text
        assert answer.usage.completion_tokens == 20 * count
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens == len(PROMPT_IDS) + 2


def row_51_a_stop_string_ends_the_text(servers: Servers) -> None:
    for stop in ("\n", ["never said", "\n"]):
        (choice,) = connect(servers.plain).completions.create(prompt=PROMPT, stop=stop, **GREEDY).choices
        assert (choice.text, choice.finish_reason) == (" Paris.", "stop")


def row_51_streams_what_it_completes(servers: Servers) -> None:
    client = connect(servers.plain)
    prompts = [PROMPT, "Once upon a time"]
    chunks = list(
        client.completions.create(prompt=prompts, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text

    whole = client.completions.create(prompt=prompts, **GREEDY)
    assert texts == [choice.text for choice in whole.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def row_52_scores_come_in_four_lists(servers: Servers) -> None:
    client = connect(servers.plain)
    (choice,) = client.completions.create(
        model="tgi", prompt=PROMPT, echo=True, logprobs=3, max_tokens=4, temperature=0
    ).choices
    lists = choice.logprobs

    assert choice.text.startswith(f"{PROMPT} Paris")
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset) == 9
    assert lists.token_logprobs[0] is None
    assert lists.top_logprobs[0] is None
    assert "".join(lists.tokens) == choice.text
    for token, offset in zip(lists.tokens, lists.text_offset, strict=True):
        assert choice.text.startswith(token, offset)
    for token, logprob, top in zip(lists.tokens[1:], lists.token_logprobs[1:], lists.top_logprobs[1:], strict=True):
        assert top[token] == logprob <= max(top.values())
        assert 3 <= len(top) <= 4


def row_53_takes_what_others_refuse(servers: Servers) -> None:
    client = connect(servers.plain)
    answer = client.chat.completions.create(
        model="tgi",
        messages=QUESTION,
        n=2,
        max_completion_tokens=9,
        seed=1,
        temperature=1.5,
        top_p=1,
        frequency_penalty=0.5,
        presence_penalty=0.5,
        user="someone",
        stop="never said",
        parallel_tool_calls=True,
        logit_bias={},
    )

    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content
    assert answer.usage.completion_tokens <= 18


def row_53_a_bias_bans_and_forces(servers: Servers) -> None:
    client = connect(servers.plain)
    banned = client.chat.completions.create(messages=QUESTION, logit_bias={PARIS_ID: -100}, **GREEDY)
    forced = client.chat.completions.create(messages=QUESTION, logit_bias={str(PARIS_ID): 100}, **GREEDY)

    assert " Paris" not in banned.choices[0].message.content
    assert forced.choices[0].message.content == " Paris" * 20


def row_54_parses_an_answer_into_a_model(servers: Servers) -> None:
    answer = connect(servers.plain).chat.completions.parse(
        model="tgi", messages=QUESTION, response_format=City, temperature=0, max_tokens=200
    )

    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, City)


def row_54_the_stream_helper_parses_too(servers: Servers) -> None:
    client = connect(servers.plain)
    asked = {"model": "tgi", "messages": QUESTION, "response_format": City, "temperature": 0, "max_tokens": 200}
    with client.chat.completions.stream(**asked) as events:
        final = events.get_final_completion()

    assert final.choices[0].message.parsed == client.chat.completions.parse(**asked).choices[0].message.parsed


def row_54_the_stream_helper_puts_calls_together(servers: Servers) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    client = connect(servers.plain)
    with client.chat.completions.stream(
        model="tgi", messages=QUESTION, tools=[strict], tool_choice="required", temperature=0, max_tokens=200
    ) as events:
        seen = list(events)
        final = events.get_final_completion()

    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    assert any(event.type == "tool_calls.function.arguments.done" for event in seen)
    for call in choice.message.tool_calls:
        assert call.type == "function"
        assert call.function.name == "get_weather"
        check_weather(call.function.arguments)
        assert call.function.parsed_arguments is not None
    ids = [call.id for call in choice.message.tool_calls]
    sent = [id_ for event in seen if event.type == "chunk" for id_ in _ids(event.chunk)]
    assert ids == sent


def _ids(chunk: object) -> list[str]:
    deltas = [choice.delta for choice in chunk.choices]
    return [call.id for delta in deltas for call in delta.tool_calls or () if call.id]


def row_54_the_stream_helper_puts_text_together(servers: Servers) -> None:
    client = connect(servers.plain)
    with client.chat.completions.stream(messages=QUESTION, stream_options={"include_usage": True}, **GREEDY) as events:
        final = events.get_final_completion()

    assert final.choices[0].message.content == ANSWER
    assert final.usage.completion_tokens > 0


def row_55_models_are_listed_and_found(servers: Servers) -> None:
    client = connect(servers.strict, servers.key)

    assert [model.id for model in client.models.list()] == ["org/m"]
    assert client.models.retrieve("org/m").id == "org/m"
    with raises(openai.NotFoundError, "404"):
        client.models.retrieve("org/other")


def row_56_refusals_have_classes(servers: Servers) -> None:
    for client, kind, message in (
        (connect(servers.strict, "wrong"), openai.AuthenticationError, "401"),
        (connect(f"{servers.plain}/no/such/path"), openai.NotFoundError, "404"),
        (connect(servers.failing), openai.APIStatusError, "424"),
        (connect(servers.unready), openai.InternalServerError, "503"),
    ):
        with raises(kind, message):
            client.chat.completions.create(messages=QUESTION, **GREEDY)
        with raises(kind, message):
            client.completions.create(prompt=PROMPT, **GREEDY)


def row_56_a_bad_parameter_is_told_in_words(servers: Servers) -> None:
    client = connect(servers.plain)

    for stream in (False, True):
        asked = {"model": "tgi", "top_p": 2, "stream": stream}
        for call in (
            lambda asked=asked: client.chat.completions.create(messages=QUESTION, **asked),
            lambda asked=asked: client.completions.create(prompt=PROMPT, **asked),
        ):
            assert refusal_of(call) == "Input validation error: `top_p` must be > 0.0 and < 1.0"


def refusal_of(call: Callable[[], object]) -> object:
    """The client shows the sentence in the error's body only, because ours is not an object."""
    try:
        call()
    except openai.UnprocessableEntityError as error:
        return error.body
    raise AssertionError("not refused")


def row_56_an_overload(servers: Servers) -> None:
    client = connect(servers.strict, servers.key)

    with occupied(servers), raises(openai.RateLimitError, "429"):
        client.chat.completions.create(messages=QUESTION, **GREEDY)


def row_56_a_failure_within_a_stream(servers: Servers) -> None:
    chunks = []
    with raises(openai.APIError, "Request failed during generation: out of luck"):
        chunks.extend(connect(servers.failing).chat.completions.create(messages=QUESTION, stream=True, **GREEDY))
    assert len(chunks) > 0


if __name__ == "__main__":
    run(sys.modules[__name__])

"""Every validation rule: what breaks it, the exact sentence, and which of two broken rules is told."""

from __future__ import annotations

from dataclasses import fields, replace

import anyio
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers

from router.api.schemas import GenerateParameters
from router.config import Config
from router.core.request import BeamSettings, Request
from router.errors import StartupError, ValidationError
from router.validate import Capacity, Limits, Parameters, Validator
from tests.http_app import CONFIG, Client, Json
from tests.tiny_tokenizers import byte_level, tokenizer_of

TOKENIZER = tokenizer_of(byte_level())
VOCAB = TOKENIZER.vocab_size
ONE_TOKEN = "a"
LONG = "z" * 60
"""60 tokens: above the 40 of CONFIG, below its 64 in all."""
TOO_LONG = "z" * 80
NO_PROPERTIES = "grammar is not valid: Grammar must have a 'properties' field"


def deep(num_levels: int) -> Json:
    schema: Json = {}
    for _ in range(num_levels):
        schema = {"properties": {"x": schema}}
    return schema


# In the order in which they are checked.
RULES: list[tuple[str, Json, str]] = [
    ("a", {"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ("a", {"temperature": 0}, "`temperature` must be strictly positive"),
    ("a", {"temperature": -0.5}, "`temperature` must be strictly positive"),
    ("a", {"temperature": 1e-50}, "`temperature` must be strictly positive"),
    ("a", {"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ("a", {"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ("a", {"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ("a", {"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ("a", {"top_p": 1.1}, "`top_p` must be > 0.0 and < 1.0"),
    ("a", {"typical_p": 0.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ("a", {"typical_p": 1.5}, "`typical_p` must be > 0.0 and < 1.0"),
    ("a", {"top_k": -1}, "`top_k` must be strictly positive"),
    ("a", {"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ("a", {"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ("a", {"best_of": 2, "do_sample": True, "seed": 0}, "`seed` must not be set when `best_of` > 1"),
    ("a", {"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ("a", {"stop": ["a" * 1001]}, "`stop` sequences must have at most 1000 characters. Given: 1001"),
    ("a", {"presence_penalty": 2.5}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ("a", {"min_p": 1.1}, "`min_p` must be >= 0.0 and <= 1.0"),
    ("a", {"min_p": -0.1}, "`min_p` must be >= 0.0 and <= 1.0"),
    ("a", {"no_repeat_ngram_size": 1001}, "`no_repeat_ngram_size` must be <= 1000. Given: 1001"),
    ("a", {"num_beams": 0}, "`num_beams` must be strictly positive"),
    ("a", {"length_penalty": 10.5}, "`length_penalty` must be >= -10.0 and <= 10.0. Given: 10.5"),
    ("a", {"length_penalty": -10.5}, "`length_penalty` must be >= -10.0 and <= 10.0. Given: -10.5"),
    (
        "a",
        {"num_beams": 2, "best_of": 2, "do_sample": True},
        "`best_of` is not supported when `num_beams` is > 1",
    ),
    ("a", {"logit_bias": {str(i): 1 for i in range(1025)}}, "`logit_bias` supports up to 1024 tokens. Given: 1025"),
    ("a", {"logit_bias": {"1": 101}}, "`logit_bias` values must be >= -100 and <= 100. Given: 101.0"),
    ("a", {"logit_bias": {str(VOCAB): 1}}, f"`logit_bias` keys must be token ids below {VOCAB}. Given: {VOCAB}"),
    ("a", {"logit_bias": {"-1": 1}}, f"`logit_bias` keys must be token ids below {VOCAB}. Given: -1"),
    ("a", {"logit_bias": {"٣": 1}}, f"`logit_bias` keys must be token ids below {VOCAB}. Given: ٣"),
    ("a", {"bad_words": ["a"] * 129}, "`bad_words` supports up to 128 words. Given: 129"),
    ("a", {"bad_words": [""]}, "`bad_words` must not be empty"),
    ("a", {"bad_words": [[]]}, "`bad_words` must not be empty"),
    ("a", {"bad_words": ["a" * 1001]}, "`bad_words` must have at most 1000 characters. Given: 1001"),
    ("a", {"bad_words": [[1, VOCAB]]}, f"`bad_words` must be made of token ids below {VOCAB}. Given: {VOCAB}"),
    ("a", {"bad_words": [VOCAB]}, f"`bad_words` must be made of token ids below {VOCAB}. Given: {VOCAB}"),
    ("", {}, "`inputs` cannot be empty"),
    ("a", {"truncate": 0}, "`truncate` must be strictly positive and less than 40. Given: 0"),
    ("a", {"truncate": 41}, "`truncate` must be strictly positive and less than 40. Given: 41"),
    (
        "a",
        {"max_new_tokens": 64},
        "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 1 `inputs` tokens and 64 `max_new_tokens`",
    ),
    (
        "a",
        {"max_new_tokens": 5000},
        "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 1 `inputs` tokens and 5000 `max_new_tokens`",
    ),
    (
        TOO_LONG,
        {},
        "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 80 `inputs` tokens and 0 `max_new_tokens`",
    ),
    (LONG, {}, "`inputs` must have less than 40 tokens. Given: 60"),
    (LONG, {"max_new_tokens": 4}, "`inputs` must have less than 40 tokens. Given: 60"),
    ("a", {"max_new_tokens": 3, "min_new_tokens": 4}, "`min_new_tokens` must be <= 3. Given: 4"),
    ("a", {"grammar": {"type": "json", "value": 5}}, "grammar is not supported"),
    ("a", {"grammar": {"type": "json", "value": True}}, "grammar is not supported"),
    (
        "a",
        {"grammar": {"type": "json", "value": "{"}},
        "grammar is not valid: unexpected end of data: line 1 column 2 (char 1)",
    ),
    (
        "a",
        {"grammar": {"type": "json_object", "value": {"properties": {"x": {"minLength": "1"}}}}},
        'grammar is not valid: "1" is not of type "integer"',
    ),
    ("a", {"grammar": {"type": "json", "value": "[]"}}, 'grammar is not valid: [] is not of types "boolean", "object"'),
    ("a", {"grammar": {"type": "json", "value": {}}}, NO_PROPERTIES),
    ("a", {"grammar": {"type": "json", "value": "true"}}, NO_PROPERTIES),
    ("a", {"grammar": {"type": "json_schema", "value": {"schema": {"type": "object"}}}}, NO_PROPERTIES),
    (
        "a",
        {"grammar": {"type": "json", "value": {"properties": {}, "title": "x" * 65_536}}},
        "grammar is not valid: it is longer than 65536 bytes",
    ),
    (
        "a",
        {"grammar": {"type": "json", "value": deep(60)}},
        "grammar is not valid: it is nested more than 50 schemas deep",
    ),
    (
        "a",
        {"grammar": {"type": "json", "value": {"properties": {"x": {"uniqueItems": True}}}}},
        "grammar is not valid: the keyword `uniqueItems` at #/properties/x cannot be enforced: it is not supported",
    ),
    ("a", {"bad_words": [[1] * 9_000, [2] * 1_001]}, "`bad_words` supports up to 10000 tokens. Given: 10001"),
]
# In the order in which they are checked, behind `best_of`'s above.
BEAM_RULES: list[tuple[Json, str]] = [
    ({"stop": ["x"]}, "`stop` is not supported when `num_beams` is > 1"),
    ({"repetition_penalty": 1.5}, "`repetition_penalty` is not supported when `num_beams` is > 1"),
    ({"frequency_penalty": 0.5}, "`frequency_penalty` is not supported when `num_beams` is > 1"),
    ({"presence_penalty": 0.5}, "`presence_penalty` is not supported when `num_beams` is > 1"),
    ({"min_p": 0.5}, "`min_p` is not supported when `num_beams` is > 1"),
    ({"logit_bias": {"1": 1}}, "`logit_bias` is not supported when `num_beams` is > 1"),
    ({"bad_words": ["x"]}, "`bad_words` is not supported when `num_beams` is > 1"),
    (
        {"no_repeat_ngram_size": 2},
        "`no_repeat_ngram_size` is not supported when `num_beams` is > 1",
    ),
    ({"min_new_tokens": 2}, "`min_new_tokens` is not supported when `num_beams` is > 1"),
    ({"watermark": True}, "`watermark` is not supported when `num_beams` is > 1"),
    (
        {"grammar": {"type": "regex", "value": "a"}},
        "`grammar` is not supported when `num_beams` is > 1",
    ),
    ({"do_sample": True}, "you must not use sampling when `num_beams` is > 1"),
    ({"temperature": 0.5}, "you must not use sampling when `num_beams` is > 1"),
    ({"top_k": 3}, "you must not use sampling when `num_beams` is > 1"),
    ({"top_p": 0.5}, "you must not use sampling when `num_beams` is > 1"),
    ({"typical_p": 0.5}, "you must not use sampling when `num_beams` is > 1"),
]
STREAM_RULES: list[tuple[Json, str]] = [
    ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
    ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
    ({"num_beams": 2}, "`num_beams` > 1 is not supported when streaming tokens"),
    ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
]


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream", "/invocations"])
def test_every_broken_rule_is_a_422_with_its_sentence(path: str) -> None:
    client = Client()
    for inputs, parameters, sentence in RULES:
        if path == "/generate_stream" and ("best_of" in parameters or "num_beams" in parameters):
            continue
        response = client.post(path, {"inputs": inputs, "parameters": parameters})

        expected = {"error": f"Input validation error: {sentence}", "error_type": "validation"}
        assert (response.status_code, response.json()) == (422, expected), parameters

    assert client.engine.requests == []
    assert client.post(path, {"inputs": "a"}).status_code == 200


@pytest.mark.parametrize(("parameters", "sentence"), STREAM_RULES)
@pytest.mark.parametrize(("path", "extra"), [("/generate_stream", {}), ("/", {"stream": True})])
def test_streams_refuse_what_cannot_be_streamed(path: str, extra: Json, parameters: Json, sentence: str) -> None:
    response = Client().post(path, {"inputs": "a", "parameters": parameters} | extra)

    assert response.status_code == 422
    assert response.json() == {"error": f"Input validation error: {sentence}", "error_type": "validation"}


@pytest.mark.parametrize(
    ("max_best_of", "best_of", "sentence"),
    [
        (1, 2, "`best_of` != 1 is not allowed for this endpoint"),
        (2, 3, "`best_of` must be > 0 and <= 2. Given: 3"),
    ],
)
def test_best_of_has_a_limit(max_best_of: int, best_of: int, sentence: str) -> None:
    response = Client(max_best_of=max_best_of).post("/generate", {"inputs": "a", "parameters": {"best_of": best_of}})

    assert response.json()["error"] == f"Input validation error: {sentence}"


def test_num_beams_has_a_limit() -> None:
    client = Client(max_num_beams=3)

    answers = [
        client.post("/generate", {"inputs": "a", "parameters": {"num_beams": num_beams}}) for num_beams in (3, 4)
    ]

    assert [answer.status_code for answer in answers] == [200, 422]
    assert answers[1].json()["error"] == "Input validation error: `num_beams` must be > 0 and <= 3. Given: 4"


@pytest.mark.parametrize(("parameters", "sentence"), BEAM_RULES)
def test_beams_exclude_what_changes_logits_or_chooses_among_tokens(parameters: Json, sentence: str) -> None:
    client = Client()

    response = client.post("/generate", {"inputs": "a", "parameters": parameters | {"num_beams": 2}})

    expected = {"error": f"Input validation error: {sentence}", "error_type": "validation"}
    assert (response.status_code, response.json()) == (422, expected)
    assert client.engine.requests == []


def together(earlier: Json, later: Json) -> Json | None:
    """Both rules broken at once, where they speak of different fields."""
    return None if set(earlier) & set(later) else earlier | later


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_of_two_broken_rules_the_earlier_is_told(path: str) -> None:
    client = Client()
    not_here = {"max_new_tokens"} | ({"best_of", "num_beams"} if path == "/generate_stream" else set())
    in_order = [rule for rule in RULES if rule[0] == "a" and not not_here & set(rule[1])]
    num_pairs = 0
    for index, (_, earlier, sentence) in enumerate(in_order):
        for _, later, _ in in_order[index + 1 :]:
            both = together(earlier, later)
            if both is None or ("do_sample" in both and sentence.startswith("you must")) or "top_p" in later:
                continue
            if sentence.startswith("you must") and set(later) & {"temperature", "top_k", "typical_p"}:
                continue
            response = client.post(path, {"inputs": "a", "parameters": both})

            assert response.json()["error"] == f"Input validation error: {sentence}", both
            num_pairs += 1
    assert num_pairs > 300


def test_rules_of_the_parameters_come_before_those_of_the_inputs() -> None:
    errors = [
        Client().post("/generate", {"inputs": inputs, "parameters": parameters}).json()["error"]
        for inputs, parameters in [
            ("", {"top_n_tokens": 6}),
            ("", {"truncate": 0}),
            (TOO_LONG, {"truncate": 0}),
            (TOO_LONG, {"grammar": {"type": "json", "value": "{}"}}),
        ]
    ]

    words = [error.removeprefix("Input validation error: ").split()[0] for error in errors]
    assert words == ["`top_n_tokens`", "`inputs`", "`truncate`", "`inputs`"]


@pytest.mark.parametrize("value", ["always", 1, 0.0, []])
def test_early_stopping_is_true_false_or_never(value: object) -> None:
    response = Client().post("/generate", {"inputs": "a", "parameters": {"early_stopping": value}})

    assert response.status_code == 422
    assert 'expected a boolean or "never"' in response.json()["error"]


@pytest.mark.parametrize(
    ("parameters", "beams"),
    [
        ({}, None),
        ({"num_beams": 1, "length_penalty": 2.0}, None),
        ({"num_beams": 2}, BeamSettings(2, 1.0, False)),
        ({"num_beams": 3, "length_penalty": -0.5, "early_stopping": "never"}, BeamSettings(3, -0.5, "never")),
        ({"num_beams": 8, "early_stopping": True, "temperature": 1.0, "top_k": 0}, BeamSettings(8, 1.0, True)),
    ],
)
def test_beams_reach_the_request(parameters: Json, beams: BeamSettings | None) -> None:
    assert request_for(parameters).beams == beams


def test_a_grammar_that_has_not_the_form_of_one_is_an_unfit_body() -> None:
    errors = [
        Client().post("/generate", {"inputs": "a", "parameters": {"grammar": grammar}}).json()["error"]
        for grammar in (
            {"type": "json"},
            {"type": "ebnf", "value": "a"},
            {"type": "regex", "value": {}},
            {"type": "json_schema", "value": "{}"},
            {"type": "json_schema", "value": {"name": "n"}},
        )
    ]

    assert [error.partition("grammar")[2].rpartition(" at line")[0] for error in errors] == [
        ": missing field `value`",
        ".type: unknown variant, expected one of 'json', 'json_object', 'json_schema', 'regex' or 'lark'",
        ": invalid type: map, expected a string",
        ': invalid type: string "{}", expected struct JsonSchemaConfig',
        ": missing field `schema`",
    ]


def test_a_text_that_the_tokenizer_has_no_token_for_is_a_mistake_of_its_author() -> None:
    fast = FastTokenizer(models.WordLevel({"a": 0}))
    tokenizer = tokenizer_of(fast)
    validator = Validator(Limits.derive(CONFIG, CAPACITY, tokenizer), tokenizer)

    async def validate() -> None:
        await validator.validate("b", Parameters(), "id")

    with pytest.raises(ValidationError, match="^Input validation error: tokenizer error .*UNK"):
        anyio.run(validate)
    with pytest.raises(ValidationError, match="tokenizer error"):
        tokenizer.tokenize("b")


# What is accepted


def request_for(parameters: Json, inputs: str = "a", **settings: object) -> Request:
    client = Client(**settings)
    response = client.post("/generate", {"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    return client.engine.requests[0]


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_p": 1.0},
        {"top_p": 1},
        {"typical_p": 1.0},
        {"top_k": 0},
        {"temperature": 1.0},
        {"repetition_penalty": 1.0, "frequency_penalty": 0, "presence_penalty": 0, "min_p": 0},
        {"best_of": 1},
        {"best_of": 0},
        {"num_beams": 1, "length_penalty": 2.0, "early_stopping": "never"},
        {"adapter_id": ""},
    ],
)
def test_neutral_values_are_accepted_and_stay_greedy(parameters: Json) -> None:
    neutral = replace(request_for({}).sampling, seed=7)

    assert request_for(parameters | {"seed": 7}).sampling == neutral
    assert not neutral.do_sample


@pytest.mark.parametrize(
    "parameters", [{"do_sample": True}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"typical_p": 0.5}]
)
def test_sampling_is_switched_on_by_any_parameter_of_it(parameters: Json) -> None:
    assert request_for(parameters).sampling.do_sample


@pytest.mark.parametrize("parameter", [{"temperature": 1.0}, {"top_k": 0}, {"top_p": 1.0}, {"typical_p": 1.0}])
def test_best_of_takes_a_neutral_parameter_for_sampling(parameter: Json) -> None:
    response = Client().post("/generate", {"inputs": "a", "parameters": {"best_of": 2} | parameter})

    assert response.status_code == 200


def test_every_parameter_reaches_the_request() -> None:
    sampling = request_for(
        {
            "temperature": 0.5,
            "top_k": 3,
            "top_p": 0.75,
            "typical_p": 0.25,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "frequency_penalty": 0.5,
            "presence_penalty": -0.5,
            "seed": 2**64 - 1,
            "logit_bias": {"7": -100, "8": 1.5},
            "watermark": True,
            "top_n_tokens": 5,
            "no_repeat_ngram_size": 3,
            "min_new_tokens": 2,
            "bad_words": [[4, 5], 6],
        }
    ).sampling

    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 3, 0.75, 0.25)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.125, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert (sampling.seed, sampling.logit_bias) == (2**64 - 1, ((7, -100.0), (8, 1.5)))
    assert (sampling.watermark_gamma, sampling.watermark_delta) == (0.5, 2.0)
    assert (sampling.top_n_tokens, sampling.no_repeat_ngram_size, sampling.min_new_tokens) == (5, 3, 2)
    assert sampling.bad_words == ((4, 5), (6,))


def test_watermark_takes_the_operators_strength_and_is_off_otherwise() -> None:
    on = request_for({"watermark": True}, watermark_gamma=0.25, watermark_delta=4.0).sampling
    off = request_for({}).sampling

    assert (on.watermark_gamma, on.watermark_delta) == (0.25, 4.0)
    assert off.watermark_delta == 0.0


def test_bad_words_given_as_text_are_forbidden_with_and_without_a_space() -> None:
    encoded = [tuple(TOKENIZER.encode(text, add_special_tokens=False)) for text in ("Paris", " Paris")]

    assert request_for({"bad_words": ["Paris"]}).sampling.bad_words == tuple(encoded)


def test_stop_strings_and_end_tokens_reach_the_request() -> None:
    request = request_for({"stop": ["x", "yz"]})

    assert (request.stop, request.keep_stop, request.eos_token_ids) == (("x", "yz"), True, (2,))


def test_max_new_tokens_defaults_to_all_that_fit() -> None:
    assert request_for({}, inputs="a").max_new_tokens == 63
    assert request_for({}, inputs="z" * 40).max_new_tokens == 24


def test_total_may_be_reached_exactly() -> None:
    assert request_for({"max_new_tokens": 24}, inputs="z" * 40).max_new_tokens == 24


def test_long_generations_are_checked_for_their_whole_length() -> None:
    parameters = {"max_new_tokens": 2990}

    response = Client(max_total_tokens=3000).post("/generate", {"inputs": "z" * 11, "parameters": parameters})

    assert response.status_code == 422
    assert "Given: 11 `inputs` tokens and 2990 `max_new_tokens`" in response.json()["error"]
    assert request_for(parameters, "z" * 10, max_total_tokens=3000).max_new_tokens == 2990


def test_longest_prompt_is_accepted() -> None:
    assert len(request_for({}, inputs="z" * 40).prompt) == 40


def test_truncate_keeps_the_last_tokens() -> None:
    request = request_for({"truncate": 3}, inputs="z" * 60 + "abc")

    assert request.prompt == tuple(TOKENIZER.encode("z" * 60 + "abc")[-3:])


def test_seeds_are_drawn_and_differ() -> None:
    seeds = {request_for({"do_sample": True}).sampling.seed for _ in range(5)}

    assert len(seeds) == 5
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_best_of_makes_requests_that_differ_in_nothing_but_their_seeds() -> None:
    client = Client(max_best_of=3)

    client.post("/generate", {"inputs": "a", "parameters": {"best_of": 3, "do_sample": True}})

    requests = client.engine.requests
    assert len({request.sampling.seed for request in requests}) == len(requests) == 3
    unseeded = {repr(replace(request, sampling=replace(request.sampling, seed=0))) for request in requests}
    assert len(unseeded) == 1


def test_body_and_parameters_know_the_same_names() -> None:
    body, known = set(GenerateParameters.model_fields), {field.name for field in fields(Parameters)}

    assert body == known


def test_inputs_without_tokens_count_as_empty() -> None:
    fast = byte_level()
    fast.normalizer = normalizers.Strip()
    tokenizer = tokenizer_of(fast)
    validator = Validator(Limits.derive(CONFIG, CAPACITY, tokenizer), tokenizer)

    async def validate() -> None:
        await validator.validate("   ", Parameters(), "id")

    with pytest.raises(ValidationError, match="`inputs` cannot be empty"):
        anyio.run(validate)


def test_a_token_without_an_embedding_is_refused() -> None:
    validator = Validator(replace(Limits.derive(CONFIG, CAPACITY, TOKENIZER), vocab_size=3), TOKENIZER)

    async def validate() -> None:
        await validator.validate("The capital", Parameters(), "id")

    with pytest.raises(ValidationError, match="not in the model's vocabulary of 3"):
        anyio.run(validate)


# Limits


CAPACITY = Capacity(vocab_size=VOCAB, eos_token_ids=(2,), kv_tokens=1024, max_positions=512)


def limits(config: Config, capacity: Capacity = CAPACITY, model_max_length: int | None = None) -> tuple[int, int]:
    TOKENIZER.model_max_length = model_max_length
    derived = Limits.derive(config, capacity, TOKENIZER)
    TOKENIZER.model_max_length = None
    return derived.max_input_tokens, derived.max_total_tokens


def test_longest_sequence_is_what_model_tokenizer_and_memory_allow() -> None:
    assert limits(Config()) == (511, 512)
    assert limits(Config(), model_max_length=100) == (99, 100)
    assert limits(Config(), replace(CAPACITY, kv_tokens=64)) == (63, 64)
    assert limits(Config(), replace(CAPACITY, max_positions=None)) == (1023, 1024)


@pytest.mark.parametrize(
    ("config", "capacity", "sentence"),
    [
        (Config(max_total_tokens=600), CAPACITY, r"`max_total_tokens` must be <= 512"),
        (
            Config(max_total_tokens=500),
            replace(CAPACITY, kv_tokens=256),
            r"Not enough memory to handle `max_total_tokens=500`: KV memory holds 256 tokens",
        ),
        (
            Config(max_input_tokens=512),
            CAPACITY,
            r"`max_input_tokens` must be < `max_total_tokens`. Given: 512 and 512",
        ),
    ],
)
def test_limits_that_cannot_hold_end_the_start(config: Config, capacity: Capacity, sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        limits(config, capacity)

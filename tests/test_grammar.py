"""Matchers and masks on the shard, and how tokens are chosen under them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jsonschema_rs
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import shard.grammar
from router.text import grammar_process
from router.text.grammar import Grammar, GrammarKind, to_source
from shard.grammar import GrammarCompiler, Grammars
from shard.sampler import Sampler, SamplingParams
from tests.tiny_tokenizers import byte_level, wordpiece

CPU = torch.device("cpu")
TOKENIZER = byte_level()
VOCAB = TOKENIZER.get_vocab_size() + 5
"""Models often have a few more embeddings than their tokenizer has tokens."""
EOS = TOKENIZER.token_to_id("<|end|>")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer"},
        "is_well": {"type": "boolean"},
    },
    "required": ["name", "age", "is_well"],
    "additionalProperties": False,
}
NODE = {"type": "object", "properties": {"v": {"type": "null"}, "next": {"$ref": "#"}}, "additionalProperties": False}
SCHEMAS: list[dict[str, object]] = [
    PERSON,
    NODE,
    {"type": "boolean"},
    {"enum": ["red", "green", "blue", 1, None, {"a": [1.5]}]},
    {"const": {"kind": "fixed", "values": [1, 2, 3]}},
    {"type": "integer", "minimum": -20, "maximum": 300},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]+$", "maxLength": 12},
    {"type": "string", "format": "uuid"},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 2},
    {"anyOf": [{"type": "null"}, {"type": "object", "required": ["a"], "properties": {"a": {"type": "null"}}}]},
    {"type": "object", "patternProperties": {"^x_": {"type": "boolean"}}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}]},
    {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"type": "object", "maxProperties": 2}]},
]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return GrammarCompiler(path, vocab_size=VOCAB, eos_token_ids=[EOS])


@pytest.fixture
def grammars(compiler: GrammarCompiler) -> Grammars:
    return Grammars(compiler, max_seats=4)


def json_source(schema: dict[str, object]) -> str:
    return to_source(Grammar(GrammarKind.JSON, schema))


def regex_source(expression: str) -> str:
    return to_source(Grammar(GrammarKind.REGEX, expression))


def text_of(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(list(tokens))


def is_allowed(grammars: Grammars, seat: int, vocab_size: int = VOCAB) -> npt.NDArray[np.bool_]:
    """For each token whether the seat may emit it."""
    bits = grammars.allowed(seat).view(np.uint8)
    return np.unpackbits(bits, count=vocab_size, bitorder="little").astype(np.bool_)


def allowed(grammars: Grammars, seat: int) -> list[int]:
    ids: list[int] = is_allowed(grammars, seat).nonzero()[0].tolist()
    return ids


class Walk:
    """A sequence that takes whatever it is allowed, by chance."""

    def __init__(self, grammars: Grammars, source: str, seed: int = 0, seat: int = 0) -> None:
        self.tokens: list[int] = []
        self.promises: list[int] = []
        self._grammars, self._seat, self._chance = grammars, seat, random.Random(seed)
        grammars.open(seat, source, [7, 8, 9], 3)

    def step(self) -> None:
        """Emits one token. What was promised has to be it."""
        assert self._grammars.prepare([self._seat], [3 + len(self.tokens)]) == {}
        promised = self._grammars.promised(self._seat)
        if promised is not None:
            token = promised
            assert token == self.promises.pop(0)
        else:
            assert not self.promises
            choices = allowed(self._grammars, self._seat)
            closing = [t for t in choices if t == EOS or text_of([t])[-1:] in ('"', "}", "]")]
            token = self._chance.choice(closing if closing and self._chance.random() < 0.5 else choices)
            assert is_allowed(self._grammars, self._seat)[token]
        self.tokens.append(token)
        (forced,) = self._grammars.advance([self._seat], [token])
        self.promises += forced

    def finish(self, max_tokens: int = 400) -> str:
        while EOS not in self.tokens and len(self.tokens) < max_tokens:
            self.step()
        return text_of([token for token in self.tokens if token != EOS])


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:50])
def test_whatever_is_allowed_ends_as_a_valid_document(grammars: Grammars, schema: dict[str, object]) -> None:
    for seed in range(8):
        walk = Walk(grammars, json_source(schema), seed)
        text = walk.finish()
        grammars.close(0)

        assert walk.tokens[-1] == EOS, text
        assert jsonschema_rs.is_valid(schema, json.loads(text)), text


@pytest.mark.parametrize("expression", ["[ab]{3,5}|c+d", "(19|20)[0-9]{2}-é?", "x*"])
def test_whatever_is_allowed_matches_the_expression(grammars: Grammars, expression: str) -> None:
    for seed in range(8):
        text = Walk(grammars, regex_source(expression), seed).finish()
        grammars.close(0)

        assert re.fullmatch(expression, text)


def test_a_forced_run_is_promised_once_and_then_emitted(grammars: Grammars) -> None:
    walk = Walk(grammars, regex_source("(a|b)zzyyxx(c|d)"))
    walk.step()
    promises = list(walk.promises)
    walk.finish()

    assert len(promises) >= 2
    assert "zzyyxx".startswith(text_of(promises))
    assert walk.tokens[1 : 1 + len(promises)] == promises


def test_the_end_is_promised_where_nothing_else_can_follow(grammars: Grammars) -> None:
    walk = Walk(grammars, regex_source("a|b"))
    walk.step()

    assert walk.promises == [EOS]


def test_behind_the_end_only_end_tokens_follow(grammars: Grammars) -> None:
    walk = Walk(grammars, regex_source("a|b"))
    walk.finish()
    for _ in range(2):
        walk.step()

    assert walk.tokens[1:] == [EOS] * 3


def test_promised_tokens_may_come_as_literals(grammars: Grammars) -> None:
    source = regex_source("(a|b)zzyyxx(c|d)")
    emitting = Walk(grammars, source, seat=0)
    emitting.step()
    fed = Walk(grammars, source, seat=1)
    fed.step()
    promises = list(fed.promises)
    for _ in promises:
        emitting.step()

    grammars.feed(1, [fed.tokens[0], *promises])
    position = 4 + len(promises)

    assert grammars.prepare([0, 1], [position, position]) == {}
    assert grammars.promised(1) is None
    assert allowed(grammars, 1) == allowed(grammars, 0)


def test_some_promised_tokens_may_be_emitted_and_the_rest_come_as_literals(grammars: Grammars) -> None:
    walk = Walk(grammars, regex_source("(a|b)zzyyxx(c|d)"))
    walk.step()
    walk.step()
    rest = list(walk.promises)
    grammars.feed(0, [*walk.tokens[1:], *rest])

    assert rest
    assert grammars.prepare([0], [4 + 1 + len(rest)]) == {}
    assert grammars.promised(0) is None
    assert {text_of([token]) for token in allowed(grammars, 0)} >= {"c", "d"}


@pytest.mark.parametrize("num_cached", [0, 2, 3, 5, 9])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_replay_continues_where_the_sequence_stood(grammars: Grammars, num_cached: int, chunk: int) -> None:
    """Prompt and generated tokens come back, as history and as literals in chunks."""
    source = json_source(PERSON)
    walk = Walk(grammars, source, seed=2)
    while len(walk.tokens) < 12 or walk.promises:
        walk.step()
    tokens = [7, 8, 9, *walk.tokens]

    grammars.open(1, source, tokens[:num_cached], 3)
    for start in range(num_cached, len(tokens), chunk):
        grammars.feed(1, tokens[start : start + chunk])
        if start == num_cached:
            grammars._compiler.compile(source).result()
    grammars.prepare([0, 1], [len(tokens)] * 2)

    assert allowed(grammars, 1) == allowed(grammars, 0)


def test_seats_of_one_grammar_go_their_own_ways(grammars: Grammars) -> None:
    source = regex_source("a[0-9]{3}|b[x-z]{3}")
    walks = [Walk(grammars, source, seed, seat=seed) for seed in range(4)]
    for _ in range(3):
        for walk in walks:
            walk.step()
    texts = [walk.finish() for walk in walks]

    assert all(re.fullmatch("a[0-9]{3}|b[x-z]{3}", text) for text in texts)
    assert len(set(texts)) > 1


def test_a_seat_may_be_used_again_at_once(grammars: Grammars) -> None:
    Walk(grammars, regex_source("a+"), seat=2).step()
    grammars.close(2)

    assert re.fullmatch("[0-9]{4}", Walk(grammars, regex_source("[0-9]{4}"), seat=2).finish())


def test_a_grammar_that_runs_into_a_limit_faults_its_seat_alone(grammars: Grammars) -> None:
    """Router and shards have the same limits, so this one is not let in; its sequence must not take others along."""
    good = Walk(grammars, regex_source("[0-9]{2}"), seat=0)
    grammars.open(1, regex_source("a{1000000000}"), [], 1)
    a = TOKENIZER.token_to_id("a")
    faults: dict[int, str] = {}
    for position in range(1, 5):
        faults = faults or grammars.prepare([1], [position])
        assert faults or EOS not in allowed(grammars, 1)
        grammars.advance([1], [a])

    assert list(faults) == [1]
    assert faults[1].startswith("the grammar cannot be followed: ")
    assert re.fullmatch("[0-9]{2}", good.finish())


def test_a_tokenizer_that_cannot_be_used_faults_the_seat(tmp_path: Path) -> None:
    wordpiece().save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path / "tokenizer.json", tmp_path / "missing.json"):
        grammars = Grammars(GrammarCompiler(path, vocab_size=VOCAB, eos_token_ids=[1]), max_seats=1)
        grammars.open(0, regex_source("a"), [], 1)

        assert "tokenizer" in grammars.prepare([0], [1])[0]
        assert grammars.prepare([0], [1]) != {}
        grammars.close(0)


def test_end_tokens_that_only_the_model_knows_are_left_out(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    compiler = GrammarCompiler(tmp_path / "tokenizer.json", vocab_size=VOCAB, eos_token_ids=[EOS, VOCAB + 3])

    assert compiler.tokenizer().eos_tokens == [EOS]
    assert compiler.tokenizer().vocab_size == VOCAB


def test_a_model_may_have_fewer_embeddings_than_its_tokenizer_has_tokens(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    compiler = GrammarCompiler(tmp_path / "tokenizer.json", vocab_size=300, eos_token_ids=[EOS])
    grammars = Grammars(compiler, max_seats=1)
    grammars.open(0, regex_source("[ab]"), [], 1)
    grammars.prepare([0], [1])

    assert len(is_allowed(grammars, 0, 300)) == 300


def test_a_grammar_is_compiled_once_while_it_is_kept(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard.grammar, "MAX_KEPT", 2)
    first = compiler.compile(regex_source("one"))

    assert compiler.compile(regex_source("one")) is first
    compiler.compile(regex_source("two"))
    compiler.compile(regex_source("one"))
    compiler.compile(regex_source("three"))
    assert compiler.compile(regex_source("one")) is first
    compiler.compile(regex_source("four"))
    compiler.compile(regex_source("five"))
    assert compiler.compile(regex_source("one")) is not first


def test_kept_grammars_are_bounded_by_bytes(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    large = compiler.compile(regex_source("a" * 500))
    monkeypatch.setattr(shard.grammar, "MAX_KEPT_BYTES", 700)

    compiler.compile(regex_source("b" * 400))

    assert compiler.compile(regex_source("a" * 500)) is not large


def test_router_and_shards_have_the_same_limits() -> None:
    for name in ("initial_lexer_fuel", "step_lexer_fuel", "step_max_items", "max_lexer_states", "max_grammar_size"):
        assert getattr(shard.grammar.LIMITS, name) == getattr(grammar_process.LIMITS, name)


# ---- choosing under a grammar -----------------------------------------------------------------------------------


@pytest.fixture(params=["native", "torch"])
def logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """To be chosen from in both ways, where there are two."""
    if request.param == "torch":
        for module in ("shard.sampler", "shard.logits"):
            monkeypatch.setattr(f"{module}.native_threads", lambda logits: None)
    return torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3)) * 4


def sampler_of(compiler: GrammarCompiler) -> Sampler:
    grammars = Grammars(compiler, max_seats=4)
    return Sampler(vocab_size=VOCAB, max_seats=4, eos_token_ids=[EOS], device=CPU, grammars=grammars)


def masked(logits: Tensor, compiler: GrammarCompiler, source: str) -> Tensor:
    grammars = Grammars(compiler, max_seats=1)
    grammars.open(0, source, [], 1)
    grammars.prepare([0], [1])
    return logits.masked_fill(~torch.from_numpy(is_allowed(grammars, 0)), -torch.inf)


DIGITS = regex_source("[0-9]{3}")
PRINTABLE = regex_source("[!-~]{3,}")
RULES = [
    SamplingParams(),
    SamplingParams(do_sample=True, temperature=1.5, seed=1),
    SamplingParams(do_sample=True, top_p=0.6, seed=2),
    SamplingParams(do_sample=True, top_k=3, typical_p=0.8, seed=3),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(do_sample=True, frequency_penalty=1.0, bias_token_ids=(20,), bias_values=(9.0,), seed=4),
]


@pytest.mark.parametrize("source", [DIGITS, PRINTABLE], ids=["digits", "printable"])
@pytest.mark.parametrize("params", RULES, ids=str)
def test_a_choice_under_a_grammar_is_one_from_masked_logits(
    compiler: GrammarCompiler, logits: Tensor, params: SamplingParams, source: str
) -> None:
    """Chosen as if the model itself had left no room for anything else."""
    history = [20, 21, 22]
    constrained, free = sampler_of(compiler), sampler_of(compiler)
    constrained.open(0, params, history, 3, source)
    free.open(0, params, history, 3)

    chosen = constrained.sample(logits[:1], [0], [3])
    expected = free.sample(masked(logits[:1], compiler, source), [0], [3])

    assert chosen.token_ids.tolist() == expected.token_ids.tolist()
    assert text_of(chosen.token_ids.tolist()).isprintable()


def test_log_probabilities_are_those_of_the_raw_logits(compiler: GrammarCompiler, logits: Tensor) -> None:
    sampler = sampler_of(compiler)
    sampler.open(0, SamplingParams(top_n_tokens=2), [5], 1, DIGITS)
    before = logits.clone()

    sampled = sampler.sample(logits[:1], [0], [1])

    expected = logits[0].log_softmax(-1)
    assert sampled.logprobs[0] == expected[sampled.token_ids[0]]
    assert sampled.top_ids[0].tolist() == expected.topk(2).indices.tolist()
    assert torch.equal(logits, before)


def test_rows_without_a_grammar_choose_as_if_alone(compiler: GrammarCompiler, logits: Tensor) -> None:
    params = [RULES[0], RULES[1], RULES[2], RULES[0]]
    together, alone = sampler_of(compiler), sampler_of(compiler)
    for seat, p in enumerate(params):
        together.open(seat, p, [5], 1, DIGITS if seat % 2 else "")
        if seat % 2 == 0:
            alone.open(seat, p, [5], 1)

    tokens = together.sample(logits, [0, 1, 2, 3], [1] * 4).token_ids.tolist()

    assert tokens[::2] == alone.sample(logits[::2], [0, 2], [1] * 2).token_ids.tolist()
    assert all(text_of([token]).isdecimal() for token in tokens[1::2])


def test_free_draws_beside_one_under_a_grammar(compiler: GrammarCompiler, logits: Tensor) -> None:
    together, alone = sampler_of(compiler), sampler_of(compiler)
    for sampler in (together, alone):
        sampler.open(0, RULES[1], [5], 1)
        sampler.open(2, replace(RULES[1], seed=9), [5], 1)
    together.open(1, RULES[1], [5], 1, DIGITS)

    tokens = together.sample(logits[:3], [0, 1, 2], [1] * 3).token_ids.tolist()

    assert tokens[::2] == alone.sample(logits[:3:2], [0, 2], [1] * 2).token_ids.tolist()
    assert text_of(tokens[1:2]).isdecimal()


def test_a_draw_does_not_depend_on_batch_mates(compiler: GrammarCompiler, logits: Tensor) -> None:
    together = sampler_of(compiler)
    for seat in range(4):
        together.open(seat, RULES[1 + seat % 3], [5], 1, DIGITS)
    tokens = together.sample(logits, [0, 1, 2, 3], [1] * 4).token_ids.tolist()

    for seat in range(4):
        alone = sampler_of(compiler)
        alone.open(0, RULES[1 + seat % 3], [5], 1, DIGITS)
        assert alone.sample(logits[seat : seat + 1], [0], [1]).token_ids.tolist() == [tokens[seat]]


def test_where_the_other_rules_forbid_all_that_is_allowed_the_grammar_stands(
    compiler: GrammarCompiler, logits: Tensor
) -> None:
    """`min_new_tokens` forbids the end where the text is complete; a model would go on with anything else."""
    sampler = sampler_of(compiler)
    zero = TOKENIZER.token_to_id("0")
    sampler.open(0, SamplingParams(min_new_tokens=9, bad_words=((zero,),)), [5], 1, regex_source("0"))

    first = sampler.sample(logits[:1], [0], [1])
    second = sampler.sample(logits[1:2], [0], [2])

    assert [*first.token_ids.tolist(), *second.token_ids.tolist()] == [zero, EOS]


def test_what_is_promised_overrides_the_likeliest_token(compiler: GrammarCompiler, logits: Tensor) -> None:
    sampler = sampler_of(compiler)
    sampler.open(0, SamplingParams(), [5], 1, regex_source("(a|b)zzyyxx(c|d)"))
    first = sampler.sample(logits[:1], [0], [1])
    (forced,) = first.forced

    tokens = [
        sampler.sample(logits[1 + i % 3 : 2 + i % 3], [0], [2 + i]).token_ids.tolist()[0] for i in range(len(forced))
    ]

    assert tokens == list(forced)
    assert sampler.sample(logits[:1], [0], [2 + len(forced)]).forced != [forced]


def test_penalties_count_forced_tokens_once_however_they_come(compiler: GrammarCompiler, logits: Tensor) -> None:
    """Emitted by rows in flight, or fed as literals."""
    params = SamplingParams(frequency_penalty=1.5, repetition_penalty=1.3)
    source = regex_source("(a|b)zzyyxx[a-z]{4}")
    emitting, fed = sampler_of(compiler), sampler_of(compiler)
    for sampler in (emitting, fed):
        sampler.open(0, params, [], 1, source)
        sampler.feed(0, [5])
    first = emitting.sample(logits[:1], [0], [1])
    fed.sample(logits[:1], [0], [1])
    forced = list(first.forced[0])
    for index in range(len(forced)):
        emitting.sample(logits[1:2], [0], [2 + index])
    fed.feed(0, [*first.token_ids.tolist(), *forced])
    position = 2 + len(forced)

    by_emission = emitting.sample(logits[2:3], [0], [position])
    by_literals = fed.sample(logits[2:3], [0], [position])

    assert by_emission.token_ids.tolist() == by_literals.token_ids.tolist()
    assert emitting._known.counts is not None
    assert fed._known.counts is not None
    assert torch.equal(emitting._known.counts[0], fed._known.counts[0])


def test_a_row_whose_grammar_fails_is_refused_alone(compiler: GrammarCompiler, logits: Tensor, tmp_path: Path) -> None:
    grammars = Grammars(GrammarCompiler(tmp_path / "none", vocab_size=VOCAB, eos_token_ids=[EOS]), max_seats=2)
    sampler = Sampler(vocab_size=VOCAB, max_seats=2, eos_token_ids=[EOS], device=CPU, grammars=grammars)
    sampler.open(0, SamplingParams(), [5], 1, DIGITS)
    sampler.open(1, SamplingParams(), [5], 1)

    sampled = sampler.sample(logits[:2], [0, 1], [1, 1])

    assert list(sampled.refusals) == [0]
    assert sampled.token_ids[1] == logits[1].argmax()

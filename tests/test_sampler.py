"""The sampler as a whole: against a pipeline of transformers' own processors, in mixed batches, and replayed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedConfig,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkDetector,
    WatermarkLogitsProcessor,
)

from shard.choice import Cut, group_rows
from shard.draw import uniform
from shard.logits import Candidates
from shard.processors import truncate
from shard.sampler import Sampled, Sampler, SamplingParams, score

pytestmark = pytest.mark.usefixtures("one_thread")

EOS = 2
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of choosing, where there are two."""
    if request.param == "torch":
        for module in ("shard.sampler", "shard.logits"):
            monkeypatch.setattr(f"{module}.native_threads", lambda logits: None)


def make_sampler(vocab_size: int, max_seats: int = 32) -> Sampler:
    return Sampler(vocab_size=vocab_size, max_seats=max_seats, eos_token_ids=[EOS], device=CPU)


def peaked_logits(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    """Like a trained model's: a broad floor and a few tokens well above it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    peaks = torch.randint(vocab_size, (num_rows, 12), generator=generator)
    return logits.scatter_add_(1, peaks, 6 * torch.rand(num_rows, 12, generator=generator))


def sample_once(params: SamplingParams, logits: Tensor, prompt: Sequence[int] = (1, 5, 3)) -> Sampled:
    """One row of a fresh sampler, chosen after `prompt`."""
    sampler = make_sampler(logits.shape[1])
    sampler.open(0, params, prompt, len(prompt))
    return sampler.sample(logits, [0], [len(prompt)])


# ---- the oracle ----------------------------------------------------------------------------------------------------


def score_processors(params: SamplingParams, num_prompt_tokens: int, vocab_size: int) -> list[LogitsProcessor]:
    """transformers' processors before the warpers, in TGI's order. (Frequency and presence have no class there.)"""
    processors: list[LogitsProcessor] = []
    if params.watermark_delta:
        processors.append(
            WatermarkLogitsProcessor(vocab_size, "cpu", params.watermark_gamma, bias=params.watermark_delta)
        )
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(OpenAIPenalties(params, num_prompt_tokens))
    if params.bias_token_ids:
        pairs = zip(params.bias_token_ids, params.bias_values, strict=True)
        processors.append(SequenceBiasLogitsProcessor({(token,): value for token, value in pairs}))
    if params.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.bad_words:
        processors.append(NoBadWordsLogitsProcessor([list(run) for run in params.bad_words], eos_token_id=EOS))
    if params.min_new_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(num_prompt_tokens, params.min_new_tokens, EOS))
    return processors


class OpenAIPenalties(LogitsProcessor):
    def __init__(self, params: SamplingParams, num_prompt_tokens: int) -> None:
        self.params = params
        self.num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(input_ids[0, self.num_prompt_tokens :], minlength=scores.shape[1])
        return scores - counts * self.params.frequency_penalty - (counts > 0) * self.params.presence_penalty


def warpers(params: SamplingParams) -> list[LogitsProcessor]:
    chosen: list[LogitsProcessor] = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        chosen.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chosen.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chosen.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1.0:
        chosen.append(TypicalLogitsWarper(params.typical_p))
    return chosen


def expected_token(params: SamplingParams, logits: Tensor, tokens: Sequence[int], num_prompt_tokens: int) -> int:
    """What one sequence alone must choose after `tokens`: logits [V]."""
    input_ids, scores = torch.tensor([tokens]), logits.unsqueeze(0)
    for processor in score_processors(params, num_prompt_tokens, logits.shape[0]):
        scores = processor(input_ids, scores)
    if not scores.isfinite().any():
        return int(logits.argmax())
    if not params.do_sample:
        return int(scores.argmax())
    for warper in warpers(params):
        scores = warper(input_ids, scores)
    probabilities = scores[0].double().softmax(-1)
    order = torch.arange(len(logits))
    if len(warpers(params)) > 1:
        order = scores[0].sort(descending=True, stable=True).indices
    index = torch.searchsorted(probabilities[order].cumsum(0), uniform(params.seed, len(tokens)), right=True)
    return int(order[index])


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    """Half of the rules at random, from mild to extreme."""
    rules = SamplingParams(
        temperature=rng.choice([0.01, 0.6, 0.9, 1.5, 4.0]),
        top_k=rng.choice([1, 5, 50, 51, 200, vocab_size, 10**6]),
        top_p=rng.uniform(0.05, 0.99),
        typical_p=rng.uniform(0.05, 0.99),
        min_p=rng.choice([0.001, 0.05, 0.5]),
        repetition_penalty=rng.choice([0.7, 1.1, 2.0]),
        frequency_penalty=rng.uniform(-2, 2),
        presence_penalty=rng.uniform(-2, 2),
        no_repeat_ngram_size=rng.choice([1, 2, 3]),
        min_new_tokens=4,
        bad_words=((7,), (3, 4), (EOS,), (5, 5, 5)),
        watermark_delta=2.0,
    )
    off = {field.name: field.default for field in fields(rules) if rng.random() < 0.5}
    bias = {rng.randrange(vocab_size): value for value in (-math.inf, -5.0, 5.0, 2.0) if rng.random() < 0.5}
    always = {
        "do_sample": rng.random() < 0.7,
        "seed": rng.getrandbits(64),
        "watermark_gamma": 0.25,
        "top_n_tokens": 3,
        "bias_token_ids": tuple(bias),
        "bias_values": tuple(bias.values()),
    }
    return replace(rules, **(off | always))


@pytest.mark.parametrize("vocab_size", [60, 1100, 4099])
def test_every_row_of_mixed_batches_chooses_what_transformers_processors_leave(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    sampler = make_sampler(vocab_size)
    params = [random_params(rng, vocab_size) for _ in range(24)]
    prompts = [[rng.randrange(min(vocab_size, 12)) for _ in range(rng.randint(1, 9))] for _ in params]
    tokens = [list(prompt) for prompt in prompts]
    for seat, prompt in enumerate(prompts):
        num_cached = rng.randrange(len(prompt))
        sampler.open(seat, params[seat], prompt[:num_cached], len(prompt))
        sampler.feed(seat, prompt[num_cached:])

    for step in range(8):
        seats = rng.sample(range(len(params)), rng.randint(1, len(params)))
        logits = peaked_logits(len(seats), vocab_size, seed=step)
        logits[:, EOS] += 3.0
        sampled = sampler.sample(logits, seats, [len(tokens[seat]) for seat in seats])

        expected = [
            expected_token(params[seat], row, tokens[seat], len(prompts[seat]))
            for seat, row in zip(seats, logits, strict=True)
        ]
        assert sampled.token_ids.tolist() == expected
        for seat, token in zip(seats, expected, strict=True):
            tokens[seat].append(token)


# ---- independence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", [False, True])
def test_a_row_gives_the_same_bits_alone_and_among_sixteen_others(coarse: bool) -> None:
    rng = random.Random(5)
    params = [random_params(rng, 4099) for _ in range(17)]
    logits = peaked_logits(17, 4099, seed=1)
    if coarse:  # ties, as a bfloat16 model gives them
        logits = (logits * 2).round() / 2
    tokens = [[4, 4, 9] for _ in params]
    together = make_sampler(4099)
    for seat in range(17):
        together.open(seat, params[seat], tokens[seat], 3)

    for position in range(3, 7):
        batch = together.sample(logits, list(range(17)), [position] * 17)

        for row in range(17):
            sampler = make_sampler(4099)
            sampler.open(0, params[row], tokens[row], 3)
            alone = sampler.sample(logits[row : row + 1], [0], [position])
            assert row_of(alone, 0) == row_of(batch, row)
            tokens[row].append(int(batch.token_ids[row]))


def row_of(sampled: Sampled, row: int) -> tuple[int, float, list[int], list[float]]:
    num_top = sampled.num_top[row]
    return (
        int(sampled.token_ids[row]),
        float(sampled.logprobs[row]),
        sampled.top_ids[row, :num_top].tolist(),
        sampled.top_logprobs[row, :num_top].tolist(),
    )


def test_candidates_that_are_not_enough_are_looked_at_again() -> None:
    logits = torch.cat([torch.zeros(1, 4099), peaked_logits(1, 4099, seed=0) * 0.1])
    params = SamplingParams(do_sample=True, top_p=0.999, seed=11)
    sampler = make_sampler(4099, max_seats=2)
    for seat in (0, 1):
        sampler.open(seat, params, [1], 1)

    drawn = set()
    for position in range(1, 200):
        token_ids = sampler.sample(logits, [0, 1], [position] * 2).token_ids.tolist()
        assert token_ids[1] == expected_token(params, logits[1], [1] * position, 1)
        drawn.add(token_ids[0])

    assert max(drawn) > 3900  # equal logits are ranked by id: only a look at all of them draws the last


@pytest.mark.parametrize(
    "rules",
    [
        SamplingParams(),
        SamplingParams(top_k=8),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=1.7, typical_p=0.8),
        SamplingParams(min_p=0.1),
    ],
)
@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_sampled_frequencies_pass_a_chi_squared_test(rules: SamplingParams, along: str) -> None:
    num_seats, num_steps = 50, 80
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(4)) * 1.5
    sampler = make_sampler(20, max_seats=num_seats)
    for seat in range(num_seats):
        seed = seat if along == "seeds" else 9
        sampler.open(seat, replace(rules, do_sample=True, seed=seed), [1], 1)
    counts = torch.zeros(20, dtype=torch.int64)

    for step in range(num_steps):
        positions = [1 + step * num_seats + (seat if along == "positions" else 0) for seat in range(num_seats)]
        counts += sampler.sample(logits.expand(num_seats, 20), range(num_seats), positions).token_ids.bincount(
            minlength=20
        )

    scores = logits
    for warper in warpers(rules):
        scores = warper(torch.tensor([[1]]), scores)
    expected = scores[0].double().softmax(-1) * num_seats * num_steps
    support = expected > 0
    assert not counts[~support].any()
    chi_squared = float(((counts - expected)[support] ** 2 / expected[support]).sum())
    assert chi_squared < CHI_SQUARED_0_1_PERCENT[int(support.sum()) - 1]


CHI_SQUARED_0_1_PERCENT = (
    [0.0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88]
    + [29.59, 31.26, 32.91, 34.53, 36.12, 37.70, 39.25, 40.79, 42.31, 43.82]
)  # fmt: skip
"""Critical values by degrees of freedom."""


# ---- what seats know -----------------------------------------------------------------------------------------------

LOOKING_BACK = SamplingParams(
    do_sample=True,
    temperature=1.3,
    top_k=40,
    repetition_penalty=1.4,
    frequency_penalty=0.7,
    presence_penalty=0.3,
    seed=77,
    watermark_gamma=0.5,
    watermark_delta=1.0,
    no_repeat_ngram_size=3,
    min_new_tokens=5,
    bad_words=((3, 4), (9,)),
)
STEP_LOGITS = peaked_logits(40, 80, seed=8)


def generate(sampler: Sampler, tokens: list[int], num_tokens: int) -> list[int]:
    """Continues seat 0 until it has `num_tokens` tokens."""
    while len(tokens) < num_tokens:
        position = len(tokens)
        sampled = sampler.sample(STEP_LOGITS[position : position + 1], [0], [position])
        tokens = [*tokens, int(sampled.token_ids[0])]
    return tokens


def test_a_replay_chooses_the_same_tokens() -> None:
    prompt = [1, 2, 3, 4]
    sampler = make_sampler(80)
    sampler.open(0, LOOKING_BACK, [], 4)
    sampler.feed(0, prompt)
    tokens = generate(sampler, prompt, 40)

    for num_known in (5, 17, 39):
        for num_cached in (0, 3, num_known - 1):
            sampler.close(0)
            sampler.open(0, LOOKING_BACK, tokens[:num_cached], 4)
            sampler.feed(0, tokens[num_cached : num_known - 1])
            sampler.feed(0, tokens[num_known - 1 : num_known])
            assert generate(sampler, tokens[:num_known], 40) == tokens


def test_a_sampled_token_that_comes_back_as_a_literal_counts_once() -> None:
    prompt = [1, 2, 3, 4]
    sampler = make_sampler(80)
    sampler.open(0, LOOKING_BACK, prompt, 4)
    tokens = generate(sampler, prompt, 20)
    sampler.close(0)

    sampler.open(0, LOOKING_BACK, prompt, 4)
    repeated = prompt
    for position in range(4, 20):
        repeated = generate(sampler, repeated, position + 1)
        if position % 3:
            sampler.feed(0, repeated[-1:])

    assert repeated == tokens


def test_what_follows_a_literal_that_came_back_is_new() -> None:
    sampler = make_sampler(10)
    sampler.open(0, SamplingParams(no_repeat_ngram_size=1), [1], 1)
    logits = torch.arange(10.0).unsqueeze(0)
    sampler.sample(logits, [0], [1])

    sampler.feed(0, [9])
    sampler.feed(0, [8])

    assert sampler.sample(logits, [0], [3]).token_ids.tolist() == [7]


def test_a_seat_knows_nothing_of_the_sequence_before() -> None:
    sampler = make_sampler(80)
    sampler.open(0, LOOKING_BACK, [1, 2], 2)
    fresh = generate(sampler, [1, 2], 30)
    sampler.close(0)
    sampler.open(0, replace(LOOKING_BACK, seed=5), list(range(39)), 20)
    sampler.close(0)

    sampler.open(0, LOOKING_BACK, [1, 2], 2)

    assert generate(sampler, [1, 2], 30) == fresh


def test_penalties_reach_back_over_a_long_sequence() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 5], logits[0, 6] = 2.0, 1.9
    sampler = make_sampler(10)
    sampler.open(0, SamplingParams(repetition_penalty=1.5), [5, 1, 1], 1003)
    sampler.feed(0, [1 + i % 3 for i in range(1000)])

    sampled = sampler.sample(logits, [0], [1003])

    assert sampled.token_ids.tolist() == [6]


def test_only_generated_tokens_are_counted() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 5], logits[0, 6] = 2.0, 1.5
    sampler = make_sampler(10)
    sampler.open(0, SamplingParams(frequency_penalty=0.2), [5, 5, 5, 5, 5], 5)

    chosen = [int(sampler.sample(logits, [0], [position]).token_ids[0]) for position in range(5, 11)]

    assert chosen == [5, 5, 5, 6, 5, 6]


def test_end_tokens_are_forbidden_until_enough_tokens_are_generated() -> None:
    logits = torch.zeros(1, 10)
    logits[0, EOS], logits[0, 7] = 5.0, 1.0
    sampler = make_sampler(10)
    sampler.open(0, SamplingParams(min_new_tokens=2), [], 3)

    chosen = [int(sampler.sample(logits, [0], [position]).token_ids[0]) for position in (3, 4, 5)]

    assert chosen == [7, 7, EOS]


# ---- what comes back -----------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = peaked_logits(1, 80, seed=3)
    before = logits.clone()
    params = replace(LOOKING_BACK, top_n_tokens=3)

    sampled = sample_once(params, logits)

    raw = logits[0].double().log_softmax(-1)
    values, ids = raw.sort(descending=True)
    assert abs(float(sampled.logprobs[0]) - float(raw[sampled.token_ids[0]])) < 1e-5
    assert sampled.top_ids[0].tolist() == ids[:3].tolist()
    assert (sampled.top_logprobs[0] - values[:3]).abs().max() < 1e-5
    assert torch.equal(logits, before)


def test_top_tokens_include_ties_with_the_last_and_differ_by_row() -> None:
    logits = torch.tensor([-1.0, -3.0, -4.0, -2.0, -3.0]).expand(4, 5).contiguous()
    sampler = make_sampler(5)
    for seat, top_n_tokens in enumerate((3, 0, 1, 9)):
        sampler.open(seat, SamplingParams(top_n_tokens=top_n_tokens), [], 1)

    sampled = sampler.sample(logits, [0, 1, 2, 3], [1] * 4)

    assert sampled.num_top == [4, 0, 1, 5]
    assert sampled.top_ids[0, :4].tolist() == [0, 3, 1, 4]
    assert sampled.top_ids[2, :1].tolist() == [0]
    assert sampled.top_ids[3].tolist() == [0, 3, 1, 4, 2]


def test_nobody_asking_for_top_tokens_gets_an_empty_column() -> None:
    sampled = sample_once(SamplingParams(), torch.zeros(1, 10))

    assert sampled.num_top == [0]
    assert sampled.top_ids.shape == sampled.top_logprobs.shape == (1, 0)


@pytest.mark.parametrize("nan", [math.nan, -math.nan], ids=["positive", "negative"])
def test_a_broken_row_is_flagged_and_disturbs_nobody(nan: float) -> None:
    """Processors give infinities that cancel a negative NaN, which is first or last where bits are compared."""
    logits = peaked_logits(6, 1100, seed=2)
    logits[1, 700] = nan
    logits[2] = -math.inf
    logits[4, 3] = math.inf
    rules = [
        SamplingParams(do_sample=True, top_p=0.9, repetition_penalty=1.2, seed=3, top_n_tokens=2),
        SamplingParams(),
    ]

    for params in [*rules, replace(rules[0], top_p=1.0), replace(rules[0], top_k=5)]:
        sampler = make_sampler(1100)
        for seat in range(6):
            sampler.open(seat, params, [1, 2], 2)
        sampled = sampler.sample(logits, range(6), [2] * 6)

        assert sampled.faults.tolist() == [False, True, True, False, True, False]
        assert all(0 <= token < 1100 for token in sampled.token_ids.tolist())
        for row in (0, 3, 5):
            assert row_of(sampled, row) == row_of(sample_once(params, logits[row : row + 1], [1, 2]), 0)


def test_rules_that_leave_no_token_leave_the_models_choice() -> None:
    logits = torch.zeros(2, 4)
    logits[0, 3] = 1.0
    params = SamplingParams(do_sample=True, bad_words=((0,), (1,)), bias_token_ids=(2, 3), bias_values=(-math.inf,) * 2)
    everything = replace(params, bad_words=((0,), (1,), (3,)), min_new_tokens=9)
    sampler = make_sampler(4)
    sampler.open(0, everything, [1], 1)
    sampler.open(1, replace(params, bias_token_ids=(2,), bias_values=(-math.inf,)), [1], 1)

    sampled = sampler.sample(logits, [0, 1], [1, 1])

    assert sampled.token_ids.tolist() == [3, 3]
    assert not sampled.faults.any()


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"do_sample": True},
        *({"do_sample": True} | cut for cut in ({"top_p": 0.9}, {"top_k": 9}, {"typical_p": 0.9})),
    ],
)
def test_scores_that_are_no_numbers_leave_the_models_choice(rules: dict[str, float]) -> None:
    """A tiny penalty makes a known token's logit infinite, and a bad word takes infinity off."""
    logits = peaked_logits(1, 20_000, seed=5)
    logits[0, [1, 5, 3]] = 2.0
    params = SamplingParams(repetition_penalty=1e-39, bad_words=((5,),), **rules)  # type: ignore[arg-type]

    sampled = sample_once(params, logits)

    assert sampled.token_ids.tolist() == logits.argmax(-1).tolist()
    assert not sampled.faults.any()


def test_top_p_is_a_fraction_of_all_ties_with_the_kth_token() -> None:
    logits = torch.full((1, 2000), -9.0)
    logits[0, 1000:1300] = 0.0
    logits[0, 7] = math.log(20)
    params = [SamplingParams(do_sample=True, top_k=2, top_p=0.8, seed=seed) for seed in range(60)]

    drawn = {sample_once(p, logits).token_ids.item() for p in params}

    assert drawn.issubset({7, *range(1000, 1236)}), "of a mass of 320 the first 256"
    assert max(drawn) > 1200


def test_tokens_outside_the_vocabulary_are_passed_over() -> None:
    logits = torch.arange(10.0).unsqueeze(0)
    params = SamplingParams(bias_token_ids=(10, 4, 99), bias_values=(50.0, 20.0, 50.0), bad_words=((12,), ()))

    assert sample_once(params, logits).token_ids.tolist() == [4]


def test_a_truncation_that_is_off_cuts_nothing() -> None:
    (group,) = group_rows([SamplingParams(do_sample=True, min_p=1e-30)], 100, CPU)
    assert isinstance(group, Cut)

    truncated = truncate(
        Candidates(torch.tensor([[0.0, -40.0, -60.0]]), torch.tensor([[0, 1, 2]])), group.truncation, torch.ones(1, 1)
    )

    assert truncated.weights.bool().all()


def test_the_coldest_temperature_is_greedy() -> None:
    logits = peaked_logits(1, 4099, seed=6)

    for rules in (SamplingParams(), SamplingParams(top_k=20), SamplingParams(top_p=0.99)):
        cold = replace(rules, do_sample=True, temperature=1e-38, seed=1)
        assert sample_once(cold, logits).token_ids.tolist() == logits.argmax(-1).tolist()


def test_transformers_detector_finds_the_watermark() -> None:
    vocab_size, num_tokens = 500, 120
    logits = peaked_logits(num_tokens, vocab_size, seed=9) * 0.3
    marked = SamplingParams(do_sample=True, seed=4, watermark_gamma=0.25, watermark_delta=3.0)
    detector = WatermarkDetector(
        model_config=PreTrainedConfig(vocab_size=vocab_size, bos_token_id=vocab_size + 1),
        device="cpu",
        watermarking_config={
            "greenlist_ratio": 0.25,
            "bias": 3.0,
            "hashing_key": 15485863,
            "seeding_scheme": "lefthash",
            "context_width": 1,
        },
    )
    texts = []
    for params in (marked, replace(marked, watermark_delta=0.0)):
        sampler = make_sampler(vocab_size)
        sampler.open(0, params, [1], 1)
        rows = [sampler.sample(logits[i : i + 1], [0], [i + 1]) for i in range(num_tokens)]
        texts.append([int(sampled.token_ids[0]) for sampled in rows])

    assert detector(torch.tensor(texts)).tolist() == [True, False]


def test_score_is_the_log_softmax_at_the_targets() -> None:
    logits = peaked_logits(70, 300, seed=1)
    targets = torch.randint(300, (70,), generator=torch.Generator().manual_seed(0))

    expected = logits.double().log_softmax(-1)[torch.arange(70), targets]

    assert (score(logits, targets, [0] * 70).logprobs - expected).abs().max() < 1e-5


def test_score_finds_the_likeliest_tokens_of_the_rows_that_ask() -> None:
    logits = peaked_logits(3, 300, seed=2)
    best = logits.argmax(-1)

    scored = score(logits, torch.tensor([7, int(best[1]), 7]), [0, 1, 3])

    assert scored.num_top == [0, 1, 3]
    assert scored.top_ids[1, 0] == best[1]
    assert scored.top_logprobs[1, 0] == scored.logprobs[1], "a greedy token is recognised by exact equality"
    assert scored.top_ids[2].tolist() == logits[2].topk(3).indices.tolist()

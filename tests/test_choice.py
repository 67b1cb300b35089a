"""One native call that chooses for a whole batch: against torch, whoever shares the work or is in the batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shard.choice import Cut, TorchRules, group_rows, native_rules
from shard.draw import draw, uniform
from shard.kernels import build, native
from shard.kernels.build import AVX2, AVX512, Variant, best_variant
from shard.kernels.native import Change, ChoiceRules, Library, Mask, Rule, Threads, library
from shard.known_tokens import KnownTokens
from shard.logits import Candidates, block_maxima, likeliest_with_ties
from shard.processors import penalise_counts, penalise_repetition, truncate
from shard.sampler import Sampled, Sampler, SamplingParams

pytestmark = pytest.mark.skipif(library() is None, reason="the native operations are not built for this machine")

PART = 8192
"""Tokens of a row that one thread looks through at a time."""

SHAPES = [(1, 49152), (3, 50257), (17, PART + 1), (2, 70), (1, 5)]


@cache
def native_library(variant: Variant) -> Library:
    return Library(build.build(variant))


@pytest.fixture(params=[(AVX512, 1), (AVX512, 3), (AVX2, 2)], ids=lambda p: f"{p[0].name}-{p[1]}")
def team(request: pytest.FixtureRequest) -> Threads:
    variant, count = request.param
    if variant is AVX512 and best_variant() is not AVX512:
        pytest.skip("this processor cannot run it")
    return Threads(native_library(variant), count)


def random_logits(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 4


def chosen(
    rules: ChoiceRules,
    logits: Tensor,
    positions: Sequence[int],
    forbidden: Sequence[tuple[int, int]],
    team: Threads,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the threads and the library that are asked for."""
    changes = [Change(row, token, -math.inf) for row, token in forbidden]
    return native.choose(logits, rules.arguments(positions, changes), team)[:3]


def choose(
    team: Threads,
    logits: Tensor,
    temperatures: Sequence[float] | None = None,
    forbidden: Sequence[tuple[int, int]] = (),
    first_position: int = 7,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = len(logits)
    seeds = [seed_of(row) for row in range(num_rows)]
    rules = ChoiceRules([Rule(temperature) for temperature in temperatures or [0.0] * num_rows], seeds)
    return chosen(rules, logits, range(first_position, first_position + num_rows), forbidden, team)


def seed_of(row: int) -> int:
    return (1 << 64) - 1 - 1234567 * row


def drawn(logits: Tensor, temperature: float, row: int, position: int) -> int:
    """By the definition: where the fraction falls in the cumulative distribution, in double precision."""
    sums = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return int(torch.searchsorted(sums, uniform(seed_of(row), position) * sums[-1], right=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_logit_is_taken_with_its_log_probability(team: Threads, shape: tuple[int, int]) -> None:
    logits = random_logits(shape)

    tokens, logprobs, faults = choose(team, logits)

    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logprobs.double(), logits.double().log_softmax(-1).amax(-1), atol=4e-6, rtol=0)
    assert not faults.any()


@pytest.mark.parametrize(("first", "second"), [(3, 5), (62, 64), (PART - 1, PART), (100, 3 * PART - 1)])
def test_of_equal_ones_the_first_is_taken(team: Threads, first: int, second: int) -> None:
    logits = random_logits((2, 3 * PART))
    logits[:, [first, second]] = 30.0

    assert choose(team, logits)[0].tolist() == [first, first]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_a_draw_is_by_the_cumulative_distribution(team: Threads, shape: tuple[int, int], temperature: float) -> None:
    logits = random_logits(shape)
    logits[:, ::3] = -math.inf

    for position in (0, 1, 100_000):
        tokens, logprobs, _ = choose(team, logits, [temperature] * len(logits), first_position=position)

        expected = [drawn(logits[row], temperature, row, position + row) for row in range(len(logits))]
        assert tokens.tolist() == expected
        wanted = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), wanted, atol=4e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-6])
def test_the_coldest_draw_is_the_largest_logit(team: Threads, temperature: float) -> None:
    logits = random_logits((3, 9000))

    assert choose(team, logits, [temperature] * 3)[0].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_forbidden_counts_for_log_probabilities_alone(team: Threads, temperature: float) -> None:
    logits = random_logits((4, 20_000))
    best = logits.topk(300).indices
    forbidden = [(row, token) for row in (0, 2) for token in best[row].tolist()]
    allowed = logits.clone()
    for pair in forbidden:
        allowed[pair] = -math.inf

    tokens, logprobs, faults = choose(team, logits, [temperature] * 4, forbidden)

    expected = (
        [drawn(allowed[row], temperature, row, 7 + row) for row in range(4)] if temperature else allowed.argmax(-1)
    )
    assert tokens.tolist() == list(expected)
    wanted = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), wanted, atol=4e-6, rtol=0)
    assert not faults.any()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_where_all_is_forbidden_the_models_choice_stands(team: Threads, temperature: float) -> None:
    logits = random_logits((2, 100))

    tokens, _, faults = choose(team, logits, [temperature] * 2, [(1, token) for token in range(100)])

    assert tokens[1] == logits[1].argmax()
    assert not faults.any()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_that_are_not_finite_are_flagged_and_disturb_nobody(team: Threads, temperature: float) -> None:
    logits = random_logits((6, PART + 300))
    undisturbed = choose(team, logits, [temperature] * 6)
    logits[1, 70] = math.nan
    logits[2] = -math.inf
    logits[3, PART + 299] = math.nan
    logits[4, 3] = math.inf

    disturbed = choose(team, logits, [temperature] * 6)

    assert disturbed[2].tolist() == [False, True, True, True, True, False]
    assert all(0 <= token < logits.shape[1] for token in disturbed[0].tolist())
    for before, after in zip(undisturbed[:2], disturbed[:2], strict=True):
        assert before[[0, 5]].tolist() == after[[0, 5]].tolist()


def test_a_row_is_chosen_the_same_by_any_number_of_threads_and_in_any_company(team: Threads) -> None:
    logits = random_logits((9, 20_000))
    temperatures = [0.0, 0.7, 1.3] * 3
    alone = Threads(team.native, 1)

    together = choose(team, logits, temperatures)

    for row in range(9):
        rules = ChoiceRules([Rule(temperatures[row])], [seed_of(row)])
        token, logprob, _ = chosen(rules, logits[row : row + 1], [7 + row], (), alone)
        assert (token.item(), logprob.item()) == (together[0][row].item(), together[1][row].item())


# Draws from the likeliest tokens


def rules_of(params: Sequence[SamplingParams]) -> ChoiceRules:
    return native_rules(params, range(len(params)), 0)


def peaked(shape: tuple[int, int]) -> Tensor:
    """Rows from flat to peaked, some of whose tokens are far above the rest."""
    generator = torch.Generator().manual_seed(shape[1])
    logits = torch.randn(shape, generator=generator) * torch.linspace(0.3, 6.0, shape[0]).unsqueeze(1)
    return logits + 8.0 * (torch.rand(shape, generator=generator) > 0.999)


def coarse(shape: tuple[int, int]) -> Tensor:
    """Many ties, zeros of both signs among them."""
    logits = (peaked(shape) / 2).round() * 2
    return torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5, logits + 0.0, logits)


def sparse(shape: tuple[int, int]) -> Tensor:
    """Few finite numbers, as a rule that forbids most tokens leaves them."""
    logits = peaked(shape)
    is_left = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.003
    is_left[:, -1] = True
    return logits.masked_fill(~is_left, -math.inf)


def equal(shape: tuple[int, int]) -> Tensor:
    return torch.full(shape, -3.25)


CUTS = [
    *(SamplingParams(top_k=top_k) for top_k in (1, 2, 50, 51, 767, 1000, 10**6)),
    *(SamplingParams(top_p=top_p) for top_p in (1e-9, 0.1, 0.8, 0.95, 0.9991, 0.9999999)),
    *(SamplingParams(min_p=min_p) for min_p in (1e-30, 0.003, 0.2, 1.0)),
    SamplingParams(top_k=60, top_p=0.93, min_p=0.01),
    SamplingParams(top_k=60, top_p=0.93),
    SamplingParams(top_k=10**6, top_p=0.71),
    SamplingParams(top_k=1000, top_p=0.5, min_p=0.2),
    SamplingParams(top_p=0.9, min_p=0.04),
    *(SamplingParams(typical_p=typical_p) for typical_p in (1e-9, 0.2, 0.9, 0.99999)),
    SamplingParams(top_k=10, top_p=0.95, typical_p=0.95),
    SamplingParams(top_k=300, typical_p=0.4),
    SamplingParams(top_p=0.9, typical_p=0.7),
    SamplingParams(min_p=0.02, typical_p=0.7),
]
"""More of them than rows, so that each comes with others, and twice with other temperatures."""


def cut_rows(num_rows: int, first: int) -> list[SamplingParams]:
    temperatures = (1.0, 0.3, 1.7, 1e-6, 1e-45, 30.0)
    rng = random.Random(first)
    cuts = [CUTS[(first + row) % len(CUTS)] for row in range(num_rows)]
    return [
        replace(cut, do_sample=True, temperature=rng.choice(temperatures), seed=seed_of(row))
        for row, cut in enumerate(cuts)
    ]


def cut_draws(logits: Tensor, params: SamplingParams, position: int) -> set[int]:
    """What torch draws for a row [V]; where the mass of the vocabulary counts, with one that is a millionth off too."""
    (group,) = group_rows([params], len(logits), logits.device)
    assert isinstance(group, Cut)
    candidates = Candidates(*logits.unsqueeze(0).sort(descending=True, stable=True))
    values = candidates.values.double()
    mass = ((values - values[:, :1]) / params.temperature).exp().sum(-1, keepdim=True)
    masses: Sequence[Tensor | None] = [None] if group.has_top_k else [mass * (1 - 1e-6), mass, mass * (1 + 1e-6)]
    u = torch.tensor([uniform(params.seed, position)], dtype=torch.float64)
    draws = [draw(truncate(candidates, group.truncation, mass).weights, u) for mass in masses]
    return {int(candidates.ids[0, index]) for index in draws}


@cache
def expected_draws(
    rows: Callable[[tuple[int, int]], Tensor], shape: tuple[int, int]
) -> list[tuple[list[SamplingParams], list[set[int]]]]:
    logits = rows(shape)
    batches = [cut_rows(shape[0], first) for first in range(0, len(CUTS), shape[0])]
    return [
        (params, [cut_draws(logits[row], p, row * len(CUTS)) for row, p in enumerate(params)]) for params in batches
    ]


@pytest.mark.parametrize("shape", [(5, 49152), (4, 12_345), (17, PART + 1), (7, 70), (7, 5)])
@pytest.mark.parametrize("rows", [peaked, coarse, sparse, equal])
def test_a_cut_draw_is_that_of_torch(
    team: Threads, shape: tuple[int, int], rows: Callable[[tuple[int, int]], Tensor]
) -> None:
    logits = rows(shape)
    positions = range(0, shape[0] * len(CUTS), len(CUTS))

    for params, expected in expected_draws(rows, shape):
        tokens, logprobs, faults = chosen(rules_of(params), logits, positions, (), team)

        for token, draws, p in zip(tokens.tolist(), expected, params, strict=True):
            assert token in draws, p
        wanted = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), wanted, atol=1e-5, rtol=0)
        assert not faults.any()


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Rule(1.0, top_k=2), {30, 999, 70}),  # as likely as the second
        (Rule(1.0, top_p=0.39), {30}),
        (Rule(1.0, top_p=0.41), {30, 70}),  # of equal ones those that come first
        (Rule(1.0, min_p=0.49), {30, 70, 999}),
        (Rule(1.0, min_p=0.51), {30}),
        (Rule(1.0, top_p=0.88), {30, 70, 999, 5}),
        (Rule(1.0, top_k=4, top_p=0.88), {30, 70, 999}),  # a fraction of what top-k leaves
        (Rule(1.0, top_p=0.85, min_p=0.3), {30, 70, 999}),
        (Rule(1.0, top_k=4, top_p=0.7, min_p=0.3), {30, 70, 999}),  # also of what min-p drops
    ],
)
def test_a_draw_stays_within_its_limits_and_reaches_them(team: Threads, rule: Rule, kept: set[int]) -> None:
    logits = torch.full((1, 2000), -math.inf)
    logits[0, [30, 70, 999, 5]] = torch.tensor([0.4, 0.2, 0.2, 0.1]).log()
    logits[0, 100:200] = math.log(0.1 / 100)
    rules = ChoiceRules([rule], [5])

    tokens = {chosen(rules, logits, [position], (), team)[0].item() for position in range(200)}

    assert tokens == kept


def test_a_temperature_that_makes_all_weights_equal_leaves_min_p_nothing_to_cut(team: Threads) -> None:
    rules = ChoiceRules([Rule(1e20, min_p=1.0)], [5])

    tokens = {chosen(rules, random_logits((1, 2000)), [position], (), team)[0].item() for position in range(50)}

    assert len(tokens) > 40, "of 2,000 that are equally likely"


@pytest.mark.parametrize(
    "rule", [Rule(0.8, top_k=40), Rule(0.8, top_p=0.9), Rule(0.8, min_p=0.01), Rule(0.8, typical_p=0.9)]
)
def test_a_cut_draw_passes_over_what_is_forbidden(team: Threads, rule: Rule) -> None:
    logits = random_logits((3, 20_000))
    forbidden = [(row, token) for row in (0, 2) for token in sorted(logits[row].topk(300).indices.tolist())]
    allowed = logits.clone()
    allowed[tuple(zip(*forbidden, strict=True))] = -math.inf
    rules = ChoiceRules([rule] * 3, [seed_of(row) for row in range(3)])

    for position in range(5):
        tokens, logprobs, _ = chosen(rules, logits, [position] * 3, forbidden, team)

        assert tokens.tolist() == chosen(rules, allowed, [position] * 3, (), team)[0].tolist()
        wanted = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), wanted, atol=4e-6, rtol=0)


def test_cut_rows_that_are_not_finite_are_flagged_and_disturb_nobody(team: Threads) -> None:
    logits = random_logits((4, PART + 300))
    params = [replace(cut, do_sample=True) for cut in (CUTS[2], CUTS[9], CUTS[13], CUTS[17])]
    for row, number in enumerate([math.nan, -math.inf, math.inf]):
        disturbed = logits.clone()
        disturbed[row, 70] = number
        if number == -math.inf:
            disturbed[row] = number

        tokens, _, faults = chosen(rules_of(params), disturbed, range(4), (), team)

        assert faults.tolist() == [other == row for other in range(4)]
        assert all(0 <= token < logits.shape[1] for token in tokens.tolist())
        assert tokens[3] == chosen(rules_of(params), logits, range(4), (), team)[0][3]


def test_a_cut_row_is_chosen_the_same_by_any_number_of_threads_and_in_any_company(team: Threads) -> None:
    logits = peaked((22, 20_000))
    params = [SamplingParams(), *cut_rows(20, 0), SamplingParams(do_sample=True, temperature=0.9)]
    alone = Threads(team.native, 1)

    together = chosen(rules_of(params), logits, range(22), (), team)

    for row in range(22):
        token, logprob, _ = chosen(rules_of([params[row]]), logits[row : row + 1], [row], (), alone)
        assert (token.item(), logprob.item()) == (together[0][row].item(), together[1][row].item())


# Scores that rules have changed


@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"),
    [(1.03, 0.0, 0.0), (0.7, 0.0, 0.0), (1.0, 0.31, 0.0), (1.0, 0.0, -0.7), (1.7, 0.93, 0.41)],
)
@pytest.mark.parametrize("rivals_come_first", [False, True])
def test_penalties_are_rounded_as_torch_rounds_them(
    team: Threads, repetition: float, frequency: float, presence: float, rivals_come_first: bool
) -> None:
    """Each known token has a rival with the very score that torch gives it: of the two the first is taken."""
    num_rows, (rival, token) = 500, (70, 9000) if rivals_come_first else (9000, 70)
    logits = torch.full((num_rows, 10_000), -100.0)
    generator = torch.Generator().manual_seed(0)
    logits[:, token] = torch.randn(num_rows, generator=generator) * 7
    known, counts = torch.zeros(num_rows, 10_000, dtype=torch.bool), torch.zeros(num_rows, 10_000, dtype=torch.int32)
    known[:, [token, 5000]] = True
    counts[:, token] = torch.arange(num_rows) % 40
    columns = [torch.full((num_rows, 1), value) for value in (repetition, frequency, presence)]
    repeated = penalise_repetition(logits[:, [token]], columns[0])
    logits[:, [rival]] = penalise_counts(repeated, counts[:, [token]], *columns[1:])
    rule = Rule(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    before = counts.clone()

    given = ChoiceRules([rule] * num_rows, [0] * num_rows, range(num_rows)).arguments(
        range(num_rows), known=known, counts=counts
    )
    tokens = native.choose(logits, given, team).token_ids

    assert tokens.tolist() == [70] * num_rows
    assert known[:, 70].all()
    assert counts[:, 70].tolist() == (before[:, 70] + int(frequency != 0 or presence != 0)).tolist()
    assert known.sum() == num_rows * (2 if token == 70 else 3)


def test_masks_come_first_and_what_they_leave_stands_where_other_rules_leave_nothing(team: Threads) -> None:
    logits = random_logits((5, PART + 70))
    best = logits.topk(3).indices
    bits = np.zeros((2, 259), dtype=np.uint32)
    left = sorted(best[0].tolist())[:2]
    for token in left:
        bits[0, token // 32] |= np.uint32(1 << token % 32)
    favoured = int(best[2, 2])
    bits[1, favoured // 32] = 1 << favoured % 32
    masks = [
        *(Mask(row, bits[0], 0.0, -math.inf) for row in (0, 1)),
        Mask(2, bits[1], 50.0, 0.0),
        Mask(3, np.zeros(259, dtype=np.uint32), 0.0, -math.inf),
    ]
    forbidden = [Change(1, token, -math.inf) for token in left]
    known = torch.zeros(5, logits.shape[1], dtype=torch.bool)
    rules = ChoiceRules([Rule()] * 5, [0] * 5)

    chosen = native.choose(logits, rules.arguments([0] * 5, forbidden, masks, known), team)
    by_torch = TorchRules([SamplingParams()] * 5, range(5), logits.shape[1], logits.device).choose(
        logits, [0] * 5, forbidden, masks, KnownTokens(5, logits.shape[1], logits.device)
    )

    expected = [max(left, key=lambda token, row=row: float(logits[row, token])) for row in (0, 1)]  # type: ignore[misc]
    assert chosen.token_ids.tolist() == [*expected, favoured, *best[3:, 0].tolist()]
    assert by_torch.token_ids.tolist() == chosen.token_ids.tolist()
    wanted = logits.double().log_softmax(-1).gather(1, chosen.token_ids[:, None])[:, 0]
    torch.testing.assert_close(chosen.logprobs.double(), wanted, atol=4e-6, rtol=0)
    assert not chosen.faults.any()


@pytest.mark.parametrize(
    "given",
    [
        {"known": torch.zeros(2, 69, dtype=torch.bool)},
        {"known": torch.zeros(2, 71, dtype=torch.bool)},
        {"masks": [Mask(0, np.zeros(2, dtype=np.uint32), 0.0, -math.inf)]},
    ],
    ids=["too narrow a table", "too wide a table", "too few words"],
)
def test_what_does_not_fit_the_vocabulary_is_not_read(team: Threads, given: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="70"):
        native.choose(random_logits((2, 70)), ChoiceRules([Rule()] * 2, [0] * 2).arguments([0, 0], **given), team)


def test_no_token_comes_twice_where_known_ones_are_forbidden(team: Threads) -> None:
    logits = random_logits((2, PART + 70)).repeat(2, 1)
    order = logits[:2].argsort(-1, descending=True)
    known = torch.zeros(4, logits.shape[1], dtype=torch.bool).scatter_(1, order[:, :300].repeat(2, 1), True)
    rules = ChoiceRules([Rule(forbids_known=row < 2) for row in range(4)], [0] * 4, range(4))

    for step in range(3):
        tokens = native.choose(logits, rules.arguments([step] * 4, known=known), team).token_ids

        assert tokens.tolist() == [*order[:, 300 + step].tolist(), *order[:, 0].tolist()]


def test_biases_are_added_to_their_tokens_alone(team: Threads) -> None:
    logits = torch.zeros(3, 3 * PART)
    tokens = [0, 63, 64, PART - 1, PART, 3 * PART - 1]
    for token in tokens:
        biases = [Change(1, other, 1.0) for other in tokens] + [Change(1, token, 0.5), Change(2, token, -1.0)]
        rules = ChoiceRules([Rule()] * 3, [0] * 3, biases=biases)

        chosen = native.choose(logits, rules.arguments([0] * 3), team)

        assert chosen.token_ids.tolist() == [0, token, 0 if token else 1]


@pytest.mark.parametrize("shape", [(4, 49152), (6, PART + 70), (5, 70), (5, 5)])
@pytest.mark.parametrize("rows", [peaked, coarse, sparse, equal])
def test_the_likeliest_tokens_come_with_ties_and_with_log_probabilities_as_the_chosen_one(
    team: Threads, shape: tuple[int, int], rows: Callable[[tuple[int, int]], Tensor]
) -> None:
    logits = rows(shape)
    asked = [0, 1, 5, 20, 3, 2][: shape[0]]
    rules = ChoiceRules([Rule(num_top=count) for count in asked], [0] * len(asked))
    num_top, top_ids = likeliest_with_ties(logits, block_maxima(logits), asked)

    chosen = native.choose(logits, rules.arguments([0] * len(asked), [Change(1, 3, -math.inf)]), team)

    assert chosen.num_top.tolist() == num_top
    log_probabilities = logits.double().log_softmax(-1)
    for row, count in enumerate(num_top):
        ids = chosen.top_ids[row, :count]
        assert ids.tolist() == top_ids[row, :count].tolist()
        torch.testing.assert_close(
            chosen.top_logprobs[row, :count].double(), log_probabilities[row, ids], atol=1e-5, rtol=0
        )
        if count and row != 1:
            assert chosen.top_logprobs[row, 0] == chosen.logprobs[row], "the greedy token is recognised by equality"


# The sampler with it and without


def sampled_lives(params: Sequence[SamplingParams], vocab_size: int) -> list[Sampled]:
    """Ten steps of some seats, with logits that have ties."""
    sampler = Sampler(vocab_size=vocab_size, max_seats=len(params), eos_token_ids=[2, 9], device=torch.device("cpu"))
    for seat, p in enumerate(params):
        sampler.open(seat, p, [4, 4, 7], 3)
    steps = []
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        logits = (torch.randn(len(params), vocab_size, generator=generator) * 6).round() / 2
        logits[:, 9] += 5.0
        if step == 6:
            logits[1, 5] = math.nan
        steps.append(sampler.sample(logits, range(len(params)), [3 + step] * len(params)))
    return steps


def test_a_batch_is_chosen_as_without_native_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    params = [
        SamplingParams(
            do_sample=rng.random() < 0.5,
            temperature=rng.choice([0.3, 1.0, 2.0]),
            top_k=rng.choice([0, 0, 20]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.01]),
            typical_p=rng.choice([1.0, 1.0, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.3]),
            presence_penalty=rng.choice([0.0, -0.4]),
            bias_token_ids=(11, 400, 2999, 3001),
            bias_values=(rng.uniform(-2, 6), 3.0, -math.inf, 9.0),
            watermark_gamma=0.25,
            watermark_delta=rng.choice([0.0, 0.0, 2.0]),
            seed=rng.getrandbits(64),
            top_n_tokens=rng.choice([0, 1, 5]),
            min_new_tokens=rng.choice([0, 4]),
            no_repeat_ngram_size=rng.choice([0, 1]),
            bad_words=rng.choice([(), ((11,), (4, 12))]),
        )
        for _ in range(24)
    ]
    natively = sampled_lives(params, 3000)
    monkeypatch.setattr("shard.sampler.native_threads", lambda logits: None)
    monkeypatch.setattr("shard.logits.native_threads", lambda logits: None)

    plain = sampled_lives(params, 3000)

    for step, other in zip(natively, plain, strict=True):
        fit = ~other.faults
        assert step.faults.tolist() == other.faults.tolist()
        assert step.token_ids[fit].tolist() == other.token_ids[fit].tolist()
        torch.testing.assert_close(step.logprobs[fit], other.logprobs[fit], atol=1e-5, rtol=0)
        for row in fit.nonzero().flatten().tolist():
            count = step.num_top[row]
            assert count == other.num_top[row]
            assert step.top_ids[row, :count].tolist() == other.top_ids[row, :count].tolist()
            torch.testing.assert_close(
                step.top_logprobs[row, :count], other.top_logprobs[row, :count], atol=1e-5, rtol=0
            )
    assert natively[6].faults.tolist() == [row == 1 for row in range(24)]

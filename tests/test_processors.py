"""The rules one by one: against transformers' classes of the same name, and the searches and draws under them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from shard.draw import draw, draw_from_vocabulary, uniform
from shard.logits import argmax, block_maxima, likeliest, log_probabilities
from shard.processors import (
    RepeatedNGrams,
    Truncation,
    completed_bad_words,
    green_list,
    penalise_counts,
    penalise_repetition,
    truncate,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NO_TOKENS = torch.zeros(1, 0, dtype=torch.int64)


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Rows from flat to peaked, each with a few tokens far above the rest."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * torch.linspace(0.3, 6.0, num_rows).unsqueeze(1)
    return logits + 8.0 * (torch.rand(num_rows, vocab_size, generator=generator) > 0.99)


def coarse_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Logits with many ties, as a bfloat16 model gives them; zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-8, 9, (num_rows, vocab_size), generator=generator) * 0.5
    return torch.where(torch.rand(num_rows, vocab_size, generator=generator) < 0.5, logits, logits * -1.0)


def truncation(
    num_rows: int,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = math.inf,
    min_p: float = 0.0,
    typical_p: float = math.inf,
) -> Truncation:
    def column(value: float) -> Tensor:
        return torch.full((num_rows, 1), value, dtype=torch.float64)

    return Truncation(
        temperature=column(temperature),
        top_k=torch.full((num_rows, 1), top_k or vocab_size, dtype=torch.int64),
        top_p=column(top_p),
        min_p=column(min_p),
        typical_p=column(typical_p),
        any_typical=typical_p < 1.0,
    )


def truncated_log_probabilities(logits: Tensor, rule: Truncation, width: int) -> Tensor:
    """What `truncate` leaves of the `width` likeliest tokens, as log-probabilities of the whole vocabulary."""
    candidates = likeliest(logits, block_maxima(logits), width)
    scaled = (logits.double() - logits.max(-1, keepdim=True).values) / rule.temperature
    weights = truncate(candidates, rule, scaled.exp().sum(-1, keepdim=True)).weights
    dense = torch.zeros(logits.shape, dtype=torch.float64).scatter_(1, candidates.ids, weights)
    return (dense / dense.sum(-1, keepdim=True)).log()


def assert_same_distribution(ours: Tensor, theirs: Tensor) -> None:
    expected = theirs.double().log_softmax(-1)
    assert torch.equal(ours.isfinite(), expected.isfinite())
    assert torch.where(ours.isfinite(), ours - expected, 0.0).abs().max() < 1e-5


WARPERS = [
    ("temperature", 0.7, TemperatureLogitsWarper(0.7)),
    ("temperature", 3.5, TemperatureLogitsWarper(3.5)),
    ("top_k", 1, TopKLogitsWarper(1)),
    ("top_k", 50, TopKLogitsWarper(50)),
    ("top_p", 0.1, TopPLogitsWarper(0.1)),
    ("top_p", 0.95, TopPLogitsWarper(0.95)),
    ("min_p", 0.05, MinPLogitsWarper(0.05)),
    ("min_p", 1.0, MinPLogitsWarper(1.0)),
    ("typical_p", 0.2, TypicalLogitsWarper(0.2)),
    ("typical_p", 0.95, TypicalLogitsWarper(0.95)),
]


@pytest.mark.parametrize(("name", "value", "theirs"), WARPERS)
@pytest.mark.parametrize("vocab_size", [1003, 4096])
def test_a_truncation_equals_the_warper_of_its_name(
    name: str, value: float, theirs: LogitsProcessor, vocab_size: int
) -> None:
    logits = random_logits(12, vocab_size)
    rule = truncation(12, vocab_size, **{name: value})  # type: ignore[arg-type]

    ours = truncated_log_probabilities(logits, rule, vocab_size)

    assert_same_distribution(ours, theirs(NO_TOKENS, logits))


def test_the_truncations_together_equal_the_warpers_in_their_order() -> None:
    logits = random_logits(12, 2000)
    warpers = [
        TemperatureLogitsWarper(1.6),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.02),
        TypicalLogitsWarper(0.8),
    ]
    expected = logits
    for warper in warpers:
        expected = warper(NO_TOKENS, expected)

    rule = truncation(12, 2000, temperature=1.6, top_k=40, top_p=0.9, min_p=0.02, typical_p=0.8)

    assert_same_distribution(truncated_log_probabilities(logits, rule, 2000), expected)


def test_ties_with_the_kth_token_are_kept() -> None:
    logits = coarse_logits(6, 1003)

    ours = truncated_log_probabilities(logits, truncation(6, 1003, top_k=20), 1003)

    assert_same_distribution(ours, TopKLogitsWarper(20)(NO_TOKENS, logits))


@pytest.mark.parametrize(
    "rule",
    [{"top_k": 30}, {"top_k": 30, "top_p": 0.6}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 30, "typical_p": 0.7}],
)
def test_enough_candidates_give_the_same_weights_as_the_whole_vocabulary(rule: dict[str, float]) -> None:
    logits = torch.cat([random_logits(8, 2000), coarse_logits(8, 2000)])
    limits = truncation(16, 2000, **rule)  # type: ignore[arg-type]
    mass = (logits.double() - logits.max(-1, keepdim=True).values).exp().sum(-1, keepdim=True)

    narrow = truncate(likeliest(logits, block_maxima(logits), 64), limits, mass)
    whole = truncate(likeliest(logits, block_maxima(logits), 2000), limits, mass)

    assert narrow.enough.any()
    assert not narrow.enough.all()
    assert torch.equal(narrow.weights[narrow.enough], whole.weights[narrow.enough, :64])
    assert not whole.weights[narrow.enough, 64:].any()


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_equals_transformers(penalty: float) -> None:
    logits = random_logits(5, 300)
    known = torch.randint(300, (5, 40), generator=torch.Generator().manual_seed(1))

    penalised = penalise_repetition(logits.gather(1, known), torch.full((5, 1), penalty))

    expected = RepetitionPenaltyLogitsProcessor(penalty)(known, logits)
    assert torch.equal(logits.scatter(1, known, penalised), expected)


def test_frequency_and_presence_follow_openais_formula() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    counts = torch.tensor([[0, 1, 4], [3, 0, 0]], dtype=torch.int32)

    penalised = penalise_counts(logits, counts, torch.tensor([[0.5], [-1.0]]), torch.tensor([[0.25], [0.0]]))

    assert penalised.tolist() == [[1.0, 2.0 - 0.5 - 0.25, 3.0 - 2.0 - 0.25], [1.0 + 3.0, 2.0, 3.0]]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_repeated_ngrams_equal_transformers_after_every_token(size: int) -> None:
    tokens = torch.randint(4, (60,), generator=torch.Generator().manual_seed(size)).tolist()
    theirs = NoRepeatNGramLogitsProcessor(size)
    ngrams = RepeatedNGrams(size)

    for end in range(1, len(tokens) + 1):
        ngrams.append(tokens[end - 1])
        scores = theirs(torch.tensor([tokens[:end]]), torch.zeros(1, 4))

        assert sorted(ngrams.forbidden()) == (scores[0] == -math.inf).nonzero().flatten().tolist(), "each once"


def test_bad_words_equal_transformers_after_every_token() -> None:
    tokens = torch.randint(5, (80,), generator=torch.Generator().manual_seed(3)).tolist()
    bad_words = [[4], [1, 2], [0, 0, 3], [3, 1, 1, 0], [2, 2]]
    theirs = NoBadWordsLogitsProcessor(bad_words)

    for end in range(1, len(tokens) + 1):
        scores = theirs(torch.tensor([tokens[:end]]), torch.zeros(1, 5))

        forbidden = completed_bad_words(tokens[:end], bad_words)
        assert set(forbidden) == set((scores[0] == -math.inf).nonzero().flatten().tolist())


@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.7])
def test_the_green_list_equals_transformers(gamma: float) -> None:
    theirs = WatermarkLogitsProcessor(vocab_size=1000, device="cpu", greenlist_ratio=gamma, bias=1.0)
    as_sent = torch.tensor(gamma, dtype=torch.float32).item()

    for last_token in (0, 1, 999):
        green = torch.zeros(1000).index_fill(0, green_list(last_token, as_sent, 1000), 1.0)

        assert torch.equal(green, theirs(torch.tensor([[5, last_token]]), torch.zeros(1, 1000))[0])


@pytest.mark.parametrize("vocab_size", [40, 64, 1003, 4096])
@pytest.mark.parametrize("make", [random_logits, coarse_logits])
def test_argmax_is_the_first_of_the_largest(vocab_size: int, make: object) -> None:
    assert callable(make)
    logits = make(9, vocab_size)

    assert torch.equal(argmax(logits, block_maxima(logits)), logits.argmax(-1))


@pytest.mark.parametrize("vocab_size", [200, 1003, 4096])
@pytest.mark.parametrize("width", [1, 7, 64, 130])
def test_the_likeliest_are_the_head_of_a_stable_sort(vocab_size: int, width: int) -> None:
    logits = torch.cat([random_logits(5, vocab_size), coarse_logits(5, vocab_size)])
    logits[4, 3:] = -math.inf

    candidates = likeliest(logits, block_maxima(logits), width)

    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(candidates.ids, ids[:, :width])
    assert torch.equal(candidates.values, values[:, :width])


def test_log_probabilities_are_those_of_a_float64_softmax() -> None:
    logits = random_logits(40, 5003) * 3
    ids = torch.randint(5003, (40, 3), generator=torch.Generator().manual_seed(0))

    expected = logits.double().log_softmax(-1).gather(1, ids)

    assert (log_probabilities(logits, ids) - expected).abs().max() < 1e-5


def test_uniform_is_splitmix64() -> None:
    # The first outputs of the reference implementation seeded with 0.
    outputs = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)

    for position, output in enumerate(outputs):
        assert uniform(0, position) == ((output >> 12) + 0.5) / 2**52


def test_uniform_uses_the_whole_seed() -> None:
    numbers = {uniform(seed, 0) for seed in (0, 1, 1 << 32, 1 << 63, (1 << 64) - 1)}

    assert len(numbers) == 5


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours(along: str) -> None:
    num = 20_000
    numbers = [uniform(7, i) if along == "positions" else uniform(i, 7) for i in range(num)]
    cells = [0] * 64

    for first, second in zip(numbers[::2], numbers[1::2], strict=True):
        cells[int(first * 8) * 8 + int(second * 8)] += 1

    assert all(0.0 < number < 1.0 for number in numbers)
    assert chi_squared(cells, [1 / 64] * 64) < 103.4  # 63 degrees of freedom, 0.1 %


def chi_squared(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    total = sum(counts)
    return sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, probabilities, strict=True))


def test_a_draw_finds_the_weight_that_holds_the_fraction() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]], dtype=torch.float64)

    drawn = [int(draw(weights, torch.tensor([u], dtype=torch.float64))) for u in (0.0, 0.24, 0.26, 1 - 2.0**-53)]

    assert drawn == [1, 1, 3, 3]


@pytest.mark.parametrize("vocab_size", [100, 256, 1003])
def test_a_draw_from_the_vocabulary_is_the_draw_from_one_long_sum(vocab_size: int) -> None:
    probabilities = random_logits(6, vocab_size).softmax(-1)
    probabilities[:, 2::3] = 0.0

    for u in torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64):
        drawn = draw_from_vocabulary(probabilities, u.expand(6))

        assert torch.equal(drawn, draw(probabilities.double(), u.expand(6)))


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    probabilities = torch.zeros(2, 600)
    probabilities[0, 270:275] = 0.2
    probabilities[1, [5, 599]] = 0.5

    first = draw_from_vocabulary(probabilities, torch.full((2,), 2.0**-53, dtype=torch.float64))
    last = draw_from_vocabulary(probabilities, torch.full((2,), 1 - 2.0**-53, dtype=torch.float64))

    assert first.tolist() == [270, 5]
    assert last.tolist() == [274, 599]

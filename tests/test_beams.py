"""Beam search as arithmetic: equal to transformers' on models whose sequences end often, and its rules one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import pytest
import torch
from transformers import PreTrainedModel

from router.core.beams import Beam, BeamSearch
from router.core.plan import TopTokens
from router.core.request import BeamSettings
from tests.tiny_models import VOCAB_SIZE, tiny_model

EarlyStopping = bool | Literal["never"]

PROMPTS = ([1, 5, 9], [1], [1, 44], [1, 77, 30, 12, 4])
NO_ENDS: list[int] = []
ONE_END = [2]
SOME_ENDS = list(range(2, VOCAB_SIZE, 14))
MANY_ENDS = list(range(2, VOCAB_SIZE, 9))
NUM_NEW = 12


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """With logits so flat that beams overtake each other."""
    torch.set_num_threads(1)
    model = tiny_model("llama", initializer_range=0.08)
    model.generation_config.eos_token_id = None
    return model


def steps(model: PreTrainedModel, prompt: list[int], search: BeamSearch) -> Iterator[list[TopTokens]]:
    """The likeliest next tokens of the running beams, until the search is done."""
    while not search.is_done:
        ids = torch.tensor([[*prompt, *beam.token_ids] for beam in search.running])
        with torch.inference_mode():
            top = model(ids).logits[:, -1].log_softmax(-1).topk(search.num_candidates)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        yield [tuple(zip(*row, strict=True)) for row in rows]


def assert_equal_searches(model: PreTrainedModel, prompt: list[int], settings: BeamSettings, ends: list[int]) -> None:
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NUM_NEW,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping,
        eos_token_id=ends or None,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    search = BeamSearch(settings, NUM_NEW, ends)
    num_steps = 0

    for tops in steps(model, prompt, search):
        search.advance(tops)
        num_steps += 1

    winner = search.winner
    assert list(winner.token_ids) == expected.sequences[0, len(prompt) :].tolist()
    assert num_steps == len(expected.scores)
    score = winner.total_logprob / len(winner.token_ids) ** settings.length_penalty
    assert score == pytest.approx(expected.sequences_scores.item(), rel=1e-4)
    assert winner.total_logprob == pytest.approx(math.fsum(winner.logprobs))
    sources = expected.beam_indices[0, : len(winner.sources)].tolist()
    assert list(winner.sources) == sources


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 1.0, 2.5])
@pytest.mark.parametrize("ends", [SOME_ENDS, MANY_ENDS], ids=["some ends", "many ends"])
def test_a_search_with_many_ends_is_transformers(
    model: PreTrainedModel, ends: list[int], length_penalty: float, early_stopping: EarlyStopping
) -> None:
    for num_beams in (2, 4):
        for prompt in PROMPTS:
            assert_equal_searches(model, prompt, BeamSettings(num_beams, length_penalty, early_stopping), ends)


@pytest.mark.parametrize("ends", [NO_ENDS, ONE_END], ids=["no end", "one end"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6])
def test_a_search_that_hardly_ends_is_transformers(
    model: PreTrainedModel, ends: list[int], length_penalty: float
) -> None:
    for prompt in PROMPTS:
        assert_equal_searches(model, prompt, BeamSettings(5, length_penalty), ends)


# By hand. Token 9 ends a beam.

END = 9


def top(*pairs: tuple[int, float]) -> TopTokens:
    return pairs


def tokens(beams: Sequence[Beam]) -> list[tuple[int, ...]]:
    return [beam.token_ids for beam in beams]


@pytest.mark.parametrize(("num_ends", "num_candidates"), [(0, 6), (1, 6), (2, 9), (5, 18)])
def test_ends_cannot_crowd_out_what_goes_on(num_ends: int, num_candidates: int) -> None:
    assert BeamSearch(BeamSettings(3), 4, range(num_ends)).num_candidates == num_candidates


def test_the_best_continuations_of_all_beams_go_on() -> None:
    search = BeamSearch(BeamSettings(2), 4, [END])

    search.advance([top((1, -0.1), (2, -1.0), (3, -9.0), (4, -9.5))])
    search.advance([top((5, -2.0), (6, -3.0), (7, -4.0), (8, -5.0)), top((5, -0.5), (6, -1.5), (7, -4.0), (8, -5.0))])

    assert search.running == [
        Beam((2, 5), (-1.0, -0.5), (0, 1), -1.5),
        Beam((1, 5), (-0.1, -2.0), (0, 0), -2.1),
    ]


def test_of_equal_continuations_the_better_beams_and_then_the_lower_id_goes_on() -> None:
    search = BeamSearch(BeamSettings(2), 4, [END])

    search.advance([top((7, -1.0), (4, -1.0), (3, -1.0), (8, -1.0))])
    assert tokens(search.running) == [(3,), (4,)]
    search.advance([top((6, -1.0), (2, -3.0)), top((1, -1.0), (2, -3.0))])

    assert tokens(search.running) == [(3, 6), (4, 1)]


def test_an_end_beyond_the_first_beams_is_no_candidate() -> None:
    """It is worse than what runs: transformers lets only the first `num_beams` continuations end a beam."""
    search = BeamSearch(BeamSettings(2, early_stopping=True), 2, [END])

    search.advance([top((1, -0.1), (2, -0.2), (END, -0.3), (3, -0.4))])
    search.advance([top((4, -9.0), (5, -9.0)), top((4, -9.0), (5, -9.0))])

    assert tokens([search.winner]) == [(1, 4)]


@pytest.mark.parametrize(
    ("length_penalty", "winner"), [(0.0, (END,)), (1.0, (1, 2)), (-1.0, (END,))], ids=["none", "long", "short"]
)
def test_the_penalty_decides_between_lengths(length_penalty: float, winner: tuple[int, ...]) -> None:
    """Log-probability -1.0 after one token, -1.5 after two: -0.75 a token."""
    search = BeamSearch(BeamSettings(2, length_penalty), 2, [END])

    search.advance([top((1, -0.9), (END, -1.0), (3, -7.0), (4, -8.0))])
    search.advance([top((2, -0.6), (5, -9.0)), top((2, -9.0), (5, -9.0))])

    assert search.is_done
    assert search.winner.token_ids == winner


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "is_done"),
    [(True, 1.0, True), (False, 1.0, True), ("never", 1.0, False), ("never", 0.0, True)],
)
def test_when_as_many_beams_as_wanted_have_ended(
    early_stopping: EarlyStopping, length_penalty: float, is_done: bool
) -> None:
    """Two have ended with -1 and -1.5. What runs has -4 after one token: -0.4 a token if it were ten tokens long."""
    search = BeamSearch(BeamSettings(2, length_penalty, early_stopping), 10, [8, END])

    search.advance([top((END, -1.0), (8, -1.5), (3, -4.0), (4, -5.0), (5, -6.0), (6, -7.0))])

    assert search.is_done == is_done


def test_with_early_stopping_a_better_beam_is_not_waited_for() -> None:
    """After two tokens two beams have ended with -2 and -2.2; one runs with -0.2."""

    def ended(early_stopping: bool) -> bool:
        search = BeamSearch(BeamSettings(2, 0.0, early_stopping), 10, [7, 8, END])
        search.advance([top((1, -0.1), (END, -2.0), *((i, -9.0) for i in (2, 3, 4, 5, 6, 10)))])
        search.advance([top((2, -0.1), (END, -2.1), (3, -9.0)), top((2, -9.0), (3, -9.0))])
        return search.is_done

    assert ended(True)
    assert not ended(False)


def test_the_last_token_ends_every_beam() -> None:
    search = BeamSearch(BeamSettings(2, early_stopping="never"), 1, [END])

    search.advance([top((1, -1.0), (2, -2.0), (3, -3.0), (4, -4.0))])

    assert search.is_done
    assert search.winner == Beam((1,), (-1.0,), (0,), -1.0)

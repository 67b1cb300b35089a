"""One rank's steps in this process, driven by the real scheduler through the real codec, on a tiny random model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from proto import shard_pb2 as pb
from router.core.plan import SampledToken, StepPlan
from router.core.request import Request, Sampling
from router.core.scheduler import Emission, Limits, Scheduler
from router.group.codec import decode_output, encode_plan
from shard.config import ShardConfig
from shard.distributed import RankGroup
from shard.grammar import GrammarCompiler
from shard.inputs import PlanError
from shard.model import load_model
from shard.sampler import Sampled, Sampler
from shard.worker import NOT_FINITE, StartedStep, Worker
from tests.tiny_models import VOCAB_SIZE, save_tiny

LIMITS = Limits(num_blocks=80, block_size=4, max_seats=4, max_step_tokens=64)
NUM_NEW = 40
FEW = ((5, 9.0), (9, 9.0), (17, 9.0))
"""Makes other tokens unlikely, so that text repeats itself."""
GREEDY = Sampling(logit_bias=FEW, top_n_tokens=2)
DRAWN = Sampling(do_sample=True, temperature=0.5, top_p=0.95, seed=3, logit_bias=FEW, top_n_tokens=2)
LOOKS_BACK = Sampling(repetition_penalty=1.3, frequency_penalty=0.2, no_repeat_ngram_size=3, min_new_tokens=9)
LOOPING = (5, 9, 17, 5, 9, 17, 5, 9)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A rank of a random llama."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("llama")
    save_tiny(directory, "llama")
    model = load_model(
        directory,
        dtype=torch.float32,
        device=torch.device("cpu"),
        group=RankGroup(),
        on_progress=lambda done, total: None,
        block_size=LIMITS.block_size,
        use_native=False,
    )
    unused = GrammarCompiler(directory / "tokenizer.json", vocab_size=VOCAB_SIZE, eos_token_ids=())
    return Worker(ShardConfig(kv_cache_bytes=1 << 20), model, RankGroup(), "", unused)


@pytest.fixture
def worker(loaded: Worker) -> Worker:
    begin_epoch(loaded)
    return loaded


def begin_epoch(worker: Worker) -> None:
    worker.configure(
        pb.ConfigureRequest(
            epoch=worker.describe().last_epoch + 1,
            num_blocks=LIMITS.num_blocks,
            block_size=LIMITS.block_size,
            max_seats=LIMITS.max_seats,
            max_step_tokens=LIMITS.max_step_tokens,
        )
    )


class Run:
    """Sequences from their first to their last step."""

    def __init__(
        self,
        worker: Worker,
        requests: Sequence[Request],
        *,
        max_drafts: int = 0,
        depth: int = 2,
        max_repeats: int = 0,
        prefix_caching: bool = False,
    ) -> None:
        self.max_repeats = max_repeats
        self.num_repeats = 0
        self.scheduler = Scheduler(LIMITS, prefix_caching=prefix_caching, max_drafts=max_drafts)
        sequences = [self.scheduler.add(request) for request in requests]
        emissions = [emission for step in self._steps(worker, depth) for emission in step]
        self.tokens = [[t for e in emissions if e.sequence is sequence for t in e.tokens] for sequence in sequences]
        self.faults = [next((e.fault for e in emissions if e.sequence is s and e.fault), None) for s in sequences]

    def _steps(self, worker: Worker, depth: int) -> Iterator[list[Emission]]:
        answers: deque[tuple[StepPlan, int, pb.StepOutput]] = deque()
        while True:
            while len(answers) < depth and (plan := self.scheduler.plan(max_repeats=self.max_repeats)):
                self.num_repeats += plan.num_repeats
                answers += [(plan, repeat, output) for repeat, output in enumerate(outputs(worker, plan))]
            if not answers:
                return
            plan, repeat, answer = answers.popleft()
            yield self.scheduler.commit(decode_output(answer, plan, VOCAB_SIZE, repeat=repeat))


def outputs(worker: Worker, plan: StepPlan) -> Iterator[pb.StepOutput]:
    step = worker.prepare(encode_plan(plan), time.perf_counter())
    yield worker.run(step).output
    for _ in range(plan.num_repeats):
        step = worker.prepare_repeat(step)
        yield worker.run(step).output


class RunAhead(Run):
    """The same, but every step is started as soon as it can be planned, and finished when its answer is needed."""

    def _steps(self, worker: Worker, depth: int) -> Iterator[list[Emission]]:
        started: deque[tuple[StepPlan, int, StartedStep]] = deque()
        while True:
            while len(started) < depth and (plan := self.scheduler.plan(max_repeats=self.max_repeats)):
                self.num_repeats += plan.num_repeats
                started += [(plan, repeat, step) for repeat, step in enumerate(starts(worker, plan))]
            if not started:
                return
            plan, repeat, step = started.popleft()
            output = worker.finish(step).output
            yield self.scheduler.commit(decode_output(output, plan, VOCAB_SIZE, repeat=repeat))


def starts(worker: Worker, plan: StepPlan) -> Iterator[StartedStep]:
    step = worker.prepare(encode_plan(plan), time.perf_counter())
    yield worker.start(step)
    for _ in range(plan.num_repeats):
        step = worker.prepare_repeat(step)
        yield worker.start(step)


def requests_of(sampling: Sampling) -> list[Request]:
    return [Request("r", prompt, NUM_NEW, sampling) for prompt in (LOOPING, (3, 4, 8), (30, 31, 32, 33))]


def assert_same(runs: list[list[SampledToken]], wanted: list[list[SampledToken]]) -> None:
    for tokens, others in zip(runs, wanted, strict=True):
        assert [token.token_id for token in tokens] == [token.token_id for token in others]
        assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in others], abs=1e-4)
        for token, other in zip(tokens, others, strict=True):
            assert [id_ for id_, _ in token.top_tokens] == [id_ for id_, _ in other.top_tokens]


# Repeats


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, LOOKS_BACK], ids=["greedy", "drawn", "looks back"])
def test_tokens_logprobs_and_likeliest_tokens_are_the_same_with_repeats(worker: Worker, sampling: Sampling) -> None:
    plain = Run(worker, requests_of(sampling))
    begin_epoch(worker)

    repeating = Run(worker, requests_of(sampling), max_repeats=3)

    assert repeating.num_repeats >= 27
    assert_same(repeating.tokens, plain.tokens)


def test_a_row_that_fails_amid_repeats_fails_alone(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Run(worker, requests_of(GREEDY))
    begin_epoch(worker)
    not_finite_at(len(LOOPING) + 19, monkeypatch)

    spoilt = Run(worker, requests_of(GREEDY), max_repeats=3)

    assert spoilt.faults == [NOT_FINITE, None, None]
    assert_same([spoilt.tokens[0]], [plain.tokens[0][:19]])
    assert_same(spoilt.tokens[1:], plain.tokens[1:])


def test_the_step_after_repeats_is_numbered_on(worker: Worker) -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(requests_of(GREEDY)[0])
    plans = [scheduler.plan(), scheduler.plan(max_repeats=2)]

    steps = [output.step for plan in plans if plan for output in outputs(worker, plan)]

    assert steps == [1, 2, 3, 4]
    with pytest.raises(PlanError, match="step 4 came instead of 5"):
        worker.prepare(pb.StepPlan(step=4), time.perf_counter())


def test_a_step_without_rows_is_not_repeated(worker: Worker) -> None:
    """What is there to go on with is an older plan's."""
    scheduler = Scheduler(LIMITS)
    scheduler.add(requests_of(GREEDY)[0])
    steps = [
        output.step
        for plan in (scheduler.plan(), scheduler.plan(max_repeats=1))
        if plan
        for output in outputs(worker, plan)
    ]
    assert steps == [1, 2, 3]

    with pytest.raises(PlanError, match="has no rows"):
        worker.prepare_repeat(worker.prepare(pb.StepPlan(step=4, num_repeats=1), time.perf_counter()))


# Steps that are started ahead


@pytest.mark.parametrize(("depth", "max_repeats"), [(2, 0), (3, 0), (2, 3)])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, LOOKS_BACK], ids=["greedy", "drawn", "looks back"])
def test_tokens_are_the_same_where_steps_are_finished_after_later_ones_have_started(
    worker: Worker, sampling: Sampling, depth: int, max_repeats: int
) -> None:
    plain = Run(worker, requests_of(sampling))
    begin_epoch(worker)

    ahead = RunAhead(worker, requests_of(sampling), depth=depth, max_repeats=max_repeats)

    assert_same(ahead.tokens, plain.tokens)


def test_a_row_that_fails_in_a_step_that_is_finished_late_has_its_own_name(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if its seat is another's by then."""
    monkeypatch.setattr(Sampler, "sample", with_a_fault(Sampler.sample))
    emitting = {"row_num_tokens": [1], "row_num_literals": [1], "literals": [5], "row_emit": [True]}
    neutral = pb.Sampling(temperature=1.0, repetition_penalty=1.0)

    def plan(step: int, name: str) -> pb.StepPlan:
        opened = pb.Open(seat=0, num_prompt_tokens=1, sampling=neutral, request_id=name)
        closes = [0] * (step > 1)
        return pb.StepPlan(
            step=step,
            closes=closes,
            opens=[opened],
            row_seat=[0],
            row_num_new_blocks=[1],
            new_blocks=[1],
            row_num_targets=[0],
            **emitting,  # type: ignore[arg-type]
        )

    first = worker.start(worker.prepare(plan(1, "one"), 0.0))
    second = worker.start(worker.prepare(plan(2, "two"), 0.0))
    for step in (first, second):
        worker.finish(step)

    assert [record.message.split(":")[1] for record in caplog.records] == [" request one", " request two"]


# Drafts


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_tokens_logprobs_and_likeliest_tokens_are_the_same_with_drafts(worker: Worker, sampling: Sampling) -> None:
    plain = Run(worker, requests_of(sampling))
    begin_epoch(worker)

    guessing = Run(worker, requests_of(sampling), max_drafts=4)

    counters = guessing.scheduler.counters
    assert sum(counters.num_rows_by_accepted[1:]) > 5
    assert counters.num_rows_by_accepted[0] > 0
    assert counters.num_steps < plain.scheduler.counters.num_steps
    assert_same(guessing.tokens, plain.tokens)


def with_a_fault(sample: Callable[..., Sampled]) -> Callable[..., Sampled]:
    def spoilt(*given: object) -> Sampled:
        sampled = sample(*given)
        sampled.faults |= True
        return sampled

    return spoilt


def not_finite_at(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the sampler find logits that are no numbers for the looping sequence's token there."""
    sample = Sampler.sample

    def spoilt(self: Sampler, logits: Tensor, seats: Sequence[int], positions: Sequence[int]) -> Sampled:
        sampled = sample(self, logits, seats, positions)
        sampled.faults |= torch.tensor([(s, p) == (0, position) for s, p in zip(seats, positions, strict=True)])
        return sampled

    monkeypatch.setattr(Sampler, "sample", spoilt)


def test_a_row_with_drafts_fails_as_a_whole_and_alone(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Run(worker, requests_of(GREEDY))
    begin_epoch(worker)
    not_finite_at(len(LOOPING) + 30, monkeypatch)

    spoilt = Run(worker, requests_of(GREEDY), max_drafts=4)

    assert spoilt.faults == [NOT_FINITE, None, None]
    assert 20 < len(spoilt.tokens[0]) <= 30
    assert_same(spoilt.tokens[1:], plain.tokens[1:])


@pytest.mark.parametrize("changes", [{"row_num_drafts": [2]}, {"row_emit": [False]}])
def test_drafts_behind_nothing_are_refused(worker: Worker, changes: dict[str, list[int]]) -> None:
    columns = {
        "row_seat": [0],
        "row_num_tokens": [2],
        "row_num_literals": [2],
        "row_num_new_blocks": [1],
        "row_emit": [True],
        "row_num_targets": [0],
        "row_num_drafts": [1],
    }
    plan = pb.StepPlan(
        step=1,
        opens=[pb.Open(seat=0, num_prompt_tokens=2, sampling=pb.Sampling(temperature=1.0, repetition_penalty=1.0))],
        literals=[5, 9],
        new_blocks=[1],
        **(columns | changes),
    )

    with pytest.raises(PlanError, match="drafts"):
        worker.prepare(plan, time.perf_counter())


# Forced tokens


def foretell(tokens: list[int], every: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the sampler say ahead of time what the looping sequence's next tokens will be, every so many tokens."""
    sample = Sampler.sample

    def foretelling(self: Sampler, logits: Tensor, seats: Sequence[int], positions: Sequence[int]) -> Sampled:
        sampled = sample(self, logits, seats, positions)
        places = [position - len(LOOPING) if seat == 0 else -1 for seat, position in zip(seats, positions, strict=True)]
        sampled.forced = [
            tokens[place + 1 : place + 1 + length] if place >= 0 and place % every == 0 else [] for place in places
        ]
        return sampled

    monkeypatch.setattr(Sampler, "sample", foretelling)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_forced_tokens_have_the_logprobs_of_those_that_are_chosen_one_by_one(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, sampling: Sampling, depth: int
) -> None:
    plain = Run(worker, requests_of(sampling))
    begin_epoch(worker)
    foretell([token.token_id for token in plain.tokens[0]], 7, 6, monkeypatch)

    forced = Run(worker, requests_of(sampling), depth=depth)

    assert forced.scheduler.counters.num_forced_tokens > 20
    assert_same(forced.tokens, plain.tokens)

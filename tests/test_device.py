"""Steps on a device that works by itself: nothing of the host's meets what is the device's, and the host does not wait.

There is no GPU where tests run: a device without numbers stands for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import count
from queue import SimpleQueue

import pytest
import torch

from proto import shard_pb2 as pb
from router.core.plan import StepPlan
from router.core.request import Request, Sampling
from router.core.scheduler import Emission, Limits, Scheduler
from router.group.codec import decode_output, encode_plan
from shard import transfer
from shard.attention import PagedAttention, VarlenAttention
from shard.config import ShardConfig
from shard.distributed import RankGroup
from shard.grammar import GrammarCompiler
from shard.model import Attention, Model, load_model
from shard.server import Plans, start_plans
from shard.transfer import Mark
from shard.worker import StartedStep, Worker
from tests.meta_device import META, Driver, HostWaits, NoWaiting
from tests.tiny_models import save_tiny

LIMITS = Limits(num_blocks=60, block_size=256, max_seats=4, max_step_tokens=48)
VOCAB_SIZE = 1040  # so many that truncation looks at the likeliest first
NUM_NEW = 12
GREEDY = Sampling()
DRAWN = Sampling(do_sample=True, temperature=0.7, seed=3)
PENALISED = Sampling(repetition_penalty=1.3, frequency_penalty=0.2, logit_bias=((5, 9.0), (9, 9.0)), min_new_tokens=9)
ONCE = Sampling(no_repeat_ngram_size=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random llama whose weights are on the device."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("llama")
    save_tiny(directory, "llama", vocab_size=VOCAB_SIZE)
    model = load_model(
        directory,
        dtype=torch.float32,
        device=torch.device("cpu"),
        group=RankGroup(),
        on_progress=lambda done, total: None,
        use_native=False,
    )
    for module in (model._backbone, model._head):
        module.to(META)
    model.device = META
    return model


@pytest.fixture
def driver(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setattr(transfer, "ASYNCHRONOUS", ("cuda", "meta"))
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "Event", driver.event)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with NoWaiting(), driver:
        yield driver


def make_worker(model: Model, attention: Attention = VarlenAttention) -> Worker:
    model.attend_by(attention, LIMITS.block_size)
    unused = GrammarCompiler("tokenizer.json", vocab_size=VOCAB_SIZE, eos_token_ids=(2,))
    worker = Worker(ShardConfig(kv_cache_bytes=1 << 20), model, RankGroup(), "", unused)
    worker.configure(
        pb.ConfigureRequest(
            epoch=1,
            num_blocks=LIMITS.num_blocks,
            block_size=LIMITS.block_size,
            max_seats=LIMITS.max_seats,
            max_step_tokens=LIMITS.max_step_tokens,
        )
    )
    return worker


class Run:
    """Sequences whose steps are started as soon as they can be planned, and finished when there is nothing to start."""

    def __init__(self, worker: Worker, requests: list[Request], max_repeats: int = 0, max_drafts: int = 0) -> None:
        self.scheduler = Scheduler(LIMITS, prefix_caching=False, max_drafts=max_drafts)
        self.worker = worker
        self.most_started = 0
        self.outputs: list[pb.StepOutput] = []
        sequences = [self.scheduler.add(request) for request in requests]
        emissions = [emission for step in self._steps(max_repeats) for emission in step]
        self.tokens = [[t.token_id for e in emissions if e.sequence is own for t in e.tokens] for own in sequences]

    def _steps(self, max_repeats: int) -> Iterator[list[Emission]]:
        started: deque[tuple[StepPlan, int, StartedStep]] = deque()
        while True:
            while len(started) < 3 and (plan := self.scheduler.plan(max_repeats=max_repeats)):
                started += [(plan, repeat, step) for repeat, step in enumerate(starts(self.worker, plan))]
            if not started:
                return
            self.most_started = max(self.most_started, len(started))
            plan, repeat, step = started.popleft()
            self.outputs.append(self.worker.finish(step).output)
            yield self.scheduler.commit(decode_output(self.outputs[-1], plan, VOCAB_SIZE, repeat=repeat))


def starts(worker: Worker, plan: StepPlan) -> Iterator[StartedStep]:
    step = worker.prepare(encode_plan(plan), 0.0)
    yield worker.start(step)
    for _ in range(plan.num_repeats):
        step = worker.prepare_repeat(step)
        yield worker.start(step)


def requests_of(*ways: Sampling) -> list[Request]:
    """Prompts of several chunks, of one, and of a single token."""
    prompts = (tuple(range(3, 100)), tuple(range(9, 30)), (5,))
    return [Request("r", prompts[row % 3], NUM_NEW, sampling) for row, sampling in enumerate(ways)]


@pytest.mark.parametrize("max_repeats", [0, 3])
@pytest.mark.parametrize("attention", [PagedAttention, VarlenAttention])
@pytest.mark.parametrize(
    "ways",
    [(GREEDY,) * 3, (DRAWN,) * 3, (PENALISED,) * 3, (ONCE,) * 3, (GREEDY, DRAWN, PENALISED)],
    ids=["greedy", "drawn", "penalised", "once", "mixed"],
)
def test_the_host_waits_for_nothing_but_the_end_of_a_step(
    model: Model, driver: Driver, attention: Attention, ways: tuple[Sampling, ...], max_repeats: int
) -> None:
    worker = make_worker(model, attention)

    run = Run(worker, requests_of(*ways), max_repeats)

    assert run.tokens == [[0] * NUM_NEW] * 3
    assert driver.num_waits == len(run.outputs)
    assert run.most_started >= 3


def test_known_tokens_are_scored_without_waiting(model: Model, driver: Driver) -> None:
    worker = make_worker(model)
    request = Request("r", tuple(range(3, 100)), NUM_NEW, GREEDY, prompt_logprobs=True)

    run = Run(worker, [request])

    assert [len(output.target_logprobs) for output in run.outputs[:4]] == [48, 48, 0, 0]


def test_a_decode_step_has_two_copies_in_and_one_out_of_each_kind_of_answer(model: Model, driver: Driver) -> None:
    """In: its inputs, and its rows' lengths for attention."""
    worker = make_worker(model)
    scheduler = Scheduler(LIMITS)
    scheduler.add(Request("r", (5, 6, 7), NUM_NEW, GREEDY))
    first, second = scheduler.plan(), scheduler.plan()
    assert first
    assert second
    list(starts(worker, first))
    before = driver.num_copies_in, driver.num_copies_out

    list(starts(worker, second))

    assert (driver.num_copies_in - before[0], driver.num_copies_out - before[1]) == (2, 5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(do_sample=True, top_p=0.9, seed=1),
        Sampling(top_n_tokens=3),
        Sampling(no_repeat_ngram_size=2),
        Sampling(watermark_gamma=0.5, watermark_delta=2.0),
    ],
    ids=["truncation", "top tokens", "n-grams", "watermark"],
)
def test_some_rules_make_the_host_wait(model: Model, driver: Driver, sampling: Sampling) -> None:
    worker = make_worker(model)

    with pytest.raises(HostWaits):
        Run(worker, [Request("r", (5, 6, 5), NUM_NEW, sampling)])


def test_drafts_make_the_host_wait(model: Model, driver: Driver) -> None:
    worker = make_worker(model)

    with pytest.raises(HostWaits):
        Run(worker, [Request("r", (5, 6, 7, 5, 6, 7, 5, 6), NUM_NEW, GREEDY)], max_drafts=4)


def test_steps_are_answered_on_a_thread_of_their_own_in_order(model: Model, driver: Driver) -> None:
    worker = make_worker(model)
    scheduler = Scheduler(LIMITS)
    scheduler.add(Request("r", tuple(range(3, 100)), 60, GREEDY))
    plans: Plans = SimpleQueue()
    for number in count(1):
        if number > 20 or (plan := scheduler.plan()) is None:
            break
        plans.put((encode_plan(plan), 0.0))
    plans.put(None)
    answers: list[pb.FromShard | None] = []

    start_plans(worker, plans, answers.append)

    assert [answer.output.step if answer else None for answer in answers] == [*range(1, len(answers)), None]
    assert len(answers) > 3


def test_times_are_the_devices(model: Model, driver: Driver) -> None:
    begun = Mark(META)
    transfer.to_host(torch.zeros(3, device=META))
    transfer.to_host(torch.zeros(3, device=META))
    ended = Mark(META)

    ended.wait()

    assert ended.seconds_since(begun) == pytest.approx(0.002)


def test_who_waits_is_on_the_device_it_waits_for(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)

    Mark(META).wait()

    assert current == [META]

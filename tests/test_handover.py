"""Between the event loop and the model thread: answers in order, at the right moment, and none lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

import pytest

from proto import shard_pb2 as pb
from shard.server import Plans, ShardServicer, Waiting, run_plans, start_plans
from tests.clock import Clock
from tests.server import PATIENCE_S


class Steps:
    """Stands for a worker: writes down what is asked of it, and fails where it is told to."""

    owners: Sequence[str] = ()
    starts_ahead = False

    def __init__(self, *, fails_at: str = "", then: tuple[str, int] | None = None) -> None:
        self.events: list[str] = []
        self.plans: Plans = SimpleQueue()
        self.fails_at = fails_at
        self.then = then
        """A step during which the next plan, of that number, arrives."""

    def _note(self, event: str) -> None:
        self.events.append(event)
        if event == self.fails_at:
            raise RuntimeError("out of memory")

    def prepare(self, plan: pb.StepPlan, arrived_at: float) -> int:
        self._note(f"prepare {plan.step}")
        return plan.step

    def prepare_repeat(self, last: int) -> int:
        self._note(f"repeat {last + 1}")
        return last + 1

    def run(self, step: int) -> pb.FromShard:
        self._note(f"run {step}")
        if self.then == (f"run {step}", step + 1):
            self.plans.put((pb.StepPlan(step=step + 1), 0.0))
        return pb.FromShard(output=pb.StepOutput(step=step))

    def take(self, answer: pb.FromShard | None) -> None:
        self.events.append(f"answer {answer.output.step}" if answer else "end")
        if answer and answer.output.step == 2:
            self.plans.put(None)


def with_plans(steps: Steps, *numbers: int) -> Steps:
    for number in numbers:
        steps.plans.put((pb.StepPlan(step=number), 0.0))
    return steps


@pytest.mark.parametrize("plan", [pb.StepPlan(step=2, opens=[pb.Open(seat=1)]), pb.StepPlan(step=2, closes=[1])])
def test_an_answer_does_not_wait_for_sequences_that_come_or_go(plan: pb.StepPlan) -> None:
    steps = with_plans(Steps(), 1)
    steps.plans.put((plan, 0.0))

    run_plans(steps, steps.plans, steps.take)  # type: ignore[arg-type]

    assert steps.events == ["prepare 1", "run 1", "answer 1", "prepare 2", "run 2", "answer 2", "end"]


def test_an_answer_is_handed_over_when_the_next_step_is_about_to_run() -> None:
    steps = with_plans(Steps(), 1, 2)

    run_plans(steps, steps.plans, steps.take)  # type: ignore[arg-type]

    assert steps.events == ["prepare 1", "run 1", "prepare 2", "answer 1", "run 2", "answer 2", "end"]


def test_an_answer_is_handed_over_at_once_when_no_plan_waits() -> None:
    steps = with_plans(Steps(then=("run 1", 2)), 1)
    late = with_plans(Steps(), 1)
    take = late.take

    def answer_then_plan(answer: pb.FromShard | None) -> None:
        take(answer)
        if answer and answer.output.step == 1:
            late.plans.put((pb.StepPlan(step=2), 0.0))

    run_plans(steps, steps.plans, steps.take)  # type: ignore[arg-type]
    run_plans(late, late.plans, answer_then_plan)  # type: ignore[arg-type]

    assert steps.events == ["prepare 1", "run 1", "prepare 2", "answer 1", "run 2", "answer 2", "end"]
    assert late.events == ["prepare 1", "run 1", "answer 1", "prepare 2", "run 2", "answer 2", "end"]


def test_the_steps_of_a_plan_are_answered_one_by_one() -> None:
    steps = Steps()
    steps.plans.put((pb.StepPlan(step=0, num_repeats=2), 0.0))

    run_plans(steps, steps.plans, steps.take)  # type: ignore[arg-type]

    first = ["prepare 0", "run 0", "repeat 1", "answer 0", "run 1", "repeat 2", "answer 1", "run 2"]
    assert steps.events == [*first, "answer 2", "end"]


@pytest.mark.parametrize("fails_at", ["repeat 1", "run 1"])
def test_an_answer_that_waits_is_not_lost_with_the_repeat_of_its_step(fails_at: str) -> None:
    steps = Steps(fails_at=fails_at)
    steps.plans.put((pb.StepPlan(step=0, num_repeats=2), 0.0))

    with pytest.raises(RuntimeError, match="out of memory"):
        run_plans(steps, steps.plans, steps.take)  # type: ignore[arg-type]

    assert [event for event in steps.events if event.startswith("answer")] == ["answer 0"]
    assert steps.events[-1] == "end"


@pytest.mark.parametrize("fails_at", ["prepare 2", "run 2"])
def test_an_answer_that_waits_is_not_lost_with_the_next_step(fails_at: str) -> None:
    steps = with_plans(Steps(fails_at=fails_at), 1, 2, 3)

    with pytest.raises(RuntimeError, match="out of memory"):
        run_plans(steps, steps.plans, steps.take)  # type: ignore[arg-type]

    assert steps.events[-2:] == (["answer 1", "end"] if fails_at == "prepare 2" else ["run 2", "end"])
    assert steps.events.count("answer 1") == 1


# Steps that are started ahead


class StepsAhead(Steps):
    """Stands for a worker whose device does a step when it is let."""

    starts_ahead = True

    def __init__(self, *, fails_at: str = "", steps_done: int = 0) -> None:
        super().__init__(fails_at=fails_at)
        self.done = threading.Semaphore(steps_done)
        self.num_started = threading.Semaphore(0)

    def start(self, step: int) -> int:
        self._note(f"start {step}")
        self.num_started.release()
        return step

    def finish(self, step: int) -> pb.FromShard:
        assert self.done.acquire(timeout=PATIENCE_S)
        self._note(f"finish {step}")
        return pb.FromShard(output=pb.StepOutput(step=step))

    def take(self, answer: pb.FromShard | None) -> None:
        self.events.append(f"answer {answer.output.step}" if answer else "end")

    def wait_for_starts(self, count: int) -> None:
        for _ in range(count):
            assert self.num_started.acquire(timeout=PATIENCE_S)


def answers(steps: Steps) -> list[str]:
    return [event for event in steps.events if event.split()[0] in ("answer", "end")]


def test_steps_are_started_while_those_before_them_run() -> None:
    steps = with_plans(StepsAhead(), 1, 2)
    steps.plans.put((pb.StepPlan(step=3, num_repeats=2), 0.0))

    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(start_plans, steps, steps.plans, steps.take)  # type: ignore[arg-type]
        steps.wait_for_starts(5)
        before = list(steps.events)
        steps.done.release(5)
        steps.plans.put(None)
        run.result(PATIENCE_S)

    first = ["prepare 1", "start 1", "prepare 2", "start 2", "prepare 3", "start 3"]
    assert before == [*first, "repeat 4", "start 4", "repeat 5", "start 5"]
    assert answers(steps) == [*(f"answer {step}" for step in range(1, 6)), "end"]


def test_an_answer_does_not_wait_for_the_next_plan() -> None:
    steps = with_plans(StepsAhead(steps_done=2), 1)
    answered = threading.Semaphore(0)

    def take(answer: pb.FromShard | None) -> None:
        steps.take(answer)
        answered.release()

    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(start_plans, steps, steps.plans, take)  # type: ignore[arg-type]
        assert answered.acquire(timeout=PATIENCE_S)
        steps.plans.put((pb.StepPlan(step=2), 0.0))
        assert answered.acquire(timeout=PATIENCE_S)
        steps.plans.put(None)
        run.result(PATIENCE_S)

    assert answers(steps) == ["answer 1", "answer 2", "end"]


@pytest.mark.parametrize("fails_at", ["prepare 3", "start 3", "repeat 3"])
def test_steps_that_were_started_are_answered_before_the_failure_of_a_later_one_is_told(fails_at: str) -> None:
    steps = with_plans(StepsAhead(fails_at=fails_at, steps_done=2), 1)
    repeats = int(fails_at.startswith("repeat"))
    steps.plans.put((pb.StepPlan(step=2, num_repeats=repeats), 0.0))
    with_plans(steps, 3, 4)

    with pytest.raises(RuntimeError, match="out of memory"):
        start_plans(steps, steps.plans, steps.take)  # type: ignore[arg-type]

    assert answers(steps) == ["answer 1", "answer 2", "end"]
    assert "prepare 4" not in steps.events


def test_a_failure_of_the_device_ends_the_steps_though_no_plan_comes() -> None:
    steps = with_plans(StepsAhead(fails_at="finish 2", steps_done=3), 1, 2, 3)

    with pytest.raises(RuntimeError, match="out of memory"):
        start_plans(steps, steps.plans, steps.take)  # type: ignore[arg-type]

    assert answers(steps) == ["answer 1", "end"]


# Through the servicer


class Stream:
    """A router that sends some plans, then says Bye or leaves its stream open."""

    def __init__(self, num_plans: int, *, says_bye: bool, num_repeats: int = 0) -> None:
        self._incoming = [pb.ToShard(hello=pb.Hello(epoch=1))]
        firsts = range(1, 1 + num_plans * (1 + num_repeats), 1 + num_repeats)
        self._incoming += [pb.ToShard(plan=pb.StepPlan(step=step, num_repeats=num_repeats)) for step in firsts]
        if says_bye:
            self._incoming.append(pb.ToShard(bye=pb.Bye()))
        self.answers: list[pb.FromShard] = []

    async def read(self) -> pb.ToShard:
        if not self._incoming:
            await asyncio.Event().wait()
        return self._incoming.pop(0)

    async def write(self, answer: pb.FromShard) -> None:
        self.answers.append(answer)


STEP_TIMEOUT_S = 60.0


def served(worker: object, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Serves an epoch on that stream. Returns whether the process would have ended."""
    ended: list[int] = []
    monkeypatch.setattr("shard.server.os._exit", ended.append)
    monkeypatch.setattr("shard.server.LAST_WORDS_S", 0.0)

    async def serve() -> None:
        servicer = ShardServicer(thread, STEP_TIMEOUT_S)
        servicer.serve(worker)  # type: ignore[arg-type]
        servicer._epoch = 1
        await asyncio.wait_for(servicer.Execute(None, stream), PATIENCE_S)
        await asyncio.sleep(0.01)

    with ThreadPoolExecutor(1) as thread:
        asyncio.run(serve())
    return bool(ended)


@pytest.mark.parametrize("make", [Steps, partial(StepsAhead, steps_done=20)], ids=["one by one", "ahead"])
def test_all_plans_before_a_goodbye_are_answered(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Steps]) -> None:
    stream = Stream(20, says_bye=True)
    repeating = Stream(5, says_bye=True, num_repeats=3)

    has_ended = served(make(), stream, monkeypatch) or served(make(), repeating, monkeypatch)

    assert not has_ended
    for served_stream in (stream, repeating):
        assert [answer.output.step for answer in served_stream.answers[1:]] == [*range(1, 21)]


@pytest.mark.parametrize(
    "steps",
    [
        Steps(fails_at="prepare 11"),
        StepsAhead(fails_at="prepare 11", steps_done=20),
        StepsAhead(fails_at="finish 11", steps_done=20),
    ],
    ids=["one by one", "ahead", "on the device"],
)
def test_a_fault_comes_after_the_answers_before_it(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
    stream = Stream(20, says_bye=False)

    has_ended = served(steps, stream, monkeypatch)

    assert has_ended
    assert [answer.output.step for answer in stream.answers[1:-1]] == [*range(1, 11)]
    assert stream.answers[-1].fault.message == "RuntimeError: out of memory"


@pytest.mark.parametrize(("num_plans", "num_repeats"), [(5, 0), (1, 4)])
def test_a_step_that_hangs_ends_the_epoch(monkeypatch: pytest.MonkeyPatch, num_plans: int, num_repeats: int) -> None:
    class Hanging(Steps):
        released = threading.Event()

        def run(self, step: int) -> pb.FromShard:
            if step == 2:
                self.released.wait(PATIENCE_S)
            return super().run(step)

    class Watched(Stream):
        async def write(self, answer: pb.FromShard) -> None:
            await super().write(answer)
            if answer.output.step == 1:
                clock.leap(STEP_TIMEOUT_S)
            if answer.HasField("fault"):
                Hanging.released.set()

    clock, stream = Clock(), Watched(num_plans, says_bye=False, num_repeats=num_repeats)
    monkeypatch.setattr("shard.server.time", clock)

    has_ended = served(Hanging(), stream, monkeypatch)

    assert has_ended
    assert [answer.output.step for answer in stream.answers[1:-1]] == [1]
    assert stream.answers[-1].fault.message == "TimeoutError: a step has not ended within 60 s"


def test_a_steps_time_begins_when_the_step_before_it_is_answered() -> None:
    waiting = Waiting()
    waiting.plan_came(1, at=1.0)
    waiting.plan_came(3, at=2.0)
    begun_at = waiting.since

    before = time.perf_counter()
    waiting.answer_came()

    assert begun_at == 1.0
    assert (waiting.num_steps, waiting.since >= before) == (3, True)


def test_an_idle_epoch_does_not_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(Stream):
        async def read(self) -> pb.ToShard:
            if len(self._incoming) == 2:
                while len(self.answers) < 2:  # noqa: ASYNC110  what is waited for has no event
                    await asyncio.sleep(0.001)
                clock.leap(STEP_TIMEOUT_S)
                for _ in range(10):  # for whoever looks at the clock
                    await asyncio.sleep(0)
            return await super().read()

    clock, stream = Clock(), Idle(2, says_bye=True)
    monkeypatch.setattr("shard.server.time", clock)

    assert not served(Steps(), stream, monkeypatch)
    assert [answer.output.step for answer in stream.answers[1:]] == [1, 2]

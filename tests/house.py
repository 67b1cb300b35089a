"""A scheduler and a ghost under one roof, with the real codec between them.

`House` is the smallest engine: it keeps up to `depth` steps outstanding, runs each on a ghost at once and commits the
answer later, which is what a pipeline looks like to the scheduler. It knows every sequence's right tokens and compares
each emission with them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from proto import shard_pb2 as pb
from router.core.plan import SampledToken, StepPlan, TopTokens
from router.core.request import FinishReason, Request, Sequence, SequenceState
from router.core.scheduler import Emission, Limits, Scheduler
from router.group.codec import decode_output, encode_plan
from tests.ghost import GhostState, likeliest, oracle, oracle_prompt_logprobs, score

VOCAB_SIZE = 97
NUM_ADAPTERS = 2
ROOMY = Limits(num_blocks=65, block_size=4, max_seats=8, max_step_tokens=64)


@dataclass(slots=True)
class Expected:
    """What one sequence must give, and what it gave so far."""

    tokens: list[int]
    finish: FinishReason
    num_emitted: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_tops: list[TopTokens] = field(default_factory=list)
    ended: bool = False


class House:
    """A scheduler and a ghost between which plans are sent as long as fewer than `depth` steps are outstanding."""

    def __init__(
        self,
        limits: Limits = ROOMY,
        *,
        depth: int = 1,
        prefix_caching: bool = True,
        max_drafts: int = 0,
        max_prompt_tokens: int | None = None,
        max_repeats: int = 0,
    ) -> None:
        self.scheduler = Scheduler(limits, prefix_seed=b"house", prefix_caching=prefix_caching, max_drafts=max_drafts)
        self.depth = depth
        self.max_prompt_tokens = max_prompt_tokens
        self.max_repeats = max_repeats
        self.expected: dict[Sequence, Expected] = {}
        self.plans: list[StepPlan] = []
        self.emissions: list[Emission] = []
        self._answers: deque[tuple[StepPlan, int, pb.StepOutput]] = deque()  # a plan, which repeat of it, its answer
        self._start_ghost()

    def _start_ghost(self) -> None:
        limits = self.scheduler.limits
        self.ghost = GhostState(
            *(limits.num_blocks, limits.block_size, limits.max_seats, limits.max_step_tokens, VOCAB_SIZE),
            num_adapters=NUM_ADAPTERS,
        )

    def add(self, request: Request) -> Sequence:
        sequence = self.scheduler.add(request)
        tokens = oracle(
            request.prompt,
            request.max_new_tokens,
            eos_token_ids=request.eos_token_ids,
            sampling=request.sampling,
            grammar=request.grammar,
            adapter=request.adapter,
            vocab_size=VOCAB_SIZE,
        )
        is_full = len(tokens) == request.max_new_tokens
        self.expected[sequence] = Expected(tokens, FinishReason.LENGTH if is_full else FinishReason.EOS_TOKEN)
        return sequence

    def fill(self) -> None:
        while len(self._answers) < self.depth and self.send():
            pass

    def send(self) -> StepPlan | None:
        """Plans a step, and perhaps repeats, and lets the ghost run them; the answers are on the way."""
        plan = self.scheduler.plan(self.max_prompt_tokens, self.max_repeats)
        if plan is not None:
            self.plans.append(plan)
            answers = self.ghost.run_steps(encode_plan(plan))
            self._answers.extend((plan, repeat, answer) for repeat, answer in enumerate(answers))
        return plan

    def receive(self) -> list[Emission]:
        plan, repeat, answer = self._answers.popleft()
        emissions = self.scheduler.commit(decode_output(answer, plan, VOCAB_SIZE, repeat=repeat))
        for emission in emissions:
            self._check(emission)
        self.emissions += emissions
        return emissions

    def turn(self) -> bool:
        """Fills the pipeline and takes one answer. False: nothing is going on."""
        self.fill()
        if not self._answers:
            return False
        self.receive()
        return True

    def run(self) -> None:
        while self.turn():
            pass
        self.scheduler.check_integrity()

    def crash(self, limits: Limits | None = None, *, died: bool = True) -> list[Emission]:
        self._answers.clear()
        ends = self.scheduler.reset(limits or self.scheduler.limits, died=died)
        self._start_ghost()
        for end in ends:
            self.expected[end.sequence].ended = True
        return ends

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.cancel(sequence)
        self.expected[sequence].ended = True

    def is_amid_repeats(self) -> bool:
        """Whether a plan's first step was answered, and not all of its repeats."""
        return bool(self._answers) and self._answers[0][1] > 0

    def seats_in_flight(self) -> set[int]:
        return {row.seat for plan, _, _ in self._answers for row in plan.rows}

    def _check(self, emission: Emission) -> None:
        sequence, expected = emission.sequence, self.expected[emission.sequence]
        name = f"sequence {sequence.arrival}"
        assert not expected.ended, f"{name} emits after its end"
        assert emission.fault is None, f"{name}: {emission.fault}"
        expected.prompt_logprobs += emission.prompt_logprobs
        expected.prompt_tops += emission.prompt_tops
        for token in emission.tokens:
            self._check_token(sequence, expected, token)
        is_last = expected.num_emitted == len(expected.tokens)
        assert emission.finish == (expected.finish if is_last else None), f"{name} finished by {emission.finish}"
        if is_last:
            expected.ended = True
            self._check_end(sequence, expected)

    def _check_token(self, sequence: Sequence, expected: Expected, token: SampledToken) -> None:
        index = expected.num_emitted
        assert token.token_id == expected.tokens[index], f"sequence {sequence.arrival}: token {index} is wrong"
        history = [*sequence.request.prompt, *expected.tokens[:index]]
        assert token.logprob == score(history, token.token_id)
        num_top = sequence.request.sampling.top_n_tokens
        assert list(token.top_tokens) == likeliest(history, num_top, VOCAB_SIZE)
        expected.num_emitted += 1

    def _check_end(self, sequence: Sequence, expected: Expected) -> None:
        wanted = oracle_prompt_logprobs(sequence.request.prompt) if sequence.request.prompt_logprobs else []
        assert expected.prompt_logprobs == wanted, f"sequence {sequence.arrival}: prompt logprobs"
        assert expected.prompt_tops == self._wanted_prompt_tops(sequence), f"sequence {sequence.arrival}: prompt tops"
        assert sequence.state is SequenceState.FINISHED

    def _wanted_prompt_tops(self, sequence: Sequence) -> list[TopTokens]:
        prompt, num_top = sequence.request.prompt, sequence.request.sampling.prompt_top_n_tokens
        if not sequence.request.prompt_logprobs or not num_top:
            return []
        return [tuple(likeliest(prompt[:end], num_top, VOCAB_SIZE)) for end in range(1, len(prompt))]


def make_request(
    prompt: tuple[int, ...] | range, max_new_tokens: int = 4, *, prompt_logprobs: bool = False, priority: int = 0
) -> Request:
    return Request("r", tuple(prompt), max_new_tokens, prompt_logprobs=prompt_logprobs, priority=priority)

"""Greedy tokens that ranks choose together, against those of one sampler that has the whole rows."""

from __future__ import annotations

import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from proto import shard_pb2 as pb
from router.core.request import Sampling
from router.core.scheduler import Limits
from shard.config import ShardConfig
from shard.distributed import RankGroup, connect
from shard.grammar import GrammarCompiler
from shard.greedy import GreedySeats
from shard.kernels.native import Peers, library
from shard.model import _own_columns, load_model
from shard.sampler import Sampled, Sampler
from shard.sampling_params import SamplingParams
from shard.tensor_parallel import deal
from shard.worker import PreparedStep, Worker
from tests import test_worker
from tests.server import PATIENCE_S
from tests.test_fused import WIDE
from tests.test_sampler import peaked_logits
from tests.test_worker import DRAWN, Run, assert_same, begin_epoch, requests_of
from tests.tiny_models import VOCAB_SIZE, save_tiny

pytestmark = [
    pytest.mark.skipif(library() is None, reason="the native operations are not built for this machine"),
    pytest.mark.usefixtures("one_thread"),
]

CPU = torch.device("cpu")
ENDS = (2, 19_990)
NUM_PROMPT = 7
NUM_ROWS = 6

Joined = Callable[[int], list[Peers]]


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[Joined]:
    """Ranks that share memory, all in this process."""
    ends: list[Peers] = []

    def join(world_size: int) -> list[Peers]:
        native = library()
        assert native is not None
        path = tempfile.mkstemp(dir=tmp_path)[1]
        # Slots so small that they hold what three rows have come to.
        ends.extend(Peers(native, path, rank, world_size, 96, PATIENCE_S) for rank in range(world_size))
        return ends

    yield join
    for peers in ends:
        peers.leave()


def chosen_together(
    peers: Sequence[Peers], logits: Tensor, params: Sequence[SamplingParams], position: int = NUM_PROMPT
) -> list[Sampled]:
    """What each rank says."""
    rows = range(len(logits))

    def of_rank(rank: int) -> Sampled:
        columns = deal(logits.shape[1], rank, len(peers))
        seats = GreedySeats(peers[rank], columns, ENDS)
        for row in rows:
            seats.open(row, params[row], NUM_PROMPT)
        own = logits[:, columns.start : columns.stop].contiguous()
        return seats.sample(own, rows, [position] * len(rows))

    with ThreadPoolExecutor(len(peers)) as ranks:
        return list(ranks.map(of_rank, range(len(peers))))


def chosen_alone(logits: Tensor, params: Sequence[SamplingParams], position: int = NUM_PROMPT) -> Sampled:
    sampler = Sampler(vocab_size=logits.shape[1], max_seats=len(logits), eos_token_ids=ENDS, device=CPU)
    for row, of_row in enumerate(params):
        sampler.open(row, of_row, range(position), NUM_PROMPT)
    return sampler.sample(logits, range(len(logits)), [position] * len(logits))


def assert_equal(
    peers: Sequence[Peers], logits: Tensor, params: Sequence[SamplingParams], position: int = NUM_PROMPT
) -> list[int]:
    """That all ranks say what one would. Returns the tokens."""
    alone = chosen_alone(logits, params, position)
    fit = ~alone.faults
    for together in chosen_together(peers, logits, params, position):
        assert together.faults.tolist() == alone.faults.tolist()
        assert together.token_ids[fit].tolist() == alone.token_ids[fit].tolist()
        torch.testing.assert_close(together.logprobs[fit], alone.logprobs[fit], rtol=1e-6, atol=1e-6)
        assert together.num_top == [0] * len(logits)
        assert together.top_ids.shape == (len(logits), 0)
    return alone.token_ids.tolist()


PLAIN = [SamplingParams()] * NUM_ROWS


# Parts of rows have 8,192 columns: ranks hold some whole ones, whole ones alone, or less than one.
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("vocab_size", [2, 5, 1001, 20_011, 49_152])
def test_ranks_choose_what_one_would(joined: Joined, world_size: int, vocab_size: int) -> None:
    assert_equal(joined(world_size), peaked_logits(NUM_ROWS, vocab_size, seed=vocab_size), PLAIN)


def test_logprobs_are_the_same_bits_where_ranks_hold_whole_parts_of_rows(joined: Joined) -> None:
    logits = peaked_logits(NUM_ROWS, 49_152, seed=1)

    alone = chosen_alone(logits, PLAIN)

    assert all(torch.equal(rank.logprobs, alone.logprobs) for rank in chosen_together(joined(2), logits, PLAIN))


def test_the_lowest_of_equal_logits_is_taken_whichever_ranks_have_them(joined: Joined) -> None:
    logits = peaked_logits(NUM_ROWS, 20_011, seed=2)
    border, other = deal(20_011, 1, 3).start, deal(20_011, 2, 3).start
    logits[0, [border - 1, border]] = 50.0
    logits[1, [border, border + 1, other]] = 50.0
    logits[2, [other - 1, other, 20_010]] = 50.0
    logits[3] = 1.0
    logits[4, [border, border - 1]] = torch.tensor([0.0, -0.0])
    logits[4, :other].clamp_(max=0.0)
    logits[4, other:] = -1.0

    tokens = assert_equal(joined(3), logits, PLAIN)

    assert tokens[:4] == [border - 1, border, other - 1, 0]


def test_ranks_that_have_no_finite_logit_have_no_say(joined: Joined) -> None:
    logits = peaked_logits(NUM_ROWS, 1001, seed=3)
    columns = [deal(1001, rank, 3) for rank in range(3)]
    for row, silent in enumerate(([0], [1], [2], [0, 1], [1, 2], [0, 2])):
        for rank in silent:
            logits[row, columns[rank].start : columns[rank].stop] = -math.inf

    assert_equal(joined(3), logits, PLAIN)


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_a_row_with_a_fault_on_any_rank_fails_alone_and_on_all(joined: Joined, rank: int, damage: float) -> None:
    logits = peaked_logits(NUM_ROWS, 1001, seed=4)
    logits[1, deal(1001, rank, 3).start + 5] = damage
    logits[4] = -math.inf

    tokens = [sampled.token_ids.tolist() for sampled in chosen_together(joined(3), logits, PLAIN)]

    assert chosen_alone(logits, PLAIN).faults.tolist() == [False, True, False, False, True, False]
    assert_equal(joined(3)[-3:], logits, PLAIN)
    assert tokens[0] == tokens[1] == tokens[2], "what is fed next must be the same everywhere"


@pytest.mark.parametrize("position", [NUM_PROMPT + 2, NUM_PROMPT + 3])
def test_end_tokens_wait_for_the_minimum_length_of_their_row(joined: Joined, position: int) -> None:
    logits = peaked_logits(NUM_ROWS, 20_011, seed=5)
    logits[:, ENDS[0]] = 60.0
    logits[:, ENDS[1]] = 61.0
    params = [replace(PLAIN[0], min_new_tokens=length) for length in (0, 2, 3, 4, 3, 9)]

    tokens = assert_equal(joined(3), logits, params, position)

    assert [token in ENDS for token in tokens] == [position >= NUM_PROMPT + p.min_new_tokens for p in params]


def test_an_end_token_is_taken_if_a_minimum_length_leaves_nothing_else(joined: Joined) -> None:
    logits = torch.full((NUM_ROWS, 20_011), -math.inf)
    logits[:, ENDS[0]] = 1.0
    logits[3:, ENDS[1]] = 2.0
    logits[5, 30] = 0.0

    tokens = assert_equal(joined(3), logits, [SamplingParams(min_new_tokens=9)] * NUM_ROWS)

    assert tokens == [ENDS[0]] * 3 + [ENDS[1]] * 2 + [30]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(do_sample=True),
        SamplingParams(top_n_tokens=1),
        SamplingParams(repetition_penalty=1.1),
        SamplingParams(frequency_penalty=0.1),
        SamplingParams(presence_penalty=0.1),
        SamplingParams(bias_token_ids=(5,), bias_values=(1.0,)),
        SamplingParams(watermark_delta=1.0),
        SamplingParams(no_repeat_ngram_size=1),
        SamplingParams(no_repeat_ngram_size=3),
        SamplingParams(bad_words=((5, 6),)),
    ],
)
def test_rows_with_other_rules_are_not_chosen_so(joined: Joined, params: SamplingParams) -> None:
    seats = GreedySeats(joined(1)[0], range(10), ENDS)
    seats.open(0, SamplingParams(prompt_top_n_tokens=3), NUM_PROMPT)
    seats.open(1, params, NUM_PROMPT)
    seats.open(2, SamplingParams(min_new_tokens=3), NUM_PROMPT)
    seats.open(3, SamplingParams(), NUM_PROMPT, grammar="{}")

    assert seats.hold([0, 2, 2])
    assert not seats.hold([0, 1])
    assert not seats.hold([3])
    seats.close(1)
    seats.open(1, SamplingParams(), NUM_PROMPT)
    assert seats.hold([0, 1])


@pytest.mark.parametrize("scaled_on", [(), (0,), (1,), (0, 1)])
def test_ranks_choose_together_only_if_no_logit_is_more_than_its_head_says(
    joined: Joined, scaled_on: tuple[int, ...]
) -> None:
    peers = joined(2)

    def of_rank(rank: int) -> range | None:
        head = SimpleNamespace(num_outputs=(6, 5)[rank])
        model = SimpleNamespace(vocab_size=11, _packed_head=None if rank in scaled_on else head)
        return _own_columns(model, head, RankGroup(rank, 2, peers[rank]))  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as ranks:
        columns = list(ranks.map(of_rank, range(2)))

    assert columns == ([None, None] if scaled_on else [range(6), range(6, 11)])


# ---- workers -------------------------------------------------------------------------------------------------------


LIMITS = Limits(num_blocks=40, block_size=16, max_seats=4, max_step_tokens=64)
PLAINLY = Sampling(min_new_tokens=9)


def worker_in(folder: Path, group: RankGroup) -> Worker:
    model = load_model(folder, dtype=torch.float32, device=CPU, group=group, on_progress=lambda done, total: None)
    unused = GrammarCompiler(folder / "tokenizer.json", vocab_size=VOCAB_SIZE, eos_token_ids=())
    return Worker(ShardConfig(kv_cache_bytes=1 << 20), model, group, "", None if group.rank else unused)


def serve(rank: int, folder: Path, pipe: Connection) -> None:
    """Runs the plans that come, an empty one for a repeat, and says of each whether only own columns were asked for."""
    torch.set_num_threads(1)
    test_worker.LIMITS = LIMITS
    group = connect(rank, 2, str(folder / "store"), CPU, PATIENCE_S)
    worker = worker_in(folder, group)
    asked: list[None] = []
    own_logits = worker._model.own_logits
    worker._model.own_logits = lambda hidden: (asked.append(None), own_logits(hidden))[1]  # type: ignore[method-assign]
    step: PreparedStep | None = None
    while (plan := pipe.recv()) is not None:
        if plan == "begin":
            begin_epoch(worker)
            continue
        step = worker.prepare_repeat(step) if step and not plan else worker.prepare(pb.StepPlan.FromString(plan), 0.0)
        asked.clear()
        answer = worker.run(step).SerializeToString()
        pipe.send((answer, bool(asked)))
    group.close()


class TwoRanks:
    """What a `Run` takes for a worker."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes
        self.together: list[bool] = []
        """For each step, whether the ranks chose together."""

    def begin_epoch(self) -> None:
        self.together.clear()
        for pipe in self._pipes:
            pipe.send("begin")

    def prepare(self, plan: pb.StepPlan, arrived_at: float) -> bytes:
        return plan.SerializeToString()

    def prepare_repeat(self, last: bytes) -> bytes:
        return b""

    def run(self, step: bytes) -> pb.FromShard:
        for pipe in self._pipes:
            pipe.send(step)
        answers = []
        for pipe in self._pipes:
            assert pipe.poll(PATIENCE_S), "a rank waits for the other"
            answers.append(pipe.recv())
        first, second = (pb.FromShard.FromString(answer) for answer, _ in answers)
        assert first.output.digest == second.ack.digest, "the ranks hold different tokens"
        assert answers[0][1] == answers[1][1], "the ranks went different ways"
        self.together.append(answers[0][1])
        return first


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TwoRanks, Worker]]:
    """Two ranks of a fused model, and one that has all of it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("llama")
    save_tiny(folder, "llama", **WIDE)
    spawn = multiprocessing.get_context("spawn")
    pairs = [spawn.Pipe() for _ in range(2)]
    processes = [spawn.Process(target=serve, args=(rank, folder, theirs)) for rank, (_, theirs) in enumerate(pairs)]
    for process in processes:
        process.start()
    yield TwoRanks([ours for ours, _ in pairs]), worker_in(folder, RankGroup())
    for ours, _ in pairs:
        ours.send(None)
    for process in processes:
        process.join(timeout=PATIENCE_S)
        assert process.exitcode == 0


@pytest.fixture
def runs(ranks: tuple[TwoRanks, Worker], monkeypatch: pytest.MonkeyPatch) -> tuple[TwoRanks, Worker]:
    """The same, each at the beginning of an epoch."""
    monkeypatch.setattr(test_worker, "LIMITS", LIMITS)
    two, alone = ranks
    two.begin_epoch()
    begin_epoch(alone)
    return ranks


@pytest.mark.parametrize("max_drafts", [0, 3])
@pytest.mark.parametrize("max_repeats", [0, 4])
def test_two_ranks_generate_what_one_does(runs: tuple[TwoRanks, Worker], max_drafts: int, max_repeats: int) -> None:
    two, alone = runs

    together = Run(two, requests_of(PLAINLY), max_drafts=max_drafts, max_repeats=max_repeats)  # type: ignore[arg-type]

    assert all(two.together)
    assert_same(together.tokens, Run(alone, requests_of(PLAINLY)).tokens)


def test_steps_with_a_row_of_other_rules_are_chosen_by_one_rank(runs: tuple[TwoRanks, Worker]) -> None:
    two, alone = runs
    plain, drawn = requests_of(PLAINLY), requests_of(DRAWN)[2]
    # The drawn one waits until the first has ended, and gets its seat.
    first, scored = replace(plain[0], max_new_tokens=4), replace(plain[1], prompt_logprobs=True)
    requests = [first, scored, plain[0], plain[2], replace(drawn, max_new_tokens=5)]
    assert len(requests) == LIMITS.max_seats + 1

    together = Run(two, requests)  # type: ignore[arg-type]

    assert two.together[0]
    assert two.together[-1]
    assert not all(two.together)
    assert_same(together.tokens, Run(alone, requests).tokens)

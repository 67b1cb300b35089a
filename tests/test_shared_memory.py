"""Ranks that talk through shared memory: sums and gathers in two processes, and what happens when one of them ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shard import distributed
from shard.distributed import SLOT_BYTES, RankGroup, connect
from shard.kernels.native import PeerError, library

needs_library = pytest.mark.skipif(library() is None, reason="the native operations are not built for this machine")

CPU = torch.device("cpu")
TIMEOUT_S = 120.0

Work = Callable[[RankGroup, Connection], None]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of shared memory, for a test's own ranks: where all others keep theirs, files come and go."""
    with tempfile.TemporaryDirectory(prefix="test-", dir=distributed._directory()) as path:
        yield Path(path)


def run_rank(work: Work, rank: int, world_size: int, folder: Path, pipe: Connection, without_library: bool) -> None:
    torch.set_num_threads(1)
    distributed._SHARED_MEMORY = folder
    if without_library:
        distributed.library = lambda: None
    group = connect(rank, world_size, str(folder / "store"), CPU, TIMEOUT_S)
    work(group, pipe)
    group.close()


class Ranks:
    """Processes that run `work`, and a pipe to each."""

    def __init__(self, work: Work, world_size: int, folder: Path, without_library: int | None = None) -> None:
        spawn = multiprocessing.get_context("spawn")
        pairs = [spawn.Pipe() for _ in range(world_size)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            spawn.Process(target=run_rank, args=(work, rank, world_size, folder, theirs, rank == without_library))
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def join(self) -> None:
        for process in self.processes:
            process.join(timeout=TIMEOUT_S)
            assert process.exitcode == 0


def tensor_of(rank: int, length: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(rank))


# Less than a slot, exactly one, and more than two, which is a round each.
LENGTHS = (1, 577, SLOT_BYTES // 4, SLOT_BYTES // 2 + 3)


# Columns of each rank, of which a slot holds all rows, some, or not even one; the last rank may have none.
WIDTHS = ([3, 4, 5], [SLOT_BYTES // 12, 7, 1], [SLOT_BYTES // 4 + 9, 2, 0])
NUM_ROWS = 5


def columns_of(rank: int, widths: list[int]) -> Tensor:
    return tensor_of(rank, NUM_ROWS * widths[rank]).view(NUM_ROWS, widths[rank])


def all_columns() -> list[float]:
    """As the first rank gets them."""
    joined = [torch.cat([columns_of(rank, widths) for rank in range(3)], dim=1) for widths in WIDTHS]
    return torch.cat([columns.flatten() for columns in joined]).tolist()


def use_every_collective(group: RankGroup, pipe: Connection) -> None:
    sums = [group.all_reduce(tensor_of(group.rank, length)) for length in LENGTHS for _ in range(3)]
    halves = group.all_reduce(tensor_of(group.rank, 100).bfloat16())
    whole = group.all_reduce(torch.tensor([group.rank + 1, 2**40]))
    strided = group.all_reduce(torch.arange(12.0).view(3, 4).t() * (group.rank + 1))
    told = group.broadcast(torch.full((4,), group.rank), source=1)
    joined = [group.gather_columns(columns_of(group.rank, widths), widths) for widths in WIDTHS]
    group.barrier()
    tensors = [*sums, halves, whole, strided, told, torch.cat([columns.flatten() for columns in joined])]
    pipe.send((group.peers is not None, [tensor.tolist() for tensor in tensors]))


@needs_library
def test_three_ranks_compute_the_same_through_shared_memory(folder: Path) -> None:
    ranks = Ranks(use_every_collective, 3, folder)

    answers = [pipe.recv() for pipe in ranks.pipes]
    ranks.join()

    assert all(shared for shared, _ in answers)
    *sums, halves, whole, strided, told, joined = answers[0][1]
    assert all(others[:-1] == answers[0][1][:-1] for _, others in answers), "the ranks hold different bits"
    for actual, length in zip(sums, [length for length in LENGTHS for _ in range(3)], strict=True):
        assert actual == (tensor_of(0, length) + tensor_of(1, length) + tensor_of(2, length)).tolist()
    exact = sum(tensor_of(rank, 100).bfloat16().float() for rank in range(3))
    assert isinstance(exact, Tensor)
    assert halves == exact.bfloat16().tolist()
    assert whole == [1 + 2 + 3, 3 * 2**40]
    assert strided == (torch.arange(12.0).view(3, 4).t() * 6).tolist()
    assert told == [1, 1, 1, 1]
    assert joined == all_columns()
    assert list(folder.glob("shardstream-*")) == [], "a file was left behind"


WIDTH = SLOT_BYTES // 4 // 3
"""Of rows of which a slot holds three."""

TABLE_STARTS = [0, 4, 4, 9]
"""Rows of each rank, the second of which has none."""


def row_of(place: int) -> Tensor:
    return torch.full((WIDTH,), float(place))


def look_rows_up(group: RankGroup, pipe: Connection) -> None:
    assert group.peers is not None
    own = range(TABLE_STARTS[group.rank], TABLE_STARTS[group.rank + 1])
    table = torch.stack([row_of(place) for place in own]) if own else torch.empty(0, WIDTH)
    found = [
        group.peers.look_up(table, TABLE_STARTS, torch.tensor(rows, dtype=torch.int64))
        for rows in ([8], [0, 3, 4, 8, 4, 4, 0], [], [1, 5])
    ]
    pipe.send([[(row.min().item(), row.max().item()) for row in rows] for rows in found])


@needs_library
def test_rows_of_a_table_are_found_whichever_rank_has_them(folder: Path) -> None:
    ranks = Ranks(look_rows_up, 3, folder)

    answers = [pipe.recv() for pipe in ranks.pipes]
    ranks.join()

    wanted = [[8], [0, 3, 4, 8, 4, 4, 0], [], [1, 5]]
    assert answers == [[[(place, place) for place in rows] for rows in wanted]] * 3


def sum_until_alone(group: RankGroup, pipe: Connection) -> None:
    group.all_reduce(torch.ones(1))
    pipe.send(None)
    if group.rank == 1:
        time.sleep(TIMEOUT_S)  # until it is killed
    try:
        group.all_reduce(torch.ones(1))
    except PeerError as error:
        pipe.send(str(error))


@needs_library
def test_a_rank_that_waits_for_a_dead_one_hears_of_it(folder: Path) -> None:
    ranks = Ranks(sum_until_alone, 2, folder)
    for pipe in ranks.pipes:
        pipe.recv()

    # It stays a zombie until we wait for it, as it would under a launcher that is busy.
    os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)

    assert ranks.pipes[0].poll(timeout=TIMEOUT_S / 2), "the rank still waits"
    assert ranks.pipes[0].recv() == "another rank ended"
    for process in ranks.processes:
        process.join(timeout=TIMEOUT_S)


def sum_with_one_late(group: RankGroup, pipe: Connection) -> None:
    if group.rank == 1:
        pipe.recv()
    group.all_reduce(torch.ones(1))
    pipe.send(None)


@needs_library
def test_a_rank_waits_for_one_that_is_slow(folder: Path) -> None:
    ranks = Ranks(sum_with_one_late, 2, folder)

    assert not ranks.pipes[0].poll(timeout=1)
    ranks.pipes[1].send(None)

    for pipe in ranks.pipes:
        assert pipe.recv() is None
    ranks.join()


def test_ranks_use_sockets_when_one_of_them_cannot_share_memory(folder: Path) -> None:
    ranks = Ranks(use_every_collective, 3, folder, without_library=1)

    answers = [pipe.recv() for pipe in ranks.pipes]
    ranks.join()

    assert not any(shared for shared, _ in answers)
    assert all(others[:-1] == answers[0][1][:-1] for _, others in answers)
    assert answers[0][1][-1] == all_columns()

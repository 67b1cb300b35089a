"""Local groups as processes: ghosts stand in for ranks, so that starting one takes a moment."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from router.errors import StartupError
from router.group.client import Demands, GroupClient
from router.launch import LaunchSettings, LocalGroup, find_checkpoint
from tests.server import is_alive


def launch(act: Callable[[LocalGroup], Awaitable[None]], **values: object) -> None:
    async def run() -> None:
        settings = LaunchSettings(Path("/nowhere"), 2, module="tests.ghost", **values)  # type: ignore[arg-type]
        group = LocalGroup(settings, on_progress=lambda rank, done, total: None)
        try:
            await act(group)
        finally:
            await group.stop()

    asyncio.run(run())


def test_a_started_group_can_be_joined_and_a_stopped_one_is_gone() -> None:
    left: list[int] = []

    async def act(group: LocalGroup) -> None:
        await group.start()
        left.extend(group.process_ids)
        client = GroupClient(group.addresses, Demands(4, 16))
        info = await client.connect(find_s=60, load_s=60)
        await client.close(goodbye=True)

        assert info.world_size == len(group.process_ids) == 2
        assert Path(group.addresses[0].removeprefix("unix:")).parent.stat().st_mode & 0o077 == 0

    launch(act)
    assert not any(map(is_alive, left))


def test_a_killed_rank_is_noticed_and_the_whole_group_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async def act(group: LocalGroup) -> None:
        await group.start()
        before = group.process_ids
        os.kill(before[1], signal.SIGKILL)
        cause = await group.wait_for_death()
        await group.restart()

        assert cause == "rank 1 was ended by SIGKILL"
        assert caplog.messages == [cause]
        assert not any(map(is_alive, before))
        assert all(map(is_alive, group.process_ids))
        assert len(group.process_ids) == 2

    launch(act)


def test_a_group_that_dies_again_and_again_is_given_up() -> None:
    async def act(group: LocalGroup) -> None:
        await group.restart()
        with pytest.raises(StartupError, match="died 2 times in a row"):
            await group.restart()

    launch(act, max_restarts=1)


def test_deaths_with_service_in_between_do_not_add_up() -> None:
    async def act(group: LocalGroup) -> None:
        for _ in range(3):
            await group.restart()
            group.note_served()

        assert all(map(is_alive, group.process_ids))

    launch(act, max_restarts=1)


def test_a_rank_that_cannot_start_ends_the_start_with_its_exit_code() -> None:
    async def act(group: LocalGroup) -> None:
        with pytest.raises(StartupError, match="rank [01] ended with exit code 2"):
            await group.start()
        assert group.process_ids == []

    launch(act, flags=("--rank", "not a number"))


def test_an_unusable_folder_for_sockets_is_named(tmp_path: Path) -> None:
    for folder in (Path("/proc/no/such/place"), tmp_path / ("long" * 30)):
        with pytest.raises(StartupError, match=str(folder)):
            LocalGroup(LaunchSettings(Path("/nowhere"), 2, run_directory=folder), on_progress=lambda *_: None)


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(StartupError, match="no such directory"):
        asyncio.run(find_checkpoint("/nowhere/at/all", None))

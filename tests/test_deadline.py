"""One timer for many timeouts: each ends what it is for at its own time, and nothing else."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from router.group.deadline import Deadline


async def forever() -> None:
    await asyncio.Event().wait()


async def five() -> int:
    """Ends before the event loop can look at any timer, however slow the machine."""
    return 5


def test_what_ends_in_time_is_returned() -> None:
    assert asyncio.run(Deadline().within(60.0, five())) == 5


def test_what_takes_longer_is_cancelled() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await forever()
        finally:
            ended.append("work")

    async def act() -> int:
        with pytest.raises(TimeoutError):
            await Deadline().within(0.01, work())
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert asyncio.run(act()) == 0
    assert ended == ["work"]


def test_an_earlier_deadline_is_kept_behind_a_later_one() -> None:
    async def act() -> None:
        deadline = Deadline()
        await deadline.within(3600.0, five())
        with pytest.raises(TimeoutError):
            await deadline.within(0.01, forever())
        deadline.close()

    asyncio.run(asyncio.wait_for(act(), 60.0))


def test_a_later_deadline_is_kept_behind_an_earlier_one() -> None:
    async def act() -> int:
        deadline = Deadline()
        await deadline.within(0.01, five())
        await deadline.within(3600.0, asyncio.sleep(0.05))
        with pytest.raises(TimeoutError):
            await deadline.within(0.01, forever())
        return await deadline.within(3600.0, five())

    assert asyncio.run(asyncio.wait_for(act(), 60.0)) == 5


def test_nothing_is_cancelled_while_nobody_waits() -> None:
    async def act() -> None:
        await Deadline().within(0.01, five())
        await asyncio.sleep(0.05)

    asyncio.run(act())


def test_a_cancellation_from_outside_is_no_timeout() -> None:
    async def act() -> None:
        waiting = asyncio.create_task(Deadline().within(60.0, forever()))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(act())


def test_a_deadline_within_a_millisecond_is_one_on_uvloop_too() -> None:
    async def act() -> int:
        deadline = Deadline()
        await deadline.within(0.0003, five())
        return await deadline.within(60.0, five())

    assert uvloop.run(act()) == 5

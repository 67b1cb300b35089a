"""Who is measured when: every engine once, then every engine again, so that a machine that slows down slows all alike.

In its turn an engine has the machine to itself: it is started, asked and stopped. What else the processors did is read
around every measurement, and a measurement that was disturbed is taken again while that is cheap.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.client import BenchError
from tests.bench.peers.cases import PEAK_RSS, READY, Case
from tests.bench.peers.engines import BANDWIDTH, MAX_STREAMS, Engine
from tests.bench.peers.machine import peak_rss_bytes, process_tree, read_bandwidth_gb_s, read_cpu
from tests.bench.peers.report import Reading, Run, Turn
from tests.bench.peers.servers import Server, running
from tests.bench.prompts import Prompts

MAX_ATTEMPTS: Final = 3
MAX_ATTEMPTS_S: Final = 20.0
NUM_WARM_UP_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how often."""

    cases: list[Case]
    num_turns: int
    logs: Path


class Bench:
    """Takes the turns; adds to `run` what came of them and tells `say`, line by line."""

    def __init__(self, plan: Plan, run: Run, prompts: Prompts, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._run = run
        self._prompts = prompts
        self._say = say

    async def take_turns(self) -> None:
        for number in range(self._plan.num_turns):
            for engine in self._run.engines:
                if engine.name in self._run.failures:
                    continue
                try:
                    turn = await self._take_turn(engine, number)
                except BenchError as error:
                    self._leave_out(engine.name, error)
                    continue
                self._run.turns.append(turn)
                self._say(_line(turn))

    async def _take_turn(self, engine: Engine, number: int) -> Turn:
        """Raises `BenchError` if the engine does not even start."""
        before = read_bandwidth_gb_s(BANDWIDTH)
        begun_at = time.perf_counter()
        with running(engine, self._plan.logs) as server:
            readings = [await _start(server, begun_at, self._prompts)]
            await _warm_up(server, self._prompts)
            for case in self._plan.cases:
                if number == 0 or not case.once:
                    readings += await self._take_case(engine, server, case)
            peak_mb = peak_rss_bytes(process_tree(server.pid)) / 1e6
            readings.append(Reading(PEAK_RSS.name, peak_mb, foreign_cores=0.0, client_us_per_token=0.0))
        return Turn(engine.name, number, (before, read_bandwidth_gb_s(BANDWIDTH)), readings)

    async def _take_case(self, engine: Engine, server: Server, case: Case) -> list[Reading]:
        """Nothing, now and in later turns, if the engine cannot do it."""
        name = f"{engine.name}, {case.measure.title}"
        if name in self._run.failures:
            return []
        try:
            return await _measure(server, case, self._prompts)
        except BenchError as error:
            self._leave_out(name, error)
            return []

    def _leave_out(self, name: str, reason: BenchError) -> None:
        self._run.failures[name] = str(reason)
        self._say(f"left out from now on: {name}: {reason}")


async def _start(server: Server, begun_at: float, prompts: Prompts) -> Reading:
    text = prompts.text(NUM_WARM_UP_TOKENS)
    before = read_cpu(server.pid)
    await server.wait_until_ready(text)
    after = read_cpu(server.pid)
    return Reading(READY.name, after.at - begun_at, before.foreign_cores_until(after), client_us_per_token=0.0)


async def _warm_up(server: Server, prompts: Prompts) -> None:
    """Raises `BenchError` if the engine counts other tokens than everybody else."""
    texts = [prompts.text(NUM_WARM_UP_TOKENS) for _ in range(MAX_STREAMS)]
    for answer in (await server.ask(texts, NUM_WARM_UP_TOKENS)).answers:
        if answer.num_prompt_tokens not in (None, NUM_WARM_UP_TOKENS):
            raise BenchError(f"counts {answer.num_prompt_tokens} tokens in a prompt of {NUM_WARM_UP_TOKENS}")


async def _measure(server: Server, case: Case, prompts: Prompts) -> list[Reading]:
    """Again with other texts if it was disturbed, until it costs too much."""
    readings: list[Reading] = []
    begun_at = time.perf_counter()
    while True:
        readings.append(await _measure_once(server, case, prompts))
        too_long = time.perf_counter() - begun_at > MAX_ATTEMPTS_S
        if not readings[-1].disturbed or too_long or len(readings) == MAX_ATTEMPTS:
            return readings


async def _measure_once(server: Server, case: Case, prompts: Prompts) -> Reading:
    groups = case.prompts(prompts)
    before = read_cpu(server.pid)
    asked = [await server.ask(texts, case.num_new_tokens) for texts in groups]
    after = read_cpu(server.pid)
    num_tokens = sum(answer.num_tokens for group in asked for answer in group.answers)
    client_us = sum(group.client_cpu_s for group in asked) * 1e6 / num_tokens
    value = case.value([group.answers for group in asked])
    return Reading(case.measure.name, value, before.foreign_cores_until(after), client_us)


def _line(turn: Turn) -> str:
    bandwidth = "–".join(f"{bandwidth:.0f}" for bandwidth in turn.bandwidth_gb_s)
    readings = ", ".join(f"{'~' * r.disturbed}{r.measure} {r.value:.4g}" for r in turn.readings)
    return f"turn {turn.number + 1}, {turn.engine}, memory {bandwidth} GB/s: {readings}"

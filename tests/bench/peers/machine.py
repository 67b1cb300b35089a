"""What processes and the machine did, read from Linux's /proc, and how fast memory is right now.

Host processors are shared and memory bandwidth drifts by half within an hour, so a figure means something only next to
these.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
TOLERANCE_S: Final = 4 / TICKS_PER_S
"""The total is counted in ticks, by whoever runs when one falls; processes are counted otherwise."""
PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class CpuReading:
    """Processor seconds up to a moment: of everybody, and of the processes of a measurement."""

    at: float
    everybody_s: float
    own_s: float

    def foreign_cores_until(self, later: CpuReading) -> float:
        """How many cores were busy with something else, time stolen from a virtual machine included."""
        foreign_s = (later.everybody_s - self.everybody_s) - (later.own_s - self.own_s)
        return max(0.0, foreign_s - TOLERANCE_S) / (later.at - self.at)


def read_cpu(root_pid: int) -> CpuReading:
    """The own processes are this one, and `root_pid` with all that it started."""
    own_s = sum(_cpu_s(pid) for pid in (os.getpid(), *process_tree(root_pid)))
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, (PROC / "stat").read_text().partition("\n")[0].split()[1:]
    )
    return CpuReading(time.perf_counter(), (user + nice + system + irq + softirq + steal) / TICKS_PER_S, own_s)


def process_tree(pid: int) -> list[int]:
    """A process and its descendants, those that are gone left out."""
    try:
        tasks = [(task / "children").read_text().split() for task in (PROC / str(pid) / "task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(descendant for task in tasks for child in task for descendant in process_tree(int(child)))]


def peak_rss_bytes(pids: Sequence[int]) -> int:
    """Sum of each process's largest resident set; pages that two of them share count twice."""
    return sum(_peak_rss_bytes(pid) for pid in pids)


def read_bandwidth_gb_s(program: Path) -> float:
    """How fast all cores together read memory; `program` is bandwidth.c, compiled."""
    done = subprocess.run([program, str(os.cpu_count())], capture_output=True, text=True, check=True)
    return float(done.stdout)


def describe() -> str:
    """The machine in a line."""
    names = {line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")}
    flags = {flag for line in _cpuinfo() if line.startswith("flags") for flag in line.split()}
    notable = [flag for flag in ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if flag in flags]
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{os.cpu_count()} cores of {', '.join(names)} ({', '.join(notable)}), {memory_gb:.0f} GB, {platform.system()}"
    )


def _cpuinfo() -> list[str]:
    return (PROC / "cpuinfo").read_text().splitlines()


def _cpu_s(pid: int) -> float:
    """Of the process and of the children it has waited for."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(ticks) for ticks in fields[11:15]) / TICKS_PER_S


def _peak_rss_bytes(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

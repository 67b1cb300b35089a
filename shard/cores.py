"""How many cores a container may use.

A CPU limit hides no core from a process. It stops all threads together once they have used up their time, until the
next tenth of a second: a thread for each of 64 cores under a limit of four would stand still most of the time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

CONTROL_GROUPS: Final = Path("/sys/fs/cgroup")


def num_allowed_cores(num_cores: int) -> int:
    """Of `num_cores` so many that together they stay within the limit of the control group, one at least."""
    quota = _quota_cores()
    return num_cores if quota is None else max(1, min(num_cores, int(quota)))


def _quota_cores() -> float | None:
    """The limit in cores; None without one. Version 2 of control groups has one file for it, version 1 has two."""
    try:
        limit, period = _read("cpu.max").split()
    except (OSError, ValueError):
        try:
            limit, period = _read("cpu/cpu.cfs_quota_us"), _read("cpu/cpu.cfs_period_us")
        except OSError:
            return None
    return int(limit) / int(period) if limit not in ("max", "-1") else None


def _read(name: str) -> str:
    return (CONTROL_GROUPS / name).read_text().strip()

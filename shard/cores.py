"""How many cores a container may use.

A CPU limit hides no core from a process. It stops all threads together once they have used up their time, until the
next tenth of a second: a thread for each of 64 cores under a limit of four would stand still most of the time.
"""

from __future__ import annotations

from pathlib import Path

from shard.control_groups import own_groups


def num_allowed_cores(num_cores: int) -> int:
    """Of `num_cores` so many that together they stay within the limits of the control groups, one at least."""
    quotas = map(_quota_cores, own_groups("cpu"))
    return max(1, min([num_cores, *(int(quota) for quota in quotas if quota is not None)]))


def _quota_cores(group: Path) -> float | None:
    """The limit in cores; None without one. Version 2 has one file for it, version 1 has two."""
    try:
        limit, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    return int(limit) / int(period) if limit not in ("max", "-1") else None

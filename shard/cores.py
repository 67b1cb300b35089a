"""How many cores a container may use.

A CPU limit hides no core from a process. It stops all threads together once they have used up their time, until the
next tenth of a second: a thread for each of 64 cores under a limit of four would stand still most of the time.

Control groups lie within each other, and each one's limit holds for all within it. A container usually sees its own as
the outermost; where it sees the host's, or is divided further, the limit stands deeper down.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

CONTROL_GROUPS: Final = Path("/sys/fs/cgroup")
OWN_GROUPS: Final = Path("/proc/self/cgroup")


def num_allowed_cores(num_cores: int) -> int:
    """Of `num_cores` so many that together they stay within the limits of the control groups, one at least."""
    return max(1, min([num_cores, *(int(quota) for group in _groups() if (quota := _quota_cores(group)) is not None)]))


def _groups() -> Iterator[Path]:
    """Folders of the groups that this process is in, as far as they are shown here: those of version 2 of control
    groups, where there is one tree, and of version 1, where processors have one of their own."""
    for tree, controller in ((CONTROL_GROUPS, ""), (CONTROL_GROUPS / "cpu", "cpu")):
        own = _own_group(controller)
        yield from (tree / group for group in (own, *own.parents))


def _own_group(controller: str) -> PurePosixPath:
    """The innermost one, from the root of the controller's tree."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return PurePosixPath(path.lstrip("/"))
    return PurePosixPath()


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

"""The control groups that this process is in.

They lie within each other, and each one's limits hold for all within it. A container usually sees its own as the
outermost; where it sees the host's, or is divided further, the limits stand deeper down.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

CONTROL_GROUPS: Final = Path("/sys/fs/cgroup")
OWN_GROUPS: Final = Path("/proc/self/cgroup")


def own_groups(controller: str) -> Iterator[Path]:
    """Folders of the groups, as far as they are shown here: those of version 2 of control groups, where there is one
    tree, and of version 1, where each controller, as `cpu` and `memory`, has one of its own."""
    for tree, name in ((CONTROL_GROUPS, ""), (CONTROL_GROUPS / controller, controller)):
        innermost = _innermost(name)
        yield from (tree / group for group in (innermost, *innermost.parents))


def _innermost(controller: str) -> PurePosixPath:
    """From the root of the controller's tree; version 2 has no name for its own."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return PurePosixPath(path.lstrip("/"))
    return PurePosixPath()

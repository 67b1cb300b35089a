"""No process of ours outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def end_with(parent_pid: int) -> None:
    """Linux kills this process when its parent dies, however it dies; 0 means that nobody started it."""
    if not parent_pid:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before prctl
        sys.exit(1)

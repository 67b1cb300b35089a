"""How much memory KV blocks may take when nobody says, and memory that is taken only as it is used."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from shard.control_groups import own_groups

MEMINFO: Final = Path("/proc/meminfo")

CPU_SHARE: Final = 0.25
CPU_MAX_BYTES: Final = 4 << 30


def default_kv_bytes(device: torch.device, world_size: int, cuda_memory_fraction: float) -> int:
    """Bytes for this rank's KV memory.

    On CUDA what is free below `cuda_memory_fraction` of the device. On a CPU a quarter of the available memory shared
    among the ranks, at most 4 GiB: the pages are only touched as sequences need them.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - (1.0 - cuda_memory_fraction) * total))
    return min(CPU_MAX_BYTES, int(_available_bytes() * CPU_SHARE)) // world_size


def _available_bytes() -> int:
    """MemAvailable, or less where a control group allows less."""
    limits = map(_limit_bytes, own_groups("memory"))
    return min([_meminfo_available(), *(limit for limit in limits if limit is not None)])


def _limit_bytes(group: Path) -> int | None:
    """Of versions 2 and 1 of control groups; None without one."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return int((group / name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _meminfo_available() -> int:
    for line in MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return CPU_MAX_BYTES


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on the CPU, take memory only once they are written: pages the system hands out on first touch.

    `torch.zeros` writes every page, which for gigabytes takes seconds and holds memory that no sequence may ever need.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not num_bytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    # The tensor keeps the mapping alive, and its end unmaps it.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)

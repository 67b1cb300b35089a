"""The ranks of a group as one object: who we are, and the few collectives the model and the sampler need.

Ranks meet through a file (`FileStore`): no port to guess, nothing taken from the environment, nothing to reach from
another machine. Collectives run over gloo on CPUs and NCCL on CUDA. A lone rank needs no process group at all, and all
of this does nothing then.

Every rank must call every collective in the same order; a rank that does not makes the others wait until the timeout.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from shard.errors import LoadError

LOOPBACK: Final = "lo0" if sys.platform == "darwin" else "lo"


class RankGroup:
    """All ranks that hold one copy of a model, seen from one of them."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks, in place; every rank gets the same bits. Returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrites `tensor` with the one of rank `source`. Returns it."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=source)
        return tensor

    def gather_columns(self, tensor: Tensor, widths: list[int]) -> Tensor:
        """Joins the ranks' tensors along the last dimension on rank 0; `widths` are their sizes there.

        The other ranks get their own tensor back.
        """
        if self.world_size == 1:
            return tensor
        # A gather wants equal shapes.
        padded = tensor.new_zeros(*tensor.shape[:-1], max(widths))
        padded[..., : tensor.shape[-1]] = tensor
        parts = [torch.empty_like(padded) for _ in widths] if self.rank == 0 else None
        dist.gather(padded, parts, dst=0)
        if parts is None:
            return tensor
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def connect(rank: int, world_size: int, store_path: str, device: torch.device, timeout_s: float) -> RankGroup:
    """Joins the group; returns when all ranks have.

    `store_path` is a file that no earlier group has used. Raises `LoadError` when a rank is missing for `timeout_s`,
    which is also how long a collective may take later.
    """
    if world_size == 1:
        return RankGroup()
    # gloo would bind to whatever address the host's name resolves to, which may face a network or not exist.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    timeout = timedelta(seconds=timeout_s)
    store = dist.FileStore(store_path, world_size)  # type: ignore[attr-defined]
    store.set_timeout(timeout)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        dist.barrier()
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
        raise LoadError(f"rank {rank} met not all {world_size} ranks within {timeout_s:g} s: {cause}") from error
    return RankGroup(rank, world_size)

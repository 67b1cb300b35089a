"""The ranks of a group as one object: who we are, and the few collectives the model and the sampler need.

Ranks meet through a file (`FileStore`): no port to guess, nothing taken from the environment, nothing to reach from
another machine. Collectives run over NCCL on CUDA. On CPUs they run through shared memory where all ranks are on one
host and have the native operations, and over gloo otherwise. A lone rank needs no process group at all, and all of this
does nothing then.

Every rank must call every collective in the same order; a rank that does not makes the others wait until the timeout.
Through shared memory the others notice at once when a rank has ended.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shard.errors import LoadError
from shard.kernels.native import Library, Peers, library

log = logging.getLogger(__name__)

LOOPBACK: Final = "lo0" if sys.platform == "darwin" else "lo"

SLOT_BYTES: Final = 1 << 19
"""Sent at once through shared memory; two slots for each rank have room in the 64 MB that containers get."""

_SHARED_MEMORY: Final = Path("/dev/shm")


class _Store(Protocol):
    """What torch's stores have in common; `get` waits until the key is there."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class RankGroup:
    """All ranks that hold one copy of a model, seen from one of them."""

    def __init__(self, rank: int = 0, world_size: int = 1, peers: Peers | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.peers = peers
        """The shared memory, if collectives run through it."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks, in place; every rank gets the same bits. Returns it."""
        if self.world_size == 1:
            return tensor
        if self.peers is None:
            dist.all_reduce(tensor)
        elif tensor.dtype == torch.float32 and tensor.is_contiguous():
            self.peers.sum(tensor)
        else:
            exact = torch.float32 if tensor.is_floating_point() else None
            tensor.copy_(self.peers.gather(tensor).sum(dim=0, dtype=exact))
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrites `tensor` with the one of rank `source`. Returns it."""
        if self.world_size == 1:
            return tensor
        if self.peers is None:
            dist.broadcast(tensor, src=source)
        else:
            tensor.copy_(self.peers.gather(tensor)[source])
        return tensor

    def gather_columns(self, tensor: Tensor, widths: list[int]) -> Tensor:
        """Joins the ranks' tensors along the last dimension on rank 0; `widths` are their sizes there.

        The other ranks get their own tensor back.
        """
        if self.world_size == 1:
            return tensor
        if self.peers is not None:
            return self.peers.join_columns(tensor, widths)
        # A gather wants equal shapes.
        padded = tensor.new_zeros(*tensor.shape[:-1], max(widths))
        padded[..., : tensor.shape[-1]] = tensor
        parts = [torch.empty_like(padded) for _ in widths] if self.rank == 0 else None
        dist.gather(padded, parts, dst=0)
        if parts is None:
            return tensor
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def barrier(self) -> None:
        if self.peers is not None:
            self.peers.gather(torch.zeros(1))
        elif self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.peers is not None:
            self.peers.leave()
        if self.world_size > 1:
            dist.destroy_process_group()


def connect(rank: int, world_size: int, store_path: str, device: torch.device, timeout_s: float) -> RankGroup:
    """Joins the group; returns when all ranks have.

    Raises `LoadError` when a rank is missing for `timeout_s`, which is also how long a collective may take later, or
    when an earlier group has used the file at `store_path`, where its addresses still are.
    """
    if world_size == 1:
        return RankGroup()
    # gloo would bind to whatever address the host's name resolves to, which may face a network or not exist.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    timeout = timedelta(seconds=timeout_s)
    store = dist.FileStore(store_path, world_size)  # type: ignore[attr-defined]
    store.set_timeout(timeout)
    if store.add(f"life-of-{rank}", 1) > 1:
        raise LoadError(f"{store_path} was used by an earlier group: every life of a group needs a new --store-path")
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
        peers = _share_memory(store, rank, world_size, timeout_s) if device.type == "cpu" else None
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
        raise LoadError(f"rank {rank} met not all {world_size} ranks within {timeout_s:g} s: {cause}") from error
    return RankGroup(rank, world_size, peers)


def _share_memory(store: _Store, rank: int, world_size: int, timeout_s: float) -> Peers | None:
    """Memory of all ranks, if every one of them can share it: then all get it, otherwise none."""
    native = library()
    able = _agree(store, "host", rank, world_size, "" if native is None else _host())
    if native is None or not able:
        return None
    if rank == 0:
        store.set("memory", str(_new_file()))
    path = Path(store.get("memory").decode())
    peers = _join(native, path, rank, world_size, timeout_s)
    joined = _agree(store, "joined", rank, world_size, "" if peers is None else "yes")
    if rank == 0:
        path.unlink(missing_ok=True)  # the mappings stay; nothing is left behind however the ranks end
    if peers is not None and not joined:
        peers.leave()
    return peers if joined else None


def _agree(store: _Store, what: str, rank: int, world_size: int, answer: str) -> bool:
    """Whether all ranks give the same answer, and not an empty one."""
    store.set(f"{what}-{rank}", answer or "no")
    answers = {store.get(f"{what}-{peer}").decode() for peer in range(world_size)}
    return answers == {answer}


def _host() -> str:
    """Equal for two processes if they share memory: the kernel's life and the file system."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip() if boot.is_file() else os.uname().nodename} {_directory().stat().st_dev}"


def _directory() -> Path:
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def _new_file() -> Path:
    """Empty, and for this user alone."""
    file, path = tempfile.mkstemp(prefix="shardstream-", dir=_directory())
    os.close(file)
    return Path(path)


def _join(native: Library, path: Path, rank: int, world_size: int, timeout_s: float) -> Peers | None:
    try:
        return Peers(native, str(path), rank, world_size, SLOT_BYTES, timeout_s)
    except OSError as error:
        log.warning("the ranks talk over sockets: %s", error)
        return None

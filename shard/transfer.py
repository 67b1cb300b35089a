"""Numbers between the host and a device that works by itself, and how far it is, without either waiting for the other.

A copy that waits for nothing must read or write page-locked memory. torch keeps a pool of it and gives none out again
while a copy that was queued still needs it: so whoever prepares the next step never writes over what the device has yet
to read, however far it is behind. A CPU is not such a device: there nothing is copied and nothing awaited.

It has not been run on a GPU yet; tests run the same calls with a device that has shapes but no numbers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int64Array = npt.NDArray[np.int64]

ASYNCHRONOUS: Final = ("cuda",)
"""The kinds of devices that work by themselves."""


def works_by_itself(device: torch.device) -> bool:
    """Whether the host only tells the device what to do, and must ask when it is done."""
    return device.type in ASYNCHRONOUS


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's where the device can use it, once it has done what it was told before. What is there
    already stays."""
    if tensor.device.type != "cpu" or not works_by_itself(device):
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def all_to_device(arrays: Sequence[Int64Array], device: torch.device) -> list[Tensor]:
    """Flat arrays as tensors, in one copy. Where the host's memory is the device's too, they are the arrays'."""
    if not works_by_itself(device):
        return [torch.from_numpy(array) for array in arrays]
    ends = np.cumsum([len(array) for array in arrays])[:-1]
    return list(to_device(torch.from_numpy(np.concatenate(arrays)), device).tensor_split(ends.tolist()))


def to_host(tensor: Tensor) -> Tensor:
    """What a tensor will hold when a `Mark` set behind this is reached."""
    if not works_by_itself(tensor.device):
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class Mark:
    """A point in what a device that works by itself was told to do so far; without one, a moment."""

    __slots__ = ("_at", "_device", "_event")

    def __init__(self, device: torch.device | None) -> None:
        self._at = time.perf_counter()
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device is not None:
            # Who waits sleeps: spinning, it would take a core from the thread that tells the device what to do next.
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Returns when the device has come this far. Raises what torch raises if it never will."""
        if self._event is not None:
            torch.cuda.set_device(self._device)  # each thread has its own, and takes memory of the first one otherwise
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """Only once both are reached."""
        if self._event is None or earlier._event is None:
            return self._at - earlier._at
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds * 1e-3

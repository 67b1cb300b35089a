"""A device that works by itself, without one: torch's meta device keeps shapes and no numbers, and so cannot be asked
for any.

`Driver` watches what goes between it and the host, and lets the device's time pass where the host waits for an event.
Until then what was copied to the host is not there, and what is copied from the host must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")

aten = torch.ops.aten


class HostWaits(AssertionError):
    """What was asked of the device makes the host wait for it."""


class Driver(TorchDispatchMode):
    """Copies wait for nothing, or fail. What comes from the device is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.num_copies_in = 0
        self.num_copies_out = 0
        self.num_waits = 0
        self._pinned: list[Tensor] = []
        self._queue: list[Callable[[], None]] = []
        self._num_done = 0
        self._lock = Lock()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten.pin_memory.default:
            return self._pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **(kwargs | {"pin_memory": False})))
        if func is aten._to_copy.default and args[0].device != torch.device(kwargs.get("device") or args[0].device):
            if args[0].device.type != "cpu":
                raise HostWaits("the host asks the device for numbers")
            self._copy_in(args[0], is_waited_for=not kwargs.get("non_blocking"))
            return func(*args, **kwargs)
        if func is aten.copy_.default and args[0].device != args[1].device:
            return self._copy_out(*args)
        with self:  # what an operation is made of comes here too
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if func is aten.nonzero.default and args[0].device.type != "cpu":
            raise HostWaits("the host must know how many there are")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        assert len(devices) < 2, f"{func} is given tensors of the host and of the device"
        is_indexed = func in (aten.index.Tensor, aten.index_put_.default) and "meta" in devices
        if is_indexed and tensors[1].dtype == torch.bool:
            raise HostWaits("the host must know how many a mask holds")

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned.append(tensor)
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() for own in self._pinned)

    def _copy_in(self, source: Tensor, *, is_waited_for: bool) -> None:
        if is_waited_for or not self._is_pinned(source):
            raise HostWaits("the host waits for a copy to the device")
        self.num_copies_in += 1
        expected = source.clone()

        def read() -> None:
            assert source.equal(expected), "numbers were changed before the device had read them"

        self._queue.append(read)

    def _copy_out(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert target.device.type == "cpu", "a tensor of the device's is written over by the host"
        if not non_blocking or not self._is_pinned(target):
            raise HostWaits("the host waits for a copy from the device")
        self.num_copies_out += 1
        if target.dtype != torch.bool:
            target.fill_(-1)  # no token, and refused by whoever packs it

        def write() -> None:
            target.zero_()

        self._queue.append(write)
        return target

    def event(self, enable_timing: bool = False, blocking: bool = False) -> Event:
        """In the place of `torch.cuda.Event`."""
        assert enable_timing
        assert blocking
        return Event(self)

    def queued(self) -> int:
        with self._lock:
            return self._num_done + len(self._queue)

    def do_until(self, queued: int) -> None:
        """Lets the device do what it was told before so much was queued."""
        with self._lock, torch.inference_mode():
            self.num_waits += 1
            while self._num_done < queued:
                self._num_done += 1
                self._queue.pop(0)()

    def has_done(self, queued: int) -> bool:
        return self._num_done >= queued


class Event:
    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._at: int | None = None

    def record(self) -> None:
        self._at = self._driver.queued()

    def synchronize(self) -> None:
        assert self._at is not None
        self._driver.do_until(self._at)

    def elapsed_time(self, end: Event) -> float:
        """In milliseconds: one for each copy between them."""
        assert self._at is not None
        assert end._at is not None
        assert self._driver.has_done(end._at), "a time is asked for that is not over"
        return float(end._at - self._at)


class NoWaiting(TorchFunctionMode):
    """Refuses what would make a tensor on the device of numbers that nobody locked in memory."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        of_list = func in (torch.tensor, torch.as_tensor)
        if of_list and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            raise HostWaits("a tensor on the device is made of a list")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device.type == "meta":
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(index, list):
                    raise HostWaits("the device is given a list to index with")
        return func(*args, **kwargs)

"""How many bytes are alive: on the CPU by following storages, on GPUs as their allocator counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from deepspeed.accelerator import get_accelerator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class StorageTracker(TorchDispatchMode):
    """The bytes of all storages that ops allocated while it was active, exact after every op.

    It sits below autograd, on the thread that runs, so it sees backward, checkpointing's second
    forward and hooks too; and a storage counts for as long as anything holds it, be it a saved
    tensor that Python does not know of. Not seen: memory that no op returned, such as a kernel's
    or a communication library's own, and ``storage.resize_`` (DeepSpeed drops whole storages).
    """

    def __init__(self) -> None:
        super().__init__()
        # By address, which a weak reference keeps from being given to another storage.
        self._counted: dict[int, tuple[StorageWeakRef, int]] = {}
        self._older: dict[int, StorageWeakRef] = {}
        self._bound = 0  # bytes alive when they were last added up, and all allocated since
        self._peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # What an op is given was there before it; if it is unknown, it is older than the tracker,
        # and a view of it is no allocation. But torch.tensor() allocates out of sight and hands
        # its result to lift_fresh, which returns it.
        if func is not torch.ops.aten.lift_fresh.default:
            for storage in storages_in((args, kwargs)):
                if storage._cdata not in self._counted and storage._cdata not in self._older:
                    self._older[storage._cdata] = StorageWeakRef(storage)
        result = func(*args, **kwargs)
        for storage in storages_in(result):
            if storage._cdata in self._older:
                continue
            # Also where it is known: an op with out= may have resized it.
            reference, nbytes = self._counted.get(storage._cdata) or (StorageWeakRef(storage), 0)
            self._counted[storage._cdata] = reference, storage.nbytes()
            self._bound += storage.nbytes() - nbytes
        if self._bound > self._peak:  # below, there is no new peak whatever has been freed since
            self._peak = max(self._peak, self.live())
        return result

    def live(self) -> int:
        """Bytes alive now."""
        self._counted = {k: (r, n) for k, (r, n) in self._counted.items() if not r.expired()}
        self._older = {k: r for k, r in self._older.items() if not r.expired()}
        self._bound = sum(nbytes for _, nbytes in self._counted.values())
        return self._bound

    def reset_peak(self) -> None:
        """Start :meth:`peak` anew, from what is alive now."""
        self._peak = self.live()

    def peak(self) -> int:
        """The most bytes alive after any op since :meth:`reset_peak`."""
        return self._peak


def storages_in(value) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors in an op's arguments or results."""
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided and not value.is_meta:
            yield value.untyped_storage()
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from storages_in(item)


class DeviceCounter(contextlib.nullcontext):
    """What :class:`StorageTracker` tells, from a GPU's own allocator."""

    def __enter__(self) -> DeviceCounter:
        return self

    def live(self) -> int:
        get_accelerator().synchronize()
        return get_accelerator().memory_allocated()

    def reset_peak(self) -> None:
        get_accelerator().reset_peak_memory_stats()

    def peak(self) -> int:
        get_accelerator().synchronize()
        return get_accelerator().max_memory_allocated()


def memory_counter() -> StorageTracker | DeviceCounter:
    """What counts live bytes on this device; a context manager."""
    return StorageTracker() if get_accelerator().device_name() == "cpu" else DeviceCounter()

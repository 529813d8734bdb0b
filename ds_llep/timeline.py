"""Where a layer's time goes: named parts, each an NVTX range and a pair of device events.

Nothing is timed unless a :class:`Timeline` is active. Until then a part is one shared context
manager that does nothing: no event, no range, no synchronisation. Parts may nest; the name of an
inner one begins with its outer one's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator

_OFF = contextlib.nullcontext()
_active: Timeline | None = None


def part(name: str) -> contextlib.AbstractContextManager:
    """A context manager around one part of a layer's work, by name."""
    return _OFF if _active is None else _active.range(name)


class Timeline:
    """Records the parts that run while it is active; one at a time in a process.

    A part's time is that of the device between its two ends, on the stream that was current there:
    it includes waiting for the host or for another rank. On the CPU it is wall-clock time.
    """

    def __init__(self) -> None:
        self._on_cpu = get_accelerator().device_name() == "cpu"
        self._parts: list[list] = []  # name, start, end
        self._open: list[str] = []

    def __enter__(self) -> Timeline:
        global _active
        assert _active is None, "two timelines at once"
        _active = self
        return self

    def __exit__(self, *_) -> None:
        global _active
        _active = None

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Record one part."""
        self._open.append(name)
        name = "/".join(self._open)
        get_accelerator().range_push(f"llep {name}")
        recorded = [name, self._now(), None]
        self._parts.append(recorded)
        try:
            yield
        finally:
            recorded[2] = self._now()
            get_accelerator().range_pop()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Milliseconds of every part since the last call, in the order in which they first began.

        A part that ran more than once, in several layers or again in backward, is summed up. Waits
        for the device.
        """
        get_accelerator().synchronize()
        total: dict[str, float] = {}
        for name, start, end in self._parts:
            elapsed = 1e3 * (end - start) if self._on_cpu else start.elapsed_time(end)
            total[name] = total.get(name, 0.0) + elapsed
        self._parts.clear()
        return total

    def _now(self) -> Any:
        if self._on_cpu:
            return time.perf_counter()
        event = get_accelerator().Event(enable_timing=True)
        event.record()
        return event

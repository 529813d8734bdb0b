"""Times, peaks and errors that all ranks agree on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from ds_llep.bench.live_bytes import memory_counter

WARM_UPS = 3


def agreed_max(value: float) -> float:
    """The largest of the ranks' values; all ranks call."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64).to(get_accelerator().current_device_name())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def milliseconds(
    work: Callable[[], object],
    repeats: int,
    prepare: Callable[[int], object] = lambda step: None,
    warm_ups: int = WARM_UPS,
) -> float:
    """Median over the repeats of the slowest rank's time; all ranks call.

    Ranks start each repeat together, so that no time is that of waiting for a late start.
    ``prepare`` is called before each repeat with its number, and not timed.
    """
    times = []
    for step in range(warm_ups + repeats):
        prepare(step)
        dist.barrier()
        get_accelerator().synchronize()
        start = time.perf_counter()
        result = work()
        get_accelerator().synchronize()
        times.append(time.perf_counter() - start)
        del result
    return 1e3 * statistics.median(agreed_max(elapsed) for elapsed in times[warm_ups:])


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak memory of ``work`` above the start, of the hungriest rank; all ranks call."""
    with memory_counter() as memory:
        before = memory.live()
        memory.reset_peak()
        work()
        return int(agreed_max(memory.peak() - before))


def reset_allocator() -> None:
    """Make the caching allocator give back what it does not need, and count peaks from here."""
    get_accelerator().empty_cache()
    get_accelerator().reset_peak_memory_stats()


def allocator_peaks() -> dict[str, int | None]:
    """Since :func:`reset_allocator`, of the hungriest rank; None on the CPU, which caches nothing.

    All ranks call.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return {"peak_allocated_bytes": None, "peak_reserved_bytes": None}
    return {
        "peak_allocated_bytes": int(agreed_max(accelerator.max_memory_allocated())),
        "peak_reserved_bytes": int(agreed_max(accelerator.max_memory_reserved())),
    }


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative to that of ``exact``; all ranks call.

    Taken over the tensors of all ranks together. Differences are summed in fp64, in pieces that
    need little memory.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=exact.device)
    pieces = zip(found.flatten().split(2**24), exact.flatten().split(2**24), strict=True)
    for piece, wide in pieces:
        sums[0] += (piece.double() - wide.double()).square().sum()
        sums[1] += wide.double().square().sum()
    dist.all_reduce(sums)
    difference, size = sums.sqrt().tolist()
    return difference / size if size else difference

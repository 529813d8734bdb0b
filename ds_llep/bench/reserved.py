"""Does routing that changes at every step make the caching allocator grow?

The sizes of nearly all tensors of an MoE layer follow the routing. PyTorch's allocator on GPUs
keeps the blocks it has reserved, so sizes that never come back could make it reserve more and more.
What it has reserved is read after a tenth, a quarter, half and all of the steps. A level says that
it found what it needed in what it had, for this routing and so many steps; it is no proof for
others. The CPU's allocator keeps nothing, so there is nothing to read there.
"""

from __future__ import annotations

from unittest import mock

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from ds_llep import fetch
from ds_llep.bench import output
from ds_llep.bench.batch import Batch
from ds_llep.bench.measure import agreed_max, allocator_peaks, reset_allocator
from ds_llep.bench.records import Settings, conditions
from ds_llep.bench.routing import force_routing
from ds_llep.bench.stack import Stack, expert_parallel, results, shard, switch
from ds_llep.shards import weights_changed
from ds_llep.workspace import Workspace

READINGS = (10, 4, 2, 1)  # after the steps divided by these


def measure(settings: Settings, device: torch.device) -> list[dict]:
    """Run ``settings.repeats`` forward+backward of each workload and mode.

    Returns:
        A record of each: ``reserved_bytes`` by the number of steps done, ``peak_allocated_bytes``
        and ``peak_reserved_bytes`` of the hungriest rank, weights and all else included;
        ``alloc_retries``: how often it had to flush what it kept, because the device had no more.
        All of them None on the CPU.

    Raises:
        ValueError: settings that do not fit the ranks.
    """
    world, shape = dist.get_world_size(), settings.shape
    settings.check(world)
    ep_size, dtype = settings.ep_size or world, settings.torch_dtype(device)
    stack = Stack(shape, settings.layers, dtype, device, settings.seed)
    shard(stack, expert_parallel(shape, ep_size, dtype), settings.llep)
    like = torch.empty(0, dtype=dtype, device=device)
    readings = {max(1, settings.repeats // part) for part in READINGS}
    records = []
    for workload, mode in settings.points():
        batch = Batch(workload, shape, ep_size, settings.seed, like)
        switch(stack.layers, "llep" if mode == "llep" else "ep")
        reserved: dict[int, int | None] = {}
        with mock.patch.object(fetch, "WORKSPACE", Workspace()):
            reset_allocator()
            flushed = _statistics().get("num_alloc_retries", 0)
            for step in range(settings.repeats):
                for index, layer in enumerate(stack.layers):
                    force_routing(layer, batch.ids(step, index))
                weights_changed()  # as after an optimizer step
                results(stack, *batch.tokens(step))
                if step + 1 in readings:
                    reserved[step + 1] = _count("reserved_bytes.all.current")
            flushes = _count("num_alloc_retries", since=flushed)
            peaks = allocator_peaks()
        where = conditions(settings, workload, mode, world, ep_size, dtype)
        found = {"reserved_bytes": reserved, **peaks, "alloc_retries": flushes}
        records.append({"kind": "reserved", **where, **found})
    return records


def _count(name: str, since: int = 0) -> int | None:
    """One of the allocator's statistics, the largest of all ranks; None on the CPU. All call."""
    statistics = _statistics()
    return int(agreed_max(statistics[name] - since)) if statistics else None


def _statistics() -> dict[str, int]:
    """Of this rank's caching allocator; none on the CPU, where DeepSpeed has others."""
    on_cpu = get_accelerator().device_name() == "cpu"
    return {} if on_cpu else get_accelerator().memory_stats()


def show(title: str, records: list[dict]) -> None:
    """The records as a table."""
    steps = list(records[0]["reserved_bytes"])
    columns = ["workload", "mode", "peak allocated GB"]
    columns += [f"reserved after {step}" for step in steps] + ["flushes"]
    rows = []
    for record in records:
        reserved = [output.gigabytes(nbytes) for nbytes in record["reserved_bytes"].values()]
        peak = output.gigabytes(record["peak_allocated_bytes"])
        flushes = output.number(record["alloc_retries"], 0)
        rows.append([record["workload"], record["mode"], peak, *reserved, flushes])
    output.table(title, columns, rows)

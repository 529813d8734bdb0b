"""What each part of a layer takes at least: its FLOP or bytes at the machine's best rate.

A floor assumes that nothing pads, waits or starts. So no part can be faster as the algorithm
stands, and what is above its floor is what work on that part could win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_llep.bench import machine
from ds_llep.bench.calibrate import sizes
from ds_llep.bench.cost import traffic
from ds_llep.bench.machine import Points, seconds
from ds_llep.bench.rates import Rates
from ds_llep.bench.shapes import Shape
from ds_llep.plan import Plan


@dataclass(frozen=True)
class BestRates:
    """What nothing on this machine beats."""

    dense: float
    """FLOP/s."""
    memory: float
    """bytes/s, read and written together."""
    all_to_all: Points
    latency: float
    """Seconds of a small all-gather whose result the host reads."""


def best_rates(name: str | None, device: torch.device) -> BestRates:
    """Of the machine of that name or file; without one, of this machine, measured by all ranks.

    Raises:
        ValueError: no such machine.
        OSError: the file cannot be read.
    """
    if name is not None:
        known = machine.find(name)
        return BestRates(
            known.dense_rate, known.memory_rate, known.all_to_all_inside, known.latency_inside
        )
    rates = Rates(sizes(device), device)
    alone = rates.world == 1
    all_to_all = () if alone else rates.links(rates.all)[0]
    return BestRates(rates.dense_rate(), rates.memory_rate(), all_to_all, rates.latency(rates.all))


def of_parts(
    best: BestRates, plans: Sequence[Plan], shape: Shape, rank: int, dtype: torch.dtype
) -> dict[str, float]:
    """Milliseconds of each part of :class:`~ds_llep.timeline.Timeline` that has a floor.

    Args:
        best: the machine's rates.
        plans: of the layers of one step.
        shape: the layers'.
        rank: in the EP group.
        dtype: of the rows.
    """
    total: dict[str, float] = {}
    for plan in plans:
        for name, value in _of_layer(best, plan, shape, rank, dtype).items():
            *outer, _ = name.split("/")
            for key in (name, *outer):
                total[key] = total.get(key, 0.0) + 1e3 * value
    return total


def _of_layer(
    best: BestRates, plan: Plan, shape: Shape, rank: int, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of the innermost parts of one layer."""
    row_bytes = shape.hidden_size * dtype.itemsize
    rows_PP = traffic(plan)
    sent, received = rows_PP[rank], rows_PP[:, rank]
    crossing = max(sent.sum() - sent[rank], received.sum() - received[rank])
    link = float(seconds(best.all_to_all, crossing * row_bytes)) if crossing else 0.0
    copies, rows = int(sent.sum()), int(received.sum())
    tokens = copies // shape.top_k

    def passes(moved: int) -> float:
        return moved * row_bytes / best.memory

    # Read or written once each: the tokens, their copies in send order, the rows by expert.
    there, back = passes(tokens + copies + 2 * rows), passes(2 * rows + copies + tokens)
    first, last = rank * plan.experts_per_rank, (rank + 1) * plan.experts_per_rank
    home = int(plan.tokens_EP[first:last, rank].sum())
    gemm = {
        "home experts": shape.gemm_flop(home) / best.dense,
        "foreign experts": shape.gemm_flop(rows - home) / best.dense,
    }
    return {
        "counts": best.latency,
        "dispatch/rows": there,
        "dispatch/all-to-all": link,
        **gemm,
        "combine/rows": back,
        "combine/all-to-all": link,
        # The scores' gradient reads the copies and the tokens once more.
        "combine backward/rows": there + passes(copies + tokens),
        "combine backward/all-to-all": link,
        **{f"{name} backward": 2 * value for name, value in gemm.items()},
        "dispatch backward/rows": back,
        "dispatch backward/all-to-all": link,
    }

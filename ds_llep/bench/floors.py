"""What each part of a layer takes at least: its FLOP or bytes at the machine's best rate.

A floor assumes that nothing pads, waits or starts. So no part can be faster as the algorithm
stands, and what is above its floor is what work on that part could win. A part that waits for a
transfer begins when the work beside the transfer ends, so its floor is what that work, if it takes
no longer than its own floor, leaves of the transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ds_llep.bench import machine
from ds_llep.bench.calibrate import sizes
from ds_llep.bench.machine import Points, seconds
from ds_llep.bench.parcels import fewest_parcels, most_parcels, traffic
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
    best: BestRates,
    plans: Sequence[Plan],
    reached: Sequence[tuple[np.ndarray, np.ndarray]],
    shape: Shape,
    rank: int,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Milliseconds of each part of :class:`~ds_llep.timeline.Timeline` that has a floor.

    Args:
        best: the machine's rates.
        plans: of the layers of one step.
        reached: for each of them what :meth:`~ds_llep.bench.batch.Batch.reached` returns.
        shape: the layers'.
        rank: in the EP group.
        dtype: of the rows.
    """
    total: dict[str, float] = {}
    for plan, of_layer in zip(plans, reached, strict=True):
        for name, value in _of_layer(best, plan, *of_layer, shape, rank, dtype).items():
            *outer, _ = name.split("/")
            for key in (name, *outer):
                total[key] = total.get(key, 0.0) + 1e3 * value
    return total


def _of_layer(
    best: BestRates,
    plan: Plan,
    reached_PP: np.ndarray,
    alone_PE: np.ndarray,
    shape: Shape,
    rank: int,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Seconds of the innermost parts of one layer."""
    row_bytes, top_k = shape.hidden_size * dtype.itemsize, shape.top_k
    tokens = int(plan.counts_PE[rank].sum()) // top_k
    rows, own = int(plan.rank_load_P[rank]), int(traffic(plan)[rank, rank])
    most_PP = most_parcels(plan, reached_PP, alone_PE, top_k)
    sent, arrived = most_PP[rank].sum(), most_PP[:, rank].sum()
    used = fewest_parcels(plan, reached_PP, top_k)[rank].sum()  # of the parcels that are sent

    def passes(moved: float) -> float:
        return moved * row_bytes / best.memory

    def link(labels: int) -> float:  # 4 bytes for each choice: a score, or the row of a copy
        nbytes = max(sent, arrived) * (row_bytes + 4 * labels * top_k)
        return float(seconds(best.all_to_all, nbytes)) if nbytes else 0.0

    # Read or written once each: tokens, their parcels; tokens, own rows; parcels, their rows.
    own_pass = passes(tokens + own)
    there = passes(tokens + used) + own_pass + passes(arrived + rows - own)
    back = passes(rows - own + arrived) + passes(own + used + tokens)
    first, last = rank * plan.experts_per_rank, (rank + 1) * plan.experts_per_rank
    home = int(plan.tokens_EP[first:last, rank].sum())
    gemm = {
        "home experts": shape.gemm_flop(home) / best.dense,
        "foreign experts": shape.gemm_flop(rows - home) / best.dense,
    }
    behind = 2 / 3 * sum(gemm.values())  # backward's gradients of w1 and w3: two products of three
    return {
        "counts": best.latency,
        "dispatch/rows": there,
        "dispatch/all-to-all": max(link(labels=2) - own_pass, 0.0),
        **gemm,
        "combine/rows": back,
        "combine/all-to-all": link(labels=0),
        "combine backward/rows": there,
        "combine backward/all-to-all": max(link(labels=0) - own_pass, 0.0),
        **{f"{name} backward": 2 * value for name, value in gemm.items()},
        "dispatch backward/rows": back,
        "dispatch backward/all-to-all": max(link(labels=1) - behind, 0.0),
    }

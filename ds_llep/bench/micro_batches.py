"""Micro-batches to simulate: the counts of a stack of layers, from a workload or from a trace."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ds_llep.bench.shapes import Shape
from ds_llep.bench.workloads import Draw, parse
from ds_llep.trace import Trace

Layers = list[tuple[np.ndarray, Shape]]
"""Counts ``[P, E]`` and shape of each layer."""


def from_workload(
    name: str, shape: Shape, ranks: int, layers: int, step: int, seed: int, first: int = 0
) -> Layers:
    """The counts of a workload in one step, of the EP group that begins at source rank ``first``.

    Raises:
        ValueError: an unknown workload, or one that does not fit the shape.
    """
    E = shape.num_experts
    if E % ranks:
        raise ValueError(f"{E} experts do not divide evenly among {ranks} ranks")
    workload = parse(name, E // ranks)
    draws = [
        Draw(E, shape.top_k, shape.tokens, first, layer, step, seed) for layer in range(layers)
    ]
    return [(workload.counts_PE(ranks, draw), shape) for draw in draws]


def training_rows(trace: Trace, most: int) -> list[int]:
    """At most so many of a trace's training micro-batches, evenly spread: their rows.

    Raises:
        ValueError: there is none.
    """
    rows = np.flatnonzero(trace.training)
    if not len(rows):
        raise ValueError("the trace has no training micro-batch: it was recorded in evaluation")
    return rows[evenly(len(rows), most)].tolist()


def evenly(count: int, most: int) -> np.ndarray:
    """At most ``most`` of ``range(count)``, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def from_trace(trace: Trace, row: int, layers: Iterable[int], ranks: int) -> Layers:
    """A recorded micro-batch on so many ranks; layers that did not run in it are left out.

    Raises:
        ValueError: the counts cannot be split among so many ranks; none of the layers ran.
    """
    found = []
    for layer in layers:
        counts_PE = resplit(trace.counts(row, layer), ranks)
        if counts_PE.any():
            top_k = trace.top_k[layer]
            tokens = max(1, int(counts_PE.sum()) // (top_k * ranks))
            sizes = counts_PE.shape[1], trace.hidden_size[layer], trace.ffn_size[layer]
            found.append((counts_PE, Shape(*sizes, top_k, tokens)))
    if not found:
        raise ValueError(f"micro-batch {trace.micro_batches[row]} of the trace has no tokens")
    return found


def resplit(counts_PE: np.ndarray, ranks: int) -> np.ndarray:
    """The same tokens on another number of source ranks: int64 ``[ranks, E]``.

    Neighbours merge, or a rank's tokens of each expert are divided evenly among its successors,
    whose totals differ by one row at most.

    Raises:
        ValueError: neither number divides the other, or the experts do not divide evenly.
    """
    P, E = counts_PE.shape
    if E % ranks:
        raise ValueError(f"{E} experts do not divide evenly among {ranks} ranks")
    if P % ranks == 0:
        return counts_PE.reshape(ranks, P // ranks, E).sum(1)
    if ranks % P:
        raise ValueError(
            f"the trace is of {P} source ranks; --ranks must divide that or be a multiple, "
            f"got {ranks}"
        )
    parts = ranks // P
    # Dealt out in turn, one expert after the other.
    ends_PE = counts_PE.cumsum(axis=1)
    turn = np.arange(parts)[:, None, None]
    dealt = (ends_PE + parts - 1 - turn) // parts  # of the first rows, those in each turn
    split = np.diff(dealt, axis=2, prepend=0)
    return split.transpose(1, 0, 2).reshape(ranks, E)

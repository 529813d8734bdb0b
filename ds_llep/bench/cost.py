"""What one MoE layer costs with one plan on one machine: seconds by part, bytes, rows in memory.

Beside the stages of :mod:`ds_llep.bench.stages` a layer exchanges counts, plans on the host, and
has an overhead that depends on nothing.

The model counts FLOP, bytes and tiles and knows no congestion, no power limit and no memory
allocator; what it was compared with is in docs/simulate.md.

Shape letters: `P` ranks of the EP group, `E` experts, `M` home experts of a rank, `D` hidden size,
`F` expert FFN size, `K` experts per token, `G` groups of rows, one for each expert on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ds_llep.bench import stages
from ds_llep.bench.machine import DTYPES, Machine
from ds_llep.bench.parcels import distinct, expected_parcels, traffic
from ds_llep.bench.primitives import Kernels, Links
from ds_llep.bench.shapes import Shape
from ds_llep.plan import Plan


class Bytes(NamedTuple):
    """What crosses links, inside nodes and between them."""

    inside: float
    between: float


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one layer and micro-batch, of the slowest rank at each stage, and its traffic."""

    forward: dict[str, float]
    """Seconds by part: counts, overhead, dispatch, home, combine; llep's also plan, wait (for
    foreign weights) and foreign."""
    backward: dict[str, float]
    """Seconds by part: overhead, combine, home, dispatch; llep's also wait, foreign, return."""
    row_bytes: Bytes
    """Of the four all-to-alls together, all ranks'."""
    weight_bytes: Bytes
    """Of fetches and of returned gradients, all ranks'."""
    rows_P: np.ndarray
    """Rows that each rank computes."""
    kept_bytes_P: np.ndarray
    """What each rank keeps of rows from forward to backward: dispatched rows, gate and up; in
    AutoEP's layer also combined rows."""

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())


def ep_plan(counts_PE: np.ndarray) -> Plan:
    """Standard expert parallelism: every token at its expert's home."""
    P, E = counts_PE.shape
    tokens_EP = np.zeros((E, P), dtype=np.int64)
    tokens_EP[np.arange(E), np.arange(E) // (E // P)] = counts_PE.sum(0)
    return Plan(counts_PE, tokens_EP, bypassed=True)


def spilled(plan: Plan) -> np.ndarray:
    """int64 ``[P, P]``: experts that each home rank lends to each helper."""
    lent_PP = np.zeros((plan.num_ranks, plan.num_ranks), dtype=np.int64)
    for spill in plan.spills:
        lent_PP[spill.home, spill.helper] += 1
    return lent_PP


def layer_cost(
    plan: Plan,
    shape: Shape,
    machine: Machine,
    *,
    fetched_PP: np.ndarray | None = None,
    fetched_again_PP: np.ndarray | None = None,
    ranks_per_node: int | None = None,
    dtype: str | None = None,
) -> LayerCost:
    """The cost of llep's layer with a plan.

    Args:
        plan: of the EP group; ranks of a node are neighbours in it.
        shape: the layer's; tokens are the plan's.
        machine: what it runs on.
        fetched_PP: experts sent from each home to each helper in forward; None: all that spill.
        fetched_again_PP: the same in backward; None: none, they are still there.
        ranks_per_node: None: the machine's.
        dtype: of rows and weights; None: the machine's.
    """
    kernels, links = _machinery(shape, machine, plan.num_ranks, ranks_per_node, dtype)
    lent_PP, home_MP = spilled(plan), _home_rows(plan)
    foreign_GP = np.zeros((len(plan.spills), plan.num_ranks))
    for group, spill in enumerate(plan.spills):
        foreign_GP[group, spill.helper] = spill.tokens
    work = stages.Work(
        top_k=shape.top_k,
        home=kernels.products(home_MP, np.ones_like(home_MP, dtype=bool)),
        foreign=kernels.products(foreign_GP, foreign_GP > 0),
        foreign_rows_P=foreign_GP.sum(0),
        rows_PP=traffic(plan),
        parcels_PP=expected_parcels(plan, shape.top_k),
        fetched_PP=lent_PP if fetched_PP is None else fetched_PP,
        fetched_again_PP=0 * lent_PP if fetched_again_PP is None else fetched_again_PP,
        returned_PP=lent_PP,
    )
    planning = machine.plan_seconds_per_expert * plan.num_experts
    planning += machine.plan_seconds_per_choice * len(plan.spills) * plan.num_ranks
    return _llep_cost(work, kernels, links, machine, planning)


def ideal_cost(
    counts_PE: np.ndarray,
    shape: Shape,
    machine: Machine,
    *,
    ranks_per_node: int | None = None,
    dtype: str | None = None,
) -> LayerCost:
    """The cost of llep's layer if the router were perfectly even: equal rows on all ranks.

    Each rank sends an equal share of its rows to every rank; products run at the machine's best
    rate without a row of padding; nothing is planned, and no weights move. Expert time is never
    more than a plan's. A plan can still win in traffic, since it may leave tokens on the rank that
    they are on.
    """
    P = len(counts_PE)
    kernels, links = _machinery(shape, machine, P, ranks_per_node, dtype)
    none_PP, none_GP = np.zeros((P, P)), np.zeros((0, P))
    active = np.count_nonzero(counts_PE.sum(0)) / P
    rows_PP = np.repeat(counts_PE.sum(1, keepdims=True) / P, P, axis=1)
    parcels_PP = distinct(rows_PP, shape.top_k)
    np.fill_diagonal(parcels_PP, 0)
    work = stages.Work(
        top_k=shape.top_k,
        home=kernels.even_products(counts_PE.sum() / P, active, P),
        foreign=kernels.products(none_GP, none_GP > 0),
        foreign_rows_P=np.zeros(P),
        rows_PP=rows_PP,
        parcels_PP=parcels_PP,
        fetched_PP=none_PP,
        fetched_again_PP=none_PP,
        returned_PP=none_PP,
    )
    return _llep_cost(work, kernels, links, machine, planning=0.0)


def autoep_cost(
    counts_PE: np.ndarray,
    shape: Shape,
    machine: Machine,
    *,
    ranks_per_node: int | None = None,
    dtype: str | None = None,
) -> LayerCost:
    """The cost of AutoEP's layer: every token at its expert's home."""
    plan = ep_plan(counts_PE)
    kernels, links = _machinery(shape, machine, plan.num_ranks, ranks_per_node, dtype)
    home_MP, rows_PP = _home_rows(plan), traffic(plan)
    products = kernels.products(home_MP, np.ones_like(home_MP, dtype=bool))
    forward, backward = stages.autoep(products, rows_PP, shape.top_k, kernels, links)
    crossing = 2 * (rows_PP + rows_PP.T) * kernels.row_bytes
    return LayerCost(
        forward={
            "counts": links.latency,
            "overhead": machine.autoep_overhead_forward,
            **forward,
        },
        backward={"overhead": machine.autoep_overhead_backward, **backward},
        row_bytes=Bytes(*links.crossing(crossing)),
        weight_bytes=Bytes(0.0, 0.0),
        rows_P=rows_PP.sum(0),
        kept_bytes_P=kernels.kept_bytes(rows_PP.sum(0)) + rows_PP.sum(1) * kernels.row_bytes,
    )


def _llep_cost(
    work: stages.Work, kernels: Kernels, links: Links, machine: Machine, planning: float
) -> LayerCost:
    forward, backward = stages.llep(work, kernels, links)
    moved_PP = work.fetched_PP + work.fetched_again_PP + work.returned_PP.T
    rows_P = work.rows_PP.sum(0)
    return LayerCost(
        forward={
            "counts": links.latency,
            "plan": planning,
            "overhead": machine.overhead_forward,
            **forward,
        },
        backward={"overhead": machine.overhead_backward, **backward},
        row_bytes=Bytes(*links.crossing(stages.crossing(work, kernels))),
        weight_bytes=Bytes(*links.crossing(moved_PP * kernels.expert_bytes)),
        rows_P=rows_P,
        kept_bytes_P=kernels.kept_bytes(rows_P),
    )


def _machinery(
    shape: Shape, machine: Machine, num_ranks: int, ranks_per_node: int | None, dtype: str | None
) -> tuple[Kernels, Links]:
    kernels = Kernels(machine, shape, DTYPES[dtype or machine.dtype])
    return kernels, Links(machine, num_ranks, ranks_per_node)


def _home_rows(plan: Plan) -> np.ndarray:
    """``[M, P]``: rows of each rank's home experts."""
    P, M = plan.num_ranks, plan.experts_per_rank
    return plan.tokens_EP.reshape(P, M, P).diagonal(axis1=0, axis2=2)

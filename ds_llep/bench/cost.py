"""What one MoE layer costs with one plan on one machine: seconds by part, bytes, rows in memory.

A layer is a few stages, each ended by a collective, so a stage lasts as long as its slowest rank:

    forward:   counts, plan, rows into send order | all-to-all | experts | all-to-all | weighted sum
    backward:  gradients into send order | all-to-all | experts | all-to-all | sum

In the experts stage a rank regroups its rows, computes home and foreign experts, and in backward
waits for what returns. Weights travel before the all-to-all that follows their fetch, not beside
it: both use the same links and, with NCCL, the same communicator, which runs one thing at a time.
What that delays is the part "wait".

The model counts FLOP, bytes and tiles and knows no congestion, no power limit and no memory
allocator; what it was compared with is in docs/simulate.md.

Shape letters: `P` ranks of the EP group, `E` experts, `M` home experts of a rank, `D` hidden size,
`F` expert FFN size, `K` experts per token, `G` groups of rows, one for each expert on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ds_llep.bench.machine import DTYPES, Machine
from ds_llep.bench.primitives import Kernels, Links, Products
from ds_llep.bench.shapes import Shape
from ds_llep.plan import Plan

_SUM_BYTES = 10  # of memory traffic for each element of a gradient that is added at home in fp32


class Bytes(NamedTuple):
    """What crosses links, inside nodes and between them."""

    inside: float
    between: float


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one layer and micro-batch, of the slowest rank at each stage, and its traffic."""

    forward: dict[str, float]
    """Seconds by part: counts, plan, overhead, dispatch, wait, home, foreign, combine."""
    backward: dict[str, float]
    """Seconds by part: overhead, combine, wait, home, foreign, return, dispatch."""
    row_bytes: Bytes
    """Of the four all-to-alls together, all ranks'."""
    weight_bytes: Bytes
    """Of fetches and of returned gradients, all ranks'."""
    rows_P: np.ndarray
    """Rows that each rank computes."""
    kept_bytes_P: np.ndarray
    """Rows that each rank keeps from forward to backward: dispatched rows, gate, up, combined."""

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


def traffic(plan: Plan) -> np.ndarray:
    """int64 ``[P, P]``: rows from each source rank to each computing rank, of all experts.

    Row s is ``plan.send_EP(s).sum(0)``.
    """
    P, M = plan.num_ranks, plan.experts_per_rank
    rows_PP = plan.counts_PE.reshape(P, P, M).sum(2)
    for expert in {spill.expert for spill in plan.spills}:
        rows_PP[:, expert // M] -= plan.counts_PE[:, expert]
        source, computing = plan.counts_PE[:, expert].cumsum(), plan.tokens_EP[expert].cumsum()
        ends = np.minimum.outer(source, computing)
        starts = np.maximum.outer(
            source - plan.counts_PE[:, expert], computing - plan.tokens_EP[expert]
        )
        rows_PP += np.maximum(ends - starts, 0)
    return rows_PP


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
    autoep: bool = False,
) -> LayerCost:
    """The cost of a plan.

    Args:
        plan: of the EP group; ranks of a node are neighbours in it.
        shape: the layer's; tokens are the plan's.
        machine: what it runs on.
        fetched_PP: experts sent from each home to each helper in forward; None: all that spill.
        fetched_again_PP: the same in backward; None: none, they are still there.
        ranks_per_node: None: the machine's.
        dtype: of rows and weights; None: the machine's.
        autoep: with the overheads of AutoEP's layer, and no plan, as it makes none.
    """
    P, M = plan.num_ranks, plan.experts_per_rank
    none_PP, lent_PP = np.zeros((P, P)), spilled(plan)
    home_MP = plan.tokens_EP.reshape(P, M, P).diagonal(axis1=0, axis2=2)
    foreign_GP = np.zeros((len(plan.spills), P))
    for group, spill in enumerate(plan.spills):
        foreign_GP[group, spill.helper] = spill.tokens
    planning = 0.0
    if not autoep:
        planning += machine.plan_seconds_per_expert * plan.num_experts
        planning += machine.plan_seconds_per_choice * len(plan.spills) * P
    kernels = Kernels(machine, shape, DTYPES[dtype or machine.dtype])
    return _cost(
        kernels,
        Links(machine, P, ranks_per_node),
        shape,
        home=kernels.products(home_MP, np.ones_like(home_MP, dtype=bool)),
        foreign=kernels.products(foreign_GP, foreign_GP > 0),
        rows_PP=traffic(plan),
        foreign_rows_P=foreign_GP.sum(0),
        fetched_PP=lent_PP if fetched_PP is None else fetched_PP,
        fetched_again_PP=none_PP if fetched_again_PP is None else fetched_again_PP,
        returned_PP=lent_PP,
        planning=planning,
        overheads=_overheads(machine, autoep),
    )


def ideal_cost(
    counts_PE: np.ndarray,
    shape: Shape,
    machine: Machine,
    *,
    ranks_per_node: int | None = None,
    dtype: str | None = None,
) -> LayerCost:
    """The cost if the router were perfectly even: equal rows on all ranks, no weights moved.

    Each rank sends an equal share of its rows to every rank; products run at the machine's best
    rate without a row of padding; nothing is planned. Expert time is never more than a plan's. A
    plan can still win in traffic, since it may leave tokens on the rank that they are on.
    """
    P = len(counts_PE)
    none_PP, none_GP = np.zeros((P, P)), np.zeros((0, P))
    active = np.count_nonzero(counts_PE.sum(0)) / P
    kernels = Kernels(machine, shape, DTYPES[dtype or machine.dtype])
    return _cost(
        kernels,
        Links(machine, P, ranks_per_node),
        shape,
        home=kernels.even_products(counts_PE.sum() / P, active, P),
        foreign=kernels.products(none_GP, none_GP > 0),
        rows_PP=np.repeat(counts_PE.sum(1, keepdims=True) / P, P, axis=1),
        foreign_rows_P=np.zeros(P),
        fetched_PP=none_PP,
        fetched_again_PP=none_PP,
        returned_PP=none_PP,
        planning=0.0,
        overheads=_overheads(machine, autoep=False),
    )


def _cost(
    kernels: Kernels,
    links: Links,
    shape: Shape,
    *,
    home: Products,
    foreign: Products,
    rows_PP: np.ndarray,
    foreign_rows_P: np.ndarray,
    fetched_PP: np.ndarray,
    fetched_again_PP: np.ndarray,
    returned_PP: np.ndarray,
    planning: float,
    overheads: tuple[float, float],
) -> LayerCost:
    """Put the stages together; see the module's docstring."""
    row, expert = kernels.row_bytes, kernels.expert_bytes
    sent_P, rows_P = rows_PP.sum(1), rows_PP.sum(0)
    home_rows_P = rows_P - foreign_rows_P
    all_to_all = links.all_to_all(rows_PP * row)  # as long there as back
    order_P, regroup_P = kernels.passes(2 * sent_P * row), kernels.passes(2 * rows_P * row)
    sum_P = kernels.passes(sent_P * row * (1 + 1 / shape.top_k))

    home_P = home.forward + kernels.activation(home_rows_P)
    foreign_P = foreign.forward + kernels.activation(foreign_rows_P)
    slowest = (2 * regroup_P + home_P + foreign_P).argmax()
    forward = {
        "counts": links.latency,
        "plan": planning,
        "overhead": overheads[0],
        "dispatch": order_P.max() + all_to_all + regroup_P[slowest],
        "wait": _delay(order_P, links.transfer(fetched_PP * expert)),
        "home": home_P[slowest],
        "foreign": foreign_P[slowest],
        "combine": regroup_P[slowest] + all_to_all + sum_P.max(),
    }

    # Two activations' worth of traffic, and the sum of the two gradients of the rows.
    home_P = home.hidden + 2 * kernels.activation(home_rows_P)
    home_P = home_P + kernels.passes(3 * home_rows_P * row)
    foreign_P = foreign.hidden + 2 * kernels.activation(foreign_rows_P) + foreign.gate_up
    foreign_P = foreign_P + kernels.passes(3 * foreign_rows_P * row)
    sent_at_P = regroup_P + home_P + foreign_P
    computed_P = sent_at_P + home.gate_up
    return_P = _arrival(sent_at_P, returned_PP, links.transfer(returned_PP.T * expert)) - computed_P
    added_P = kernels.passes(returned_PP.sum(1) * shape.expert_numel * _SUM_BYTES)
    return_P = np.maximum(return_P, 0) + added_P
    slowest = (computed_P + return_P + regroup_P).argmax()
    order_P = order_P + sum_P  # the scores' gradient reads all rows once more
    backward = {
        "overhead": overheads[1],
        "combine": order_P.max() + all_to_all + regroup_P[slowest],
        "wait": _delay(order_P, links.transfer(fetched_again_PP * expert)),
        "home": (home_P + home.gate_up)[slowest],
        "foreign": foreign_P[slowest],
        "return": return_P[slowest],
        "dispatch": regroup_P[slowest] + all_to_all + sum_P.max(),
    }
    weights_PP = fetched_PP + fetched_again_PP + returned_PP.T
    gate_and_up = 2 * shape.ffn_size * kernels.element_size
    return LayerCost(
        forward={name: float(value) for name, value in forward.items()},
        backward={name: float(value) for name, value in backward.items()},
        row_bytes=Bytes(*links.crossing(2 * (rows_PP + rows_PP.T) * row)),
        weight_bytes=Bytes(*links.crossing(weights_PP * expert)),
        rows_P=rows_P,
        kept_bytes_P=rows_P * (row + gate_and_up) + sent_P * row,
    )


def _delay(before_P: np.ndarray, fetch_P: np.ndarray) -> float:
    """How much later than without a fetch the last rank is ready for an all-to-all."""
    return max(0.0, fetch_P.max() - before_P.max())


def _arrival(ready_P: np.ndarray, returned_PP: np.ndarray, transfer_P: np.ndarray) -> np.ndarray:
    """``[P]``: when a rank's returns are done, which start when both ends are ready; 0 for none."""
    together_PP = np.where((returned_PP + returned_PP.T) > 0, np.maximum.outer(ready_P, ready_P), 0)
    return np.where(transfer_P > 0, together_PP.max(1) + transfer_P, 0)


def _overheads(machine: Machine, autoep: bool) -> tuple[float, float]:
    if autoep:
        return machine.autoep_overhead_forward, machine.autoep_overhead_backward
    return machine.overhead_forward, machine.overhead_backward

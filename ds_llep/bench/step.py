"""One training step of a stack of MoE layers: each layer's plan and cost, and what the cache saves.

Forward runs through the layers in order, backward in reverse. What a helper still has in its
workspace is not fetched again, as in training; between steps weights change, so each step starts
with an empty one. One micro-batch is a step: with gradient accumulation less is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ds_llep.bench.cost import Bytes, LayerCost, autoep_cost, ideal_cost, layer_cost
from ds_llep.bench.machine import DTYPES, Machine
from ds_llep.bench.shapes import Shape
from ds_llep.config import CostConfig, LLEPConfig
from ds_llep.costs import Costs
from ds_llep.plan import Plan, make_plan
from ds_llep.rates import H200, Rates
from ds_llep.workspace import Directory

MODES = ("ep", "llep", "ideal")


@dataclass(frozen=True)
class System:
    """What a step runs on."""

    machine: Machine
    ranks_per_node: int
    dtype: str


@dataclass(frozen=True)
class StepCost:
    """A step's MoE layers together, or the mean over steps."""

    forward: float
    """Seconds."""
    backward: float
    """Seconds."""
    load_ratio_mean: float
    """Over the layers, of max / mean rows of a rank."""
    load_ratio_max: float
    row_bytes: Bytes
    """That cross links in all-to-alls, all ranks', as are the next."""
    weight_bytes: Bytes
    """Fetched weights and returned gradients."""
    kept_bytes: float
    """Rows kept from forward to backward in all layers, by the rank that keeps most."""
    spilled_share: float
    """Of the rows, those computed away from home."""
    foreign_experts: float
    """(expert, helper) pairs, all layers'."""

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


def step_cost(
    mode: str,
    layers: Sequence[tuple[np.ndarray, Shape]],
    config: LLEPConfig,
    system: System,
) -> StepCost:
    """What one step costs.

    Args:
        mode: ``"ep"``: AutoEP, every token at its expert's home; ``"llep"``: as planned;
            ``"ideal"``: see :func:`ds_llep.bench.cost.ideal_cost`.
        layers: counts ``[P, E]`` and shape of each.
        config: llep's settings.
        system: what it runs on.

    Raises:
        ValueError: ``max_foreign_bytes`` is less than one expert of a layer.
    """
    machine = system.machine
    where = {"ranks_per_node": system.ranks_per_node, "dtype": system.dtype}
    if mode == "ideal":
        costs = [ideal_cost(counts_PE, shape, machine, **where) for counts_PE, shape in layers]
        return _total(costs)
    if mode == "ep":
        costs = [autoep_cost(counts_PE, shape, machine, **where) for counts_PE, shape in layers]
        return _total(costs)
    shapes, element_size = [shape for _, shape in layers], DTYPES[system.dtype]
    plans = [plan_layer(counts_PE, shape, config, system) for counts_PE, shape in layers]
    fetched, fetched_again = fetches(plans, shapes, config, element_size)
    costs = [
        layer_cost(plan, shape, machine, fetched_PP=first_PP, fetched_again_PP=again_PP, **where)
        for plan, shape, first_PP, again_PP in zip(
            plans, shapes, fetched, fetched_again, strict=True
        )
    ]
    return _total(costs, plans)


def plan_layer(counts_PE: np.ndarray, shape: Shape, config: LLEPConfig, system: System) -> Plan:
    """The plan of one layer; planner "cost" has its prices from the machine and the config.

    Raises:
        ValueError: as :func:`step_cost`.
    """
    room, _ = config.with_room(shape.expert_numel * DTYPES[system.dtype])
    if config.planner != "cost":
        return make_plan(counts_PE, room)
    nodes_P = np.arange(len(counts_PE)) // system.ranks_per_node
    return make_plan(counts_PE, room, costs_of(counts_PE, shape, config, system), nodes_P)


def costs_of(counts_PE: np.ndarray, shape: Shape, config: LLEPConfig, system: System) -> Costs:
    """The prices that planner "cost" would plan one layer with; arguments as for planning."""
    return rates_of(system.machine, config.cost).costs(
        *(shape.hidden_size, shape.ffn_size, shape.top_k, len(counts_PE)),
        DTYPES[system.dtype],
        fetches=1 if config.backward_weights == "keep" else 2,
    )


def rates_of(machine: Machine, given: CostConfig) -> Rates:
    """What planner "cost" would plan with on a machine.

    What is not given is the machine's, at its best: products, and the largest all-to-all. It says
    nothing of foreign experts and of what is hidden, which are as on an H200.
    """
    known = {
        **H200.in_units(),
        "tflops": max(rate for _, rate in machine.grouped_rate) / 1e12,
        "inside_gbytes": machine.all_to_all_inside[-1][1] / 1e9,
        "between_gbytes": machine.all_to_all_between[-1][1] / 1e9,
    }
    return Rates.of({**known, **given.model_dump(include=set(known), exclude_none=True)})


def fetches(
    plans: Sequence[Plan], shapes: Sequence[Shape], config: LLEPConfig, element_size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Which experts travel in a step, by layer: ``[P, P]`` from home to helper.

    Returns:
        Those of forward, and those of backward.
    """
    P = plans[0].num_ranks
    # After some steps a workspace has grown to what its rank's hungriest layer needs.
    needed_P = np.max([np.bincount(_helpers(plan), minlength=P) for plan in plans], axis=0)
    directories: list[Directory] = []
    opened_for: tuple[int, int] | None = None

    def fetch(layer: int) -> np.ndarray:
        nonlocal opened_for
        plan, shape = plans[layer], shapes[layer]
        if opened_for != (shape.hidden_size, shape.ffn_size):  # bundles of another layout
            _, room = config.with_room(shape.expert_numel * element_size)
            directories[:] = [
                Directory(int(needed_P[p]) if room is None else room) for p in range(P)
            ]
            opened_for = shape.hidden_size, shape.ffn_size
        sent_PP = np.zeros((P, P), dtype=np.int64)
        for helper in sorted(set(_helpers(plan))):
            _, missing = directories[helper].place(layer, plan.foreign_experts(helper))
            for expert, _ in missing:
                sent_PP[expert // plan.experts_per_rank, helper] += 1
            if not config.weight_cache:
                directories[helper].forget()
        return sent_PP

    forward = [fetch(layer) for layer in range(len(plans))]
    if config.backward_weights == "keep":
        return forward, [np.zeros((P, P), dtype=np.int64) for _ in plans]
    return forward, [fetch(layer) for layer in reversed(range(len(plans)))][::-1]


def mean(steps: Sequence[StepCost]) -> StepCost:
    """The mean of all but the largest load ratio and the most kept bytes, which are maxima."""
    means = {
        name: sum(getattr(step, name) for step in steps) / len(steps)
        for name in ("forward", "backward", "load_ratio_mean", "spilled_share", "foreign_experts")
    }
    for name in ("row_bytes", "weight_bytes"):
        pairs = [getattr(step, name) for step in steps]
        means[name] = Bytes(*(sum(parts) / len(steps) for parts in zip(*pairs, strict=True)))
    for name in ("load_ratio_max", "kept_bytes"):
        means[name] = max(getattr(step, name) for step in steps)
    return replace(steps[0], **means)


def _total(costs: Sequence[LayerCost], plans: Sequence[Plan] = ()) -> StepCost:
    ratios = [_load_ratio(cost.rows_P) for cost in costs]
    rows = sum(float(cost.rows_P.sum()) for cost in costs)
    spills = [spill for plan in plans for spill in plan.spills]
    return StepCost(
        forward=sum(sum(cost.forward.values()) for cost in costs),
        backward=sum(sum(cost.backward.values()) for cost in costs),
        load_ratio_mean=sum(ratios) / len(ratios),
        load_ratio_max=max(ratios),
        row_bytes=_sum(cost.row_bytes for cost in costs),
        weight_bytes=_sum(cost.weight_bytes for cost in costs),
        kept_bytes=float(sum(cost.kept_bytes_P for cost in costs).max()),
        spilled_share=sum(spill.tokens for spill in spills) / max(rows, 1),
        foreign_experts=len(spills),
    )


def _load_ratio(rows_P: np.ndarray) -> float:
    return float(rows_P.max() / rows_P.mean()) if rows_P.any() else 1.0


def _sum(pairs: Iterable[Bytes]) -> Bytes:
    return Bytes(*map(sum, zip(*pairs, strict=True)))


def _helpers(plan: Plan) -> list[int]:
    return [spill.helper for spill in plan.spills]

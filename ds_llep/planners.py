"""The planners: which tokens leave the home ranks of their experts, and for where.

A planner is a function of integers and the config, so that every rank finds the same. The planning
loop runs on Python ints, which beat small numpy arrays.

Shape letters: `E` experts, `P` ranks of the group, `M = E / P` experts at home on a rank.
"""

from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from ds_llep.costs import Costs
from ds_llep.kernels import planner_cost


def plan_lla(load_E: np.ndarray, home_load_P: list[int], config):
    """Least-Loaded Assignment (LLEP, arXiv 2601.17111, Algorithms 2 and 3) on integers.

    A rank's effective load is what it was assigned plus its home experts that are not placed yet.
    Experts are placed by load, largest first. Home takes what fits into its capacity, the rest
    goes chunk by chunk to the other rank with the least effective load. With `capacity_factor`
    >= 1 no rank ends above the largest home load.

    Returns:
        `({(expert, helper): tokens}, capped_tokens)`: what leaves home, one entry per segment.
    """
    P, E = len(home_load_P), len(load_E)
    M, total = E // P, sum(home_load_P)
    mean = total // P
    factor = 1.0 if config.capacity_factor is None else config.capacity_factor
    # One double product, truncated: the same IEEE arithmetic, so the same integer on every rank.
    capacity = max(1, int(factor * mean) if mean else total)
    limit = E if config.max_foreign_experts is None else config.max_foreign_experts
    foreign_experts_P = [0] * P
    effective_P = list(home_load_P)
    capped_P = [0] * P
    moved: dict[tuple[int, int], int] = {}

    # A heap of the ranks that may help, effective load and rank in one int: its first is the least
    # loaded rank, and of equally loaded ones the lowest. Outdated entries are dropped when met.
    entry_P = [load * P + rank for rank, load in enumerate(home_load_P)]
    helpers = entry_P.copy() if limit else []
    heapify(helpers)
    # Stable: of equally loaded experts the lower id comes first.
    order = np.argsort(-load_E, kind="stable").tolist()
    load_E = load_E.tolist()
    for expert in order:
        home = expert // M
        # The effective load already counts this expert, so it alone says what does not fit.
        rest = min(load_E[expert], effective_P[home] - capacity)
        if rest <= 0:
            continue
        effective_P[home] -= rest
        entry_P[home] = None  # until what it keeps is known
        taken: dict[int, int] = {}
        while rest:
            # The paper sorts the ranks by effective load for every chunk and walks them. The first
            # has the most room: where it must refuse a chunk every rank must, and then it is also
            # the one that takes all the rest.
            while helpers and helpers[0] != entry_P[helpers[0] % P]:
                heappop(helpers)
            if not helpers:
                break
            helper_load, helper = divmod(helpers[0], P)
            room = capacity - helper_load
            if room <= 0 and helper_load > min(effective_P):
                # Less loaded ranks are at their limit; this one would become the overloaded one.
                break
            chunk = min(rest, room)
            if chunk < max(1, config.min_tokens_per_gemm):
                chunk = rest  # it is all that is left, or no rank takes a chunk
            taken[helper] = taken.get(helper, 0) + chunk
            effective_P[helper] += chunk
            entry_P[helper] += chunk * P
            heapreplace(helpers, entry_P[helper])
            rest -= chunk
        effective_P[home] += rest
        # Other experts may still relieve this home of what this one could not: count it once.
        capped_P[home] = min(capped_P[home] + rest, effective_P[home] - capacity)
        # A rank that takes several chunks of an expert holds one foreign expert more.
        for helper, tokens in taken.items():
            moved[expert, helper] = tokens
            foreign_experts_P[helper] += 1
            if foreign_experts_P[helper] == limit:
                entry_P[helper] = None
        if foreign_experts_P[home] < limit:
            entry_P[home] = effective_P[home] * P + home
            heappush(helpers, entry_P[home])
        if max(effective_P) <= capacity:
            break
    return moved, sum(capped_P)


def plan_cost(
    counts_PE: np.ndarray, config, costs: Costs, nodes_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The plan whose slowest rank is the fastest, as far as a local search finds it.

    Its cost by `rank_costs` is not above that of standard expert parallelism, nor above that of
    `plan_lla` where this keeps within the limits: no spill has less than `min_tokens_per_gemm`
    tokens, no rank more than `max_foreign_experts`, and no rank gets more rows by helping than
    `capacity_factor` times the mean (None: any number). The search is in kernels/planner_cost.c.

    Args:
        counts_PE: int64 [P, E], each rank's own tokens per expert.
        config: its threshold and its three limits.
        costs: prices.
        nodes_P: int64 [P], the node of each rank.

    Returns:
        int64 [E, P], tokens of each expert that each rank computes; int64 [E, P], what of them
        stays in nodes (`near_EP` of cut.py); and whether any spill.
    """
    tokens_EP, near_EP, spills, _ = planner_cost.plan_cost(
        counts_PE,
        nodes_P,
        costs.prices,
        config.min_tokens_per_gemm,
        config.max_foreign_experts,
        config.capacity_factor,
        config.imbalance_threshold,
    )
    return tokens_EP, near_EP, spills > 0


PLANNERS = ("lla", "cost")

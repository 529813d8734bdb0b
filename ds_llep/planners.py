"""The planners: which tokens leave the home ranks of their experts, and for where.

A planner is a function of integers and the config, so that every rank finds the same. The planning
loop runs on Python ints, which beat small numpy arrays.

Shape letters: `E` experts, `P` ranks of the group, `M = E / P` experts at home on a rank.
"""

from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from ds_llep.costs import Costs


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
    # One double product, truncated: the same IEEE arithmetic, so the same integer on every rank.
    capacity = max(1, int(config.capacity_factor * mean) if mean else total)
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


def plan_cost(counts_PE: np.ndarray, config, costs: Costs, nodes_P: np.ndarray):
    """Keeps moving rows from the most to the least loaded rank.

    Returns:
        `{(expert, helper): tokens}`: what leaves home.
    """
    P, E = counts_PE.shape
    M = E // P
    left_E = counts_PE.sum(0)
    load_P = left_E.reshape(P, M).sum(1)
    moved: dict[tuple[int, int], int] = {}
    for _ in range(2 * P):
        home, helper = int(load_P.argmax()), int(load_P.argmin())
        expert = home * M + int(left_E[home * M : home * M + M].argmax())
        mean = int(load_P.sum()) // P
        tokens = int(min(left_E[expert], load_P[home] - mean, mean - load_P[helper]))
        if tokens < max(1, config.min_tokens_per_gemm):
            break
        moved[expert, helper] = moved.get((expert, helper), 0) + tokens
        left_E[expert] -= tokens
        load_P[home] -= tokens
        load_P[helper] += tokens
    return moved


PLANNERS = ("lla", "cost")

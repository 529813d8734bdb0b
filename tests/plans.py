"""Configs, counts and prices for tests of planners, and which tokens go where in plain words."""

from itertools import product
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings

from ds_llep.costs import Costs
from ds_llep.plan import make_plan

CHEAP_SPILLS = Costs(
    row=1000, expert=0, copy_inside=1, copy_between=2, weights_inside=0, weights_between=0
)
"""For planner "cost": even few rows are worth a spill."""


def for_all(*strategies, examples=100):
    """`given`, with so many examples."""
    return lambda test: settings(max_examples=examples)(given(*strategies)(test))


def config_of(**changes):
    defaults = {
        "planner": "lla",
        "imbalance_threshold": 1.0,
        "capacity_factor": 1.0,
        "min_tokens_per_gemm": 0,
        "max_foreign_experts": None,
    }
    return SimpleNamespace(**{**defaults, **changes})


def scatter(load_E, P, seed=0):
    """[P, E] counts with the column sums `load_E`, dealt to the source ranks at random."""
    rng = np.random.default_rng(seed)
    share_P = rng.dirichlet(np.full(P, 0.5))
    return np.stack([rng.multinomial(load, share_P) for load in load_E], axis=1)


def draw_nodes(P, rng):
    """The nodes of P ranks: few or many, ranks in any order, numbers with gaps."""
    return rng.permutation(9)[rng.integers(0, rng.integers(1, 5), P)]


def draw_near(counts_PE, tokens_EP, nodes_P, rng):
    """[E, P]: as much as can of what ranks send or get of an expert stays in nodes: any ranks'."""
    near_EP = np.zeros_like(tokens_EP)
    for e, more_P in enumerate(tokens_EP - counts_PE.T):
        for node in set(nodes_P.tolist()):
            there = np.flatnonzero(nodes_P == node)
            sent, got = np.maximum(-more_P[there], 0), np.maximum(more_P[there], 0)
            stays = min(sent.sum(), got.sum())
            for moved in sent, got:
                near_EP[e, there] += rng.multivariate_hypergeometric(moved, stays)
    return near_EP


def shares_of(plan, expert):
    """`shares` of an expert in a plan."""
    near_P = None if plan.near_EP is None else plan.near_EP[expert]
    return shares(plan.counts_PE[:, expert], plan.tokens_EP[expert], plan.nodes_P, near_P)


def plan_for_nodes(counts_PE, config, *_, ranks_per_node):
    """A `make_plan` where planner "cost" spills even few rows, over nodes of this size."""
    nodes_P = np.arange(len(counts_PE)) // ranks_per_node
    return make_plan(counts_PE, config, CHEAP_SPILLS, nodes_P)


def shares(counts_P, tokens_P, nodes_P, near_P=None):
    """[P, P]: how many tokens of an expert go from each source to each rank, by cut.py's rules.

    First a rank's own, then those of its node, then the rest; without nodes all of them as the
    rest. Ranks take in rank order, from sources in rank order; where `near_P` is given, a rank that
    gets tokens takes so many from its node, and one that sends them leaves it so many.
    """
    P = len(counts_P)
    left_P, room_P, share_PP = counts_P.copy(), tokens_P.copy(), np.zeros((P, P), dtype=int)
    rounds = [lambda s, p: s == p, lambda s, p: nodes_P[s] == nodes_P[p], lambda s, p: True]
    for number, allowed in enumerate(rounds if nodes_P is not None else rounds[-1:]):
        limited = number == 1 and near_P is not None
        stays_P, comes_P = np.tile(near_P if limited else np.inf, (2, 1 if limited else P))
        for p, s in product(tokens_P.nonzero()[0], counts_P.nonzero()[0]):
            if allowed(s, p):
                taken = int(min(left_P[s], room_P[p], stays_P[s], comes_P[p]))
                share_PP[s, p] += taken
                left_P[s] -= taken
                room_P[p] -= taken
                stays_P[s] -= taken
                comes_P[p] -= taken
    assert not left_P.any() and not room_P.any()
    return share_PP

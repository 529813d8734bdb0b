"""What a plan costs each rank, against the model in words."""

import numpy as np
import pytest
from hypothesis import strategies as st
from plans import draw_near, draw_nodes, for_all, shares

from ds_llep.costs import Costs, rank_costs

PRICES = st.builds(Costs, *[st.sampled_from([0, 1, 7]) | st.integers(0, 10**9)] * 7)


@st.composite
def plans(draw):
    """(counts_PE, tokens_EP, nodes_P, near_EP): any assignment, wholly or partly away from home."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    P = draw(st.integers(1, 7))
    E = P * draw(st.integers(1, 4))
    counts_PE = rng.integers(0, 90, (P, E)) * rng.integers(0, 2, (P, E))
    tokens_EP = np.zeros((E, P), dtype=np.int64)
    for e, load in enumerate(counts_PE.sum(0)):
        shares_P = rng.dirichlet(np.full(P, 0.3))
        at_home = rng.random() < 0.3
        tokens_EP[e] = np.eye(P)[e * P // E] * load if at_home else rng.multinomial(load, shares_P)
    nodes_P = draw_nodes(P, rng) if draw(st.booleans()) else None
    by_plan = nodes_P is not None and draw(st.booleans())
    near_EP = draw_near(counts_PE, tokens_EP, nodes_P, rng) if by_plan else None
    return counts_PE, tokens_EP, nodes_P, near_EP


def costs_in_words(counts_PE, tokens_EP, costs, nodes_P, near_EP):
    P, E = counts_PE.shape
    prices = {
        "inside": (costs.copy_inside, costs.weights_inside),
        "between": (costs.copy_between, costs.weights_between),
    }
    home_E = np.arange(E) * P // E
    spills = any(tokens_EP[e, p] and p != home_E[e] for e, p in np.ndindex(E, P))
    time_P = [costs.spill * spills] * P
    for rank in range(P):
        moved = {
            link: dict.fromkeys(("received", "sent", "borrowed", "lent"), 0) for link in prices
        }
        for e in range(E):
            near_P = None if near_EP is None else near_EP[e]
            home, share_PP = e * P // E, shares(counts_PE[:, e], tokens_EP[e], nodes_P, near_P)
            time_P[rank] += costs.row * int(tokens_EP[e, rank])
            if rank != home and tokens_EP[e, rank]:
                time_P[rank] += costs.expert
            for other in set(range(P)) - {rank}:
                same_node = nodes_P is None or nodes_P[rank] == nodes_P[other]
                count = moved["inside" if same_node else "between"]
                count["received"] += int(share_PP[other, rank])
                count["sent"] += int(share_PP[rank, other])
                count["borrowed"] += other == home and bool(tokens_EP[e, rank])
                count["lent"] += rank == home and bool(tokens_EP[e, other])
        for link, (copy, weights) in prices.items():
            time_P[rank] += copy * max(moved[link]["received"], moved[link]["sent"])
            time_P[rank] += weights * max(moved[link]["borrowed"], moved[link]["lent"])
    return time_P


@for_all(plans(), PRICES)
def test_agrees_with_the_model_in_words(plan, costs):
    counts_PE, tokens_EP, nodes_P, near_EP = plan
    found_P = rank_costs(counts_PE, tokens_EP, costs, nodes_P, near_EP=near_EP)
    assert found_P.dtype == np.int64
    assert found_P.tolist() == costs_in_words(counts_PE, tokens_EP, costs, nodes_P, near_EP)


@pytest.mark.parametrize("nodes_P, copy, weights", [(None, 1, 3), ([4, 4], 1, 3), ([4, 2], 7, 200)])
def test_a_plan_by_hand(nodes_P, copy, weights):
    """Rank 1 computes ten of its twelve tokens of expert 0, and sends rank 0 the other two."""
    counts_PE, tokens_EP = np.array([[18, 0], [12, 5]]), np.array([[20, 10], [0, 5]])
    costs = Costs(100, 5000, copy_inside=1, copy_between=7, weights_inside=3, weights_between=200)
    nodes_P = None if nodes_P is None else np.array(nodes_P)
    found_P = rank_costs(counts_PE, tokens_EP, costs, nodes_P).tolist()
    traffic = 2 * copy + weights
    assert found_P == [20 * 100 + traffic, 15 * 100 + 5000 + traffic]

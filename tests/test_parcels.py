"""How many tokens travel: estimated, bounded, and as routes have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plans import plan_for_nodes

from ds_llep import LLEPConfig, make_plan
from ds_llep.bench.parcels import (
    alone,
    at_home,
    distinct,
    expected_parcels,
    fewest_parcels,
    most_parcels,
    traffic,
)
from ds_llep.kernels.select import select_kernels
from ds_llep.plan import Plan
from ds_llep.route import Addresses, Route, RouteMaps, find_runs, make_route

CPU = select_kernels("torch", torch.device("cpu"))
NONE, SOME, LOCAL = (
    LLEPConfig(imbalance_threshold=threshold, min_tokens_per_gemm=1, planner=planner)
    for threshold, planner in ((1e9, "lla"), (1.0, "lla"), (1.0, "cost"))
)


def routed(seed: int) -> tuple[list[np.ndarray], int, int]:
    """Expert ids ``[T, K]`` of ranks with unequal numbers of tokens; experts; K."""
    rng = np.random.default_rng(seed)
    P, M, K = int(rng.choice([2, 3, 4])), int(rng.integers(2, 6)), int(rng.integers(2, 5))
    popularity_E = rng.dirichlet(np.full(P * M, 0.3))
    sizes = rng.integers(20, 300, P)
    return [rng.choice(P * M, (T, K), p=popularity_E) for T in sizes], P * M, K


def counted(ids: list[np.ndarray], num_experts: int) -> tuple[np.ndarray, ...]:
    """What ranks count: copies ``[P, E]``, tokens that reach a home ``[P, P]``, and copies that are
    their token's only one at home ``[P, E]``."""
    E, P = num_experts, len(ids)
    scores = (torch.zeros(own_ids.shape) for own_ids in ids)
    counted = zip(map(torch.from_numpy, ids), scores, strict=True)
    reports = torch.stack([CPU.count_copies(*own, E, P, 0)[0] for own in counted])
    counts_PE, alone_PE, reached_PP, _ = (x.numpy() for x in reports.split([E, E, P, 3], dim=1))
    return counts_PE, reached_PP, alone_PE


def routes_of(ids, plan: Plan, reached_PP, alone_PE) -> list[tuple[Route, RouteMaps]]:
    """Of each rank."""
    made = []
    for rank, own_ids in enumerate(ids):
        selected_TK = torch.from_numpy(own_ids)
        runs = torch.from_numpy(find_runs(plan, rank))
        found = CPU.address_copies(selected_TK, torch.empty(0), runs, rank)
        route = make_route(reached_PP, alone_PE, plan, rank, None, CPU, own_ids.shape[1])
        first_P = torch.from_numpy(route.first_P)
        made.append((route, Addresses(*found).place(first_P, CPU)))
    return made


@pytest.mark.parametrize("config", [NONE, SOME, LOCAL], ids=["none", "some", "local"])
def test_traffic_is_what_the_plan_sends(seed, config):
    ids, E, _ = routed(seed)
    counts_PE, *_ = counted(ids, E)
    plan = plan_for_nodes(counts_PE, config, ranks_per_node=2)
    sent_PP = np.stack([plan.send_EP(source).sum(0) for source in range(plan.num_ranks)])
    np.testing.assert_array_equal(traffic(plan), sent_PP)
    if config is NONE:
        np.testing.assert_array_equal(at_home(plan), sent_PP)


@pytest.mark.parametrize("config", [NONE, SOME, LOCAL], ids=["none", "some", "local"])
def test_as_in_routes(seed, config):
    """What travels is what routes say; of these parcels no fewer are used than the lower bound."""
    ids, E, K = routed(seed)
    counts_PE, *reached = counted(ids, E)
    plan = plan_for_nodes(counts_PE, config, ranks_per_node=2)
    most_PP, fewest_PP = most_parcels(plan, *reached, K), fewest_parcels(plan, reached[0], K)
    used_PP = np.zeros_like(reached[0])
    for rank, (route, maps) in enumerate(routes_of(ids, plan, *reached)):
        assert route.send_splits == most_PP[rank].tolist()
        assert route.recv_splits == most_PP[:, rank].tolist()
        places = np.sort(maps.sent_TK[maps.sent_TK >= 0].numpy())
        ends = np.cumsum(route.send_splits)
        used_PP[rank] = np.diff(np.searchsorted(places, ends), prepend=0)
    assert (fewest_PP <= used_PP).all() and (used_PP <= most_PP).all()
    assert used_PP.any()
    if config is NONE:
        np.testing.assert_array_equal(fewest_PP, most_PP)


def test_bounds_by_hand():
    """Four tokens of rank 0 choose expert 1 twice; it keeps four of these eight copies."""
    counts_PE, tokens_EP = np.array([[0, 8], [0, 8]]), np.array([[0, 0], [4, 12]])
    plan = Plan(counts_PE, tokens_EP, bypassed=False)
    reached_PP, none_alone_PE = np.array([[0, 4], [0, 4]]), np.zeros((2, 2), dtype=int)
    np.testing.assert_array_equal(traffic(plan), [[4, 4], [0, 8]])
    np.testing.assert_array_equal(
        most_parcels(plan, reached_PP, none_alone_PE, 2), [[0, 4], [0, 0]]
    )
    np.testing.assert_array_equal(fewest_parcels(plan, reached_PP, 2), [[0, 2], [0, 0]])


def test_tokens_that_stay_by_hand():
    """Of rank 0's five copies of expert 3, rank 1 keeps one. Three are their tokens' only ones at
    home, so two tokens need not travel, as many as can have a copy left there do."""
    ids = [np.array([[3, 4, 5]] * 2 + [[3, 0, 1]] * 3), np.array([[3, 4, 5]])]
    counts_PE, *reached = counted(ids, 6)
    tokens_EP = np.zeros((6, 2), dtype=int)
    tokens_EP[:3, 0], tokens_EP[3:, 1] = counts_PE[:, :3].sum(0), counts_PE[:, 3:].sum(0)
    tokens_EP[3] = 4, 2
    plan = Plan(counts_PE, tokens_EP, bypassed=False, nodes_P=np.zeros(2, dtype=int))
    np.testing.assert_array_equal(plan.send_EP(0)[3], [4, 1])
    np.testing.assert_array_equal(most_parcels(plan, *reached, 3), [[0, 3], [0, 0]])
    (first, _), (second, _) = routes_of(ids, plan, *reached)
    assert first.send_splits == [0, 3] and second.recv_splits == [3, 0]
    assert first.recv_splits == second.send_splits == [0, 0]


def test_a_spill_that_keeps_tokens_where_they_are_sends_fewer(seed):
    """One expert is hot: the busiest rank's all-to-all is smaller than without a spill."""
    rng = np.random.default_rng(seed)
    P, E, K, T, hot = 8, 64, 6, 500, int(rng.integers(64))
    others = [rng.permuted(np.tile(np.arange(E - 1), (T, 1)), axis=1)[:, : K - 1] for _ in range(P)]
    ids = [np.insert(x + (x >= hot), rng.integers(K), hot, axis=1) for x in others]
    counts_PE, *reached = counted(ids, E)
    busiest = []
    for config in (NONE, LOCAL):
        plan = plan_for_nodes(counts_PE, config, ranks_per_node=P)
        assert bool(plan.spills) == (config is LOCAL)
        routes = [route for route, _ in routes_of(ids, plan, *reached)]
        sent_PP, received_PP = (
            np.array([getattr(route, name) for route in routes])
            for name in ("send_splits", "recv_splits")
        )
        np.testing.assert_array_equal(sent_PP.T, received_PP)
        busiest.append(max(sent_PP.sum(1).max(), received_PP.sum(1).max()))
    assert busiest[1] < 0.9 * busiest[0]


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_distinct_tokens_of_independent_choices(seed, top_k):
    rng = np.random.default_rng(seed)
    share_P, tokens = rng.dirichlet(np.ones(4)), [50_000, 20_000]
    ids = [rng.choice(4, (T, top_k), p=share_P) for T in tokens]
    copies_PP = np.stack([np.bincount(i.ravel(), minlength=4) for i in ids])
    true_PP = np.stack([[(i == p).any(1).sum() for p in range(4)] for i in ids])
    found_PP = distinct(copies_PP, top_k)
    # Six standard deviations of the number itself.
    np.testing.assert_allclose(found_PP, true_PP, rtol=0, atol=6 * np.sqrt(max(tokens) / 4))
    if top_k == 1:
        np.testing.assert_allclose(found_PP, copies_PP)


def test_distinct_at_the_ends():
    copies_PP = np.array([[12, 0], [0, 0]])
    np.testing.assert_allclose(distinct(copies_PP, 3), [[4, 0], [0, 0]])


def test_estimate_is_no_more_than_there_are(seed):
    """Never more than tokens or copies, so that without spills it is what travels."""
    ids, E, K = routed(seed)
    counts_PE, *_ = counted(ids, E)
    plan = make_plan(counts_PE, NONE)
    expected_PP = distinct(at_home(plan), K)
    np.fill_diagonal(expected_PP, 0)
    np.testing.assert_allclose(expected_parcels(plan, K), expected_PP)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_alone_of_independent_choices(seed, top_k):
    rng = np.random.default_rng(seed)
    share_E, tokens = rng.dirichlet(np.ones(6)), [50_000, 20_000]
    ids = [rng.choice(6, (T, top_k), p=share_E) for T in tokens]
    counts_PE, _, true_PE = counted(ids, 6)
    found_PE = alone(make_plan(counts_PE, NONE), top_k)
    # Six standard deviations of the number itself.
    np.testing.assert_allclose(found_PE, true_PE, rtol=0, atol=6 * np.sqrt(max(tokens) / 4))
    if top_k == 1:
        np.testing.assert_allclose(found_PE, counts_PE)

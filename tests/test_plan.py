"""The plan: golden cases, an independent oracle, and what must hold for every plan."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import strategies as st
from plans import config_of, draw_near, draw_nodes, for_all, scatter, shares_of

from ds_llep.plan import Plan, Spill, make_plan

GOLDEN = json.loads((Path(__file__).parent / "data" / "lla_golden.json").read_text())["cases"]


def capacity_of(load_E, P, config):
    total = sum(load_E)
    return max(1, math.floor(config.capacity_factor * (total // P)) if total >= P else total)


def home_loads(load_E, P):
    M = len(load_E) // P
    return [sum(load_E[p * M : (p + 1) * M]) for p in range(P)]


def facts(plan):
    """Everything that decides a plan's assignment, comparable with ==."""
    return plan.tokens_EP.tolist(), plan.spills, plan.bypassed, plan.capped_tokens


alphas = st.sampled_from([1.0, 1.1, 1.25, 1.5, 2.0]) | st.floats(1.0, 2.0)
minima = st.sampled_from([0, 1, 2, 1024, 10**9]) | st.integers(0, 300)
limits = st.none() | st.integers(0, 4)


@st.composite
def loads(draw, most=4096):
    """(load_E, P): even, skewed, sparse, tied and tiny loads, none above `most`."""
    P = draw(st.sampled_from([1, 2, 3, 4, 8]))
    E = P * draw(st.integers(1, 4))
    expert_load = draw(
        st.sampled_from(
            [
                st.integers(0, 3),
                st.integers(0, 300),
                st.integers(90, 110),
                st.sampled_from([0, 0, 0, 7, 400]),
                st.sampled_from([10, 10, 10, 10, 2000]),
                st.integers(0, 12).map(lambda exponent: 2**exponent),
            ]
        )
    )
    load_E = draw(st.lists(expert_load, min_size=E, max_size=E))
    return [min(load, most) for load in load_E], P


@st.composite
def problems(draw, alpha=alphas, m=minima, limit=limits, most=4096):
    """(load_E, P, counts_PE, config), always planned, never bypassed for its load ratio."""
    load_E, P = draw(loads(most))
    config = config_of(
        capacity_factor=draw(alpha), min_tokens_per_gemm=draw(m), max_foreign_experts=draw(limit)
    )
    return load_E, P, scatter(load_E, P, draw(st.integers(0, 2**32))), config


def oracle(load_E, P, alpha, m, limit):
    """Algorithms 2 and 3 from their definitions: every load summed up anew at every question."""
    M = len(load_E) // P
    capacity = capacity_of(load_E, P, SimpleNamespace(capacity_factor=alpha))
    assigned = {}
    unplaced = set(range(len(load_E)))

    def give(expert, rank, tokens):
        if tokens:
            assigned.setdefault(expert, Counter())[rank] += tokens

    def effective(rank):
        done = sum(ranks[rank] for ranks in assigned.values())
        return done + sum(load_E[e] for e in unplaced if e // M == rank)

    def foreign(rank):
        return {e for e, ranks in assigned.items() if ranks[rank] and e // M != rank}

    def may_help(rank, expert):
        return limit is None or expert in foreign(rank) or len(foreign(rank)) < limit

    def spill(expert, home, rest):
        while rest:
            others = [p for p in range(P) if p != home and may_help(p, expert)]
            others.sort(key=lambda p: (effective(p), p))
            for rank in others:
                chunk = min(rest, capacity - effective(rank))
                if chunk <= 0:
                    continue
                if chunk < m and chunk < rest:
                    continue
                give(expert, rank, chunk)
                rest -= chunk
                break
            else:
                # The least loaded takes it all; with a limit only if it has some room or if no
                # rank at its limit is less loaded.
                least = min((effective(p) for p in range(P) if p != home), default=0)
                if others and (effective(others[0]) < capacity or effective(others[0]) == least):
                    give(expert, others[0], rest)
                else:
                    give(expert, home, rest)
                rest = 0

    while unplaced:
        expert = min(unplaced, key=lambda e: (-load_E[e], e))
        unplaced.remove(expert)
        home = expert // M
        fits = max(0, min(load_E[expert], capacity - effective(home)))
        give(expert, home, fits)
        spill(expert, home, load_E[expert] - fits)
    return {expert: dict(ranks) for expert, ranks in assigned.items()}


def as_dict(plan):
    return {
        e: {p: int(n) for p, n in enumerate(row) if n}
        for e, row in enumerate(plan.tokens_EP)
        if row.any()
    }


@pytest.mark.parametrize(
    "case",
    GOLDEN,
    ids=lambda c: f"{c['kind']}-{c['experts']}on{c['ranks']}-{sum(c['expert_load'])}",
)
def test_golden(case):
    P = case["ranks"]
    config = config_of(
        capacity_factor=case["capacity_factor"], min_tokens_per_gemm=case["min_tokens_per_gemm"]
    )
    plan = make_plan(scatter(case["expert_load"], P), config)
    expected = {
        int(e): {int(p): n for p, n in ranks.items()} for e, ranks in case["assignment"].items()
    }
    assert as_dict(plan) == expected
    assert plan.rank_load_P.tolist() == case["rank_load"]
    assert plan.capped_tokens == 0


@for_all(problems())
def test_agrees_with_the_oracle(problem):
    load_E, P, counts_PE, config = problem
    expected = oracle(
        load_E,
        P,
        config.capacity_factor,
        config.min_tokens_per_gemm,
        config.max_foreign_experts,
    )
    assert as_dict(make_plan(counts_PE, config)) == expected


@for_all(problems())
def test_nothing_is_lost_and_the_fields_agree(problem):
    load_E, P, counts_PE, config = problem
    plan = make_plan(counts_PE, config)
    M = len(load_E) // P
    assert (plan.tokens_EP >= 0).all()
    assert plan.tokens_EP.sum(1).tolist() == load_E
    assert plan.rank_load_P.tolist() == plan.tokens_EP.sum(0).tolist()
    assert plan.home_load_P.tolist() == home_loads(load_E, P)
    assert (plan.counts_PE == counts_PE).all()
    assert plan.spills == tuple(
        Spill(e, e // M, p, n)
        for e, ranks in sorted(as_dict(plan).items())
        for p, n in sorted(ranks.items())
        if p != e // M
    )


@for_all(problems(), st.randoms(use_true_random=False))
def test_only_column_sums_decide_the_assignment(problem, random):
    load_E, P, counts_PE, config = problem
    expected = facts(make_plan(counts_PE, config))
    assert facts(make_plan(counts_PE, config)) == expected
    rows = counts_PE.tolist()
    random.shuffle(rows)
    assert facts(make_plan(rows, config)) == expected
    assert (
        facts(make_plan([load_E, *([0] * len(load_E) for _ in range(P - 1))], config)) == expected
    )


def test_another_process_makes_the_same_plan():
    script = (
        "import json, sys\n"
        "from types import SimpleNamespace\n"
        "from ds_llep.plan import make_plan\n"
        "counts, config = json.load(sys.stdin)\n"
        "plan = make_plan(counts, SimpleNamespace(**config))\n"
        "print(json.dumps([plan.tokens_EP.tolist(), repr(plan.spills)]))\n"
    )
    load_E = np.random.default_rng(7).zipf(1.3, 64).clip(max=5000).tolist()
    counts, config = scatter(load_E, 8), config_of(capacity_factor=1.1, min_tokens_per_gemm=64)
    plan = make_plan(counts, config)
    assert plan.spills
    answer = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([counts.tolist(), vars(config)]),
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    tokens, spills = json.loads(answer.stdout.splitlines()[-1])
    assert tokens == plan.tokens_EP.tolist()
    assert spills == repr(plan.spills)


@for_all(problems(limit=st.none()))
def test_capacity_is_exceeded_only_where_no_rank_could_take_a_chunk(problem):
    load_E, P, counts_PE, config = problem
    plan = make_plan(counts_PE, config)
    capacity = capacity_of(load_E, P, config)
    load = plan.rank_load_P.tolist()
    # A rank goes over only when the least loaded of all the others has less room than one chunk,
    # and a rank that is that full stays so.
    if max(load) > capacity:
        assert min(load) > capacity - max(1, config.min_tokens_per_gemm)
    for spill in plan.spills:
        assert load[spill.home] >= capacity, "a home lends only what does not fit"


@for_all(problems(m=st.sampled_from([0, 1]), limit=st.none()))
def test_without_a_chunk_size_the_plan_is_as_flat_and_as_small_as_can_be(problem):
    load_E, P, counts_PE, config = problem
    plan = make_plan(counts_PE, config)
    capacity = capacity_of(load_E, P, config)
    over = sum(max(0, load - capacity) for load in plan.rank_load_P.tolist())
    assert over == max(0, sum(load_E) - P * capacity)
    if over == 0:
        excess = [max(0, load - capacity) for load in home_loads(load_E, P)]
        moved = Counter()
        for spill in plan.spills:
            moved[spill.home] += spill.tokens
            assert plan.home_load_P[spill.helper] < capacity, "an overloaded rank never helps"
        assert [moved[p] for p in range(P)] == excess


@for_all(problems())
def test_no_rank_is_loaded_more_than_standard_ep_would(problem):
    _, _, counts_PE, config = problem
    plan = make_plan(counts_PE, config)
    assert plan.rank_load_P.max() <= plan.home_load_P.max()
    assert plan.load_ratio_after <= plan.load_ratio_before


@for_all(problems())
def test_an_expert_has_at_most_one_segment_under_the_minimum(problem):
    _, _, counts_PE, config = problem
    small = Counter(
        spill.expert
        for spill in make_plan(counts_PE, config).spills
        if spill.tokens < config.min_tokens_per_gemm
    )
    assert all(count == 1 for count in small.values())


@for_all(problems(limit=st.integers(0, 4)))
def test_foreign_expert_limit(problem):
    load_E, P, counts_PE, config = problem
    limit = config.max_foreign_experts
    plan = make_plan(counts_PE, config)
    capacity = capacity_of(load_E, P, config)
    load = plan.rank_load_P.tolist()
    held = [len(plan.foreign_experts(p)) for p in range(P)]
    assert max(held) <= limit
    assert 0 <= plan.capped_tokens <= sum(max(0, n - capacity) for n in load)
    if plan.capped_tokens:
        assert all(held[p] == limit or load[p] >= capacity for p in range(P))
    if limit == 0:
        assert plan.capped_tokens == sum(max(0, n - capacity) for n in home_loads(load_E, P))


@for_all(problems(m=st.sampled_from([0, 1]), limit=st.integers(0, 4)))
def test_what_a_limit_leaves_above_capacity_is_counted(problem):
    load_E, P, counts_PE, config = problem
    plan = make_plan(counts_PE, config)
    capacity = capacity_of(load_E, P, config)
    over = sum(max(0, load - capacity) for load in plan.rank_load_P.tolist())
    assert over == max(plan.capped_tokens, sum(load_E) - P * capacity)


@for_all(problems(limit=st.none()))
def test_a_limit_that_is_never_reached_changes_nothing(problem):
    load_E, _, counts_PE, config = problem
    unlimited = make_plan(counts_PE, config)
    config.max_foreign_experts = len(load_E)
    assert facts(make_plan(counts_PE, config)) == facts(unlimited)
    assert unlimited.capped_tokens == 0


def test_a_limited_rank_takes_more_of_an_expert_that_it_holds():
    # Capacity is 25. Expert 0 fills ranks 1 to 3 up, then its last tokens go to rank 1 again,
    # which may hold one foreign expert and holds this one.
    plan = make_plan(scatter([103, 0, 0, 0], 4), config_of(max_foreign_experts=1))
    assert plan.tokens_EP[0].tolist() == [25, 28, 25, 25]
    assert plan.spills == (Spill(0, 0, 1, 28), Spill(0, 0, 2, 25), Spill(0, 0, 3, 25))


def test_a_second_chunk_of_an_expert_is_no_second_foreign_expert():
    # Capacity is 20. Rank 1 takes expert 0 in two chunks, 9 and then the last 2, lends 2 of its own
    # to rank 0, and so is the one to take the 2 of expert 1 that no longer fit there.
    plan = make_plan(scatter([35, 5, 11, 0, 11, 0], 3), config_of(max_foreign_experts=2))
    assert as_dict(plan) == {0: {0: 15, 1: 11, 2: 9}, 1: {0: 3, 1: 2}, 2: {0: 2, 1: 9}, 4: {2: 11}}


def test_a_limit_never_sends_tokens_to_a_rank_without_room():
    # Capacity is 20; rank 2 helps rank 0 with expert 0 and is then at its limit. The only rank
    # left to help rank 1 with expert 2 is rank 0, which is full itself.
    config = config_of(max_foreign_experts=1, min_tokens_per_gemm=0)
    plan = make_plan(scatter([20, 8, 15, 10, 5, 2], 3), config)
    assert plan.spills == (Spill(0, 0, 2, 8),)
    assert plan.rank_load_P.tolist() == [20, 25, 15]
    assert plan.capped_tokens == 5


def test_capped_tokens_are_counted_once():
    # 30 tokens do not fit at home. Each of the three experts fails to leave in turn.
    plan = make_plan(scatter([20, 20, 20, 0, 0, 0], 2), config_of(max_foreign_experts=0))
    assert plan.rank_load_P.tolist() == [60, 0]
    assert plan.capped_tokens == 30
    assert not plan.bypassed


@pytest.mark.parametrize(
    "load_E, threshold, bypassed",
    [
        ([13, 7], 1.3, False),
        ([13, 7], math.nextafter(1.3, 2), True),
        ([12, 8], 1.3, True),
        ([14, 6], 1.3, False),
        ([1299, 701], 1.3, True),
        ([1300, 700], 1.3, False),
        ([5, 5], 1.0, False),
        ([11, 9, 10], 1.1, False),
        ([11, 9, 10], 1.11, True),
    ],
)
def test_bypass_boundary(load_E, threshold, bypassed):
    plan = make_plan(scatter(load_E, len(load_E)), config_of(imbalance_threshold=threshold))
    assert plan.bypassed is bypassed
    if bypassed:
        assert plan.spills == ()
        assert plan.rank_load_P.tolist() == load_E
    elif max(load_E) > sum(load_E) // len(load_E):
        assert plan.spills


@for_all(loads(), st.integers(100, 300))
def test_bypass_exactly_below_a_decimal_threshold(load, percent):
    load_E, P = load
    load_E[0] += 1  # what happens without any token is a test of its own
    plan = make_plan(scatter(load_E, P), config_of(imbalance_threshold=percent / 100))
    ratio = Fraction(max(home_loads(load_E, P)) * P, sum(load_E))
    assert plan.bypassed == (ratio < Fraction(percent, 100))
    assert plan.load_ratio_before == float(ratio)
    assert plan.load_ratio_after == float(Fraction(int(plan.rank_load_P.max()) * P, sum(load_E)))


@for_all(problems(most=100))
def test_splits_match_a_token_by_token_assignment(problem):
    load_E, P, counts_PE, config = problem
    plan = make_plan(counts_PE, config)
    sent = np.stack([plan.send_EP(source) for source in range(P)])
    received = np.stack([plan.recv_PE(rank) for rank in range(P)])
    assert sent.dtype == received.dtype == np.int64
    assert received.tolist() == sent.transpose(2, 0, 1).tolist()
    for e in range(len(load_E)):
        sources = [s for s in range(P) for _ in range(counts_PE[s, e])]
        ranks = [p for p in range(P) for _ in range(plan.tokens_EP[e, p])]
        pairs = Counter(zip(sources, ranks, strict=True))
        assert sent[:, e].tolist() == [[pairs[s, p] for p in range(P)] for s in range(P)]
        # A source's tokens in token order go to ascending ranks: one run per destination.
        for s in range(P):
            its_ranks = [p for source, p in zip(sources, ranks, strict=True) if source == s]
            assert its_ranks == [p for p in range(P) for _ in range(sent[s, e, p])]


@st.composite
def local_plans(draw):
    """Experts cut over any ranks, whether that makes sense or not, on any nodes."""
    load_E, P = draw(loads())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens_EP = scatter(load_E, P, rng).T.copy()
    at_home = rng.random(len(load_E)) < 0.3
    tokens_EP[at_home] = 0
    tokens_EP[at_home, np.flatnonzero(at_home) * P // len(load_E)] = np.array(load_E)[at_home]
    counts_PE, nodes_P = scatter(load_E, P, rng), draw_nodes(P, rng)
    near_EP = draw_near(counts_PE, tokens_EP, nodes_P, rng) if draw(st.booleans()) else None
    return Plan(counts_PE, tokens_EP, bypassed=False, nodes_P=nodes_P, near_EP=near_EP)


def sent_by_all(plan):
    """int64 [P, E, P]: by source, expert and computing rank."""
    return np.stack([plan.send_EP(source) for source in range(plan.num_ranks)])


@for_all(local_plans())
def test_a_local_cut_follows_its_rule(plan):
    sent_PEP = sent_by_all(plan)
    for e in range(plan.num_experts):
        assert sent_PEP[:, e].tolist() == shares_of(plan, e).tolist()


@for_all(local_plans())
def test_a_local_cut_loses_nothing_and_keeps_tokens_near(plan):
    P, sent_PEP = plan.num_ranks, sent_by_all(plan)
    assert (sent_PEP >= 0).all()
    assert (sent_PEP.sum(2) == plan.counts_PE).all() and (sent_PEP.sum(0) == plan.tokens_EP).all()
    received_PPE = np.stack([plan.recv_PE(rank) for rank in range(P)])
    assert (received_PPE == sent_PEP.transpose(2, 0, 1)).all()
    earlier_PEP = np.stack([plan.earlier_EP(source) for source in range(P)])
    assert (earlier_PEP == sent_PEP.cumsum(0) - sent_PEP).all()
    # No more can stay on a rank, or on a node, than there is there of tokens and of room.
    for groups_P in (np.arange(P), plan.nodes_P):
        for group in set(groups_P.tolist()):
            inside = np.flatnonzero(groups_P == group)
            stay_E = sent_PEP[inside][:, :, inside].sum((0, 2))
            tokens_E, room_E = plan.counts_PE[inside].sum(0), plan.tokens_EP[:, inside].sum(1)
            assert (stay_E == np.minimum(tokens_E, room_E)).all()


def test_a_hot_expert_sends_less_than_without_a_spill(seed):
    """And less than if cut by source, which moves a rank's own tokens to make room for others."""
    rng = np.random.default_rng(seed)
    P, E = int(rng.integers(4, 9)), 32
    counts_PE = rng.integers(2000, 3000, (P, E * P)) // P
    counts_PE[:, rng.integers(E * P)] = np.sort(rng.integers(30_000, 90_000, P))
    between = {}
    for planner in ("cost", "lla"):
        plan = make_plan(counts_PE, config_of(planner=planner))
        assert plan.spills
        between[planner] = between_ranks(plan)
    at_home = make_plan(counts_PE, config_of(imbalance_threshold=1e9))
    assert between["cost"] < between["lla"]
    assert between["cost"] < between_ranks(at_home)


def between_ranks(plan):
    """Copies that leave their rank."""
    sent_PP = sent_by_all(plan).sum(1)
    return sent_PP.sum() - sent_PP.trace()


@for_all(problems())
def test_per_rank_views(problem):
    load_E, P, counts_PE, config = problem
    plan = make_plan(counts_PE, config)
    M = len(load_E) // P
    assert (plan.num_ranks, plan.num_experts, plan.experts_per_rank) == (P, len(load_E), M)
    lent = []
    for p in range(P):
        home = tuple(range(p * M, p * M + M))
        foreign = plan.foreign_experts(p)
        computed = set(np.flatnonzero(plan.tokens_EP[:, p]).tolist())
        assert set(foreign) == computed - set(home)
        assert list(foreign) == sorted(set(foreign))
        assert plan.slots(p) == home + foreign
        assert [spill.expert for spill in plan.borrowed_experts(p)] == list(foreign)
        assert all(spill.helper == p for spill in plan.borrowed_experts(p))
        keys = [(spill.helper, spill.expert) for spill in plan.lent_experts(p)]
        assert keys == sorted(set(keys))
        assert all(spill.home == p for spill in plan.lent_experts(p))
        lent += plan.lent_experts(p)
    assert sorted(lent, key=dataclasses.astuple) == list(plan.spills)


@for_all(st.lists(st.integers(0, 1000), min_size=1, max_size=8), alphas, minima, limits)
def test_one_rank_never_spills(load_E, alpha, m, limit):
    config = config_of(capacity_factor=alpha, min_tokens_per_gemm=m, max_foreign_experts=limit)
    plan = make_plan([load_E], config)
    assert plan.spills == ()
    assert plan.tokens_EP.tolist() == [[load] for load in load_E]
    assert plan.capped_tokens == 0
    assert plan.send_EP(0).tolist() == plan.tokens_EP.tolist()
    assert plan.recv_PE(0).tolist() == [load_E]


@pytest.mark.parametrize("P, E", [(1, 1), (1, 4), (4, 4), (4, 16)])
def test_no_tokens(P, E):
    plan = make_plan(np.zeros((P, E), dtype=int), config_of())
    assert plan.bypassed
    assert plan.spills == ()
    assert not plan.tokens_EP.any()
    assert plan.load_ratio_before == plan.load_ratio_after == 1.0
    assert not plan.send_EP(P - 1).any()
    assert not plan.recv_PE(P - 1).any()


def test_one_expert_per_rank():
    plan = make_plan([[90, 0, 5], [0, 10, 0], [0, 0, 15]], config_of())
    assert plan.tokens_EP.tolist() == [[40, 30, 20], [0, 10, 0], [0, 0, 20]]
    assert plan.send_EP(0).tolist() == [[40, 30, 20], [0, 0, 0], [0, 0, 5]]
    assert plan.slots(1) == (1, 0)
    assert plan.load_ratio_before == 2.25
    assert plan.load_ratio_after == 1.0


def test_fewer_tokens_than_ranks_stay_at_home():
    plan = make_plan(scatter([3, 0, 0, 0], 4), config_of())
    assert not plan.bypassed
    assert plan.spills == ()


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint16, np.int64, np.uint64])
def test_any_integer_dtype_and_lists(dtype):
    rows = [[100, 3, 7, 0], [90, 1, 0, 4]]
    plan = make_plan(np.array(rows, dtype=dtype), config_of())
    assert facts(plan) == facts(make_plan(rows, config_of()))
    assert plan.spills
    assert plan.counts_PE.dtype == plan.tokens_EP.dtype == plan.rank_load_P.dtype == np.int64
    assert all(type(value) is int for value in dataclasses.astuple(plan.spills[0]))


def test_a_plan_cannot_be_changed():
    counts_PE = scatter([100, 0, 3, 4], 2)
    plan = make_plan(counts_PE, config_of())
    before = plan.counts_PE.copy()
    counts_PE[:] = 0
    assert (plan.counts_PE == before).all()
    for array in (plan.counts_PE, plan.tokens_EP, plan.rank_load_P):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.bypassed = True
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.spills[0].tokens = 1


def test_a_plan_leaves_its_callers_arrays_writeable():
    arrays = np.array([[5, 5]]), np.array([[5], [5]])
    Plan(arrays[0], arrays[1], bypassed=True)
    assert all(array.flags.writeable for array in arrays)


@pytest.mark.parametrize(
    "counts, message",
    [
        ([1, 2, 3], r"shape \(3,\).*\[P, E\]"),
        (np.zeros((2, 2, 2), dtype=int), r"shape \(2, 2, 2\)"),
        (np.zeros((0, 4), dtype=int), r"shape \(0, 4\)"),
        ([[1.0, 2.0]], "dtype float64.*int array"),
        ([[True, False]], "dtype bool"),
        ([[3, 4], [-5, 6]], r"counts_PE\[1, 0\] is -5; valid is >= 0"),
        (np.ones((3, 4), dtype=int), "4 experts on 3 ranks; valid is"),
        (np.ones((4, 2), dtype=int), "2 experts on 4 ranks; valid is"),
    ],
)
def test_wrong_counts(counts, message):
    with pytest.raises(ValueError, match=f"make_plan: .*{message}"):
        make_plan(counts, config_of())


@pytest.mark.parametrize(
    "nodes_P", [[0], [[0, 0]], [0, 0, 1], [0.0, 1.0], [False, True], [0, -1], 3], ids=str
)
@pytest.mark.parametrize("planner", ["lla", "cost"])
def test_wrong_nodes(nodes_P, planner):
    with pytest.raises(ValueError, match="make_plan: nodes_P is .*valid is .* each of the 2 ranks"):
        make_plan([[3, 4], [5, 6]], config_of(planner=planner), nodes_P=nodes_P)


def test_nodes_of_a_plan():
    """Planner "lla" has none: it cuts as the paper does."""
    counts_PE, nodes_P = scatter([100, 0, 3, 4], 2), np.array([4, 0], dtype=np.uint8)
    plan = make_plan(counts_PE, config_of(planner="cost"), nodes_P=nodes_P)
    nodes_P[:] = 7
    assert plan.nodes_P.tolist() == [4, 0] and plan.nodes_P.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        plan.nodes_P[0] = 1
    assert make_plan(counts_PE, config_of(planner="cost")).nodes_P.tolist() == [0, 0]
    assert make_plan(counts_PE, config_of(), nodes_P=[0, 1]).nodes_P is None


def test_unknown_planner():
    with pytest.raises(ValueError, match="unknown planner 'best'; valid planners: 'lla'"):
        make_plan([[1, 2]], config_of(planner="best"))


def test_benchmark_prints_a_row_for_each_planner(capsys):
    from ds_llep.bench.plan import main

    workloads = ["balanced", "95:1"]
    options = ["--tokens", "8192", "--repeats", "1", "--ranks-per-node", "2", "--layers", "2"]
    main([*options, "--ranks", "2", "4", "--workloads", *workloads])
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = [[cell.strip() for cell in row] for row in rows]
    points = [(ranks, w, p) for ranks in "24" for w in workloads for p in ("ep", "lla", "cost")]
    assert [tuple(row[:3]) for row in rows] == points
    names = "plan split time ratio spills foreign weights sent far".split()
    values = [dict(zip(names, map(float, row[3:]), strict=True)) for row in rows]
    found = dict(zip(points, values, strict=True))
    for (ranks, workload, planner), line in found.items():
        without = found[ranks, workload, "ep"]
        assert line["plan"] > 0 and (line["time"] <= without["time"] or planner == "lla")
        assert (line["spills"] > 0) == (line["foreign"] > 0) == (line["weights"] > 0)
        assert line["far"] <= line["sent"] and (line["far"] == 0 or ranks == "4")
    hot, without = found["4", "95:1", "cost"], found["4", "95:1", "ep"]
    assert hot["ratio"] < without["ratio"] and hot["sent"] < without["sent"]

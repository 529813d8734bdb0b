"""The plan made on the device is the host's: the same integers, whatever the counts and limits."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import config_of, scatter

from ds_llep.kernels.planner import plan_lla
from ds_llep.plan import make_plan

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "lla_golden.json").read_text())
# Triton's interpreter visits every element of a reduction in Python.
SMALL = [case for case in GOLDEN["cases"] if case["experts"] <= 64 and sum(case["expert_load"])]
# P, M: each is compiled anew.
SIZES = [(1, 4), (2, 3), (3, 1), (3, 4), (5, 2), (8, 4)]


def same_as_the_host(counts_PE, config):
    """Asserts that both planners agree, and returns the host's plan."""
    plan = make_plan(np.asarray(counts_PE), config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens_EP, capped_tokens = plan_lla(
        torch.as_tensor(counts_PE, device=device),
        config.capacity_factor,
        config.imbalance_threshold,
        config.min_tokens_per_gemm,
        config.max_foreign_experts,
    )
    assert tokens_EP.dtype == capped_tokens.dtype == torch.int64
    assert tokens_EP.tolist() == plan.tokens_EP.tolist()
    assert capped_tokens.tolist() == plan.capped_tokens
    return plan


@pytest.mark.parametrize(
    "case",
    SMALL,
    ids=lambda c: f"{c['kind']}-{c['experts']}on{c['ranks']}-{sum(c['expert_load'])}",
)
def test_golden(case):
    config = config_of(
        capacity_factor=case["capacity_factor"], min_tokens_per_gemm=case["min_tokens_per_gemm"]
    )
    plan = same_as_the_host(scatter(case["expert_load"], case["ranks"]), config)
    assert plan.rank_load_P.tolist() == case["rank_load"]


@st.composite
def problems(draw):
    """counts_PE and a config: even, skewed, sparse and tied loads, one hot expert."""
    P, M = draw(st.sampled_from(SIZES))
    expert_load = draw(
        st.sampled_from(
            [
                st.integers(0, 3),
                st.integers(0, 3000),
                st.integers(900, 1100),
                st.sampled_from([0, 0, 0, 70, 4000]),
                st.sampled_from([10, 10, 10, 10, 2000]),
                st.integers(0, 12).map(lambda exponent: 2**exponent),
            ]
        )
    )
    load_E = draw(st.lists(expert_load, min_size=P * M, max_size=P * M))
    if draw(st.booleans()):
        load_E[draw(st.integers(0, P * M - 1))] = 20000
    config = config_of(
        imbalance_threshold=draw(st.sampled_from([1.0, 1.0, 1.3])),
        capacity_factor=draw(st.sampled_from([1.0, 1.1, 1.5]) | st.floats(1.0, 2.0)),
        min_tokens_per_gemm=draw(st.sampled_from([0, 1, 2, 1024]) | st.integers(0, 300)),
        max_foreign_experts=draw(st.none() | st.integers(0, 3)),
    )
    return scatter(load_E, P, draw(st.integers(0, 2**32))), config


@given(problems())
def test_agrees_with_the_host(problem):
    same_as_the_host(*problem)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_what_limits_on_foreign_experts_keep_at_home(limit, seed):
    # Rank 0's eight experts are hot and one rank has all the room.
    load_E = [1000] * 8 + [900] * 8 + [0] * 8
    plan = same_as_the_host(scatter(load_E, 3, seed), config_of(max_foreign_experts=limit))
    assert plan.capped_tokens > 0
    assert len(plan.foreign_experts(2)) == limit


def test_threshold_exactly_at_the_ratio(seed):
    counts_PE = scatter([611, 200, 100, 89, 7, 3], 3, seed)
    ratio = make_plan(counts_PE, config_of()).load_ratio_before
    assert ratio != float(np.float32(ratio))
    planned = {
        threshold: not same_as_the_host(
            counts_PE, config_of(imbalance_threshold=threshold)
        ).bypassed
        for threshold in (math.nextafter(ratio, 1), ratio, math.nextafter(ratio, 9))
    }
    assert list(planned.values()) == [True, True, False]


@pytest.mark.parametrize(
    "factor, mean", [(1.15, 100), (math.nextafter(1.5, 1), 2**20), (1 + 2**-40, 2**41)]
)
def test_capacity_is_the_doubles(factor, mean):
    assert int(factor * mean) != int(np.float32(factor) * np.float32(mean))
    counts_PE = [[3 * mean, 0, 0], [0, 0, 0], [0, 0, 0]]
    plan = same_as_the_host(counts_PE, config_of(capacity_factor=factor))
    assert plan.tokens_EP[0, 0] == int(factor * mean)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_more_tokens_than_int32_holds(dtype):
    counts_PE = torch.tensor([[2**31 - 1, 5, 9, 2**30]] * 2, dtype=dtype)
    plan = same_as_the_host(counts_PE, config_of(capacity_factor=1.1))
    assert plan.spills and plan.tokens_EP.max() > 2**31


def test_as_gathered(seed):
    """Other columns behind the counts, and column-major counts."""
    counts_PE = torch.from_numpy(scatter([4000, 1, 300, 20, 0, 77], 3, seed))
    gathered = torch.cat((counts_PE, torch.full((3, 4), -1)), 1)
    assert same_as_the_host(gathered[:, :6], config_of()).spills
    assert same_as_the_host(counts_PE.t().contiguous().t(), config_of()).spills


@pytest.mark.parametrize(
    "load_E, P", [([0] * 6, 3), ([3, 0, 0, 0], 4), ([7, 9, 0, 4], 1), ([5, 5, 5, 5], 4)], ids=str
)
def test_nothing_to_move(load_E, P):
    assert not same_as_the_host(scatter(load_E, P), config_of()).spills


def test_values_beyond_any_count(seed):
    counts_PE = scatter([4000, 1, 300, 20, 0, 77], 3, seed)
    assert not same_as_the_host(counts_PE, config_of(capacity_factor=1e300)).spills
    assert not same_as_the_host(counts_PE, config_of(imbalance_threshold=1e300)).spills
    for changes in ({"min_tokens_per_gemm": 10**30}, {"max_foreign_experts": 10**30}):
        assert same_as_the_host(counts_PE, config_of(**changes)).spills


def test_256_experts_on_64_ranks(seed):
    load_E = np.random.default_rng(seed).permutation(2**21 // np.arange(1, 257)).tolist()
    config = config_of(imbalance_threshold=1.3, min_tokens_per_gemm=1024)
    assert len(same_as_the_host(scatter(load_E, 64, seed), config).spills) > 20

"""One layer against AutoEP's, both against fp64: outputs and every gradient, at every skew.

The budget is AutoEP's own: our error may be twice its error, plus 1e-6, in each tensor.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import layers
import pytest
import torch
import workloads
from families import FAMILIES
from plans import plan_for_nodes

from ds_llep import layer as layer_room
from ds_llep import make_plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compare(
    family: str,
    workload: str,
    dtype: torch.dtype,
    ep_size: int,
    seed: int,
    num_tokens: int = 24,
    checkpointing: str = "none",
    options: dict | None = None,
    ranks_per_node: int | None = None,
    **settings,
) -> dict:
    """On every rank: tensors over budget as ``{name: (ours, AutoEP's)}``, and what was planned.

    With ``ranks_per_node``, ranks are taken to be on nodes of this size, and any spill pays.
    """
    planner = partial(plan_for_nodes, ranks_per_node=ranks_per_node)
    nodes = mock.patch.object(layer_room, "make_plan", planner if ranks_per_node else make_plan)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    try:
        theirs = layers.autoep_layer(family, ep_size, seed, dtype, **(options or {}))
        ours = layers.llep_twin(theirs, **settings)
        x, grad, ids = layers.draw(theirs, workload, num_tokens, dtype, seed)
        found_theirs = layers.run(theirs, x, grad, ids, checkpointing)
        with nodes:
            found_ours = layers.run(ours, x, grad, ids, checkpointing)
        expected = layers.reference(family, theirs, x, grad, ids, seed, dtype, **(options or {}))
    finally:
        torch.use_deterministic_algorithms(False)
    error_theirs = layers.errors(found_theirs, expected)
    error_ours = layers.errors(found_ours, expected)
    tensors = {name for name, tensor in expected.items() if tensor is not None}
    return {
        "over": layers.over_budget(error_ours, error_theirs),
        "tensors": tensors,
        **ours.llep.statistics.last(),
    }


def check(results: list[dict], seed: int) -> None:
    for rank, result in enumerate(results):
        assert not result["over"], f"rank {rank}, seed {seed}: {result['over']}"
        compared = result["tensors"]  # the router's gradient too, whatever its size
        assert {"output", "input", "router.gate.weight"} <= compared, compared
        assert {"experts.w1", "experts.w2", "experts.w3"} <= compared, compared


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", workloads.NAMES)
def test_workloads(pools, workload, dtype, seed):
    results = pools(4).run(compare, "qwen3_moe", workload, DTYPES[dtype], 4, seed)
    check(results, seed)
    if workload != "balanced":
        assert results[0]["foreign_experts"][0] > 0, "nothing was spilled: the test tests nothing"
        assert results[0]["load_ratio_after"][0] < results[0]["load_ratio_before"][0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(pools, family, dtype, seed):
    results = pools(4).run(compare, family, "one_hot_expert", DTYPES[dtype], 4, seed)
    check(results, seed)
    assert results[0]["foreign_experts"][0] > 0


@pytest.mark.parametrize("workload", ["balanced", "one_hot_expert", "empty_rank"])
def test_two_ep_groups(pools, workload, seed):
    """EP 2 in a world of 4: the groups draw different tokens and so plan differently."""
    check(pools(4).run(compare, "mixtral", workload, torch.float32, 2, seed), seed)


@pytest.mark.parametrize("workload", ["balanced", "one_hot_expert", "hot_rank", "empty_rank"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ranks(pools, workload, dtype, seed):
    check(pools(2).run(compare, "qwen3_moe", workload, DTYPES[dtype], 2, seed), seed)


# World, EP size, ranks of a node.
@pytest.mark.parametrize("size", [(4, 4, 4), (4, 4, 2), (4, 2, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("workload", ["one_hot_expert", "hot_rank", "idle_ranks", "empty_rank"])
def test_local_cut(pools, workload, size, seed):
    """A rank computes its own tokens first."""
    world, ep_size, ranks_per_node = size
    results = pools(world).run(
        compare,
        "qwen3_moe",
        workload,
        torch.float32,
        ep_size,
        seed,
        planner="cost",
        ranks_per_node=ranks_per_node,
    )
    check(results, seed)
    assert results[0]["foreign_experts"][0] > 0


def test_every_rank_alone(pools, seed):
    """EP 1: nothing to balance, and still AutoEP's result."""
    results = pools(2).run(compare, "qwen3_moe", "one_hot_expert", torch.float32, 1, seed)
    check(results, seed)
    assert results[0]["foreign_experts"] == [0]


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("backward_weights", ["refetch", "keep"])
def test_activation_checkpointing(pools, checkpointing, backward_weights, seed):
    """The published code deadlocks here: its ranks disagree on the order of collectives."""
    results = pools(4).run(
        compare,
        "qwen3_moe",
        "hot_rank",
        torch.float32,
        4,
        seed,
        checkpointing=checkpointing,
        backward_weights=backward_weights,
    )
    check(results, seed)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scores_before_experts(pools, dtype, seed):
    results = pools(4).run(
        compare,
        "qwen3_moe",
        "one_hot_expert",
        DTYPES[dtype],
        4,
        seed,
        options={"score_apply": "pre"},
    )
    check(results, seed)
    assert results[0]["foreign_experts"][0] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"backward_weights": "keep"},
        {"max_foreign_experts": 1},
        {"max_foreign_experts": 0},
        {"capacity_factor": 1.4},
        {"min_tokens_per_gemm": 16},
        {"imbalance_threshold": 100.0},
    ],
    ids=str,
)
def test_settings(pools, settings, seed):
    """No setting changes the result."""
    results = pools(4).run(compare, "qwen3_moe", "hot_rank", torch.float32, 4, seed, **settings)
    check(results, seed)
    if "max_foreign_experts" in settings:
        limit = settings["max_foreign_experts"]
        assert results[0]["foreign_experts"][0] <= limit * 4
        assert results[0]["capped_tokens"][0] > 0
    if settings.get("imbalance_threshold") == 100.0:
        assert results[0]["bypassed"] == [True]


def backward_twice(seed: int) -> list[str]:
    """Parameters whose gradient after two backwards through one graph is not twice the first."""
    layer = layers.llep_twin(layers.autoep_layer("qwen3_moe", 4, seed, torch.float32))
    x, grad, ids = layers.draw(layer, "one_hot_expert", 24, torch.float32, seed)
    layers.force_routing(layer, ids)
    y = layer(x.requires_grad_())
    y.backward(grad, retain_graph=True)
    first = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    y.backward(grad)
    return [
        name
        for name, parameter in layer.named_parameters()
        if not torch.equal(parameter.grad, 2 * first[name]) or not first[name].any()
    ]


def test_retained_graph(pools, seed):
    """Memory is given back early in backward, but not where the graph is kept."""
    for wrong in pools(4).run(backward_twice, seed):
        assert not wrong

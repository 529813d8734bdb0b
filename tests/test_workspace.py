"""The workspace under layers: what they fetch into it, how large it gets, what comes back.

Results are held bit for bit to those of other settings, which must not change them.
"""

from __future__ import annotations

import copy
from collections import Counter
from unittest import mock

import deepspeed.comm as dist
import layers
import pytest
import torch
from traffic import EXPERT, watched

from ds_llep.activate import adopt
from ds_llep.config import LLEPConfig
from ds_llep.fetch import Exchange

FP32 = torch.float32


def stack(num_layers: int, ep_size: int, seed: int, **settings) -> list:
    """Layers with different weights that share what the layers of one engine share."""
    one = layers.autoep_layer("qwen3_moe", ep_size, seed, FP32)
    group, one.ep_group = one.ep_group, None
    stacked = [copy.deepcopy(one) for _ in range(num_layers)]
    for index, layer in enumerate(stacked):
        layer.ep_group = group
        for weight in layer.experts.parameters():
            weight.data.mul_(1 + index / 4)
    config = {"imbalance_threshold": 1.0, "min_tokens_per_gemm": 1, **settings}
    config = LLEPConfig(enabled=True, **config)
    exchange = Exchange.of_home_ranks(group, cache=config.weight_cache)
    adopt({f"layer {index}": layer for index, layer in enumerate(stacked)}, config, exchange)
    return stacked


def run(stacked: list, seed: int, checkpointing: str = "none") -> dict:
    """Output and all gradients of one forward and backward through all layers, one segment."""
    for index, layer in enumerate(stacked):
        x, grad, ids = layers.draw(layer, "hot_rank", 24, FP32, seed + index)
        layers.force_routing(layer, ids)

    def segment(x):
        for layer in stacked:
            x = x + layer(x)
        return x

    x.requires_grad_()
    reentrant = {"use_reentrant": checkpointing == "reentrant"}
    checkpointed = torch.utils.checkpoint.checkpoint
    y = segment(x) if checkpointing == "none" else checkpointed(segment, x, **reentrant)
    y.backward(grad)
    found = {"output": y.detach(), "input": x.grad}
    for index, layer in enumerate(stacked):
        for name, parameter in layer.named_parameters():
            found[f"{index} {name}"], parameter.grad = parameter.grad, None
    return found


def fetches(num_layers: int, checkpointing: str, settings: dict, seed: int) -> dict:
    """Experts that this rank borrows, and that it receives in each of two equal micro-batches."""
    plain = {"max_foreign_bytes": settings["max_foreign_bytes"], "weight_cache": False}
    expected = run(stack(num_layers, 4, seed, **plain), seed)
    stacked = stack(num_layers, 4, seed, **settings)
    result = {"different": [], "received": []}
    with watched() as log:
        for _ in range(2):
            log.received, log.plans = 0, []
            result["different"] += layers.unequal(run(stacked, seed, checkpointing), expected)
            result["received"].append(log.received)
        plans = log.plans[:num_layers]
        result["borrowed"] = sum(len(plan.foreign_experts(dist.get_rank())) for plan in plans)
        result["recomputed"] = len(log.plans) == 2 * num_layers
    last = stacked[0].llep.statistics.last()
    return {**result, "counted": sum(last["fetched_experts"]), "all": sum(last["foreign_experts"])}


# How often each borrowed expert is fetched in the first and in the second micro-batch.
@pytest.mark.parametrize(
    "num_layers, checkpointing, backward_weights, cache, first, second",
    [
        (1, "none", "refetch", True, 1, 0),
        (1, "none", "keep", True, 1, 0),
        (1, "none", "refetch", False, 2, 2),  # in forward and in backward
        (1, "none", "keep", False, 1, 1),
        (1, "reentrant", "refetch", True, 1, 0),
        (1, "non_reentrant", "refetch", True, 1, 0),
        (1, "reentrant", "refetch", False, 3, 3),  # and in the recompute
        (1, "non_reentrant", "refetch", False, 3, 3),
        (1, "non_reentrant", "keep", False, 2, 2),
        (2, "reentrant", "refetch", True, 1, 0),
        (2, "non_reentrant", "refetch", True, 1, 0),
        (2, "reentrant", "refetch", False, 3, 3),
    ],
)
def test_fetches(pools, num_layers, checkpointing, backward_weights, cache, first, second, seed):
    """Also of two layers in one checkpointed segment: both are recomputed before any backward."""
    settings = {"backward_weights": backward_weights, "weight_cache": cache}
    settings["max_foreign_bytes"] = 8 * EXPERT
    for result in pools(4).run(fetches, num_layers, checkpointing, settings, seed):
        assert not result["different"], (seed, result["different"])
        assert result["all"] > 0 and result["recomputed"] == (checkpointing != "none")
        assert result["received"] == [first * result["borrowed"], second * result["borrowed"]]
        if checkpointing == "none":  # else it starts anew with the recompute
            assert result["counted"] == second * result["all"]


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("places", [1, 2])
def test_layers_evict_each_other(pools, places, checkpointing, cache, seed):
    settings = {"max_foreign_bytes": places * EXPERT, "weight_cache": cache}
    results = pools(4).run(fetches, 2, checkpointing, settings, seed)
    for result in results:
        assert not result["different"], (seed, result["different"])
    borrowed = sum(result["borrowed"] for result in results)
    assert sum(result["received"][0] for result in results) > borrowed > 0


def bounded(num_layers: int, settings: dict, seed: int) -> dict:
    """The most that this rank borrowed for a layer, and that its workspace held."""
    stacked = stack(num_layers, 4, seed, **settings)
    with watched() as log:
        for micro_batch in range(2):
            run(stacked, seed + micro_batch)
            log.nbytes.append(log.workspace.nbytes())
    return {
        "foreign": max(len(plan.foreign_experts(dist.get_rank())) for plan in log.plans),
        "capped": max(plan.capped_tokens for plan in log.plans),
        "nbytes": max(log.nbytes),
    }


@pytest.mark.parametrize("num_layers", [2, 6])
@pytest.mark.parametrize(
    "max_bytes, max_experts, limit",
    [
        (EXPERT, None, 1),
        (2 * EXPERT - 1, None, 1),
        (2 * EXPERT, None, 2),
        (2 * EXPERT, 1, 1),
        (EXPERT, 2, 1),
        (None, None, None),
    ],
)
def test_workspace_is_bounded(pools, max_bytes, max_experts, limit, num_layers, seed):
    """All layers share it, however many there are."""
    settings = {"max_foreign_bytes": max_bytes, "max_foreign_experts": max_experts}
    results = pools(4).run(bounded, num_layers, settings, seed)
    for result in results:
        if limit is None:
            assert result["nbytes"] == result["foreign"] * EXPERT
        else:
            assert result["foreign"] <= limit and result["nbytes"] <= max_bytes
        assert (result["capped"] > 0) == (limit == 1)  # no rank wants more than two
    assert max(result["foreign"] for result in results) == (limit or 2)


def too_small(seed: int) -> str:
    stacked = stack(2, 4, seed, max_foreign_bytes=EXPERT - 1)
    with pytest.raises(ValueError) as caught:
        run(stacked, seed)
    dist.barrier()  # nobody is left behind in a collective
    return str(caught.value)


def test_no_room_for_one_expert(pools, seed):
    for message in pools(4).run(too_small, seed):
        for part in ("llep.max_foreign_bytes", str(EXPERT - 1), "'layer 0'", f"{EXPERT} bytes"):
            assert part in message, message


def returned(seed: int) -> dict:
    """Gradients that return in one round or in many, and the most that a home rank gets back."""
    found = []
    for bundles in (4, 1, 3, 100):
        with mock.patch("ds_llep.returns.BUNDLES_PER_ROUND", bundles), watched() as log:
            found.append(run(stack(2, 4, seed), seed))
    homes = Counter(spill.home for spill in log.plans[0].spills)
    different = [name for other in found[1:] for name in layers.unequal(other, found[0])]
    return {"different": different, "spills": max(homes.values())}


def test_rounds_of_returned_gradients(pools, seed):
    pool = pools(4)
    for result in pool.run(returned, seed):
        assert not result["different"], (seed, result["different"])
        assert result["spills"] >= min(pool.world_size - 1, 3)

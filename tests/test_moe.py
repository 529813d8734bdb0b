"""DeepSpeed's own MoE layer and ours with the same weights: results and every gradient.

The budget is DeepSpeed's own: our error against fp64 may be twice its error, plus 1e-6.
"""

from __future__ import annotations

import deepspeed
import deepspeed.comm as dist
import deepspeed.moe.layer
import engines
import layers
import natives
import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import safe_get_full_grad

import ds_llep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compare(kind: str, ep_size: int, dtype: torch.dtype, seed: int, settings: dict, **options):
    """On every rank: tensors over budget as ``{name: (ours, DeepSpeed's)}``, and the plan."""
    theirs = natives.layer(kind, ep_size, seed, dtype, **options)
    ours = natives.twin(theirs, **settings)
    x, grad = natives.draw([theirs], 48, dtype, seed)
    found_theirs, found_ours = (natives.run(moe, x, grad, seed) for moe in (theirs, ours))
    same = ("l_aux", "exp_counts")
    unequal = layers.unequal(*({n: found[n] for n in same} for found in (found_theirs, found_ours)))
    expected = natives.reference(kind, theirs, x, grad, seed, dtype, **options)
    error_theirs, error_ours = (
        layers.errors(found, expected) for found in (found_theirs, found_ours)
    )
    return {
        "unequal": unequal,
        "over": layers.over_budget(error_ours, error_theirs),
        "tensors": len(expected),
        **ours.deepspeed_moe.llep.statistics.last(),
    }


def check(results: list[dict], seed: int, spills: bool = True) -> None:
    for rank, result in enumerate(results):
        assert not result["unequal"], f"rank {rank}, seed {seed}: {result['unequal']}"
        assert not result["over"], f"rank {rank}, seed {seed}: {result['over']}"
        if spills:
            assert result["foreign_experts"][0] > 0, "nothing was spilled: the test tests nothing"
            assert result["load_ratio_after"][0] < result["load_ratio_before"][0]


@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_choices(pools, k, ep_size, seed):
    """EP 2 in a world of 4: the groups draw different tokens and so plan differently."""
    for dtype in DTYPES.values():
        results = pools(4).run(compare, "mlp", ep_size, dtype, seed, {}, k=k, drop_tokens=False)
        check(results, seed)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_dropped_tokens(pools, k, seed):
    options = dict(k=k, capacity_factor=0.7)
    results = pools(4).run(compare, "mlp", 4, torch.float32, seed, {}, **options)
    check(results, seed, spills=False)


@pytest.mark.parametrize("kind", natives.KINDS)
def test_experts(pools, kind, seed):
    results = pools(4).run(compare, kind, 4, torch.float32, seed, {}, k=2, drop_tokens=False)
    check(results, seed)


def one_step(make, stage: int, llep: dict | None, seed: int, saved: str, loaded: str | None):
    """Loss, gradients and stepped parameters, and the status, of an engine with EP 2.

    Args:
        make: the class of its MoE layers.
        stage: of ZeRO.
        llep: the section, or None.
        seed: of weights and input.
        saved: folder for a checkpoint that is written before the step.
        loaded: folder of the checkpoint that is read before that; None: none is.
    """
    model = natives.Model(make, layers.fit(2), seed)
    params = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    config = engines.ds_config(stage, 1, llep=llep)
    del config["expert_parallel"]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=params, config=config)
    if loaded:
        engine.load_checkpoint(loaded)
    engine.save_checkpoint(saved)
    x, _ = natives.draw([model.residual, model.plain], 48, torch.float32, seed)
    torch.manual_seed(seed + dist.get_rank())
    loss = engine(x)
    engine.backward(loss)
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        found[f"gradient of {name}"] = safe_get_full_grad(parameter).clone()
    engine.step()
    found |= {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    status = ds_llep.status(engine)
    engine.destroy()
    return found, status


def compare_engines(stage: int, seed: int, folder: str) -> tuple[list[dict], dict]:
    """Relative differences between DeepSpeed's engine and ours, before and after each has loaded
    the checkpoint of the other; and our status.

    Both start from the same weights: after a step, rounding might send a token elsewhere.
    """
    off = []
    for moment, by_theirs, by_ours in (("first", None, None), ("then", "ours", "theirs")):
        loaded = [name and f"{folder}/first/{name}" for name in (by_theirs, by_ours)]
        saved = [f"{folder}/{moment}/{name}" for name in ("theirs", "ours")]
        number = seed + len(off)
        native = deepspeed.moe.layer.MoE
        theirs, _ = one_step(native, stage, None, number, saved[0], loaded[0])
        ours, status = one_step(native, stage, {}, number, saved[1], loaded[1])
        off.append(layers.errors(ours, theirs))
    return off, status


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_engine(pools, stage, seed, tmp_path):
    """Layers are converted; they share the popular experts of a residual and a smaller layer."""
    for off, status in pools(4).run(compare_engines, stage, seed, str(tmp_path)):
        for errors in off:
            assert max(errors.values()) < 1e-4, f"seed {seed}: {errors}"
        assert status["active"] and status["layer_names"] == ["residual", "plain"]
        assert min(status["foreign_experts"]) > 0, "nothing was spilled"

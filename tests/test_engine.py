"""Whole engines under every ZeRO stage: gradients, loss curves, modes of running.

The budget is AutoEP's own error against the fp64 reference: twice that, plus 1e-6.
"""

from __future__ import annotations

import engines
import layers
import pytest
import torch
from families import build

import ds_llep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gradients(
    stage: int, ep_size: int, dtype: str, checkpointing: str, workload: str, seed: int, llep: dict
) -> dict:
    """On every rank: tensors over budget, and the status of the engine with llep."""
    found, statuses = [], []
    for section in (None, llep):
        model = build("qwen3_moe", seed, DTYPES[dtype])
        engines.enable_checkpointing(model, checkpointing)
        engine = engines.initialize(model, engines.ds_config(stage, ep_size, dtype, section))
        ids = engines.routing(workload, model.config, ep_size, seed)
        inputs = engines.batch(DTYPES[dtype], seed)
        found.append(engines.engine_gradients(engine, inputs, ids))
        statuses.append(ds_llep.status(engine))
        engine.destroy()
    reference = build("qwen3_moe", seed, DTYPES[dtype]).double().to(inputs["labels"].device)
    expected = engines.reference_gradients(reference, inputs, ids, ep_size)
    theirs, ours = (layers.errors(tensors, expected) for tensors in found)
    over = {
        name: (error, theirs[name])
        for name, error in ours.items()
        if not error <= 2 * theirs[name] + 1e-6
    }
    return {"over": over, "theirs": theirs, "statuses": statuses}


# A covering selection: every value of every factor, and the pairs that share code or hooks.
@pytest.mark.parametrize(
    "world, ep_size, stage, dtype, checkpointing, workload",
    [
        (4, 2, 0, "fp32", "none", "one_hot_expert"),
        (4, 2, 0, "bf16", "reentrant", "hot_rank"),
        (4, 2, 1, "fp32", "non_reentrant", "per_layer"),
        (4, 2, 1, "bf16", "none", "balanced"),
        (4, 2, 2, "fp32", "reentrant", "idle_ranks"),
        (4, 2, 2, "bf16", "non_reentrant", "one_hot_expert"),
        (4, 2, 3, "fp32", "none", "per_layer"),
        (4, 2, 3, "bf16", "none", "hot_rank"),
        (4, 2, 3, "fp32", "reentrant", "one_hot_expert"),
        (4, 2, 3, "fp32", "non_reentrant", "hot_rank"),
        (4, 2, 3, "fp32", "none", "balanced"),
        (4, 4, 3, "fp32", "none", "one_hot_expert"),
        (4, 4, 3, "bf16", "reentrant", "idle_ranks"),
        (4, 4, 2, "fp32", "non_reentrant", "hot_rank"),
        (4, 4, 0, "fp32", "none", "per_layer"),
        (2, 2, 3, "fp32", "none", "one_hot_expert"),
        (2, 2, 3, "bf16", "non_reentrant", "hot_rank"),
        (2, 2, 1, "fp32", "reentrant", "per_layer"),
        (2, 2, 2, "fp16", "none", "one_hot_expert"),
    ],
)
def test_gradients(pools, world, ep_size, stage, dtype, checkpointing, workload, seed):
    results = pools(world).run(gradients, stage, ep_size, dtype, checkpointing, workload, seed, {})
    for rank, result in enumerate(results):
        assert not result["over"], f"rank {rank}, seed {seed}: {result['over']}"
        expected = {"logits", "input", "lm_head.weight", "small tensors"}
        expected |= {f"model.layers.{i}.mlp.experts.w{w}" for i in range(2) for w in (1, 2, 3)}
        assert expected <= set(result["theirs"]), result["theirs"]
        off, on = result["statuses"]
        assert off == {"active": False}
        assert on["active"] and on["layers"] == 2
        assert (on["ep_size"], on["edp_size"]) == (ep_size, world // ep_size)
        if workload != "balanced":
            assert sum(on["foreign_experts"]) > 0, "nothing was spilled: the test tests nothing"

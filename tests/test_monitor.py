"""Statistics: what ``status`` says, and what reaches DeepSpeed's monitor."""

from __future__ import annotations

import csv
from pathlib import Path

import engines
import pytest
import torch
from families import build

import ds_llep


def train_monitored(directory: str, seed: int, enabled: bool) -> dict:
    """Five optimizer steps with DeepSpeed's CSV monitor."""
    config = engines.ds_config(
        2,
        2,
        llep={"monitor": {"enabled": enabled, "interval": 2}},
        csv_monitor={"enabled": True, "output_path": directory, "job_name": "job"},
    )
    engine = engines.initialize(build("qwen3_moe", seed), config)
    untouched = ds_llep.status(engine)
    ratios = []
    for step in range(5):
        ids = engines.routing("hot_rank", engine.module.config, 2, seed + step)
        engines.set_routing(engine.module, ids)
        loss = engine(**engines.batch(torch.float32, seed + step)).loss
        engine.backward(loss)
        engine.step()
        ratios.append(ds_llep.status(engine)["load_ratio_before"])
    status = ds_llep.status(engine)
    engine.destroy()
    return {"untouched": untouched, "ratios": ratios, "status": status}


@pytest.mark.parametrize("enabled", [True, False])
def test_monitor(pools, enabled, tmp_path, seed):
    results = pools(4).run(train_monitored, str(tmp_path), seed, enabled)
    for result in results:
        assert result["untouched"]["load_ratio_before"] == []
        status = result["status"]
        assert status["layer_names"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert len(status["load_ratio_before"]) == len(status["load_ratio_after"]) == 2
        # All choices of the hot rank's experts that a token can make: 3 of 3, or 2 of 3.
        assert min(status["load_ratio_before"]) > 1.3
        assert max(status["load_ratio_after"]) < min(status["load_ratio_before"])
        assert sum(status["spilled_tokens"]) > 0
    written = {path.stem: path for path in Path(tmp_path, "job").glob("*llep*.csv")}
    if not enabled:
        assert not written
        return
    assert {name.removeprefix("Train_llep_") for name in written} == {
        "load_ratio_before_max",
        "load_ratio_after_max",
        "spilled_token_share",
        "foreign_experts",
        "fetched_experts",
        "capped_token_share",
        "bypassed_layers",
    }
    with open(written["Train_llep_load_ratio_before_max"]) as file:
        rows = list(csv.reader(file))[1:]
    # After two and four steps, what the last micro-batch before them planned.
    expected = [max(results[0]["ratios"][1]), max(results[0]["ratios"][3])]
    assert [float(value) for _, value in rows] == pytest.approx(expected)

"""Statistics: what ``status`` says, and what reaches DeepSpeed's monitor."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path

import engines
import numpy as np
import pytest
import torch
from families import build
from traffic import EXPERT, watched

import ds_llep

STEPS, GAS, INTERVAL = 5, 2, 2
LIMIT = {"max_foreign_experts": 1}


def train_monitored(directory: str, seed: int, enabled: bool) -> dict:
    """Five optimizer steps with DeepSpeed's CSV monitor; what status says of each micro-batch."""
    config = engines.ds_config(
        2,
        2,
        llep={"monitor": {"enabled": enabled, "interval": INTERVAL}, **LIMIT},
        gradient_accumulation_steps=GAS,
        csv_monitor={"enabled": True, "output_path": directory, "job_name": "job"},
    )
    engine = engines.initialize(build("qwen3_moe", seed), config)
    found = {"untouched": ds_llep.status(engine), "micro_batches": [], "samples": []}
    for step in range(STEPS):
        for micro_step in range(GAS):
            # Micro-batches of different skew, so that a mean is not any of them.
            workload = ("hot_rank", "balanced", "one_hot_expert")[(step * GAS + micro_step) % 3]
            at = seed + step * GAS + micro_step
            engines.set_routing(
                engine.module, engines.routing(workload, engine.module.config, 2, at)
            )
            engine.backward(engine(**engines.batch(torch.float32, at)).loss)
            found["micro_batches"].append(ds_llep.status(engine))
            with torch.no_grad():  # of no training micro-batch, though it may fetch
                engine.eval()
                engine(**engines.batch(torch.float32, at))
                engine.train()
            engine.step()
        found["samples"].append(engine.global_samples)
    engine.destroy()
    return found


def expected_values(micro_batches: list[dict], rows: int) -> dict[str, float]:
    """A window's values, from the status of each of its micro-batches with ``rows`` a layer."""

    def all_of(key):
        return np.concatenate([status[key] for status in micro_batches])

    def per_micro_batch(values):
        return values.sum() / len(micro_batches)

    before, after = all_of("load_ratio_before"), all_of("load_ratio_after")
    fetched, capped = all_of("fetched_experts"), all_of("capped_tokens")
    return {
        "load_ratio_before_max": before.max(),
        "load_ratio_before_mean": before.mean(),
        "load_ratio_after_max": after.max(),
        "load_ratio_after_mean": after.mean(),
        "spilled_token_share": all_of("spilled_tokens").mean() / rows,
        "foreign_experts": per_micro_batch(all_of("foreign_experts")),
        "fetched_experts": per_micro_batch(fetched),
        "fetched_bytes": per_micro_batch(fetched) * EXPERT,
        "capped_token_share": capped.mean() / rows,
        "capped_layers": per_micro_batch(capped > 0),
        "bypassed_layers": per_micro_batch(all_of("bypassed")),
    }


def written(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What the CSV monitor wrote for llep: by name, (samples, value) for each write."""
    found = {}
    for path in directory.glob("job/*llep*.csv"):
        with open(path) as file:
            rows = list(csv.reader(file))[1:]
        name = path.stem.removeprefix("Train_llep_")
        found[name] = [(int(samples), float(value)) for samples, value in rows]
    return found


@pytest.mark.parametrize("enabled", [True, False])
def test_monitor(pools, enabled, tmp_path, seed):
    """Every second step is written, with all training micro-batches since the write before."""
    results = pools(4).run(train_monitored, str(tmp_path), seed, enabled)
    for result in results:
        assert result["untouched"]["load_ratio_before"] == []
        for status in result["micro_batches"]:
            assert status["layer_names"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
            assert len(status["load_ratio_before"]) == len(status["load_ratio_after"]) == 2
        # All choices of the hot rank's experts that a token can make: 3 of 3, or 2 of 3.
        hot = result["micro_batches"][0]
        assert min(hot["load_ratio_before"]) > 1.3
        assert max(hot["load_ratio_after"]) < min(hot["load_ratio_before"])
        assert sum(hot["spilled_tokens"]) > 0
    found = written(tmp_path)
    if not enabled:
        assert not found
        return
    expected: dict[str, list] = {}
    rows = engines.SEQ_LEN * 3 * results[0]["micro_batches"][0]["ep_size"]
    for end in range(INTERVAL, STEPS + 1, INTERVAL):
        window = results[0]["micro_batches"][(end - INTERVAL) * GAS : end * GAS]
        for name, value in expected_values(window, rows).items():
            expected.setdefault(name, []).append((results[0]["samples"][end - 1], value))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert [at for at, _ in found[name]] == [at for at, _ in values]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in values])
    assert sum(value for _, value in found["capped_layers"]), "no plan was cut: nothing is tested"
    assert sum(value for _, value in found["fetched_bytes"])


def fetched_by_status(seed: int, kind: str) -> tuple[int, int]:
    """Experts that arrived here in two micro-batches, and those that status counts in its group."""
    config = engines.ds_config(2, 2, llep={"weight_cache": False}, gradient_accumulation_steps=2)
    engine = engines.initialize(build("qwen3_moe", seed), config)
    engines.enable_checkpointing(engine.module, kind)
    engines.set_routing(engine.module, engines.routing("hot_rank", engine.module.config, 2, seed))
    counted = 0
    with watched() as log:
        for _ in range(2):
            engine.backward(engine(**engines.batch(torch.float32, seed)).loss)
            engine.step()
            counted += sum(ds_llep.status(engine)["fetched_experts"])
    engine.destroy()
    return log.received, counted


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_fetched_while_recomputing(pools, kind, seed):
    """Under checkpointing, what forward, recomputation and backward fetch is all counted."""
    results = pools(4).run(fetched_by_status, seed, kind)
    ep_size = min(2, len(results))
    for first in range(0, len(results), ep_size):
        group = results[first : first + ep_size]
        arrived = sum(received for received, _ in group)
        assert arrived > 0
        assert [counted for _, counted in group] == [arrived] * ep_size


def printed_at_start(seed: int) -> str:
    """What this rank prints when llep's monitor is enabled, but none of DeepSpeed's."""
    config = engines.ds_config(1, 2, llep={"monitor": {"enabled": True}})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        engines.initialize(build("qwen3_moe", seed), config).destroy()
    return printed.getvalue()


def test_monitor_without_monitors(pools, seed):
    """Rank 0 says that nothing is written."""
    first, *others = pools(4).run(printed_at_start, seed)
    assert "none of DeepSpeed's monitors is" in first and '"csv_monitor"' in first
    assert not any("none of DeepSpeed" in text for text in others)

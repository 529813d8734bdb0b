"""What the caching allocator has reserved, read as steps go by."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest import mock

import torch
from test_bench import device, settings

from ds_llep.bench import reserved, run

STEPS = 12


def read_counted(seed: int) -> tuple[list[dict], list[list]]:
    """Records where the allocator's statistics are the steps done; each step's routing and class.

    A rank reserves the more, the higher its number.
    """
    steps, routed = [], []
    rank, results, force = torch.distributed.get_rank(), reserved.results, reserved.force_routing

    def count(*args):
        steps.append(None)
        return results(*args)

    def forced(layer, ids_TK):
        routed.append((type(layer).__name__, ids_TK.cpu()))
        force(layer, ids_TK)

    def statistics():
        return {"reserved_bytes.all.current": 100 * len(steps) + rank, "num_alloc_retries": 7}

    with (
        mock.patch.object(reserved, "results", count),
        mock.patch.object(reserved, "force_routing", forced),
        mock.patch.object(reserved, "_statistics", statistics),
    ):
        changes = {"workloads": ["rotating"], "modes": ["ep", "llep"], "repeats": STEPS}
        return reserved.measure(settings(seed=seed, **changes), device()), routed


def test_readings(pools, seed):
    """As many steps as said in each mode, each routed anew and the same in both; ranks agree."""
    pool = pools(2)
    for records, routed in pool.run(read_counted, seed):
        for index, record in enumerate(records):
            done = {step: 100 * (STEPS * index + step) + 1 for step in (1, 3, 6, 12)}
            assert record["reserved_bytes"] == done
            assert record["alloc_retries"] == 0 and record["kind"] == "reserved"
            assert (record["peak_reserved_bytes"] is None) == (record["device"] == "CPU")
        assert [record["mode"] for record in records] == ["ep", "llep"]
        assert [name for name, _ in routed[:STEPS]] == ["AutoEPMoELayer"] * STEPS
        assert [name for name, _ in routed[STEPS:]] == ["LLEPMoELayer"] * STEPS
        ids = [ids_TK for _, ids_TK in routed]
        for first, second in zip(ids[:STEPS], ids[STEPS:], strict=True):
            assert torch.equal(first, second)
        assert not any(torch.equal(first, ids[0]) for first in ids[1:STEPS])


def command(path: Path) -> int:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    options = "--tokens 64 --workloads rotating --repeats 4 --reserved --json"
    args = parser.parse_args([*options.split(), str(path)])
    return run.measure(args, run.read_settings(args), device())


def test_command(pools, tmp_path):
    """One JSON line for each mode; on the CPU nothing is made up."""
    path = tmp_path / "reserved.jsonl"
    assert set(pools(2).run(command, path)) == {0}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["mode"] for line in lines] == ["ep_balanced", "ep", "llep"]
    for line in lines:
        assert list(line["reserved_bytes"]) == ["1", "2", "4"] and line["versions"]["torch"]
        values = [*line["reserved_bytes"].values(), line["peak_allocated_bytes"]]
        values.append(line["alloc_retries"])
        if line["device"] == "CPU":
            assert set(values) == {None}
        else:
            assert min(values[:-1]) > 0 and line["peak_reserved_bytes"] >= values[-2]

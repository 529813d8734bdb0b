"""``ds-llep trace``: what it says of a trace, and what it recommends."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
from test_simulate import SHAPE, SYSTEM, skewed, write_trace

from ds_llep import LLEPConfig, make_plan
from ds_llep.bench.machine import H200
from ds_llep.bench.step import StepCost, step_cost
from ds_llep.bench.summary import GRID, Setting, recommend
from ds_llep.cli import main


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = main(["trace", *map(str, args)])
    return code, *capsys.readouterr()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def test_load_ratios_and_their_trend(capsys, tmp_path, seed):
    """Of training micro-batches alone; a layer that never ran has dashes."""
    counts = skewed(seed, 3, rows=9)
    counts[1, 4:] = 1  # even from the fifth on
    counts[2] = 0
    training = [True] * 8 + [False]
    code, out, _ = run(capsys, write_trace(tmp_path / "t.npz", counts, training))
    assert code == 0 and "8 training micro-batches at steps 0 to 3, 3 layers, EP 4" in out
    home_SP = counts[0, :8].sum(1).reshape(8, 4, 4).sum(2)
    ratio_S = home_SP.max(1) / home_SP.mean(1)
    first, last = ratio_S[:2].mean(), ratio_S[-2:].mean()
    values = [ratio_S.mean(), np.percentile(ratio_S, 95), ratio_S.max(), first, last]
    rows = [cells(line) for line in out.splitlines() if "layers." in line]
    assert rows[0] == ["layers.0", *(f"{v:.2f}" for v in values), f"{last - first:+.2f}"]
    assert rows[1][5] == "1.00" and rows[1][6].startswith("-")
    assert rows[2] == ["layers.2", *"------"]


def test_hottest_experts(capsys, tmp_path):
    counts = np.ones((1, 1, 4, 16), dtype=np.int64)
    counts[0, 0, :, 9], counts[0, 0, 2, 14] = 21, 5
    code, out, _ = run(capsys, write_trace(tmp_path / "t.npz", counts), "--hottest", 2)
    row = [cells(line) for line in out.splitlines() if "layers.0" in line][1]
    total = 4 * 21 + 8 + 4 * 14
    assert code == 0
    assert row == ["layers.0", "6.2%", f"9 on 2: {84 / total:.1%}", f"14 on 3: {8 / total:.1%}"]


def test_what_is_sampled(capsys, tmp_path, seed):
    trace = write_trace(tmp_path / "t.npz", skewed(seed, 5, rows=7))
    code, out, _ = run(capsys, trace, "--samples", 3, "--layers", 2)
    assert code == 0 and "3 of the 7 micro-batches and 2 of the 5 layers" in out
    assert f"The fastest of {len(list(itertools.product(*GRID.values())))} settings" in out


@pytest.mark.parametrize("times", [1, 40_000])
def test_recommends_a_valid_section(capsys, tmp_path, seed, times):
    """It prints a section to paste, which switches llep on where it pays, as it does not for
    a few rows; its row in the table has the model's numbers."""
    counts = skewed(seed, 1, rows=1) * times
    machine = tmp_path / "machine.json"
    H200.save(machine)
    trace = write_trace(tmp_path / "t.npz", counts)
    code, out, _ = run(capsys, trace, "--machine", machine, "--settings", 1)
    assert code == 0 and "the default" not in out
    section = json.loads(out.splitlines()[-1])["llep"]
    config = LLEPConfig(**section)
    assert config.enabled == (times > 1) and {*section} == {"enabled", *GRID}
    assert ("No setting pays" in out) == (times == 1)
    layers = [(counts[0, 0], SHAPE)]
    cost, ep = (step_cost(mode, layers, config, SYSTEM) for mode in ("llep", "ep"))
    (row,) = [cells(line) for line in out.splitlines() if "recommended" in line]
    assert row[:3] == [str(section[key]) for key in GRID]
    assert row[3] == f"{make_plan(counts[0, 0], config).load_ratio_after:.2f}"
    assert row[5:9] == [
        f"{cost.spilled_share:.1%}",
        f"{cost.foreign_experts:.1f}",
        f"{sum(cost.weight_bytes) / 1e9:.3f}",
        f"{1e3 * cost.seconds:.2f}",
    ]
    assert f"{1e3 * cost.seconds:.2f} ms for these layers, AutoEP {1e3 * ep.seconds:.2f} ms" in out


def test_default_machine_is_named(capsys, tmp_path, seed):
    code, out, _ = run(capsys, write_trace(tmp_path / "t.npz", skewed(seed, 1)))
    assert code == 0 and "machine h200 (the default; --machine names another)" in out


def test_other_keys_are_the_runs_own(capsys, tmp_path, seed):
    """A run that may not borrow keeps everything at home, whatever the setting."""
    counts = 400 * skewed(seed, 1)  # so many that borrowing pays
    trace = write_trace(tmp_path / "t.npz", counts, llep={"max_foreign_experts": 0})
    code, out, _ = run(capsys, trace)
    (row,) = [cells(line) for line in out.splitlines() if "recommended" in line]
    assert code == 0 and row[5:8] == ["0.0%", "0.0", "0.000"]
    assert row[0] == str(max(GRID["imbalance_threshold"]))  # the one that plans least often


def setting(seconds: float, nbytes: float, threshold: float = 1.0) -> Setting:
    cost = StepCost(seconds, 0.0, 1.0, 1.0, (0.0, 0.0), (nbytes, nbytes), 0.0, 0.0, 0.0)
    return Setting((threshold, 1.0, 0), cost)


def test_ties_go_to_fewer_bytes():
    fastest, close, cheap = setting(1.0, 50), setting(1.009, 20), setting(1.011, 1)
    assert recommend([fastest, close, cheap]) is close
    assert recommend([fastest, cheap]) is fastest
    lazy = setting(1.005, 20, threshold=1.6)
    assert recommend([close, lazy, fastest]) is lazy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--machine", "h300"], "no machine 'h300': valid are h200"),
        (["--samples", "0"], "--samples 0; valid is 1 or more"),
        (["--hottest", "-1"], "--hottest -1; valid is 1 or more"),
    ],
)
def test_mistakes(capsys, tmp_path, seed, options, message):
    code, _, error = run(capsys, write_trace(tmp_path / "t.npz", skewed(seed, 1)), *options)
    assert code == 2 and message in error and error.count("\n") == 1


def test_broken_traces(capsys, tmp_path, seed):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 nothing more")
    evaluation = write_trace(tmp_path / "e.npz", skewed(seed, 1, rows=2), [False, False])
    for path, message in (
        (broken, "cannot be read as a trace"),
        (tmp_path / "none.npz", "No such file"),
        (evaluation, "no training micro-batch"),
    ):
        code, _, error = run(capsys, path)
        assert code == 2 and message in error and str(path) in error

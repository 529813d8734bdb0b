"""`python -m ds_llep.report`: as a user runs it, and what it says where something is wrong."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import deepspeed
import pytest
import torch
from launcher import environment

import ds_llep
from ds_llep import compat, report
from ds_llep.kernels import reference

OTHER_DEEPSPEED = """
from importlib import metadata
installed = metadata.version
metadata.version = lambda name: "99.1" if name == "deepspeed" else installed(name)
import runpy
runpy.run_module("ds_llep.report", run_name="__main__")
"""


def start(*args: str, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_as_a_command(tmp_path):
    """Exit code 0 and everything in it; with a DeepSpeed it does not know, 1 and the reason."""
    good = start("-m", "ds_llep.report", cwd=tmp_path)
    bad = start("-c", OTHER_DEEPSPEED, cwd=tmp_path)
    out, err = good.communicate(timeout=600)
    assert good.returncode == 0, out[-4000:] + err[-4000:]

    assert "DeepSpeed general environment info" in out  # ds_report's own
    assert "op name" in out
    lines = [line.split() for line in out.splitlines()]
    for package in report.PACKAGES:
        try:
            installed = metadata.version(package).split()
        except metadata.PackageNotFoundError:
            installed = ["not", "installed"]
        assert [package, *installed] in [line[: 1 + len(installed)] for line in lines], package
    assert ["ds_llep", ds_llep.__version__] in lines
    assert out.count("supported: ") == out.count(": ok\n") - len(compat.SEAMS)
    for owner, method, _ in compat.SEAMS:
        assert f"{owner.__name__}.{method}: ok" in out
    for preset in ("mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3"):
        assert preset in out
    assert "qwen2_moe (found)" in out
    assert "NOT FOUND" not in out
    assert "Triton: " in out
    on_gpu = deepspeed.get_accelerator().device_name() == "cuda"
    if on_gpu:
        assert torch.cuda.get_device_name(0) in out
        assert "sum_rows (triton): runs on the GPU and agrees" in out
    else:
        assert "no GPU: plain-PyTorch kernels" in out
    assert f'"auto" picks: {"triton" if on_gpu else "torch"}' in out
    assert out.endswith("llep can be enabled here\n")

    out, err = bad.communicate(timeout=600)
    assert bad.returncode == 1
    reason = err.strip().splitlines()[-1]
    first, last = compat.SUPPORTED["deepspeed"]
    assert reason.startswith("ValueError: ds_llep does not work with deepspeed")
    assert f"99.1 is not one of the versions known to work ({first} to {last})" in reason
    assert f'pip install "deepspeed>={first},<={last}"' in reason


@pytest.fixture
def run(monkeypatch, capsys):
    """The report in this process, without DeepSpeed's part: exit code and text."""
    monkeypatch.setattr(report.env_report, "main", lambda: None)

    def main() -> tuple[int, str]:
        return report.main(), capsys.readouterr().out

    return main


def test_unsupported_transformers(run, monkeypatch):
    monkeypatch.setitem(compat.SUPPORTED, "transformers", ("4.0.0", "4.1.0"))
    code, out = run()
    assert code == 1
    assert "supported: 4.0.0 to 4.1.0: NO" in out
    last = out.splitlines()[-1]
    assert last.startswith("llep CANNOT be enabled here: transformers")
    assert 'pip install "transformers>=4.0.0,<=4.1.0"' in last


def test_changed_seams(run, monkeypatch):
    """A method with other arguments and one that is gone; the others stay ok."""
    layer, engine = compat.AutoEPMoELayer, compat.DeepSpeedEngine
    changed = ((layer, "forward", ("self", "tokens")), (engine, "_gone", ("self",)))
    monkeypatch.setattr(compat, "SEAMS", (*changed, *compat.SEAMS[4:]))
    code, out = run()
    assert code == 1
    assert "AutoEPMoELayer.forward: ok" not in out
    assert "AutoEPMoELayer.forward takes ('self', 'hidden_states'), expected" in out
    assert "DeepSpeedEngine._gone is missing" in out
    assert "AutoEPMoELayer._finalize_output: ok" in out
    last = out.splitlines()[-1]
    assert "CANNOT" in last and "_gone is missing" in last and "AutoEPMoELayer.forward" in last


def test_missing_package(run, monkeypatch):
    """One that llep can do without is shown and is no reason to fail."""
    monkeypatch.setattr(report, "PACKAGES", (*report.PACKAGES, "no-such-package"))
    code, out = run()
    assert code == 0
    assert ["no-such-package", "not", "installed"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize("broken", ["raises", "wrong sums"])
def test_broken_kernels(run, monkeypatch, broken):
    """As on a GPU whose Triton cannot compile: the reason, and what to set until it can."""

    def sum_rows(home_ND, foreign_MD, source_UK):
        if broken == "raises":
            raise RuntimeError("no compiler found")
        return reference.sum_rows(home_ND, foreign_MD, source_UK) + 1

    class Accelerator:
        @staticmethod
        def device_name():
            return "cuda"

    kernels = report.select_kernels("torch", "cpu")._replace(sum_rows=sum_rows)
    monkeypatch.setattr(report, "get_accelerator", Accelerator)
    monkeypatch.setattr(report, "select_kernels", lambda choice, device: kernels)
    randn, arange = torch.randn, torch.arange
    monkeypatch.setattr(torch, "randn", lambda *a, device, **k: randn(*a, **k))
    monkeypatch.setattr(torch, "arange", lambda *a, device, **k: arange(*a, **k))
    code, out = run()
    assert code == 1
    last = out.splitlines()[-1]
    assert ("no compiler found" if broken == "raises" else broken) in last
    assert 'set "llep.kernels" to "torch"' in last

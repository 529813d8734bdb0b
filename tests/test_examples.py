"""The examples through the real launcher, on four CPU ranks."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from launcher import ROOT, environment, launch


def run_example(*command: str) -> str:
    """Run an example on four CPU ranks; its output."""
    code, output = launch(4, *command, cwd=ROOT, timeout=600)
    assert code == 0, output[-4000:]
    return output


def final_line(output: str) -> tuple[float, float]:
    """First and last loss."""
    return tuple(map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", output).groups()))


def test_finetune_save_and_resume(tmp_path):
    """A run in two halves, on JSONL text, gives the losses of a run in one."""
    text = tmp_path / "text.jsonl"
    words = "the quick brown fox jumps over the lazy dog again and again".split()
    lines = [{"text": " ".join(words[i % 7 :] * 20)} for i in range(60)]
    text.write_text("\n".join(json.dumps(line) for line in lines))
    common = (
        *("examples/finetune.py", "--deepspeed_config", "ds_configs/demo_cpu_zero3_ep2.json"),
        *("--seq-len", "32", "--micro-batch", "2", "--data", str(text), "--skew", "1"),
    )
    first = run_example(*common, "--steps", "6", "--save", str(tmp_path / "checkpoint"))
    assert "BIASES EVERY ROUTER" in first
    assert "llep: active on 4 MoE layer(s), ep_size=2, edp_size=2" in first
    second = run_example(*common, "--steps", "12", "--resume", str(tmp_path / "checkpoint"))
    assert "after 6 steps" in second
    start, middle = final_line(first)
    resumed, end = final_line(second)
    assert middle < start and end < middle
    assert resumed < start - (start - middle) / 2, "the second half began anew"
    before, after = re.search(r"mean load ratio ([\d.]+) -> ([\d.]+)", second).groups()
    assert float(after) < float(before)


@pytest.mark.parametrize("script", ["finetune.py", "hf_trainer.py"])
def test_help(script):
    finished = subprocess.run(
        [sys.executable, f"examples/{script}", "--help"],
        cwd=ROOT,
        env=environment(DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0 and "--deepspeed_config" in finished.stdout

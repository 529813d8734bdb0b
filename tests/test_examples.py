"""The examples through the real launcher, on CPU ranks."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import tokenizers
import torch
from launcher import ROOT, WARM, environment, launch
from quantized import write_mxfp4
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


def run_example(*command: str, ranks: int = 4) -> str:
    """Run an example on CPU ranks; its output."""
    code, output = launch(ranks, WARM, *command, cwd=ROOT, timeout=600)
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


def test_finetune_in_and_out(tmp_path, seed):
    """A directory as gpt-oss is published, into ZeRO-3 and out; and out of a checkpoint alike."""
    words = "the quick brown fox jumps over the lazy dog again and again".split()
    published = tmp_path / "published"
    before = write_mxfp4(published, seed)
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, words[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(published)
    (tmp_path / "text.txt").write_text(" ".join(words * 300))
    ds_config = json.loads((ROOT / "ds_configs/demo_cpu_zero3_ep2.json").read_text())
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({**ds_config, "bf16": {"enabled": True}}))
    common = (
        *("examples/finetune.py", "--deepspeed_config", str(config)),
        *("--model", str(published), "--data", str(tmp_path / "text.txt"), "--steps", "2"),
        *("--seq-len", "32", "--micro-batch", "2", "--checkpointing"),
    )
    checkpoint, folders = str(tmp_path / "checkpoint"), [tmp_path / name for name in ("a", "b")]
    out = run_example(*common, "--save", checkpoint, "--save-hf", str(folders[0]), ranks=2)
    assert "llep: active on 2 MoE layer(s)" in out
    out = run_example(*common, "--resume", checkpoint, "--save-hf", str(folders[1]), ranks=2)
    assert "after 2 steps" in out and "tokens/s" not in out
    trained, again = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders
    )
    assert trained.keys() == before.keys()
    assert not [name for name in trained if not torch.equal(trained[name], again[name])]
    unchanged = [name for name in before if torch.equal(trained[name], before[name])]
    assert not unchanged, unchanged
    assert AutoTokenizer.from_pretrained(folders[1])("lazy dog")["input_ids"] == [6, 7]


@pytest.mark.parametrize("script", ["finetune.py", "hf_trainer.py"])
def test_help(script):
    """In a process that has imported nothing, so that what a script forgot to import shows."""
    finished = subprocess.run(
        [sys.executable, f"examples/{script}", "--help"],
        cwd=ROOT,
        env=environment(DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0 and "--deepspeed_config" in finished.stdout

"""`deepspeed --module ds_llep.run`: a script that nobody edits runs as it would without the runner.

The scripts here do not import ds_llep. They train one step of a tiny model and write down what
they saw: their arguments, their name, their path, and whether llep was active.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from launcher import ROOT, launch

from ds_llep.run import main, split_launcher_args

BODY = """
import argparse, json, os, sys
import deepspeed, families, torch

def main(sibling_name):
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--out")
    parser.add_argument("text", nargs="*")
    args = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.init_distributed()
    model = families.build("qwen3_moe", seed=1)
    engine = deepspeed.initialize(args, model, model_parameters=model.parameters())[0]
    torch.manual_seed(engine.global_rank)
    tokens = torch.randint(0, 96, (1, 16))
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    plugin = sys.modules["ds_llep"]
    seen = {
        "argv": sys.argv,
        "text": args.text,
        "name": __name__,
        "package": __package__,
        "file": __file__,
        "is_main": sys.modules["__main__"].__dict__ is globals(),
        "path": sys.path[:1],
        "sibling": sibling_name,
        "plugin": plugin.__file__,
        "status": plugin.status(engine),
        "loss": float(loss),
        "steps": engine.global_steps,
    }
    with open(f"{args.out}/rank{engine.global_rank}.json", "w") as file:
        json.dump(seen, file)
"""
START = """
if __name__ == "__main__":
    main(sibling.NAME)
"""


def run(tmp_path: Path, ranks: int, launcher_args: list[str], target: list[str]) -> list[dict]:
    """What each rank wrote, after a run with an argument that has a space and one that is empty."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 3},
        "expert_parallel": {"enabled": True, "autoep_size": ranks},
        "llep": {"enabled": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    script_args = ["--out", str(tmp_path), "--deepspeed_config", "ds.json", "two words", ""]
    command = [*launcher_args, "--module", "ds_llep.run", *target, *script_args]
    code, out = launch(ranks, *command, cwd=tmp_path, timeout=600)
    assert code == 0, out[-6000:]
    assert "llep: active on 2 MoE layer(s)" in out
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    for rank in seen:
        assert rank["name"] == "__main__" and rank["is_main"]
        assert rank["argv"][-len(script_args) :] == script_args
        assert rank["text"] == ["two words", ""]
        assert rank["sibling"] == "sibling"
        assert rank["plugin"] == str(ROOT / "ds_llep" / "__init__.py")
        assert rank["steps"] == 1 and rank["loss"] > 0
        assert rank["status"]["active"] and rank["status"]["layers"] == 2
        assert rank["status"]["ep_size"] == ranks
        assert rank["status"]["load_ratio_before"] == seen[0]["status"]["load_ratio_before"]
    return seen


def test_script(tmp_path):
    """A script in another directory than the cwd, by a relative path."""
    scripts = tmp_path / "my scripts"
    scripts.mkdir()
    (scripts / "train.py").write_text(f"import sibling\n{BODY}{START}")
    (scripts / "sibling.py").write_text("NAME = __name__\n")
    seen = run(tmp_path, 2, [], ["my scripts/train.py"])
    for rank, found in enumerate(seen):
        # As `python train.py --local_rank=N ...`, which the launcher runs without the runner.
        assert found["argv"][:2] == ["my scripts/train.py", f"--local_rank={rank}"]
        assert found["path"] == [str(scripts)]
        assert not found["package"]


def test_module(tmp_path):
    """A module of a package under the cwd, and a launcher told to pass no rank."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(f"from . import sibling\n{BODY}{START}")
    (package / "sibling.py").write_text('NAME = __name__.rsplit(".")[-1]\n')
    seen = run(tmp_path, 1, ["--no_local_rank"], ["-m", "package.train"])
    for found in seen:
        # As `python -m package.train ...`.
        assert found["argv"][:2] == [str(package / "train.py"), "--out"]
        assert found["path"] == [str(tmp_path)]
        assert found["package"] == "package"


@pytest.mark.parametrize(
    "argv, launcher_args, rest",
    [
        ([], [], []),
        (["train.py", "--lr", "1"], [], ["train.py", "--lr", "1"]),
        (["--local_rank=3", "train.py"], ["--local_rank=3"], ["train.py"]),
        (["--local-rank=3", "train.py"], ["--local-rank=3"], ["train.py"]),
        (["--local_rank", "3", "train.py"], ["--local_rank", "3"], ["train.py"]),
        (["--local-rank", "3", "-m", "a.b"], ["--local-rank", "3"], ["-m", "a.b"]),
        (["--local_rank=3"], ["--local_rank=3"], []),
        # The script's own, behind its name, is none of the runner's business.
        (["train.py", "--local_rank=3"], [], ["train.py", "--local_rank=3"]),
    ],
)
def test_split_launcher_args(argv, launcher_args, rest):
    assert split_launcher_args(argv) == (launcher_args, rest)


@pytest.fixture
def restored(monkeypatch):
    """What the runner changes for good, as its process belongs to the script, set back."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return monkeypatch


@pytest.mark.parametrize("argv", [[], ["--local_rank=0"], ["-m"], ["--local_rank", "0", "-m"]])
def test_no_script(argv, restored):
    with pytest.raises(ValueError, match="no training script given. usage: deepspeed --module"):
        main(argv)


@pytest.mark.parametrize("argv", [["gone.py"], ["--local_rank=0", "gone.py", "--lr", "1"], ["."]])
def test_missing_script(argv, restored):
    name = argv[-1] if len(argv) == 1 else argv[1]
    with pytest.raises(ValueError) as caught:
        main(argv)
    assert f"no such script: {name!r}" in str(caught.value)
    assert "usage: deepspeed --module" in str(caught.value)


def test_missing_module(restored):
    with pytest.raises(ImportError, match="no_such_module"):
        main(["--local_rank=0", "-m", "no_such_module", "--lr", "1"])


def test_the_script_decides_how_it_ends(tmp_path, restored):
    """Its exit code and its errors are the runner's; `__main__` is its own while it runs."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "def point(): pass\n"
        "assert sys.modules['__main__'].point is point\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    restored.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--local_rank=0", "train.py", "7"])
    assert ended.value.code == 7
    assert sys.argv == ["train.py", "--local_rank=0", "7"]
    assert sys.path[0] == os.fspath(tmp_path)
    with pytest.raises(IndexError):
        main(["train.py"])

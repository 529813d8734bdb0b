"""ds-llep bench: what it measures is checked first, what it is told wrong it says, what it found
is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from launcher import ROOT, WARM, environment, warm_environment

from ds_llep import cli
from ds_llep.bench import output
from ds_llep.bench.records import Settings
from ds_llep.bench.session import Session, WrongResults
from ds_llep.bench.shapes import PRESETS, Shape
from ds_llep.config import LLEPConfig

SMALL = Shape(num_experts=8, hidden_size=64, ffn_size=48, top_k=2, tokens=96)
# What a times of nothing but rates need; measuring it is not what these tests are about.
MACHINE = "h200"


def settings(**changes) -> Settings:
    values = {
        "shape": SMALL,
        "shape_name": None,
        "layers": 1,
        "workloads": ["50:2"],
        "modes": ["ep", "ep_balanced", "llep"],
        "parts": ["forward", "backward"],
        "ep_size": None,
        "zero_stage": 1,
        "dtype": "float32",
        "repeats": 2,
        "seed": 0,
        "llep": LLEPConfig(enabled=True, imbalance_threshold=1.0, min_tokens_per_gemm=1),
        "breakdown": False,
        **changes,
    }
    return Settings(**values)


def device() -> torch.device:
    """This rank's."""
    return torch.device(get_accelerator().current_device_name())


def run_session(**changes) -> list[dict]:
    return Session(settings(**changes), device(), MACHINE).run()


WORKLOADS = ["50:2", "2:local", "ragged", "empty", "rotating", "zipf:1"]


def test_session(pools, seed):
    """EP groups beside each other, a stack, workloads with ranks without tokens."""
    pool = pools(4)
    changes = {"ep_size": 2, "layers": 2, "workloads": WORKLOADS, "breakdown": True, "seed": seed}
    answers = pool.run(run_session, **changes)
    for rank, records in enumerate(answers):
        points = {(record["workload"], record["mode"]): record for record in records}
        expected = [(workload, mode) for workload in WORKLOADS for mode in ("ep", "llep")]
        assert list(points) == [("balanced", "ep_balanced"), *expected]
        for (workload, mode), record in points.items():
            assert record["forward_ms"] > 0 and record["forward_backward_ms"] > 0
            assert record["step_ms"] is None
            assert record["peak_bytes"] > 0
            assert record["ranks"] == pool.world_size and record["ep_size"] == 2
            assert (record["ratio_to_ep"] == 1) == (mode == "ep")
            # A record speaks of its rank's EP group; in the first one, rank 1 has no token.
            fewer_rows = workload == "ragged" or workload == "empty" and rank < 2
            assert (record["ratio_to_ep_balanced"] is None) == fewer_rows
            llep = mode == "llep"
            assert (record["breakdown_ms"] is not None) == llep
            assert (record["errors"] is not None) == llep
            if not llep:
                assert record["load_ratio_after"] == record["load_ratio_before"]
                assert record["spilled_bytes"] == 0
        hot = points["50:2", "llep"]
        assert hot["load_ratio_before"] > 1.2 > 1.1 > hot["load_ratio_after"]
        assert hot["spilled_bytes"] == hot["spilled_experts"] * SMALL.expert_numel * 4 > 0
        # All parts are there, those with inner ones too, on every rank.
        assert {"counts", "plan", "dispatch/all-to-all", "gradient return"} <= set(
            hot["breakdown_ms"]
        )
        outer = [name.split("/")[0] for name in hot["breakdown_ms"]]
        assert sum(a != b for a, b in zip(outer, outer[1:], strict=False)) == len({*outer}) - 1
        for name, mean in hot["breakdown_ms"].items():
            assert 0 <= mean <= hot["breakdown_slowest_ms"][name] * (1 + 1e-9), name
    # What is agreed on is the same everywhere.
    for key in ("forward_ms", "forward_backward_ms", "peak_bytes", "breakdown_ms", "errors"):
        first, *others = ([record[key] for record in records] for records in answers)
        assert all(other == first for other in others), key


def test_planner_cost(pools, seed):
    """What is recorded of a plan is what the layers plan, with measured rates or given ones."""
    given = {"tflops": 1e-3, "inside_gbytes": 1e3, "expert_us": 1e-3, "exposed": 0.0}
    given["spill_us"] = 0.0
    llep = LLEPConfig(enabled=True, planner="cost", cost=given)
    answers = pools(2).run(run_session, workloads=["50:2"], ep_size=2, llep=llep, seed=seed)
    for records in answers:
        hot = records[-1]
        assert hot["mode"] == "llep" and hot["errors"] is not None
        assert hot["load_ratio_before"] > 1.2 > 1.1 > hot["load_ratio_after"]


def test_optimizer_step(pools, seed):
    changes = {"parts": ["step"], "modes": ["ep", "llep"], "zero_stage": 2, "seed": seed}
    for records in pools(2).run(run_session, **changes):
        assert [record["mode"] for record in records] == ["ep", "llep"]
        for record in records:
            assert record["step_ms"] > 0
            assert record["forward_ms"] is None and record["forward_backward_ms"] is None


def run_wrong(rank: int, seed: int) -> str:
    """A bench where llep's combine is off by 1 % on one rank."""
    from ds_llep import layer

    combine = layer.combine

    def wrong(*args):
        return combine(*args) * (1.01 if torch.distributed.get_rank() == rank else 1.0)

    timed = mock.Mock()
    with (
        mock.patch.object(layer, "combine", wrong),
        mock.patch.object(Session, "_time_layers", timed),
    ):
        try:
            run_session(seed=seed)
        except WrongResults as error:
            times = [call.args[2] for call in timed.call_args_list]
            assert set(times) <= {"ep_balanced"}, times
            return str(error)
    return "not refused"


def test_wrong_results_are_refused(pools, seed):
    answers = pools(2).run(run_wrong, seed % 2, seed)
    for answer in answers:
        assert "llep's results are wrong" in answer and "output" in answer
        assert answer == answers[0]


def test_command(tmp_path):
    """Its own ranks, a table, JSON lines; then the same file compared with itself."""
    results = tmp_path / "results.jsonl"
    arguments = ["--ranks", "2", "--device", "cpu", "--shape", "tiny", "--workloads", "95:1"]
    arguments += ["--repeats", "2", "--machine", MACHINE, "--json", str(results)]
    done = run_command("bench", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "95:1" in done.stdout and "llep" in done.stdout and "1 layer(s), EP 2" in done.stdout
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["mode"] for line in lines] == ["ep_balanced", "ep", "llep"]
    for line in lines:
        assert line["shape"] == "tiny" and line["versions"]["torch"] == torch.__version__
        assert line["command"].startswith("ds-llep bench --ranks 2")
        assert line["kind"] == "bench" and "commit" in line
    done = run_command("bench", "--compare", str(results), str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("(+0.0 %)") == 9


def test_published_options(tmp_path):
    """The command of the paper's repository with the program's name changed."""
    options = "--num_tokens 64 --hidden_size 64 --intermediate_size 32 --num_experts 8 --top_k 2"
    options += " --max_tokens_factor 1.5 --min_tokens_per_gemm 2 --num_runs 2"
    options += f" --modes llep --machine {MACHINE} --json {tmp_path}/results.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [
            WARM,
            "-m",
            "ds_llep",
            "bench",
            *options.split(),
            "--imbalance_configs",
            "30:4,80:local",
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=warm_environment(),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in map(json.loads, Path(tmp_path, "results.jsonl").read_text().splitlines()):
        assert line["workload"] in ("30:4", "80:local")
        assert line["llep"]["capacity_factor"] == 1.5
        assert line["llep"]["min_tokens_per_gemm"] == 2
        sizes = [line[name] for name in ("tokens", "hidden_size", "ffn_size", "num_experts")]
        assert sizes == [64, 64, 32, 8] and line["shape"] is None


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ds_llep", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(OMP_NUM_THREADS="1"),
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape qwen9", "unknown preset 'qwen9'; valid are gpt-oss-120b"),
        ("--hidden-size 0", "hidden_size is 0; valid is 1 or more"),
        ("--num-experts 4 --top-k 8", "top_k 8 is more than the 4 experts"),
        ("--workloads warm", "unknown workload 'warm'; known are balanced"),
        ("--workloads 95:16", "16 hot experts of 16"),
        ("--workloads trace:no.npz", "no.npz"),
        ("--modes fast", "--modes: unknown fast; valid are ep, ep_balanced, llep"),
        ("--parts forward,upward", "--parts: unknown upward"),
        ("--llep {", "--llep: no JSON"),
        ('--llep {"lambda":2}', 'unknown key "llep.lambda"'),
        ('--llep {"weight_source":"shards"}', "needs the shards of ZeRO-3"),
        ("--max_tokens_factor 0.5", '"llep.capacity_factor"'),
        ("--reserved --breakdown", "leave out --breakdown"),
        ("--reserved --parts forward", "leave out --breakdown, --machine and --parts"),
        ("--repeats 0", "--repeats 0; valid is 1 or more"),
        ("--ranks 0", "--ranks 0; valid is 1 or more"),
        ("--ranks 3 --ep-size 2", "EP size 2 must divide both the 3 ranks"),
        ("--ep-size 3", "EP size 3 must divide both the 2 ranks and the 16 experts"),
        ("--machine no.json", "no.json"),
        ("--json no/folder/results.jsonl", "cannot write 'no/folder/results.jsonl'"),
        ("--compare no.jsonl no.jsonl", "no.jsonl"),
    ],
)
def test_mistakes(arguments, message, capsys, monkeypatch):
    """One line and exit code 2, before any rank starts."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with mock.patch("ds_llep.bench.ranks.elastic_launch", side_effect=AssertionError("started")):
        assert cli.main(["bench", *arguments.split()]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


def test_launchers_argument_in_front(capsys):
    """DeepSpeed's launcher says `--local_rank=1` before anything else."""
    assert cli.main(["--local_rank=1", "bench", "--shape", "qwen9"]) == 2
    assert "unknown preset 'qwen9'" in capsys.readouterr().err


def test_too_few_devices(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.main(["bench", "--ranks", "8"]) == 2
    assert "too few devices: --ranks 8, but PyTorch finds 2 GPU(s)" in capsys.readouterr().err


def test_results_that_cannot_be_kept_are_printed(tmp_path, capsys):
    """The folder has gone since the start."""
    records = [{"kind": "bench", "forward_ms": 1.5}, {"kind": "bench", "forward_ms": 2.5}]
    assert output.append_json(str(tmp_path / "gone" / "results.jsonl"), records) == 2
    said = capsys.readouterr()
    assert [json.loads(line) for line in said.out.splitlines()] == records
    assert "cannot write" in said.err


def test_no_rich(capsys):
    """The tables' package is in an extra; without it the message says so."""
    with mock.patch.dict(sys.modules, {"rich.console": None, "rich.table": None}):
        with pytest.raises(ValueError, match=r"pip install 'ds_llep\[tools\]'"):
            output.table("title", ["a"], [["1"]])
        with mock.patch("ds_llep.bench.ranks.elastic_launch", side_effect=AssertionError):
            assert cli.main(["bench", "--ranks", "2", "--device", "cpu"]) == 2
    assert "ds_llep[tools]" in capsys.readouterr().err


def test_presets_are_shapes_that_split():
    for name, shape in PRESETS.items():
        assert shape.num_experts % 8 == 0, f"{name} does not split over 8 ranks"
        assert shape.gemm_flop(1) == 2 * shape.expert_numel


def test_commit_is_this_repository():
    found = output.commit()
    git = ["git", "-C", str(ROOT)]
    tracked = [*git, "ls-files", "--error-unmatch", "ds_llep/bench/output.py"]
    if not shutil.which("git") or subprocess.run(tracked, capture_output=True).returncode:
        assert found is None  # a copy that lies in no repository, or in somebody else's
        return
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert head.startswith(found.rstrip("+"))

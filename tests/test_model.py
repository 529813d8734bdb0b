"""ds-llep model: both modes take the same steps of a real model, and wrong ones get no time."""

from __future__ import annotations

import contextlib
import io
import json
from unittest import mock

import deepspeed
import deepspeed.comm as dist
import numpy as np
import pytest
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import safe_get_full_fp32_param
from test_bench import SMALL, device, run_command

from ds_llep import cli, fetch
from ds_llep.bench import fine_tuning, losses
from ds_llep.bench.fine_tuning import FineTuning, ModelSettings
from ds_llep.bench.measure import WARM_UPS
from ds_llep.bench.session import WrongResults
from ds_llep.bench.workloads import Draw, parse
from ds_llep.config import LLEPConfig
from ds_llep.layer import LLEPMoELayer
from ds_llep.plan import make_plan

REPEATS, LAYERS = 2, 2


def settings(**changes) -> ModelSettings:
    values = {
        "shape": SMALL,
        "shape_name": "tiny",
        "layers": LAYERS,
        "seq_len": SMALL.tokens // 2,
        "workloads": ["balanced", "50:2"],
        "ep_size": 2,
        "zero_stage": 1,
        "checkpointing": False,
        "repeats": REPEATS,
        "seed": 0,
        "llep": LLEPConfig(enabled=True, imbalance_threshold=1.0, min_tokens_per_gemm=1),
        **changes,
    }
    return ModelSettings(**values)


def steps(**changes) -> dict:
    """The records, and what happened: routing by mode, weights before and after, workspaces."""
    routed: dict[str, list] = {"AutoEPMoELayer": [], "LLEPMoELayer": []}
    force, borne = fine_tuning.force_routing, 0

    def forced(layer, ids_TK):
        nonlocal borne
        if type(layer) is AutoEPMoELayer:
            borne = max(borne, fetch.WORKSPACE.nbytes())
        routed[type(layer).__name__].append(ids_TK.cpu())
        force(layer, ids_TK)

    made = FineTuning(settings(**changes), device())
    weights = list(made.engine.module.parameters())
    before = [safe_get_full_fp32_param(weight).clone() for weight in weights]
    with mock.patch.object(fine_tuning, "force_routing", forced):
        records = [record for of_workload in made.run() for record in of_workload]
    after = [safe_get_full_fp32_param(weight) for weight in weights]
    found = {"borne": borne, "records": records, "kept": all(map(torch.equal, before, after))}
    steps_done = made.engine.global_steps
    recomputes = made.engine.module.is_gradient_checkpointing
    made.engine.destroy()
    return {**found, "routed": routed, "steps": steps_done, "recomputes": recomputes}


LLEP = settings().llep


def load_ratios(workload: str, seed: int, first: int) -> tuple[float, float]:
    """Mean over the timed steps and the layers, before and after the plan, of an EP group."""
    E, K, T = SMALL.num_experts, SMALL.top_k, SMALL.tokens
    plans = [
        make_plan(parse(workload).counts_PE(2, Draw(E, K, T, first, layer, step, seed)), LLEP)
        for step in range(WARM_UPS, WARM_UPS + REPEATS)
        for layer in range(LAYERS)
    ]
    before = sum(plan.load_ratio_before for plan in plans) / len(plans)
    return before, sum(plan.load_ratio_after for plan in plans) / len(plans)


@pytest.mark.parametrize(
    ("shape_name", "workloads", "zero_stage", "checkpointing"),
    [
        ("tiny", ["balanced", "50:2"], 1, False),
        ("tiny", ["50:2"], 3, True),
        ("tiny-gpt-oss", ["50:2"], 1, False),
    ],
)
def test_steps(pools, seed, shape_name, workloads, zero_stage, checkpointing):
    """EP groups beside each other; every mode has the same steps; the records tell what was."""
    pool = pools(4)
    changes = {"workloads": workloads, "zero_stage": zero_stage, "checkpointing": checkpointing}
    answers = pool.run(steps, seed=seed, shape_name=shape_name, **changes)
    for rank, found in enumerate(answers):
        records = found["records"]
        points = [(record["workload"], record["mode"]) for record in records]
        assert points == [(name, mode) for name in workloads for mode in ("ep", "llep")]
        per_mode = 1 + WARM_UPS + REPEATS  # one to compare
        ep, llep = (
            found["routed"][name][-per_mode * LAYERS :]
            for name in ("AutoEPMoELayer", "LLEPMoELayer")
        )
        timed = (WARM_UPS + REPEATS) * LAYERS
        for first, second in zip(ep[-timed:], llep[-timed:], strict=True):
            assert torch.equal(first, second)
        assert not any(torch.equal(first, llep[-1]) for first in llep[-timed:-1])
        # AutoEP's variants, which there are on GPUs only, are steps too.
        assert found["steps"] >= len(points) * per_mode and found["kept"]
        assert found["recomputes"] == checkpointing
        assert found["borne"] == 0, "AutoEP's peak would have llep's workspace in it"
        reference = records[0]["step_ms"]
        for record in records:
            tokens = pool.world_size * SMALL.tokens
            assert record["tokens_per_second"] == pytest.approx(1e3 * tokens / record["step_ms"])
            assert record["ratio_to_balanced"] == record["step_ms"] / reference
            others = [r for r in records if r["workload"] == record["workload"]]
            assert record["speedup"] == others[0]["step_ms"] / record["step_ms"]
            before, after = load_ratios(record["workload"], seed, rank // 2 * 2)
            if record["mode"] == "ep":
                after = before
                assert record["llep"] is None and record["fetched_bytes"] is None
            assert record["load_ratio_before"] == pytest.approx(before)
            assert record["load_ratio_after"] == pytest.approx(after)
            assert (record["peak_reserved_bytes"] is None) == (record["device"] == "CPU")
        assert records[-1]["fetched_bytes"] > 0 and records[-1]["spilled_token_share"] > 0.1
        assert {*records[-1]["errors"]} == {*(f"gradient of w{n}" for n in "123"), "logits"}
        assert 0 < max(records[-1]["errors"].values())
        # What is agreed on is the same everywhere.
        for key in ("step_ms", "errors"):
            assert [record[key] for record in records] == [
                record[key] for record in answers[0]["records"]
            ]


def trained(shape_name: str, seed: int, steps: int) -> list[dict]:
    classes = set()
    prepare = FineTuning.prepare

    def seen(self, batch, step):
        classes.add((type(self.layers[0]), step))
        prepare(self, batch, step)

    changes = {"shape_name": shape_name, "seed": seed, "workloads": ["50:2"]}
    with mock.patch.object(FineTuning, "prepare", seen):
        records = [*losses.train(settings(**changes), device(), steps)][0]
    assert classes == {(kind, n) for kind in (AutoEPMoELayer, LLEPMoELayer) for n in range(steps)}
    return records


@pytest.mark.parametrize("shape_name", ["tiny", "tiny-gpt-oss"])
def test_both_modes_train_alike(pools, seed, shape_name):
    """The same losses from the same weights, and they fall."""
    answers = pools(2).run(trained, shape_name, seed, 4)
    for ep, llep in answers:
        assert (ep["mode"], llep["mode"]) == ("ep", "llep") and ep["kind"] == "losses"
        fell = ep["losses"][0] - ep["losses"][-1]
        differences = np.subtract(ep["losses"], llep["losses"])
        # In fp32 a hundred thousandth of it, in bf16 more.
        assert 0 <= abs(differences).max() < fell * (0.01 if ep["dtype"] == "float32" else 0.5)
        assert [llep["losses"], ep["losses"]] == [x["losses"] for x in answers[0][::-1]]
        assert ep["tokens_per_second"] == 1e3 * 2 * ep["tokens"] / ep["step_ms"] > 0


def run_wrong(seed: int, rank: int) -> list[str]:
    """What is said where llep's first layer gives, on one rank, wrong values or wrong gradients."""
    made = FineTuning(settings(seed=seed, workloads=["50:2"]), device())
    forward, said = LLEPMoELayer.forward, []
    off = 100 if made.dtype == torch.bfloat16 else 0.01

    def wrong_values(self, x):
        return forward(self, x) * (1 + off * (dist.get_rank() == rank))

    def wrong_gradients(self, x):
        y = forward(self, x)
        more = y * off * (dist.get_rank() == rank)
        return y + (more - more.detach())

    for wrong in (wrong_values, wrong_gradients):
        with (
            mock.patch.object(LLEPMoELayer, "forward", wrong),
            mock.patch.object(FineTuning, "_measure", side_effect=AssertionError("timed")),
        ):
            try:
                said.append(str(list(made.run())))
            except WrongResults as error:
                said.append(str(error))
    made.engine.destroy()
    return said


def test_wrong_results_are_refused(pools, seed):
    """On every rank, before anything is timed."""
    answers = pools(2).run(run_wrong, seed, seed % 2)
    for values, gradients in answers:
        assert "no time is given" in values and "'logits'" in values
        assert "'gradient of w1'" in gradients and "'logits'" not in gradients
        assert [values, gradients] == answers[0]


def test_command(tmp_path):
    """Its own ranks, a table, a JSON line for each workload and mode, the reference first."""
    path = tmp_path / "model.jsonl"
    options = (
        "--ranks 2 --device cpu --tokens 64 --seq-len 32 --layers 1 --repeats 1 --zero-stage 2"
    )
    options += ' --workloads zipf:1 --llep {"imbalance_threshold":1.0} --json'
    done = run_command("model", *options.split(), str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens/s" in done.stdout and "ZeRO-2, checkpointing off, float32" in done.stdout
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    points = [(line["workload"], line["mode"]) for line in lines]
    assert points == [(name, mode) for name in ("balanced", "zipf:1") for mode in ("ep", "llep")]
    for line in lines:
        assert line["kind"] == "model" and line["shape"] == "tiny" and line["tokens"] == 64
        assert line["versions"]["torch"] == torch.__version__ and "commit" in line
        assert line["command"].startswith("ds-llep model --ranks 2")
    assert lines[-1]["llep"]["imbalance_threshold"] == 1.0


def on_launched_rank(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of the command on a rank that a launcher has started."""
    out, level = io.StringIO(), deepspeed.utils.logger.level
    going_on = mock.patch.object(dist, "destroy_process_group")  # other tests use these ranks
    with going_on, contextlib.redirect_stdout(out):
        code = cli.main(arguments)
    deepspeed.utils.logger.setLevel(level)
    return code, out.getvalue()


def test_train_command(pools, tmp_path):
    path = tmp_path / "losses.jsonl"
    options = "--ranks 2 --tokens 64 --seq-len 32 --train 3 --workloads 50:4 --json"
    answers = pools(2).run(on_launched_rank, ["model", *options.split(), str(path)])
    assert [code for code, _ in answers] == [0, 0]
    (_, out), (_, nothing) = answers
    assert "largest difference" in out and "tokens/s" in out and not nothing
    ep, llep = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(line["losses"]) for line in (ep, llep)] == [3, 3]
    assert [line["workload"] for line in (ep, llep)] == ["50:4", "50:4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train 0", "--train 0; valid is 1 or more"),
        ("--layers 0", "--layers 0; valid is 1 or more"),
        ("--repeats 0", "--repeats 0; valid is 1 or more"),
        ("--tokens 0", "tokens is 0; valid is 1 or more"),
        ("--seq-len 0", "--seq-len 0; valid is 1 or more"),
        ("--seq-len 96", "--seq-len 96 does not divide the 512 tokens of a rank"),
        ("--workloads warm", "unknown workload 'warm'"),
        ("--workloads ragged", "'ragged' routes 128 to 512 tokens a rank"),
        ("--workloads 50:4,empty", "'empty' routes 0 to 512 tokens a rank"),
        ("--ep-size 3", "EP size 3 must divide both the 2 ranks and the 16 experts"),
        ('--llep {"lambda":2}', 'unknown key "llep.lambda"'),
        ('--llep {"weight_source":"shards"}', "needs the shards of ZeRO-3, and --zero-stage is 1"),
        ("--json no/folder/model.jsonl", "cannot write 'no/folder/model.jsonl'"),
    ],
)
def test_mistakes(arguments, message, capsys, monkeypatch):
    """One line and exit code 2, before any rank starts."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with mock.patch("ds_llep.bench.ranks.elastic_launch", side_effect=AssertionError("started")):
        assert cli.main(["model", *arguments.split()]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


def test_no_transformers(capsys):
    """It is in an extra; without it the message says so."""
    with mock.patch("ds_llep.bench.model.find_spec", return_value=None):
        assert cli.main(["model", "--ranks", "2", "--device", "cpu"]) == 2
    assert "pip install 'ds_llep[examples]'" in capsys.readouterr().err

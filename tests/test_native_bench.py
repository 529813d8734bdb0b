"""ds-llep moe: routes the workload, counts every byte that travels, times no wrong result."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import deepspeed.comm as dist
import numpy as np
import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate
from test_bench import SMALL, device, run_command

from ds_llep import cli, moe
from ds_llep.bench.measure import WARM_UPS
from ds_llep.bench.native_session import NativeSession, NativeSettings
from ds_llep.bench.native_stack import force_choices
from ds_llep.bench.session import WrongResults
from ds_llep.config import LLEPConfig
from ds_llep.plan import make_plan

REPEATS = 1
LLEP = LLEPConfig(enabled=True, imbalance_threshold=1.0, min_tokens_per_gemm=1)


def settings(top_k: int = 2, **changes) -> NativeSettings:
    values = {
        "shape": replace(SMALL, top_k=top_k),
        "shape_name": None,
        "layers": 1,
        "workloads": ["50:2"],
        "modes": [],
        "parts": ["forward", "backward"],
        "ep_size": 2,
        "zero_stage": 0,
        "dtype": "float32",
        "repeats": REPEATS,
        "seed": 0,
        "llep": LLEP,
        "breakdown": False,
        "gated": False,
        **changes,
    }
    return NativeSettings(**values)


def measured(**changes) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The records, and the experts of this rank's tokens in the last repeat, by workload."""
    session, forced = NativeSession(settings(**changes), device()), []

    def noted(gate, ids_TK):
        forced.append(ids_TK.flatten().tolist())
        force_choices(gate, ids_TK)

    with mock.patch("ds_llep.bench.native_session.force_choices", noted):
        records = session.run()
    steps = WARM_UPS + REPEATS
    if any(forced):  # not on a rank that has no tokens
        assert len({tuple(ids) for ids in forced}) >= steps, "not routed anew"
    last = steps - 1
    return records, {name: batch.ids(last, 0).cpu() for name, batch in session.batches.items()}


def counts(ids_TK: torch.Tensor) -> torch.Tensor:
    return torch.bincount(ids_TK.flatten(), minlength=SMALL.num_experts)


@pytest.mark.parametrize(
    ("top_k", "changes"),
    [
        (1, {"workloads": ["balanced", "95:1"]}),
        (2, {"workloads": ["50:2", "ragged", "empty"], "gated": True}),
        (3, {"workloads": ["95:1"], "dtype": "bfloat16"}),
        (2, {"workloads": ["95:1"], "llep": LLEPConfig(enabled=True, imbalance_threshold=100)}),
    ],
    ids=["k=1", "k=2, gated", "k=3, bf16", "bypassed"],
)
def test_session(pools, seed, top_k, changes):
    """EP groups beside each other, ranks with few tokens and with none; every byte counted."""
    D, F = SMALL.hidden_size, SMALL.ffn_size
    gated, element = changes.get("gated", False), 2 if changes.get("dtype") else 4
    expert_bytes = element * (3 * D * F if gated else 2 * D * F + D + F)
    answers = pools(4).run(measured, top_k=top_k, seed=seed, **changes)
    for index, workload in enumerate(changes["workloads"]):
        pairs = [records[2 * index : 2 * index + 2] for records, _ in answers]
        ids = [of_workload[workload] for _, of_workload in answers]
        blocks, weights, copies = [], [], []
        for first in range(0, len(ids), 2):
            counts_PE = np.stack([counts(ids_TK) for ids_TK in ids[first : first + 2]])
            plan = make_plan(counts_PE, changes.get("llep", LLEP))
            # Half of every block leaves its rank: there and back, in forward and in backward.
            blocks += [4 * counts_PE.size * counts_PE.max() * D * element // 4] * 2
            # Each of two ranks sends an expert or its gradients: backward fetches nothing again.
            weights += [len(plan.spills) * expert_bytes] * 2
            homes_PP = counts_PE.reshape(2, 2, -1).sum(2)
            copies += [homes_PP[0, 1] + homes_PP[1, 0]] * 2  # sent there, and sent back
            for record in (record for pair in pairs[first : first + 2] for record in pair):
                before, after = plan.load_ratio_before, plan.load_ratio_after
                after = after if record["mode"] == "llep" else before
                assert record["load_ratio_before"] == pytest.approx(before)
                assert record["load_ratio_after"] == pytest.approx(after)
        for theirs, ours in pairs:
            assert (theirs["mode"], ours["mode"]) == ("deepspeed", "llep")
            for record in (theirs, ours):
                assert record["workload"] == workload and record["kind"] == "moe"
                assert record["forward_ms"] > 0 and record["peak_bytes"] > 0
                ratio = theirs["forward_backward_ms"] / record["forward_backward_ms"]
                assert record["speedup"] == ratio
            assert theirs["all_to_all_bytes"] == sum(blocks)
            assert theirs["all_to_all_bytes_max"] == max(blocks)
            assert theirs["weight_bytes"] == theirs["weight_bytes_max"] == 0
            assert ours["weight_bytes"] == sum(weights)
            assert ours["weight_bytes_max"] == max(weights)
            if "llep" in changes:  # no plan moves a copy; each says in 48 bytes what it is
                for key, of_ranks in ("", sum), ("_max", max):
                    rows = 2 * of_ranks(copies)
                    sent = ours[f"all_to_all_bytes{key}"]
                    assert rows * D * element <= sent <= rows * (D * element + 24)
            elif workload in ("95:1", "50:2"):
                assert sum(weights) > 0 and ours["load_ratio_after"] < ours["load_ratio_before"]
            names = {"output", "gradient of input", *ours["errors"]}
            assert len(names) == len(ours["errors"]) == 2 + 1 + 4 * (3 if gated else 4)
            assert 0 < max(error for error, _ in ours["errors"].values())
            for key in ("forward_ms", "forward_backward_ms", "peak_bytes", "errors"):
                assert ours[key] == pairs[0][1][key]


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_choices_are_forced(seed, top_k):
    """Whatever the gate would choose; and it still learns."""
    torch.manual_seed(seed)
    T, D, E = 50, 16, 8
    gate = TopKGate(D, E, top_k, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False)
    ids_TK = torch.rand(T, E).topk(top_k).indices
    force_choices(gate, ids_TK)
    for scale in (1, 1000):
        _, _, _, chosen_KT, _, gates_KT, exp_counts = gate(scale * torch.randn(T, D), None, True)
        assert torch.equal(chosen_KT.T.sort(1).values.long(), ids_TK.sort(1).values)
        assert torch.equal(exp_counts, counts(ids_TK))
        if scale == 1:
            (gates_KT * torch.randn(top_k, T)).sum().backward()
    assert gate.wg.weight.grad.abs().min() > 0


def run_wrong(seed: int, rank: int, what: str) -> str:
    """What is said where llep's values or gradients are off by 1 % on one rank, in two layers."""
    combine = moe.combine

    def wrong(*args):
        y = combine(*args)
        more = y * 0.01 * (dist.get_rank() == rank)
        return y + (more if what == "values" else more - more.detach())

    session = NativeSession(settings(seed=seed, layers=2), device())
    with (
        mock.patch.object(moe, "combine", wrong),
        mock.patch.object(NativeSession, "_measure", side_effect=AssertionError("timed")),
        pytest.raises(WrongResults) as error,
    ):
        session.run()
    return str(error.value)


@pytest.mark.parametrize("what", ["values", "gradients"])
def test_wrong_results_are_refused(pools, seed, what):
    """On every rank, before anything is timed."""
    answers = pools(2).run(run_wrong, seed, seed % 2, what)
    for said in answers:
        assert "no time is given" in said and "DeepSpeed's" in said and said == answers[0]
        assert ("'output'" in said) == (what == "values")
        assert "'gradient of layers.0.deepspeed_moe.experts" in said


def test_command(tmp_path):
    """Its own ranks, a table, a JSON line for each workload and mode."""
    path = tmp_path / "moe.jsonl"
    options = "--ranks 2 --device cpu --tokens 64 --hidden-size 32 --intermediate-size 48 --gated"
    options += ' --repeats 1 --workloads 95:1 --llep {"min_tokens_per_gemm":1} --json'
    done = run_command("moe", *options.split(), str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all-to-all MB" in done.stdout and "K 2, 64 tokens a rank, gated" in done.stdout
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["workload"], line["mode"]) for line in lines] == [
        ("95:1", mode) for mode in ("deepspeed", "llep")
    ]
    for line in lines:
        sizes = [line[name] for name in ("num_experts", "hidden_size", "ffn_size", "top_k")]
        assert sizes == [16, 32, 48, 2] and line["gated"]
        assert line["command"].startswith("ds-llep moe --ranks 2") and "commit" in line
        assert line["versions"]["torch"] == torch.__version__
    assert lines[1]["llep"]["min_tokens_per_gemm"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--top-k 17", "top_k 17 is more than the 16 experts"),
        ("--ep-size 3", "EP size 3 must divide both the 2 ranks and the 16 experts"),
        ("--num-experts 5", "EP size 2 must divide both the 2 ranks and the 5 experts"),
        ("--workloads warm", "unknown workload 'warm'; known are balanced"),
        ("--workloads 95:16", "16 hot experts of 16"),
        ("--workloads ragged --top-k 1", "'ragged' gives the ranks 128 to 512 tokens"),
        ("--workloads empty --top-k 1", "'empty' gives the ranks 0 to 512 tokens"),
        ("--layers 0", "--layers 0; valid is 1 or more"),
        ("--repeats 0", "--repeats 0; valid is 1 or more"),
        ("--tokens 0", "tokens is 0; valid is 1 or more"),
        ("--llep {", "--llep: no JSON"),
        ('--llep {"weight_source":"shards"}', 'leave out "weight_source"'),
        ('--llep {"trace":{"enabled":true}}', 'leave out "weight_source": "shards" and "trace"'),
        ("--ranks 0", "--ranks 0; valid is 1 or more"),
        ("--json no/folder/moe.jsonl", "cannot write 'no/folder/moe.jsonl'"),
    ],
)
def test_mistakes(arguments, message, capsys, monkeypatch):
    """One line and exit code 2, before any rank starts."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with mock.patch("ds_llep.bench.ranks.elastic_launch", side_effect=AssertionError("started")):
        assert cli.main(["moe", "--tokens", "512", *arguments.split()]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out

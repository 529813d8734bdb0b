"""``ds-llep simulate``: micro-batches, what a step fetches, the command, and --against."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from ds_llep import LLEPConfig, make_plan
from ds_llep.bench.cost import layer_cost, spilled
from ds_llep.bench.machine import H200
from ds_llep.bench.micro_batches import evenly, from_workload, resplit
from ds_llep.bench.shapes import Shape, preset
from ds_llep.bench.step import MODES, System, fetches, step_cost
from ds_llep.cli import main
from ds_llep.trace import write

SYSTEM = System(H200, 8, "bfloat16")
SHAPE = Shape(16, 64, 32, 2, 300)
MANY = Shape(16, 64, 32, 2, 90_000)
CONFIG = LLEPConfig(enabled=True, imbalance_threshold=1.0, min_tokens_per_gemm=1)
EXPERT = 2 * SHAPE.expert_numel


def write_trace(path, counts_LSPE: np.ndarray, training=None, llep=None) -> str:
    layers, rows, P, _ = counts_LSPE.shape
    about = {
        "ds_llep": "0",
        "layer_names": [f"layers.{layer}" for layer in range(layers)],
        "top_k": [2] * layers,
        "hidden_size": [64] * layers,
        "ffn_size": [32] * layers,
        "ep_size": P,
        "dtype": "bfloat16",
        "llep": LLEPConfig(enabled=True, **(llep or {})).model_dump(mode="json"),
    }
    training = [True] * rows if training is None else training
    numbers = [(row, row // 2, training[row]) for row in range(rows)]
    write(path, about, numbers, list(counts_LSPE.astype(np.uint32)))
    return str(path)


def skewed(seed: int, layers: int, rows: int = 1, P: int = 4) -> np.ndarray:
    """Counts ``[layers, rows, P, E]``, another hot expert in each layer."""
    rng = np.random.default_rng(seed)
    popularity_LE = rng.dirichlet(np.full(SHAPE.num_experts, 0.3), size=layers)
    return np.stack([rng.multinomial(600, share_E, size=(rows, P)) for share_E in popularity_LE])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_resplit_keeps_every_token(seed, ranks):
    counts_PE = skewed(seed, 1)[0, 0]
    split = resplit(counts_PE, ranks)
    assert split.shape == (ranks, SHAPE.num_experts) and split.min() >= 0
    np.testing.assert_array_equal(split.sum(0), counts_PE.sum(0))
    parts = max(1, ranks // 4)
    merged = split.reshape(4, parts, -1).sum(1) if ranks >= 4 else split
    np.testing.assert_array_equal(merged, counts_PE.reshape(len(merged), -1, 16).sum(1))
    # Of one source rank, the parts are even, altogether and for every expert.
    for source in split.reshape(-1, parts, 16) if ranks >= 4 else ():
        assert np.ptp(source.sum(1)) <= 1 and np.ptp(source, axis=0).max() <= 1


@pytest.mark.parametrize(("ranks", "message"), [(3, "16 experts do not"), (6, "16 experts")])
def test_resplit_refuses(ranks, message):
    with pytest.raises(ValueError, match=message):
        resplit(np.ones((4, 16), dtype=np.int64), ranks)
    with pytest.raises(ValueError, match="is of 4 source ranks; --ranks must divide"):
        resplit(np.ones((4, 36), dtype=np.int64), ranks)


def test_evenly():
    assert evenly(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly(3, 8).tolist() == [0, 1, 2]


def plans_of(seed: int, layers: int):
    plans = [make_plan(counts[0], CONFIG) for counts in skewed(seed, layers)]
    assert all(plan.spills for plan in plans)
    return plans, [SHAPE] * layers


def test_one_layer_finds_its_experts_in_backward(seed):
    plans, shapes = plans_of(seed, 1)
    (forward,), (backward,) = fetches(plans, shapes, CONFIG, 2)
    np.testing.assert_array_equal(forward, spilled(plans[0]))
    assert not backward.any()


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"weight_cache": False}, "all"),
        ({"weight_cache": False, "backward_weights": "keep"}, "none"),
        ({"max_foreign_bytes": 1000 * EXPERT}, "none"),
        ({}, "all but the last"),
    ],
)
def test_what_backward_fetches(seed, changes, again):
    """A workspace for the hungriest layer holds one of two layers that need all of it."""
    (plan, _), shapes = plans_of(seed, 2)
    plans = [plan, plan]
    config = CONFIG.model_copy(update=changes)
    forward, backward = fetches(plans, shapes, config, 2)
    lent_PP = spilled(plan)
    for fetched_PP in forward:
        np.testing.assert_array_equal(fetched_PP, lent_PP)
    expected = {"all": (1, 1), "none": (0, 0), "all but the last": (1, 0)}[again]
    for fetched_PP, times in zip(backward, expected, strict=True):
        np.testing.assert_array_equal(fetched_PP, times * lent_PP)


def test_limits_on_foreign_experts(seed):
    layers = [(skewed(seed, 1)[0, 0], SHAPE)]
    free = step_cost("llep", layers, CONFIG, SYSTEM)
    one = CONFIG.model_copy(update={"max_foreign_bytes": 2 * EXPERT - 1})
    bounded = step_cost("llep", layers, one, SYSTEM)
    plan = make_plan(layers[0][0], CONFIG.model_copy(update={"max_foreign_experts": 1}))
    assert bounded.foreign_experts == len(plan.spills) <= free.foreign_experts
    none = CONFIG.model_copy(update={"max_foreign_bytes": EXPERT - 1})
    with pytest.raises(ValueError, match=f"less than one expert, {EXPERT} bytes"):
        step_cost("llep", layers, none, SYSTEM)


def test_step_is_the_sum_of_its_layers(seed):
    counts = skewed(seed, 3)
    layers = [(counts_SPE[0], SHAPE) for counts_SPE in counts]
    for mode in MODES:
        whole = step_cost(mode, layers, CONFIG.model_copy(update={"weight_cache": False}), SYSTEM)
        assert whole.load_ratio_mean <= whole.load_ratio_max
        if mode == "llep":
            plans = [make_plan(counts_PE, CONFIG) for counts_PE, _ in layers]
            parts = [
                layer_cost(plan, SHAPE, H200, fetched_again_PP=spilled(plan)) for plan in plans
            ]
            assert whole.seconds == pytest.approx(sum(part.seconds for part in parts))
            moved = sum(sum(part.weight_bytes) for part in parts)
            assert sum(whole.weight_bytes) == pytest.approx(moved)
            away = sum(spill.tokens for plan in plans for spill in plan.spills)
            assert whole.spilled_share == pytest.approx(away / counts.sum())
        else:
            assert whole.foreign_experts == whole.spilled_share == sum(whole.weight_bytes) == 0


def test_many_ranks_take_seconds():
    start = time.perf_counter()
    layers = from_workload("zipf:1", preset("deepseek-v3"), 64, 48, 0, 0)
    for mode in MODES:
        step_cost(mode, layers, LLEPConfig(enabled=True), SYSTEM)
    assert time.perf_counter() - start < 20  # 2 on one core


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = main(["simulate", *map(str, args)])
    return code, *capsys.readouterr()


def test_command(capsys, tmp_path):
    path = tmp_path / "out.jsonl"
    options = ["--shape", "tiny", "--workload", "95:1", "--ranks", 8, "--layers", 2, "--steps", 2]
    options += ["--ranks-per-node", 4, "--llep", '{"min_tokens_per_gemm": 1}', "--json", path]
    for _ in range(2):
        code, out, _ = run(capsys, *options)
        assert code == 0
        assert "EP 8, 4 ranks a node, 2 layer(s), 2 step(s), machine h200" in out
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == second
    predicted = first["predicted"]
    assert predicted["llep"]["load_ratio_max"] < 1.1 < 7 < predicted["ep"]["load_ratio_mean"]
    assert predicted["ideal"]["load_ratio_max"] == 1
    assert min(predicted["ep"]["row_bytes"]) > 0
    assert f"{1e3 * predicted['ep']['forward']:.2f}" in out


def test_command_on_a_trace(capsys, tmp_path, seed):
    counts = skewed(seed, 2, rows=5)
    trace = write_trace(tmp_path / "t.npz", counts, [False, True, True, False, True])
    path = tmp_path / "out.jsonl"
    code, out, _ = run(capsys, "--trace", trace, "--ranks", 2, "--json", path)
    assert code == 0 and "EP 2, 8 ranks a node, 2 layer(s), 3 step(s)" in out
    record = json.loads(path.read_text())
    found = [
        step_cost("llep", [(resplit(c, 2), SHAPE) for c in counts[:, row]], LLEPConfig(), SYSTEM)
        for row in (1, 2, 4)
    ]
    expected = np.mean([step.forward for step in found])
    assert record["predicted"]["llep"]["forward"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "huge"], "unknown preset 'huge'; valid are gpt-oss-120b"),
        (["--workload", "wild"], "unknown workload 'wild'"),
        (["--ranks", "7"], "128 experts do not divide evenly among 7 ranks"),
        (["--ranks", "0"], "--ranks 0; valid is 1 or more"),
        (["--steps", "-2"], "--steps -2; valid is 1 or more"),
        (["--top-k", "0"], "top_k is 0"),
        (["--machine", "h300"], "no machine 'h300'"),
        (["--llep", "{"], "--llep: no JSON"),
        (["--llep", '{"alpha": 2}'], 'unknown key "llep.alpha"'),
        (["--llep", '{"max_foreign_bytes": 9}'], "is less than one expert"),
        (["--trace", "a.npz", "--workload", "zipf:1"], "give one"),
        (["--trace", "a.npz", "--shape", "tiny", "--top-k", "3"], "--shape, --top-k: the trace"),
        (["--trace", "/no/such.npz"], "No such file"),
        (["--against", "/no/such.jsonl"], "No such file"),
        (["--json", "/no/such/out.jsonl"], "cannot write '/no/such/out.jsonl'"),
    ],
)
def test_mistakes(capsys, options, message):
    code, _, error = run(capsys, *options)
    assert code == 2 and message in error
    assert error.startswith("ds-llep simulate: ") and error.count("\n") == 1


def bench_line(**changes) -> dict:
    shape = {"num_experts": 16, "hidden_size": 64, "ffn_size": 32, "top_k": 2, "tokens": 90_000}
    line = {"kind": "bench", "shape": None, **shape, "layers": 1, "ranks": 8, "ep_size": 4}
    line |= {"dtype": "bfloat16", "device": "X", "workload": "60:2", "mode": "llep", "seed": 5}
    line |= {"repeats": 1, "step_ms": None, "peak_bytes": None, "breakdown_ms": None}
    line |= {"versions": {}, "commit": None}
    return {**line, "forward_ms": 1.0, "forward_backward_ms": None, "llep": {}, **changes}


def test_against(capsys, tmp_path):
    """The slower of two EP groups counts, and errors are relative to what was measured."""
    config = LLEPConfig(imbalance_threshold=1.0, weight_cache=False, min_tokens_per_gemm=1)
    groups = [from_workload("empty", MANY, 4, 1, 0, 5, first) for first in (0, 4)]
    llep = [step_cost("llep", layers, config, SYSTEM) for layers in groups]
    ep = step_cost("ep", from_workload("balanced", MANY, 8, 1, 0, 5), config, SYSTEM)
    lines = [
        bench_line(
            workload="empty",  # a rank of the first group has no token
            llep=config.model_dump(mode="json"),
            forward_ms=1e3 * max(step.forward for step in llep) / 1.25,
            forward_backward_ms=1e3 * max(step.seconds for step in llep) / 0.5,
        ),
        bench_line(
            **{"mode": "ep_balanced", "workload": "balanced", "ep_size": 8, "llep": None},
            forward_ms=1e3 * ep.forward / 1.1,
        ),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = run(capsys, "--against", path)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if "empty" in line or "balanced" in line]
    assert "+25.0%" in rows[0] and "-50.0%" in rows[0] and "+10.0%" in rows[1]
    assert "absolute error: median 25.0%, worst 50.0%" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            json.dumps(bench_line()) + '\n{"kind": "bench"}',
            "line 2 is no result of `ds-llep bench`",
        ),
        (json.dumps(bench_line(forward_ms=None)), "has no forward or forward"),
        (json.dumps(bench_line(dtype="int8")), "dtype 'int8' is not modelled"),
        ("", "is empty"),
    ],
)
def test_against_broken_files(capsys, tmp_path, text, message):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    code, _, error = run(capsys, "--against", path)
    assert code == 2 and message in error and str(path) in error

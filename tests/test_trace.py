"""Recorded traces: what is in the file, when, how it stays bounded, and what a reader is told."""

from __future__ import annotations

import doctest
import json
import logging
import random
from pathlib import Path
from unittest import mock

import deepspeed.comm as dist
import engines
import numpy as np
import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import ds_llep
from ds_llep import LLEPConfig, make_plan, recorder
from ds_llep.bench.workloads import Draw, parse
from ds_llep.config import MonitorConfig
from ds_llep.monitor import Statistics
from ds_llep.recorder import Recorder, micro_batch_bytes
from ds_llep.trace import Trace, write

GAS = 2
STEPS = 2


def train_traced(path: str, seed: int, stage: int, kind: str) -> dict:
    """Two optimizer steps of two micro-batches, each step after a forward in evaluation."""
    config = engines.ds_config(
        stage, 2, llep={"trace": {"enabled": True, "path": path}}, gradient_accumulation_steps=GAS
    )
    engine = engines.initialize(build("qwen3_moe", seed), config)
    engines.enable_checkpointing(engine.module, kind)
    num_experts = engine.module.config.num_experts
    chosen = []

    def forward(training: bool):
        ids = engines.routing("per_layer", engine.module.config, 2, seed + len(chosen))
        engines.set_routing(engine.module, ids)
        counts = [torch.bincount(i.flatten(), minlength=num_experts).tolist() for i in ids]
        chosen.append((engine.global_steps, training, counts))
        engine.train(training)
        return engine(**engines.batch(torch.float32, seed + len(chosen))).loss

    for _ in range(STEPS):
        with torch.no_grad():
            forward(training=False)
        for _ in range(GAS):
            engine.backward(forward(training=True))
            engine.step()
    status = ds_llep.status(engine)
    engine.destroy()
    return {"chosen": chosen, "ep_size": status["ep_size"], "names": status["layer_names"]}


CASES = [(2, "none"), (2, "reentrant"), (3, "non-reentrant"), (3, "reentrant")]


@pytest.mark.parametrize("stage, kind", CASES)
def test_round_trip(pools, stage, kind, tmp_path, seed):
    """The file holds each routing once, also where checkpointing runs every layer twice."""
    path = tmp_path / "trace.npz"
    results = pools(4).run(train_traced, str(path), seed, stage, kind)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]  # rank 0 alone
    trace = Trace.load(path)
    steps, training, _ = zip(*results[0]["chosen"], strict=True)
    assert trace.steps.tolist() == list(steps) == [0, 0, 0, 1, 1, 1]
    assert trace.training.tolist() == list(training)
    assert trace.micro_batches.tolist() == list(range(trace.num_micro_batches))
    ep_size = trace.ep_size
    assert ep_size == results[0]["ep_size"]
    for index in range(trace.num_micro_batches):
        for layer in range(trace.num_layers):
            routed = [result["chosen"][index][2][layer] for result in results[:ep_size]]
            counts_PE = trace.counts(index, layer)
            assert counts_PE.dtype == np.int64
            assert counts_PE.tolist() == routed
    assert list(trace.layer_names) == results[0]["names"]
    assert trace.top_k == (3, 3)
    assert trace.hidden_size == (32, 32)
    assert trace.ffn_size == (48, 48)
    assert (trace.dtype, trace.ds_llep) == ("float32", ds_llep.__version__)
    assert trace.llep["trace"] == {**trace.llep["trace"], "enabled": True, "path": str(path)}


class Operations(TorchDispatchMode):
    """Notes every operation that PyTorch runs, collectives and copies to the host among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations_of_a_step(seed: int, folder: str, llep: dict) -> tuple[list[str], int]:
    """The operations of a training step, and how often a tensor's values went to the host."""
    csv_monitor = {"enabled": True, "output_path": folder}
    config = engines.ds_config(2, 2, llep=llep, csv_monitor=csv_monitor)
    engine = engines.initialize(build("qwen3_moe", seed), config)
    engines.set_routing(engine.module, engines.routing("hot_rank", engine.module.config, 2, seed))
    inputs, reads = engines.batch(torch.float32, seed), 0
    engine.backward(engine(**inputs).loss)  # what is made once is made here
    engine.step()

    def counted(method):
        def call(*args, **kwargs):
            nonlocal reads
            reads += 1
            return method(*args, **kwargs)

        return call

    names = ("cpu", "item", "tolist", "numpy")
    patches = {name: counted(getattr(torch.Tensor, name)) for name in names}
    with Operations() as operations, mock.patch.multiple(torch.Tensor, **patches):
        engine.backward(engine(**inputs).loss)
        engine.step()
    engine.destroy()
    return operations.names, reads


def test_costs_no_operation(pools, tmp_path, seed):
    """With a trace and the monitor on, a step is the same to PyTorch as without."""
    on = {
        "trace": {"enabled": True, "path": str(tmp_path / "trace.npz")},
        "monitor": {"enabled": True, "interval": 1},
    }
    pool = pools(4)
    for (ours, reads), (plain, plain_reads) in zip(
        pool.run(operations_of_a_step, seed, str(tmp_path), on),
        pool.run(operations_of_a_step, seed, str(tmp_path), {}),
        strict=True,
    ):
        assert any("c10d" in name for name in plain) and plain_reads
        assert ours == plain
        assert reads == plain_reads
    assert Trace.load(tmp_path / "trace.npz").num_micro_batches == 2
    assert list(tmp_path.rglob("*llep*.csv"))


def start_twice(folder: str, seed: int) -> list[bool]:
    """Two engines after each other record to one path, one micro-batch and two.

    Returns:
        Whether this rank has a recorder.
    """
    config = engines.ds_config(1, 2, llep={"trace": {"enabled": True, "path": f"{folder}/t.npz"}})
    found = []
    for number in range(2):
        engine = engines.initialize(build("qwen3_moe", seed), config)
        statistics = engines.moe_layers(engine.module)[0].llep.statistics
        found.append(statistics._recorder is not None)
        for _ in range(number + 1):
            engine(**engines.batch(torch.float32, seed))
        engine.destroy()
        name = f"{folder}/t.npz" if number == 0 else f"{folder}/t.1.npz"
        assert dist.get_rank() > 0 or Trace.load(name).num_micro_batches == number + 1
    return found


def test_restart_keeps_the_first_file(pools, tmp_path, seed):
    for rank, found in enumerate(pools(4).run(start_twice, str(tmp_path), seed)):
        assert found == [rank == 0] * 2
    assert Trace.load(tmp_path / "t.npz").num_micro_batches == 1
    assert Trace.load(tmp_path / "t.1.npz").num_micro_batches == 2


EXPERTS = (8, 4)  # of two layers
RANKS = 2
BYTES = micro_batch_bytes(RANKS, EXPERTS)
ABOUT = {
    "ds_llep": "0",
    "layer_names": ["a", "b"],
    "top_k": [2, 2],
    "hidden_size": [16, 16],
    "ffn_size": [24, 12],
    "ep_size": RANKS,
    "llep": {"enabled": True},
}


def some_counts(seed: int, number: int) -> list[np.ndarray]:
    """One ``[P, E]`` a layer; the second layer sits out some micro-batches from the third on."""
    rng = np.random.default_rng([seed, number])
    found = []
    for layer, experts in enumerate(EXPERTS):
        ids = np.stack([rng.permuted(np.arange(experts)) for _ in range(RANKS * 50)])[:, :2]
        by_rank = ids.reshape(RANKS, -1)
        counts_PE = np.stack([np.bincount(row, minlength=experts) for row in by_rank])
        found.append(counts_PE * (layer == 0 or number < 2 or rng.random() < 0.7))
    return found


def feed(target: Recorder, seed: int, numbers: range) -> None:
    for number in numbers:
        target.begin(step=number // 4, training=number % 5 != 0, dtype="bfloat16")
        for layer, counts_PE in enumerate(some_counts(seed, number)):
            if counts_PE.any():
                target.add(layer, counts_PE)


def check(trace: Trace, seed: int) -> None:
    """Everything in it is what was fed, and is evenly spread."""
    numbers = trace.micro_batches
    assert numbers[0] == 0 and len(set(np.diff(numbers).tolist())) <= 1
    assert trace.steps.tolist() == (numbers // 4).tolist()
    assert trace.training.tolist() == (numbers % 5 != 0).tolist()
    assert trace.dtype == "bfloat16"
    for row, number in enumerate(numbers.tolist()):
        for layer, counts_PE in enumerate(some_counts(seed, number)):
            assert np.array_equal(trace.counts(row, layer), counts_PE)


def new_recorder(path: Path, interval: int = 1, capacity: int = 1000) -> Recorder:
    return Recorder(path, interval, capacity * BYTES, EXPERTS, dict(ABOUT))


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("capacity", [2, 7, 16])
def test_bounded(interval, capacity, tmp_path, seed, caplog):
    """However long the run, memory stays under the bound and the trace covers all of the run."""
    path = tmp_path / "trace.npz"
    target = new_recorder(path, interval, capacity)
    assert sum(array.nbytes for array in target._counts) <= capacity * BYTES
    total = random.Random(seed).randrange(150, 300)
    with caplog.at_level(logging.WARNING):
        feed(target, seed, range(total))
    target.flush()
    trace = Trace.load(path)
    check(trace, seed)
    assert capacity // 2 <= trace.num_micro_batches <= capacity
    spacing = int(trace.micro_batches[1])
    assert trace.micro_batches[-1] + spacing >= total, "the end of the run is not covered"
    # Never silent: one line for each doubling, naming the spacing from then on.
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == np.log2(spacing / interval) > 0
    assert all("llep.trace.max_bytes" in line for line in lines)
    assert f"one of {spacing} is recorded" in lines[-1]


def test_killed_job_loses_little(tmp_path, seed):
    """Without any flush at the end, at most an eighth is missing; and writes stay few."""
    path = tmp_path / "trace.npz"
    target = new_recorder(path)
    with mock.patch.object(recorder, "write", side_effect=write) as writes:
        for total in range(1, 151):
            feed(target, seed, range(total - 1, total))
            if total > 1:
                rows = Trace.load(path).num_micro_batches
                assert rows >= (total - 1) * 8 / 9 - 1
        assert writes.call_count < 8 + np.log(150 / 8) / np.log(9 / 8) + 5
        target.flush()
        written = writes.call_count
        target.flush()
        assert writes.call_count == written, "written again with nothing new in it"
    check(Trace.load(path), seed)
    assert Trace.load(path).num_micro_batches == 150


def test_failing_write(tmp_path, seed, caplog):
    """A full disk is a warning each time, leaves nothing half-written, and loses nothing."""
    path = tmp_path / "trace.npz"
    target = new_recorder(path)
    feed(target, seed, range(3))
    before = path.read_bytes()
    full = OSError(28, "No space left on device")
    with mock.patch("numpy.lib.format.write_array", side_effect=full):
        feed(target, seed, range(3, 20))
        target.flush()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) > 2 and all("No space left" in line and str(path) in line for line in lines)
    target.flush()
    check(Trace.load(path), seed)
    assert Trace.load(path).num_micro_batches == 20


class Engine:
    global_steps = 0


def test_flushed_with_its_engine(tmp_path, seed):
    """What is not written yet is when the engine goes, at the latest when Python exits."""
    path = tmp_path / "trace.npz"
    target, engine = new_recorder(path), Engine()
    statistics = Statistics(MonitorConfig(), len(EXPERTS), engine, target)
    feed(target, seed, range(1))
    with pytest.raises(ValueError, match="holds no micro-batch"):
        Trace.load(path)
    del engine
    check(Trace.load(path), seed)
    assert statistics.last()["load_ratio_before"] == []


def test_where_a_micro_batch_ends(tmp_path, seed):
    """Where a layer comes again, at a step, and between training and evaluation."""
    path = tmp_path / "trace.npz"
    target, engine = new_recorder(path), Engine()
    statistics = Statistics(MonitorConfig(), len(EXPERTS), engine, target)
    window = statistics.open_window()
    plans = [make_plan(counts, LLEPConfig()) for counts in some_counts(seed, 1)]
    passes = [(0, 0, True), (1, 0, True), (0, 0, True), (1, 0, False), (0, 0, False), (1, 1, False)]
    for layer, engine.global_steps, training in passes:
        statistics.record(layer, plans[layer], training, torch.float16)
    statistics.flush()
    trace = Trace.load(path)
    ran = [[bool(trace.counts(row, layer).any()) for layer in (0, 1)] for row in range(4)]
    assert ran == [[True, True], [True, False], [True, True], [False, True]]
    assert trace.steps.tolist() == [0, 0, 0, 1]
    assert trace.training.tolist() == [True, True, False, False]
    assert trace.dtype == "float16"
    statistics.count_fetched(0, True, 3, 30)
    statistics.count_fetched(0, False, 5, 50)
    values = window.take()
    assert (values["fetched_experts"], values["fetched_bytes"]) == (3 / 2, 30 / 2)
    ratios = [plans[layer].load_ratio_before for layer in (0, 1, 0)]
    assert values["load_ratio_before_mean"] == pytest.approx(np.mean(ratios))
    assert window.take() == {}


@pytest.fixture
def recorded(tmp_path, seed) -> Path:
    path = tmp_path / "trace.npz"
    target = new_recorder(path)
    feed(target, seed, range(6))
    target.flush()
    return path


def test_replay(recorded, seed):
    """The benchmark's ``trace:FILE`` routes what was trained on, a token's experts distinct."""
    workload = parse(f"trace:{recorded}")
    trained = np.flatnonzero(Trace.load(recorded).training)
    assert 0 < len(trained) < 6
    for step, number in enumerate(trained.tolist()):
        for layer, counts_PE in enumerate(some_counts(seed, number)):
            for source in range(RANKS):
                draw = Draw(EXPERTS[layer], 2, 50, source, layer, step, seed)
                assert np.array_equal(workload.counts(draw), counts_PE[source])
                ids_TK = workload.expert_ids(draw)
                assert np.array_equal(
                    np.bincount(ids_TK.flatten(), minlength=EXPERTS[layer]), counts_PE[source]
                )
                assert all(len(set(row)) == 2 for row in ids_TK.tolist())


def test_load_again(recorded):
    trace = Trace.load(str(recorded))
    assert trace.layers[0].shape == (6, RANKS, EXPERTS[0])
    with pytest.raises(ValueError, match="read-only"):
        trace.layers[0][0] = 1
    with pytest.raises(OSError):
        Trace.load(recorded.with_name("absent.npz"))


def rewritten(path: Path, **changes) -> Path:
    """The file with some arrays replaced, or left out where None."""
    arrays = {**np.load(path), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def about(**changes) -> np.ndarray:
    return np.array(json.dumps({"format": 1, "dtype": "float32", **ABOUT, **changes}))


WRONG = {
    "another version": (
        dict(about=about(format=2, ds_llep="9.9")),
        "format 2, written by ds_llep 9.9",
    ),
    "no about": (dict(about=None), "about"),
    "about is no JSON": (dict(about=np.array("{")), ""),
    "about is no object": (dict(about=np.array("3")), ""),
    "about without a key": (dict(about=np.array('{"format": 1, "layer_names": []}')), "top_k"),
    "too few sizes": (dict(about=about(top_k=[2])), '"top_k"'),
    "sizes of another kind": (dict(about=about(ffn_size=["a", "b"])), '"ffn_size"'),
    "another EP size": (dict(about=about(ep_size=3)), "shape"),
    "a layer missing": (dict(counts_001=None), "counts_001"),
    "a layer of floats": (dict(counts_001=np.ones((6, 2, 4))), "float64"),
    "a layer too short": (dict(counts_001=np.ones((5, 2, 4), np.uint32)), "shape"),
    "no steps": (dict(steps=None), "steps"),
    "steps of floats": (dict(steps=np.ones(6)), '"steps"'),
    "training too long": (dict(training=np.ones(7, bool)), '"training"'),
    "pickled": (dict(steps=np.array([None] * 6)), "pickle"),
}


@pytest.mark.parametrize("what", WRONG)
def test_foreign_archive(what, recorded):
    changes, fragment = WRONG[what]
    with pytest.raises(ValueError) as caught:
        Trace.load(rewritten(recorded, **changes))
    assert str(recorded) in str(caught.value)
    assert fragment in str(caught.value)


def test_foreign_file(tmp_path):
    path = tmp_path / "trace.npz"
    for content in (b"", b"PK", b"counts\n1 2 3\n", bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no .npz archive") as caught:
            Trace.load(path)
        assert str(path) in str(caught.value)
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match="no .npz archive"):
        Trace.load(path)


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_file(data, tmp_path_factory):
    """Cut short or with wrong bytes, it reads as what was written or is a ``ValueError``."""
    path = tmp_path_factory.mktemp("damaged") / "trace.npz"
    target = new_recorder(path)
    feed(target, 1, range(3))
    target.flush()
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1)):
            content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        trace = Trace.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        check(trace, 1)


def test_documented_example(recorded, monkeypatch):
    monkeypatch.chdir(recorded.parent)
    recorded.rename("llep_trace.npz")
    doc = Path(__file__).parent.parent / "docs/monitoring.md"
    failed, tried = doctest.testfile(str(doc), module_relative=False)
    assert tried and not failed

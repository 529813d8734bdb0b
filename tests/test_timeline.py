"""Parts of a layer's time: nothing while nobody asks, the same on every rank while one does."""

from __future__ import annotations

import contextlib
import time

import layers
import torch

from ds_llep import timeline
from ds_llep.timeline import Timeline, part

FORWARD = ["router", "counts", "route", "wait for counts", "plan", "fetch"]
FORWARD += ["dispatch", "dispatch/rows", "dispatch/all-to-all"]
FORWARD += ["home experts", "wait for foreign", "foreign experts"]
FORWARD += ["combine", "combine/rows", "combine/all-to-all"]
BACKWARD = ["fetch backward"]
BACKWARD += ["combine backward", "combine backward/rows", "combine backward/all-to-all"]
BACKWARD += ["home experts backward", "wait for foreign backward", "foreign experts backward"]
BACKWARD += ["dispatch backward", "dispatch backward/rows"]
BACKWARD += ["gradient return", "dispatch backward/all-to-all"]


def test_off_costs_nothing():
    assert part("one") is part("other"), "a part made something although nobody asked"
    assert isinstance(part("one"), contextlib.nullcontext)


def test_parts_nest_and_add_up():
    with Timeline() as found:
        for _ in range(2):
            with part("outer"):
                with part("inner"):
                    time.sleep(0.01)
                time.sleep(0.005)
        with part("later"):
            pass
        times = found.take()
        assert found.take() == {}
    assert list(times) == ["outer", "outer/inner", "later"]
    if not torch.cuda.is_available():  # a GPU that has nothing to do does not wait for the host
        assert times["outer"] >= 30 and 20 <= times["outer/inner"] < times["outer"]
    assert timeline._active is None


def test_an_error_ends_the_part():
    with Timeline() as found:
        with contextlib.suppress(KeyError), part("outer"), part("broken"):
            raise KeyError
        with part("next"):
            pass
        assert list(found.take()) == ["outer", "outer/broken", "next"]


def parts_of_a_layer(seed: int, workload: str) -> tuple[list[str], bool]:
    """Names in order, and whether this rank's plan spilled; one of the groups has nothing to do."""
    layer = layers.llep_twin(layers.autoep_layer("qwen3_moe", 2, seed, torch.float32))
    x, grad, ids = layers.draw(layer, workload, 32, torch.float32, seed)
    plain = layers.run(layer, x, grad, ids)
    with Timeline() as found:
        timed = layers.run(layer, x, grad, ids)
        times = found.take()
    assert all(value >= 0 for value in times.values())
    assert not layers.unequal(timed, plain), "timing changes results"
    return list(times), bool(layer.llep.statistics.last()["spilled_tokens"][0])


def test_same_parts_on_every_rank(pools, seed):
    for workload in ("one_hot_expert", "empty_rank"):
        answers = pools(4).run(parts_of_a_layer, seed, workload)
        assert any(spilled for _, spilled in answers)
        for names, _ in answers:
            assert names == FORWARD + BACKWARD

"""The cost model: conservation, monotony, and what it was compared with."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time

import numpy as np
import pytest

from ds_llep import LLEPConfig, make_plan
from ds_llep.bench.cost import autoep_cost, ep_plan, ideal_cost, layer_cost, spilled
from ds_llep.bench.machine import BUILT_IN, H200, Machine, find, seconds
from ds_llep.bench.micro_batches import from_workload
from ds_llep.bench.parcels import expected_parcels, traffic
from ds_llep.bench.primitives import Kernels, Links
from ds_llep.bench.shapes import PRESETS, Shape
from ds_llep.plan import Plan

CONFIG = LLEPConfig(enabled=True, imbalance_threshold=1.0, min_tokens_per_gemm=16)

# Milliseconds of forward / forward+backward on 2 H200, AutoEP's and llep's.
MEASURED = {
    ("gpt-oss-120b", "balanced"): ((15.4, 44.5), (14.1, 39.9)),
    ("gpt-oss-120b", "50:4"): ((23.6, 65.7), (14.4, 40.4)),
    ("gpt-oss-120b", "95:1"): ((29.5, 89.5), (13.2, 40.1)),
    ("qwen3-30b-a3b", "balanced"): ((10.2, 25.0), (7.0, 16.7)),
    ("qwen3-30b-a3b", "50:4"): ((14.0, 35.0), (7.0, 17.5)),
    ("qwen3-30b-a3b", "95:1"): ((17.4, 45.9), (6.7, 17.5)),
    ("deepseek-v3", "balanced"): ((28.8, 82.9), (24.4, 68.7)),
    ("deepseek-v3", "50:4"): ((42.6, 119.7), (24.9, 69.5)),
    ("deepseek-v3", "95:1"): ((53.5, 153.8), (23.3, 69.6)),
}


def routed(seed: int) -> tuple[np.ndarray, Shape]:
    """Skewed counts ``[P, E]`` of a small layer, and its shape."""
    rng = np.random.default_rng(seed)
    P, M = int(rng.choice([2, 3, 4, 8])), int(rng.integers(2, 6))
    shape = Shape(P * M, int(rng.choice([96, 300])), int(rng.choice([64, 513])), 2, 400)
    popularity_E = rng.dirichlet(np.full(P * M, 0.3))
    return rng.multinomial(shape.tokens * shape.top_k, popularity_E, size=P), shape


def costs(counts_PE, shape, machine=H200, **where):
    """The cost of AutoEP, of the plan, and of the ideal."""
    return {
        "ep": autoep_cost(counts_PE, shape, machine, **where),
        "llep": layer_cost(make_plan(counts_PE, CONFIG), shape, machine, **where),
        "ideal": ideal_cost(counts_PE, shape, machine, **where),
    }


def faster(machine: Machine, factor: float) -> Machine:
    values = {}
    for name, value in dataclasses.asdict(machine).items():
        if isinstance(value, float):
            values[name] = value * factor if name.endswith("_rate") else value / factor
        elif name.startswith(("all_to_all", "point_to_point", "grouped")):
            values[name] = tuple((size, rate * factor) for size, rate in value)
    return dataclasses.replace(machine, **values)


@pytest.mark.parametrize("per_node", [1, 2, 64])
def test_nothing_is_lost(seed, per_node):
    """All rows are computed; all that crosses ranks is inside nodes or between them.

    AutoEP sends each copy four times. llep sends a token's row as often, but once for all of its
    copies; to there with a score and a target for each choice, the last time with a gradient.
    """
    counts_PE, shape = routed(seed)
    P, K, row = len(counts_PE), shape.top_k, 2 * shape.hidden_size
    for mode, cost in costs(counts_PE, shape, ranks_per_node=per_node).items():
        assert cost.rows_P.sum() == pytest.approx(counts_PE.sum())
        plan = make_plan(counts_PE, CONFIG) if mode == "llep" else ep_plan(counts_PE)
        if mode == "ep":
            rows_PP, nbytes = traffic(plan), 4 * row
        elif mode == "llep":
            rows_PP, nbytes = expected_parcels(plan, K), 4 * row + 12 * K
        else:
            tokens = counts_PE.sum(1, keepdims=True) / K
            rows_PP, nbytes = tokens * (1 - (1 - 1 / P) ** K) * np.ones(P), 4 * row + 12 * K
        crossing = nbytes * (rows_PP.sum() - np.trace(rows_PP))
        assert sum(cost.row_bytes) == pytest.approx(crossing)
        moved = 2 * len(plan.spills) if mode == "llep" else 0  # fetched, and a gradient returned
        assert sum(cost.weight_bytes) == pytest.approx(moved * 2 * shape.expert_numel)
        if per_node == 1:
            assert cost.row_bytes.inside == cost.weight_bytes.inside == 0
        if per_node == 64:
            assert cost.row_bytes.between == cost.weight_bytes.between == 0
            assert cost.row_bytes.inside > 0


def test_memory_of_rows(seed):
    """Rows, gate and up of what a rank computes; AutoEP keeps the results of what it sent, too."""
    counts_PE, shape = routed(seed)
    D, F = shape.hidden_size, shape.ffn_size
    for mode, cost in costs(counts_PE, shape, dtype="float32").items():
        combined_P = counts_PE.sum(1) * D if mode == "ep" else 0
        expected_P = 4 * (cost.rows_P * (D + 2 * F) + combined_P)
        np.testing.assert_allclose(cost.kept_bytes_P, expected_P)


def test_bypassed_plan(seed):
    counts_PE, shape = routed(seed)
    plan = make_plan(counts_PE, CONFIG.model_copy(update={"imbalance_threshold": 1e9}))
    assert plan.bypassed
    cost, at_home = (layer_cost(p, shape, H200) for p in (plan, ep_plan(counts_PE)))
    assert (cost.forward, cost.backward) == (at_home.forward, at_home.backward)
    for parts in (cost.forward, cost.backward):
        assert parts["foreign"] == parts["wait"] == parts.get("return", 0) == 0
    np.testing.assert_array_equal(cost.rows_P, costs(counts_PE, shape)["ep"].rows_P)


def test_overheads_are_each_layers_own(seed):
    counts_PE, shape = routed(seed)
    for mode, field in (("ep", "autoep_overhead_"), ("llep", "overhead_"), ("ideal", "overhead_")):
        before = costs(counts_PE, shape)[mode]
        for part in ("forward", "backward"):
            slower = dataclasses.replace(H200, **{field + part: 9.0})
            after = getattr(costs(counts_PE, shape, slower)[mode], part)
            assert after == {**getattr(before, part), "overhead": 9.0}


def test_passes_by_hand():
    """Two ranks of 8 tokens, 2 choices, of which rank 0 sends 4 copies away and rank 1 sends 8."""
    shape, row = Shape(2, 64, 32, 2, 8), 128
    counts_PE = np.array([[12, 4], [8, 8]])
    plan = ep_plan(counts_PE)
    sent_P = np.array([8 * (1 - 0.75**2), 8 * (1 - 0.5**2)])
    machine = dataclasses.replace(H200, memory_rate=1.0, local_rate=1e-9)
    cost = layer_cost(plan, shape, machine)
    pack_P, keep_P = (8 + sent_P) * row, (8 + np.array([12, 8])) * row
    arrived_P, others_P = sent_P[::-1], np.array([8, 4])
    unpack_P = (arrived_P + others_P) * row
    # Own rows take longer than the all-to-all, however slow an all-to-all's own rows would be.
    assert cost.forward["dispatch"] == pytest.approx((pack_P + keep_P + unpack_P)[0])
    last = ((np.array([12, 8]) + sent_P + 8) * row).max()
    assert cost.forward["combine"] == pytest.approx(unpack_P[0] + last)
    assert cost.backward["combine"] == pytest.approx((pack_P + keep_P + unpack_P)[0])
    # With slow links, they hide.
    links = dataclasses.replace(machine, all_to_all_inside=((1.0, 1e-3),))
    slow = layer_cost(plan, shape, links)
    labelled = sent_P.max() * (row + 16) * 1e3
    assert slow.forward["dispatch"] == pytest.approx(labelled + pack_P.max() + unpack_P[0])


def test_passes_of_autoep_by_hand():
    """Rank 0 sends 16 copies of 8 tokens and computes 20, rank 1 as many and 12."""
    shape, row = Shape(2, 64, 32, 2, 8), 128
    machine = dataclasses.replace(H200, memory_rate=1.0)
    cost = autoep_cost(np.array([[12, 4], [8, 8]]), shape, machine)
    assert cost.forward["dispatch"] == pytest.approx(2 * (16 + 20) * row)
    assert cost.forward["combine"] == pytest.approx((2 * 20 + 16 + 8) * row)
    assert cost.backward["combine"] == pytest.approx((2 * 16 + 16 + 8 + 2 * 20) * row)
    assert cost.backward["dispatch"] == pytest.approx((2 * 20 + 16 + 8) * row)


@pytest.mark.parametrize("mode", ["llep", "ideal"])
def test_all_to_alls_cost_their_time(seed, mode):
    """Two in forward, two in backward; the last one hides behind nothing."""
    counts_PE, shape = routed(seed)
    P, K, row = len(counts_PE), shape.top_k, 2 * shape.hidden_size
    machine = dataclasses.replace(H200, all_to_all_inside=((1.0, 1e3),), local_rate=1e-3)
    cost = costs(counts_PE, shape, machine)[mode]
    plan = make_plan(counts_PE, CONFIG)
    parcels_PP = expected_parcels(plan, K)
    if mode == "ideal":
        tokens = counts_PE.sum() / P / K
        parcels_PP = np.where(np.eye(P, dtype=bool), 0, tokens * (1 - (1 - 1 / P) ** K))
    busiest = max(parcels_PP.sum(0).max(), parcels_PP.sum(1).max()) / 1e3
    forward, backward = busiest * (2 * row + 8 * K), busiest * (2 * row + 4 * K)
    assert sum(cost.forward.values()) == pytest.approx(forward, rel=1e-2)
    assert sum(cost.backward.values()) == pytest.approx(backward, rel=1e-2)


def test_faster_machine(seed):
    counts_PE, shape = routed(seed)
    slow, fast = costs(counts_PE, shape), costs(counts_PE, shape, faster(H200, 3))
    for mode in slow:
        assert fast[mode].seconds == pytest.approx(slow[mode].seconds / 3)
    for name, value in dataclasses.asdict(faster(H200, 3)).items():
        if value != getattr(H200, name):
            one = costs(counts_PE, shape, dataclasses.replace(H200, **{name: value}))
            assert all(one[mode].seconds <= slow[mode].seconds + 1e-12 for mode in slow), name


@pytest.mark.parametrize("field", ["hidden_size", "ffn_size", "tokens"])
def test_bigger_shape_costs_more(seed, field):
    counts_PE, shape = routed(seed)
    bigger = dataclasses.replace(shape, **{field: 2 * getattr(shape, field)})
    more_PE = 2 * counts_PE if field == "tokens" else counts_PE
    before, after = costs(counts_PE, shape), costs(more_PE, bigger)
    for mode in before:
        assert after[mode].seconds > before[mode].seconds
        assert sum(after[mode].kept_bytes_P) > sum(before[mode].kept_bytes_P)


def test_experts_take_what_their_rows_take(seed):
    """Without tiles and memory, six FLOP a row and weight in forward, twice that in backward."""
    counts_PE, shape = routed(seed)
    machine = dataclasses.replace(H200, tile=(1, 1), processors=1, memory_rate=1e30)
    machine = dataclasses.replace(machine, point_to_point_inside=((1.0, 1e30),))
    for cost in costs(counts_PE, shape, machine).values():
        forward = shape.gemm_flop(1) * cost.rows_P.max() / 670e12
        found = cost.forward["home"] + cost.forward.get("foreign", 0)
        assert found == pytest.approx(forward, rel=1e-3)
        found = cost.backward["home"] + cost.backward.get("foreign", 0)
        assert found == pytest.approx(2 * forward, rel=1e-3)


def test_ideal_is_never_above_a_plan(seed):
    counts_PE, shape = routed(seed)
    found = costs(counts_PE, shape)
    for part in ("forward", "backward"):
        experts = {
            mode: getattr(cost, part)["home"] + getattr(cost, part).get("foreign", 0)
            for mode, cost in found.items()
        }
        assert experts["ideal"] <= experts["llep"] and experts["ideal"] <= experts["ep"]


def test_single_rank_moves_nothing(seed):
    counts_PE, shape = routed(seed)
    for cost in costs(counts_PE.sum(0, keepdims=True), shape).values():
        assert sum(cost.row_bytes) == sum(cost.weight_bytes) == 0
        assert cost.forward.get("wait", 0) == cost.backward.get("return", 0) == 0


def test_slow_links_show_where_weights_travel(seed):
    """A fetch that outlasts home experts delays foreign ones, a return the end of backward."""
    counts_PE, shape = routed(seed)
    plan = make_plan(counts_PE, CONFIG)
    crawling = dataclasses.replace(H200, point_to_point_inside=((1.0, 1e6),))
    quick, slow = (layer_cost(plan, shape, machine) for machine in (H200, crawling))
    bundle = 2 * shape.expert_numel / 1e6
    busiest = max(spilled(plan).sum(0).max(), spilled(plan).sum(1).max())
    assert slow.forward["wait"] == pytest.approx(busiest * bundle, rel=1e-2)
    assert slow.backward["return"] >= bundle * 0.9 and slow.backward["wait"] == 0
    for part, name in (("forward", "wait"), ("backward", "return")):
        before, after = getattr(quick, part), getattr(slow, part)
        later = sum(after.values()) - sum(before.values())
        assert later == pytest.approx(after[name] - before[name], rel=1e-2)
    again = layer_cost(plan, shape, crawling, fetched_again_PP=spilled(plan))
    assert again.backward["wait"] > 0.9 * busiest * bundle
    assert sum(again.weight_bytes) == pytest.approx(1.5 * sum(slow.weight_bytes))


def test_products_hide_transfers_of_weights(seed):
    counts_PE, shape = routed(seed)
    plan = make_plan(counts_PE + 1, CONFIG)  # so that every rank has home experts to compute
    slow_products = dataclasses.replace(H200, grouped_rate=((1.0, 1e3),))
    none_PP, lent_PP = 0 * spilled(plan), spilled(plan)
    hidden, without = (
        layer_cost(plan, shape, slow_products, fetched_PP=fetched_PP, fetched_again_PP=fetched_PP)
        for fetched_PP in (lent_PP, none_PP)
    )
    assert (hidden.forward, hidden.backward) == (without.forward, without.backward)


def test_helper_that_is_slowest():
    """All of its time is of foreign experts, but for writing its own experts' empty gradients."""
    shape = Shape(2, 512, 256, 1, 40_000)
    counts_PE, tokens_EP = np.array([[40_000, 0], [40_000, 0]]), np.array([[128, 79_872], [0, 0]])
    plan = Plan(counts_PE, tokens_EP, bypassed=False)
    cost = layer_cost(plan, shape, H200)
    flop = shape.gemm_flop(79_872) / 670e12
    assert cost.forward["home"] == 0 and cost.backward["home"] < 0.1 * flop
    assert cost.forward["foreign"] > flop and cost.backward["foreign"] > 2 * flop


def test_products_are_counted_in_tiles():
    machine = dataclasses.replace(H200, tile=(128, 256), memory_rate=1e30)
    kernels = Kernels(machine, Shape(4, 512, 256, 1, 1), 2)

    def forward(*rows: int) -> float:
        rows_G1 = np.array(rows)[:, None]
        return kernels.products(rows_G1, rows_G1 > 0).forward[0]

    assert forward(1, 128) == forward(256) == pytest.approx(6 * 256 * 512 * 256 / 670e12)
    assert forward(129) == forward(256) and forward(0) == 0


def test_slowest_link_counts():
    machine = dataclasses.replace(
        H200,
        all_to_all_inside=((1.0, 10.0),),
        all_to_all_between=((1.0, 2.0),),
        local_rate=100.0,
    )
    links = Links(machine, 4, 2)
    bytes_PP = np.array([[0, 30, 1, 0], [5, 0, 0, 0], [7, 0, 0, 0], [8, 0, 0, 0]])
    assert links.all_to_all(bytes_PP) == (7 + 8) / 2  # rank 0 receives it from the other node
    assert links.crossing(bytes_PP) == (35, 16)
    assert Links(machine, 4, 4).all_to_all(bytes_PP) == 31 / 10
    assert links.all_to_all(np.diag([800, 1, 1, 1])) == 8


def test_seconds_between_points():
    points = ((100.0, 10.0), (400.0, 20.0))  # 10 s and 20 s: a latency of 20/3 s, 30 bytes/s
    found = seconds(points, np.array([0, 100, 250, 400, 800]))
    np.testing.assert_allclose(found, [0, 10, 15, 20, 40])
    assert seconds(points, 1) == pytest.approx(20 / 3, rel=0.01)
    assert seconds(((5.0, 2.0),), 10) == 5
    sizes = np.linspace(0, 1000, 500)
    noisy = seconds(((100.0, 1.0), (200.0, 50.0), (300.0, 4.0)), sizes)
    assert (np.diff(noisy) >= 0).all()


def test_against_what_was_measured():
    """As docs/simulate.md says."""
    errors = []
    for (name, workload), modes in MEASURED.items():
        ((counts_PE, shape),) = from_workload(workload, PRESETS[name], 2, 1, 0, 0)
        plan = make_plan(counts_PE, LLEPConfig(enabled=True))
        predicted = autoep_cost(counts_PE, shape, H200), layer_cost(plan, shape, H200)
        for cost, (forward, both) in zip(predicted, modes, strict=True):
            errors.append(1e3 * sum(cost.forward.values()) / forward - 1)
            errors.append(1e3 * cost.seconds / both - 1)
    off = sorted(map(abs, errors))
    assert statistics.median(off) < 0.04 and off[-2] < 0.16 and off[-1] < 0.22


def test_large_groups_take_no_time():
    ((counts_PE, shape),) = from_workload("zipf:1", PRESETS["deepseek-v3"], 256, 1, 0, 0)
    plan = make_plan(counts_PE, CONFIG)
    start = time.perf_counter()
    layer_cost(plan, shape, H200)
    assert time.perf_counter() - start < 2


def test_machine_round_trip(tmp_path):
    path = tmp_path / "machine.json"
    machine = dataclasses.replace(H200, name="mine", given=("tile",))
    machine.save(path)
    assert find(str(path)) == machine != H200
    assert set(json.loads(path.read_text())) == set(dataclasses.asdict(H200))
    assert BUILT_IN["h200"] is find("h200")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_rate": None}, "missing: memory_rate"),
        ({"memory_bandwidth": 1.0}, "unknown: memory_bandwidth"),
        ({"memory_rate": 0}, "memory_rate is 0; valid is a number above 0"),
        ({"memory_rate": -1.5}, "memory_rate is -1.5; valid"),
        ({"memory_rate": math.inf}, "memory_rate is inf; valid"),
        ({"memory_rate": "fast"}, "memory_rate is 'fast'; valid"),
        ({"memory_rate": True}, "memory_rate is True; valid"),
        ({"ranks_per_node": 8.5}, "ranks_per_node is 8.5; valid is an integer"),
        ({"ranks_per_node": 0}, "ranks_per_node is 0; valid is an integer"),
        ({"name": ""}, "name is ''; valid is a text"),
        ({"given": "tile"}, "given is 'tile'; valid is a list"),
        ({"given": ["tiles"]}, "given names no fields: tiles"),
        ({"dtype": "int8"}, "dtype is 'int8'; valid are bfloat16"),
        ({"tile": [128]}, "tile has \\[128\\]; valid is a pair"),
        ({"tile": [128, 0]}, "tile is 0; valid is an integer"),
        ({"grouped_rate": []}, "grouped_rate is \\[\\]; valid is a list of pairs"),
        ({"grouped_rate": [[1, 2], [1, 3]]}, "grouped_rate has sizes \\[1.0, 1.0\\]; valid"),
        ({"grouped_rate": [[1, -2]]}, "grouped_rate is -2; valid"),
        ({"grouped_rate": [5]}, "grouped_rate has 5; valid is a pair"),
    ],
)
def test_machine_errors(tmp_path, change, message):
    values = json.loads(H200.to_json()) | change
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(ValueError, match=message) as error:
        Machine.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("{", "no JSON"), ("[1]", "is a JSON object")])
def test_machine_that_is_no_object(tmp_path, text, message):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Machine.load(path)


def test_unknown_machine():
    with pytest.raises(ValueError, match="no machine 'h300': valid are h200 and files"):
        find("h300")

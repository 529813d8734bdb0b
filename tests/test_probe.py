"""Rates measured on ranks: what is timed, what is made of the times, what stays untouched."""

from __future__ import annotations

from unittest import mock

import deepspeed.comm as dist
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from test_ranks import gather

from ds_llep import probe
from ds_llep.config import GivenRates
from ds_llep.probe import measure_rates
from ds_llep.rates import UNITS


def group_of(table) -> dist.ProcessGroup:
    return groups._get_expert_parallel_group(f"ep_size_{table.ep_size}")


def probed(ep_size: int, ranks_per_node: int, dtype: torch.dtype) -> dict:
    """All rates, the bytes that each rank sent to whom, and whether random numbers changed."""
    table, sent = gather(ep_size, ranks_per_node), []
    all_to_all = dist.all_to_all_single

    def recorded(into, out, into_splits, out_splits, group):
        sent.append((tuple(out_splits), tuple(into_splits)))
        return all_to_all(into, out, into_splits, out_splits, group=group)

    generators = torch.get_rng_state, get_accelerator().get_rng_state
    before = [state() for state in generators]
    with mock.patch.object(dist, "all_to_all_single", recorded):
        found = measure_rates(table, group_of(table), "auto", dtype, list(UNITS))
    same = all(torch.equal(old, state()) for old, state in zip(before, generators, strict=True))
    return {"found": found, "same": same, "sent": set(sent), "table": table}


@pytest.mark.parametrize(
    "ep_size, ranks_per_node, links",
    [(4, 2, "both"), (4, 4, "inside"), (4, 1, "between"), (2, 2, "inside"), (4, 3, "both")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured(pools, ep_size, ranks_per_node, links, dtype):
    """Rates that all ranks agree on and that a file of rates may hold, for the links there are."""
    pool = pools(4)
    if pool.world_size < 4:
        ep_size, ranks_per_node, links = 2, 2, "inside"
    results = pool.run(probed, ep_size, ranks_per_node, dtype)
    for result in results:
        assert result["found"] == results[0]["found"] and result["same"]
        missing = {"both": set(), "inside": {"between_gbytes"}, "between": {"inside_gbytes"}}[links]
        assert set(result["found"]) == set(UNITS) - missing
        GivenRates(**result["found"])  # within its bounds
        table = result["table"]
        nodes = [table.node_of[rank] for rank in table.own_group]
        here = nodes[table.ep_rank]
        near = tuple(r != table.ep_rank and node == here for r, node in enumerate(nodes))
        far = tuple(node != here for node in nodes)
        patterns = set()
        for out, into in result["sent"]:
            assert out == into
            patterns.add(tuple(size > 0 for size in out))
        expected = {"both": {near, far}, "inside": {near}, "between": {far}}[links]
        assert patterns == expected


def scripted(seconds: list[float], keys: list[str], slowest: int) -> dict:
    """What is made of times, of which rank ``slowest`` takes twice as long."""
    table = gather(4, 100)
    factor = 2 if dist.get_rank() == slowest else 1
    times = iter(factor * value for value in seconds)
    with mock.patch.object(probe._Probe, "_seconds", lambda self, work: next(times)):
        found = measure_rates(table, group_of(table), "auto", torch.float32, keys)
    assert next(times, None) is None
    return found, table.ep_size


def test_the_slowest_rank_counts(pools, seed):
    pool = pools(4)
    sizes = probe._ON_GPU if torch.cuda.is_available() else probe._ON_CPU
    N, D, F, transfer, _ = sizes
    slowest = seed % pool.world_size
    for found, _ in pool.run(scripted, [0.25], ["tflops"], slowest):
        assert found == {"tflops": pytest.approx(18 * N * D * F / 0.5 / 1e12)}
    for found, ep_size in pool.run(scripted, [0.25], ["inside_gbytes"], slowest):
        sent = transfer // ep_size * (ep_size - 1)
        assert found == {"inside_gbytes": pytest.approx(sent / 0.5 / 1e9)}
    for found, _ in pool.run(scripted, [1e-3, 4e-3], ["expert_us"], slowest):
        assert found == {"expert_us": pytest.approx(2 * 3e-3 / (32 - 8) * 1e6)}
    for found, _ in pool.run(scripted, [1e-3], ["spill_us"], slowest):
        assert found == {"spill_us": pytest.approx(2e3)}


@pytest.mark.parametrize(
    "products, transfer, both, exposed",
    [(4.0, 2.0, 4.5, 0.25), (4.0, 2.0, 6.0, 1.0), (4.0, 2.0, 7.0, 1.0), (4.0, 2.0, 3.5, 0.0)],
)
def test_exposed(pools, products, transfer, both, exposed):
    for found, _ in pools(4).run(scripted, [products, transfer, both], ["exposed"], 0):
        assert found == {"exposed": pytest.approx(exposed)}


def test_noise_above_the_price(pools):
    """More groups that took less time: almost nothing, and still a rate that a file may hold."""
    for found, _ in pools(4).run(scripted, [4e-3, 1e-3], ["expert_us"], 0):
        assert found == {"expert_us": 1e-6}
        GivenRates(**found)


def test_a_machine_at_a_standstill(pools):
    """The longest times that a file may hold, however long it took."""
    for found, _ in pools(4).run(scripted, [1e-3, 900.0, 3.0], ["expert_us", "spill_us"], 0):
        assert found == {"expert_us": 1e6, "spill_us": 1e6}
        GivenRates(**found)

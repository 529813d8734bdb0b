"""Which ranks share a node, whoever says so, and a training that mpirun starts."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from pathlib import Path
from unittest import mock

import deepspeed.comm as dist
import layers
import numpy as np
import pytest
from deepspeed.utils import groups
from hypothesis import given
from hypothesis import strategies as st
from launcher import run
from ranks import free_port

from ds_llep.ranks import RankTable, launched_nodes


def same(nodes) -> list[list[int]]:
    """The ranks of each node."""
    found: dict = {}
    for rank, node in enumerate(nodes):
        found.setdefault(node, []).append(rank)
    return list(found.values())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5).filter(lambda sizes: max(sizes) > 1))
def test_nodes_from_local_ranks(sizes):
    """Consecutive ranks that count from 0, whatever the hosts are called."""
    local_ranks = [local for size in sizes for local in range(size)]
    nodes, said = launched_nodes(local_ranks, ["container"] * len(local_ranks))
    assert said == "from local ranks"
    assert [len(ranks) for ranks in same(nodes)] == sizes


@pytest.mark.parametrize(
    "local_ranks, hosts, expected",
    [
        ([-1] * 4, "aabb", [[0, 1], [2, 3]]),  # nobody numbered them
        ([0] * 4, "aabb", [[0, 1], [2, 3]]),  # each sees one device
        ([0, 0, 1, 1], "abab", [[0, 2], [1, 3]]),  # in turn, as MPI and Slurm may place them
        ([1, 0, 1, 0], "abba", [[0, 3], [1, 2]]),
        ([0, 1, -1, -1], "aabb", [[0, 1], [2, 3]]),
        ([0, 1, 0, 2], "aabb", [[0, 1], [2, 3]]),
    ],
)
def test_nodes_from_host_names(local_ranks, hosts, expected):
    nodes, said = launched_nodes(local_ranks, hosts)
    assert said == "from host names" and same(nodes) == expected


def gather(ep_size: int, ranks_per_node: int | None) -> RankTable:
    ep_size = layers.fit(ep_size)
    groups._create_expert_and_data_parallel(ep_size)
    name = f"ep_size_{ep_size}"
    ep_group = groups._get_expert_parallel_group(name)
    edp_group = groups._get_expert_data_parallel_group(name)
    return RankTable.gather(ep_group, edp_group, ranks_per_node)


@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("ranks_per_node", [1, 2, 3, 4, 100])
def test_nodes_as_configured(pools, ep_size, ranks_per_node):
    pool = pools(4)
    for rank, table in enumerate(pool.run(gather, ep_size, ranks_per_node)):
        assert table.nodes_from == "as configured"
        assert table.node_of == {r: r // ranks_per_node for r in range(pool.world_size)}
        assert sorted(sum(table.groups, ())) == list(range(pool.world_size))
        for ranks, nodes_P in zip(table.groups, table.nodes, strict=True):
            # The same ranks together, numbered from 0 on by first appearance.
            assert nodes_P.dtype == np.int64
            configured = [r // ranks_per_node for r in ranks]
            assert same(nodes_P.tolist()) == same(configured)
            assert list(dict.fromkeys(nodes_P.tolist())) == list(range(nodes_P.max() + 1))
            assert table.spans_nodes(ranks) == (len(set(configured)) > 1)
        alone = table.alone()
        assert alone.groups == (table.own_group,) and alone.rank == table.rank == rank
        assert alone.nodes[0].tolist() == table.nodes[table.group_index].tolist()


def test_nodes_of_no_one(pools):
    """A table that asked nobody has none to tell, and no rank of this machine is far away."""
    for table in pools(4).run(gather, 2, None):
        assert table.nodes_from == "from local ranks" and set(table.node_of.values()) == {0}
        silent = RankTable(table.groups, table.group_index, table.ep_rank, {})
        assert silent.nodes == [None] * len(table.groups)


def gather_with_mpi(with_mpi: str, world_size: int) -> RankTable:
    """Where MPI says that even and odd ranks are on two nodes."""

    class Near:
        def allreduce(self, rank, op):
            assert op == "min"
            return rank % 2

        def Free(self):
            pass

    split = mock.Mock(return_value=Near())
    size = dist.get_world_size() if with_mpi != "alone" else 1
    mpi = types.SimpleNamespace(
        Is_initialized=lambda: True,
        Is_finalized=lambda: False,
        COMM_WORLD=types.SimpleNamespace(Get_size=lambda: size, Split_type=split),
        COMM_TYPE_SHARED="shared",
        MIN="min",
    )
    here = with_mpi != "one rank" or dist.get_rank() == 1
    with mock.patch.dict(sys.modules, {"mpi4py.MPI": mpi} if here else {}):
        table = gather(world_size, None)
    return table, [call.args for call in split.call_args_list]


@pytest.mark.parametrize("with_mpi", ["all", "one rank", "alone"])
def test_nodes_from_mpi(pools, with_mpi):
    """MPI is asked where it started all ranks together, and not where one has imported it."""
    pool = pools(4)
    for table, asked in pool.run(gather_with_mpi, with_mpi, pool.world_size):
        if with_mpi == "all":
            assert table.nodes_from == "from MPI" and asked == [("shared",)]
            assert table.node_of == {r: r % 2 for r in range(pool.world_size)}
        else:
            assert table.nodes_from == "from local ranks" and not asked
            assert set(table.node_of.values()) == {0}


SCRIPT = """
import json, sys
import deepspeed, engines, torch
from families import build
import ds_llep

deepspeed.init_distributed(distributed_port=int(sys.argv[1]))
seed, found = int(sys.argv[2]), {}
cost = {"tflops": 0.001, "inside_gbytes": 50, "expert_us": 0.5, "spill_us": 1}  # moves pay
for name, section in (("theirs", None), ("ours", {"planner": "cost", "cost": cost})):
    config = engines.ds_config(stage=1, ep_size=2, llep=section)
    engine = engines.initialize(build("qwen3_moe", seed), config)
    found[name] = []
    for step in range(4):
        ids = engines.routing("hot_rank", engine.module.config, 2, seed + step)
        engines.set_routing(engine.module, ids)
        loss = engine(**engines.batch(torch.float32, seed + step)).loss
        engine.backward(loss)
        engine.step()
        found[name].append(engines.mean_over_ranks(loss))
    found["status"] = ds_llep.status(engine)
    engine.destroy()
with open(f"rank{torch.distributed.get_rank()}.json", "w") as file:
    json.dump(found, file)
"""


def mpirun() -> str | None:
    """That of this Python's environment, or the system's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("mpirun", path=path)


@pytest.mark.skipif(mpirun() is None, reason="no mpirun")
def test_training_under_mpi(tmp_path, seed):
    """DeepSpeed finds its ranks by MPI, llep their node, and all train as without llep."""
    (tmp_path / "train.py").write_text(SCRIPT)
    port = free_port()
    # Other mappings of more ranks than cores may number local ranks otherwise than DeepSpeed does.
    command = [mpirun(), "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
    command += ["--timeout", "500", "-n", "4"]  # then mpirun ends all ranks
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    command += [sys.executable, "train.py", str(port), str(seed)]
    with mock.patch.dict(os.environ):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        code, out = run(command, port, cwd=tmp_path, timeout=600)
    assert code == 0, out[-6000:]
    assert "1 node(s) from MPI" in out, out[-6000:]
    for rank in range(4):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        status = found["status"]
        assert status["active"] and status["planner"] == "cost" and status["ep_size"] == 2
        assert status["nodes"] == [0, 0, 0, 0]
        assert status["rates"]["source"].startswith("exposed measured; "), status["rates"]
        assert sum(status["spilled_tokens"]) > 0, "nothing was spilled: the test tests nothing"
        assert found["ours"] == pytest.approx(found["theirs"], rel=1e-5)
        assert found["ours"][0] > 0

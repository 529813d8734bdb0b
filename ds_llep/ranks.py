"""Who is who: the global ranks of every EP group, and the nodes that they run on.

Point-to-point calls name their peers by global rank, EP groups count from zero: this table is the
one place where the two meet.

Which ranks share a node is asked of those who know best: the config, MPI where it started the
ranks, else whoever gave them their local ranks, else the hosts' names. Each may be wrong where a
container hides the machine, and then the config has the last word.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import deepspeed.comm as dist
import numpy as np
from torch.distributed import all_gather_object, get_node_local_rank, get_process_group_ranks


@dataclass(frozen=True)
class RankTable:
    """Global ranks by EP group and EP rank, and where this process is among them."""

    groups: tuple[tuple[int, ...], ...]
    """``groups[g][p]``: global rank of EP rank p of EP group g; a column is an EDP group."""
    group_index: int
    """This process's g, its rank in its EDP group."""
    ep_rank: int
    """This process's p."""
    node_of: dict[int, int]
    """Node of each global rank, numbered by first appearance; empty where it was not asked for."""
    nodes_from: str = "not asked for"
    """Who said so, in a few words."""

    @property
    def ep_size(self) -> int:
        return len(self.groups[0])

    @property
    def edp_size(self) -> int:
        return len(self.groups)

    @property
    def own_group(self) -> tuple[int, ...]:
        """Global ranks of this process's EP group, by EP rank."""
        return self.groups[self.group_index]

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return self.own_group[self.ep_rank]

    @classmethod
    def of_group(cls, ep_group: dist.ProcessGroup) -> RankTable:
        """A table of this process's own EP group alone; no communication."""
        ranks = tuple(get_process_group_ranks(ep_group))
        return cls((ranks,), 0, dist.get_rank(group=ep_group), {})

    @classmethod
    def gather(
        cls,
        ep_group: dist.ProcessGroup,
        edp_group: dist.ProcessGroup,
        ranks_per_node: int | None = None,
    ) -> RankTable:
        """The table of all EP groups. A collective over all processes, once at start-up.

        Args:
            ep_group, edp_group: this process's.
            ranks_per_node: so many consecutive ranks are a node; None: found out.
        """
        group_index, local_rank = dist.get_rank(group=edp_group), get_node_local_rank(-1)
        ranks = tuple(get_process_group_ranks(ep_group))
        everyone = all_gather(
            (group_index, ranks, local_rank, socket.gethostname(), _started_by_mpi())
        )
        groups = dict(sorted((index, ranks) for index, ranks, *_ in everyone))
        _, _, local_ranks, hosts, by_mpi = zip(*everyone, strict=True)
        if ranks_per_node is not None:
            nodes, nodes_from = [r // ranks_per_node for r in range(len(everyone))], "as configured"
        elif all(by_mpi):
            nodes, nodes_from = _mpi_nodes(), "from MPI"
        else:
            nodes, nodes_from = launched_nodes(local_ranks, hosts)
        node_of = dict(enumerate(_numbered(nodes)))
        return cls(
            tuple(groups.values()), group_index, dist.get_rank(group=ep_group), node_of, nodes_from
        )

    def alone(self) -> RankTable:
        """The same without the other EP groups."""
        return RankTable((self.own_group,), 0, self.ep_rank, self.node_of, self.nodes_from)

    @cached_property
    def nodes(self) -> list[np.ndarray | None]:
        """For each EP group int64 ``[P]``, the node of each rank, numbered by first appearance in
        the group; None where nodes were not asked for."""
        if not self.node_of:
            return [None] * len(self.groups)
        by_group = [[self.node_of[rank] for rank in ranks] for ranks in self.groups]
        return [np.array(_numbered(nodes), dtype=np.int64) for nodes in by_group]

    def spans_nodes(self, ranks: tuple[int, ...]) -> bool:
        """Whether these global ranks run on more than one node."""
        return len({self.node_of[rank] for rank in ranks}) > 1


def launched_nodes(
    local_ranks: Sequence[int], hosts: Sequence[str]
) -> tuple[Sequence[Hashable], str]:
    """Something that is the same for the ranks of a node alone, and where it is from.

    Args:
        local_ranks: by global rank, as whoever started the ranks numbered them; -1: did not.
        hosts: names.
    """
    # Consecutive ranks that count from 0. All 0 may also be one visible device for each rank.
    if any(local_ranks) and all(
        mine in (0, before + 1) for before, mine in pairwise([-1, *local_ranks])
    ):
        return [rank - local for rank, local in enumerate(local_ranks)], "from local ranks"
    return hosts, "from host names"


def _started_by_mpi() -> bool:
    # DeepSpeed imports mpi4py only where nobody but MPI tells it the ranks.
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return False
    return mpi.COMM_WORLD.Get_size() == dist.get_world_size()


def _mpi_nodes() -> list[int]:
    """For each global rank the least one that shares its memory; MPI may number them otherwise."""
    mpi = sys.modules["mpi4py.MPI"]
    near = mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED)
    first = near.allreduce(dist.get_rank(), op=mpi.MIN)
    near.Free()
    return all_gather(first)


def all_gather(value: object) -> list:
    """The values of all ranks, by rank. A collective over all processes."""
    everyone = [None] * dist.get_world_size()
    # Not deepspeed.comm's: where "comms_logger" is enabled, that one ends the process.
    all_gather_object(everyone, value)
    return everyone


def _numbered(nodes: Sequence[Hashable]) -> list[int]:
    number = {node: index for index, node in enumerate(dict.fromkeys(nodes))}
    return [number[node] for node in nodes]


def on_every_rank(work: Callable[[], object]) -> None:
    """One rank's error becomes an error on every rank. A collective over all processes.

    Raises:
        ValueError: with the first rank's that failed, and its text.
    """
    failure = None
    try:
        work()
    except Exception as error:  # whatever it is, the others wait for an answer
        failure = str(error)
    for rank, error in enumerate(all_gather(failure)):
        if error is not None:
            raise ValueError(f"rank {rank}: {error}")


def on_rank_0(work: Callable[[], Any]) -> tuple[Any, tuple[str, str] | None]:
    """What rank 0 gets from it, and the error that it ends in, by type and text: on every rank.

    A collective over all processes.
    """
    answer: list = [None]
    if dist.get_rank() == 0:
        try:
            answer = [(work(), None)]
        except Exception as error:  # whatever it is, the others wait for an answer
            answer = [(None, (type(error).__name__, str(error)))]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]

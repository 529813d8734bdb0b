"""Who is who: the global ranks of every EP group, and the nodes that they run on.

Point-to-point calls name their peers by global rank, EP groups count from zero: this table is the
one place where the two meet.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import deepspeed.comm as dist
from torch.distributed import get_process_group_ranks


@dataclass(frozen=True)
class RankTable:
    """Global ranks by EP group and EP rank, and where this process is among them."""

    groups: tuple[tuple[int, ...], ...]
    """``groups[g][p]``: global rank of EP rank p of EP group g; a column is an EDP group."""
    group_index: int
    """This process's g, its rank in its EDP group."""
    ep_rank: int
    """This process's p."""
    node_of: dict[int, str]
    """Host name of each global rank; empty where it was not asked for."""

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
    def gather(cls, ep_group: dist.ProcessGroup, edp_group: dist.ProcessGroup) -> RankTable:
        """The table of all EP groups. A collective over all processes, once at start-up."""
        mine = (
            dist.get_rank(group=edp_group),
            tuple(get_process_group_ranks(ep_group)),
            socket.gethostname(),
        )
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        groups = dict(sorted((index, ranks) for index, ranks, _ in everyone))
        return cls(
            tuple(groups.values()),
            mine[0],
            dist.get_rank(group=ep_group),
            {rank: host for rank, (_, _, host) in enumerate(everyone)},
        )

    def spans_nodes(self, ranks: tuple[int, ...]) -> bool:
        """Whether these global ranks run on more than one node."""
        return len({self.node_of[rank] for rank in ranks}) > 1

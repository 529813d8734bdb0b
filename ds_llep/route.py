"""A rank's route: the plan as splits of the all-to-alls and as maps from copies to rows.

A *copy* is a (token, choice) pair. A token travels to a rank once, as a *parcel*, however many of
its copies are computed there. How many parcels there are is known on the device only, after the
plan; the host, which must size the all-to-all, would have to wait for it a second time. So it takes
a bound that follows from the counts: a rank gets no more parcels from a source than the source has
tokens, than copies go there, or than tokens with a home expert there, less those that no copy stays
for, plus copies of experts foreign there. Without spills the bound is exact; otherwise some parcels
may travel empty.

Shapes: ``T`` tokens of a rank, ``K`` experts per token, ``E`` experts, ``P`` ranks, ``J`` segments
(see cut.py), ``S`` slots of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import deepspeed.comm as dist
import numpy as np
import torch

from ds_llep.kernels import planner_cost
from ds_llep.kernels.select import KernelSet
from ds_llep.plan import Plan


class RouteMaps(NamedTuple):
    """The maps of a route, int32 on the device; entries of -1 are nowhere."""

    own_TK: torch.Tensor
    """The row of each copy that is computed on its own rank."""
    sent_TK: torch.Tensor
    """For each copy that is computed elsewhere, the place u of its token's parcel in the send
    buffer: u for the first copy in it, -(u + 2) for the others."""
    target_TK: torch.Tensor
    """The row of each copy on the rank that computes it."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where everything of one layer and micro-batch goes."""

    send_splits: list[int]
    """Parcels to each rank of the EP group; none to itself."""
    recv_splits: list[int]
    """Parcels from each rank of the EP group."""
    rows_per_slot: list[int]
    """Rows of each of this rank's expert slots: home experts first, then foreign ones."""
    num_home_rows: int
    """How many of the rows, the first ones, are those of home slots."""
    num_rows: int
    group: dist.ProcessGroup | None
    kernels: KernelSet

    @property
    def first_P(self) -> np.ndarray:
        """int32 ``[P]``: the place of the first parcel for each rank in the send buffer."""
        return (np.cumsum(self.send_splits) - self.send_splits).astype(np.int32)


def find_runs(plan: Plan, rank: int) -> np.ndarray:
    """What ``address_copies`` needs of a plan that the host has made.

    A rank's copies, sorted by expert, fall into runs, one for each expert and computing rank. There
    a run's rows are those of the expert's slot behind the rows of earlier source ranks.

    Returns:
        int32 ``[2, E, P]``: the place behind each run, and what is to be added to the place of a
        copy in it to get the copy's row.
    """
    if plan.nodes_P is not None:
        return planner_cost.runs(_for_c(plan), rank)
    sent_EP, (expert_J, rank_J, _) = plan.send_EP(rank), plan.segments
    (E, P), M = sent_EP.shape, plan.experts_per_rank
    runs_2EP = np.zeros((2, E, P), dtype=np.int32)
    end_EP, shift_EP = runs_2EP
    end_EP.reshape(-1)[:] = sent_EP.reshape(-1).cumsum()
    # All slots of all ranks: a rank's home experts in order, then its foreign ones.
    away_J = rank_J != expert_J // M
    expert_S = np.concatenate((np.arange(E), expert_J[away_J]))
    rank_S = np.concatenate((np.arange(E) // M, rank_J[away_J]))
    order = np.argsort(rank_S, kind="stable")
    slots = expert_S, rank_S = expert_S[order], rank_S[order]
    rows_S, load_P = plan.tokens_EP[slots], plan.rank_load_P
    first_S = rows_S.cumsum() - rows_S - (load_P.cumsum() - load_P)[rank_S]
    shift_EP[slots] = first_S + plan.earlier_EP(rank)[slots] - (end_EP - sent_EP)[slots]
    return runs_2EP


class Addresses(NamedTuple):
    """What ``address_copies`` finds, before parcels have places; on the device."""

    own_TK: torch.Tensor
    sent_TK: torch.Tensor
    target_TK: torch.Tensor
    parcels: torch.Tensor

    def place(self, first_P: torch.Tensor, kernels: KernelSet) -> RouteMaps:
        """Give each parcel its place; uses up the addresses.

        Args:
            first_P: :attr:`Route.first_P` on the device.
            kernels: launchers.
        """
        own_TK, sent_TK, target_TK, parcels = self
        kernels.place_parcels(sent_TK, parcels, first_P)
        return RouteMaps(own_TK, sent_TK, target_TK)


def make_route(
    reached_PP: np.ndarray,
    alone_PE: np.ndarray,
    plan: Plan,
    rank: int,
    group: dist.ProcessGroup | None,
    kernels: KernelSet,
    top_k: int,
) -> Route:
    """Turn the plan into this rank's splits.

    Args:
        reached_PP: how many of a rank's tokens (first index) have an expert at home on a rank.
        alone_PE: a rank's tokens of each expert that have no other choice at the expert's home.
        plan: the EP group's plan.
        rank: this rank in the EP group.
        group: the EP group.
        kernels: launchers that move the rows.
        top_k: K.
    """
    send_splits, recv_splits = _splits(plan, reached_PP, alone_PE, rank, top_k)
    rows_per_slot = plan.tokens_EP[list(plan.slots(rank)), rank].tolist()
    return Route(
        send_splits=send_splits.tolist(),
        recv_splits=recv_splits.tolist(),
        rows_per_slot=rows_per_slot,
        num_home_rows=sum(rows_per_slot[: plan.experts_per_rank]),
        num_rows=sum(rows_per_slot),
        group=group,
        kernels=kernels,
    )


def _splits(
    plan: Plan, reached_PP: np.ndarray, alone_PE: np.ndarray, rank: int, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The most parcels that this rank may send to each rank, and receive from each.

    Every rank finds the same number for each pair. A copy is alone if its token has no other copy
    of an expert at that home. Where home keeps fewer of a source's copies of an expert than are
    alone, at least the difference of tokens have no copy left there, and for each expert these are
    other tokens, as a token has one such copy at a home at most. A token that chooses an expert
    twice has no copy of it alone: it counts as reached, wherever its copies go.
    """
    if plan.nodes_P is not None:
        return tuple(planner_cost.splits(_for_c(plan), reached_PP, alone_PE, rank, top_k))
    sent_P, received_P = reached_PP[rank].copy(), reached_PP[:, rank].copy()
    spilled = plan.spilled_experts
    if len(spilled):  # only these have copies elsewhere than at home
        send_EP, recv_PE = plan.send_EP(rank), plan.recv_PE(rank)
        home = spilled // plan.experts_per_rank
        more_XP = send_EP[spilled]  # foreign copies, or minus the tokens that none stays of
        at_home = np.arange(len(spilled)), home
        more_XP[at_home] = np.minimum(more_XP[at_home] - alone_PE[rank, spilled], 0)
        more_PX = recv_PE[:, spilled]
        here = home == rank
        more_PX[:, here] = np.minimum(more_PX[:, here] - alone_PE[:, spilled[here]], 0)
        tokens_P = plan.counts_PE.sum(axis=1) // top_k
        sent_P = np.minimum(sent_P + more_XP.sum(axis=0), tokens_P[rank])
        received_P = np.minimum(received_P + more_PX.sum(axis=1), tokens_P)
        sent_P = np.minimum(sent_P, send_EP.sum(axis=0))
        received_P = np.minimum(received_P, recv_PE.sum(axis=1))
    sent_P[rank] = received_P[rank] = 0
    return sent_P, received_P


def _for_c(plan: Plan) -> tuple[np.ndarray, ...]:
    """What planner "cost", which is in C, needs of a plan of its own for the rest as well."""
    return plan.counts_PE, plan.tokens_EP, *plan.segments[:2], plan.sent_JP

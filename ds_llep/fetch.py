"""Spilled experts' weights, from whoever holds them into their helpers' workspaces.

With ``weight_source="owner"`` the home rank holds whole experts and sends within its EP group. It
packs each expert that it lends once, and what lies in a row for a helper is one message: every
message costs the host some 20 us, and NCCL sends a long list of them one kernel after the other.
The price is a copy of those experts until they have left. With ``"shards"`` every rank sends from
its ZeRO-3 parts to helpers in all EP groups, and each piece of a matrix travels by itself, straight
from where it lies to where it is needed. All ranks derive the same transfers from the same plans.

The workspace doubles as a cache: what still lies there since the forward pass or since an earlier
micro-batch is not sent again while the weights are the same.

Weights that need no gather travel ahead of the tokens, which wait for them: behind the tokens they
would have to share the multiprocessors with the home experts' products, and both would end later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import deepspeed.comm as dist
import numpy as np
import torch

from ds_llep.plan import Plan
from ds_llep.ranks import RankTable
from ds_llep.shards import Version, cut_bundle, on_device, part_numel, part_of, whole_shape
from ds_llep.timeline import part
from ds_llep.workspace import WORKSPACE, BundleLayout, Directory


class Exchange:
    """What the layers of one engine share when they move weights.

    Args:
        table: all EP groups for ``shards``; this process's own where the home ranks send.
        ep_group: the EP group.
        sharded: pieces come from ZeRO-3 parts instead of the home rank.
        always_ready: the source needs no gather, so a fetch may start before the experts run.
        cache: keep foreign experts until their place is needed or their weights change.
    """

    def __init__(
        self,
        table: RankTable,
        ep_group: dist.ProcessGroup,
        *,
        sharded: bool,
        always_ready: bool,
        cache: bool,
    ) -> None:
        self.table, self.ep_group = table, ep_group
        self.sharded, self.always_ready, self.cache = sharded, always_ready, cache
        # A home rank's shards are in all EP groups, the home rank itself is in this one.
        self.group = dist.get_world_group() if sharded else ep_group
        self._token = object()
        self._size: int | None = None
        self._directories: dict[int, Directory] = {}
        self._own_version: dict[int, Version] = {}
        self._versions: dict[int, tuple[int, ...]] = {}

    @classmethod
    def of_home_ranks(
        cls, ep_group: dist.ProcessGroup, *, always_ready: bool = True, cache: bool = True
    ) -> Exchange:
        """The exchange in which home ranks send."""
        table = RankTable.of_group(ep_group)
        return cls(table, ep_group, sharded=False, always_ready=always_ready, cache=cache)

    def by_group(self, values_RX: np.ndarray) -> list[np.ndarray]:
        """What the ranks of :attr:`group` have, in its order, as ``[P, X]`` of each EP group."""
        if not self.sharded:
            return [values_RX]
        return [values_RX[list(ranks)] for ranks in self.table.groups]

    def version(self, layer: int, weights: Sequence[torch.Tensor]) -> int:
        """What the others need to know to tell that weights which lie here have changed."""
        if not self.cache:
            return 0
        return self._own_version.setdefault(layer, Version()).of(weights)

    def renew(self, layer: int, versions: Sequence[int]) -> None:
        """Forget a layer's foreign experts if the version of any rank's weights is another."""
        versions = tuple(versions)
        if self._versions.get(layer) != versions:
            self._versions[layer] = versions
            self.forget(lambda key: key[0] == layer)

    def forget(self, which: Callable[[tuple[int, int]], bool] = lambda key: True) -> None:
        """Drop the (layer, expert) pairs that ``which`` accepts from all directories."""
        for directory in self._directories.values():
            directory.forget(which)

    def open_workspace(self, bundles: Any, size: int | None) -> None:
        """Make sure that the directories describe the workspace as it is.

        Args:
            bundles: what tells bundles of this kind from others.
            size: bundles that the workspace holds; None: as planned.
        """
        if WORKSPACE.claim((self._token, bundles)):  # other weights may lie there now
            self._directories.clear()
            self._size = size

    def directory(self, rank: int) -> Directory:
        """What lies in a rank's workspace."""
        if rank not in self._directories:
            self._directories[rank] = Directory(self._size)
        return self._directories[rank]

    def post(self, operations: list[dist.P2POp]) -> None:
        """Start transfers. Their tensors are held until :meth:`finish`."""
        if operations:
            WORKSPACE.in_flight.append((dist.batch_isend_irecv(operations), operations))

    def finish(self) -> None:
        """Wait, on the current stream, for all that was posted."""
        for works, _ in WORKSPACE.in_flight:
            for work in works:
                work.wait()
        WORKSPACE.in_flight.clear()


class ForeignWeights:
    """The foreign experts of one layer and micro-batch, this rank's and all others'.

    Every rank of the exchange's group calls :meth:`start` and :meth:`wait` in the same order.

    Args:
        exchange: the engine's.
        layer: index of the layer in the engine.
        weights: the experts' parameters, each ``[M, ., .]``, gathered or not.
        plans: one for each EP group of the exchange's table.
        like: bundles travel in this tensor's dtype, to its device.
        size: bundles that the workspace holds; None: as planned.
        count: told how many experts were sent within this EP group, and their bytes together, at
            each fetch.
    """

    def __init__(
        self,
        exchange: Exchange,
        layer: int,
        weights: Sequence[torch.Tensor],
        plans: Sequence[Plan],
        like: torch.Tensor,
        size: int | None,
        count: Callable[[int, int], None],
    ) -> None:
        self._exchange, self._layer, self._weights = exchange, layer, weights
        self._like, self._size, self._count = like.new_empty(0), size, count
        self.layout = BundleLayout(tuple(whole_shape(weight)[1:] for weight in weights))
        self._experts_per_rank = plans[0].experts_per_rank
        self._wanted: dict[int, list[int]] = {}
        for ranks, plan in zip(exchange.table.groups, plans, strict=True):
            for spill in plan.spills:
                self._wanted.setdefault(ranks[spill.helper], []).append(spill.expert)
        self._places: list[int] = []

    @property
    def starts_early(self) -> bool:
        """Whether the fetch is to start before the tokens travel; the same on all ranks."""
        return self._exchange.always_ready

    def start(self) -> None:
        """Start to send and receive what helpers do not have yet; nothing where all have all."""
        exchange, table = self._exchange, self._exchange.table
        # Also where nothing spills: other EP groups of this engine may spill, and for an engine
        # with wider groups the workspace must have changed hands on all of its ranks or on none.
        exchange.open_workspace((self.layout, self._like.dtype, self._like.device), self._size)
        if not self._wanted:
            return
        missing = {}
        for rank, experts in self._wanted.items():
            places, missing[rank] = exchange.directory(rank).place(self._layer, experts)
            if rank == table.rank:
                self._places = places
        sent = sum(len(missing.get(rank, ())) for rank in table.own_group)
        self._count(sent, sent * self.layout.numel * self._like.element_size())
        if any(missing.values()):
            exchange.finish()  # a place may be given anew while data is still on its way there
            exchange.post(self._transfers(missing))

    def wait(self) -> torch.Tensor:
        """This rank's foreign experts, bundles ``[n, numel]`` by expert id.

        Valid until the next :meth:`start` of any layer.
        """
        self._exchange.finish()
        if not self._exchange.cache:
            self._exchange.forget()
        if not self._places:
            return self._like.new_empty((0, self.layout.numel))
        workspace, first = self._workspace(), self._places[0]
        if self._places == list(range(first, first + len(self._places))):
            return workspace[first : first + len(self._places)]
        return torch.stack([workspace[place] for place in self._places])

    def _workspace(self) -> torch.Tensor:
        size = self._exchange.directory(self._exchange.table.rank).size
        return WORKSPACE.view(size, self.layout.numel, self._like)

    def _transfers(self, missing: dict[int, list[tuple[int, int]]]) -> list[dist.P2POp]:
        """This rank's part of the fetch; sender and receiver go through it in the same order.

        Args:
            missing: by helper's global rank, the (expert, place) pairs to be sent there, in a row.
        """
        return self._pieces(missing) if self._exchange.sharded else self._bundles(missing)

    def _bundles(self, missing: dict[int, list[tuple[int, int]]]) -> list[dist.P2POp]:
        """From home ranks, which pack the experts that they send by their numbers."""
        table, group = self._exchange.table, self._exchange.group
        sent = sorted({expert for experts in missing.values() for expert, _ in experts})
        home_of = {expert: expert // self._experts_per_rank for expert in sent}
        packed_at = {
            expert: at
            for _, experts in groupby(sent, home_of.get)
            for at, expert in enumerate(experts)
        }
        own = [expert for expert in sent if home_of[expert] == table.ep_rank]
        packed = self._pack([expert % self._experts_per_rank for expert in own]) if own else None
        workspace = self._workspace() if missing.get(table.rank) else None
        operations = []
        for helper, experts in missing.items():
            shifts = [(home_of[expert], place - packed_at[expert]) for expert, place in experts]
            for (home, shift), run in groupby(zip(shifts, experts, strict=True), itemgetter(0)):
                places = [place for _, (_, place) in run]
                first, stop = places[0], places[-1] + 1
                if table.rank == helper:
                    holder = table.own_group[home]
                    operations.append(dist.P2POp(dist.irecv, workspace[first:stop], holder, group))
                elif table.ep_rank == home:
                    source = packed[first - shift : stop - shift]
                    operations.append(dist.P2POp(dist.isend, source, helper, group))
        return operations

    def _pack(self, experts: Sequence[int]) -> torch.Tensor:
        """Bundles ``[n, numel]`` of home experts, by their local numbers."""
        packed = self._like.new_empty((len(experts), self.layout.numel))
        targets, sources = [], []
        for matrices, weight in zip(self.layout.views(packed), self._weights, strict=True):
            weight = weight.detach()
            targets += matrices.unbind()
            sources += [on_device(weight[expert], self._like) for expert in experts]
        torch._foreach_copy_(targets, sources)  # one launch for all
        return packed

    def _pieces(self, missing: dict[int, list[tuple[int, int]]]) -> list[dist.P2POp]:
        """From ZeRO-3's parts."""
        table, group, rank = self._exchange.table, self._exchange.group, self._exchange.table.rank
        bundles = self._workspace() if missing.get(rank) else None
        held = [part_of(weight) for weight in self._weights]
        part_numels = tuple(part_numel(weight) for weight in self._weights)
        operations = []
        for helper, experts in missing.items():
            for expert, place in experts:
                home, local = divmod(expert, self._experts_per_rank)
                if rank != helper and table.ep_rank != home:
                    continue  # an expert's holders all have its home's rank, in their EP groups
                pieces = cut_bundle(local, self.layout.numels, part_numels)
                if rank == helper:
                    targets = bundles[place].split_with_sizes([piece.numel for _, piece in pieces])
                    for target, (_, piece) in zip(targets, pieces, strict=True):
                        holder = table.groups[piece.part][home]
                        operations.append(dist.P2POp(dist.irecv, target, holder, group))
                    continue
                for matrix, piece in pieces:
                    if table.groups[piece.part][home] == rank:
                        source = held[matrix][piece.held_at : piece.held_at + piece.numel]
                        source = on_device(source, self._like)
                        operations.append(dist.P2POp(dist.isend, source, helper, group))
        return operations


def start_in_backward(y_TD: torch.Tensor, foreign: ForeignWeights) -> torch.Tensor:
    """``y_TD`` itself; when its gradient arrives, a fetch that is to start early does so."""
    return _StartInBackward.apply(y_TD, foreign)


class _StartInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_TD, foreign):
        ctx.foreign = foreign
        return y_TD.view_as(y_TD)

    @staticmethod
    def backward(ctx, grad_TD):
        if ctx.foreign.starts_early:
            with part("fetch backward"):
                ctx.foreign.start()
        return grad_TD, None

"""Weights of spilled experts to their helpers, and their gradients home.

All matrices of an expert travel as one *bundle*, a row of a ``[experts, numel]`` buffer, so that
nothing here is written once per matrix and each direction is one all-to-all over the EP group. A
plan without spills issues none: all ranks of the group see the same plan.

The home rank sends (``weight_source="owner"``). Under ZeRO-3 its weights are whole only while the
experts module runs, so a fetch is started there and overlaps the home experts' own GEMMs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import deepspeed.comm as dist
import torch

from ds_llep.plan import Plan


class Workspace:
    """Grow-only scratch memory for foreign weights, one per process and reused by all layers.

    What is taken is valid until the next ``take`` of the same dtype and device, which is enough:
    forward and backward of a layer each fetch, use and forget.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def take(self, rows: int, numel: int, like: torch.Tensor) -> torch.Tensor:
        """Uninitialised ``[rows, numel]`` of ``like``'s dtype and device."""
        key = like.device, like.dtype
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * numel:
            # Freed first: old and new workspace never exist at the same time.
            self._buffers.pop(key, None)
            del buffer
            with torch.inference_mode(False):  # it outlives the inference mode it may be made in
                buffer = self._buffers[key] = like.new_empty(rows * numel)
        return buffer[: rows * numel].view(rows, numel)

    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


WORKSPACE = Workspace()


@dataclass(frozen=True)
class BundleLayout:
    """How the matrices of one expert lie in a bundle: one after the other."""

    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor]) -> BundleLayout:
        """The layout for stacked weights ``[M, ., .]``."""
        return cls(tuple(weight.shape[1:] for weight in weights))

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def views(self, bundles: torch.Tensor) -> list[torch.Tensor]:
        """``[n, numel]`` as one ``[n, ., .]`` view for each matrix."""
        parts = bundles.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


@dataclass(frozen=True)
class Traffic:
    """Which bundles this rank sends and receives for one plan, both in all-to-all order."""

    lent: list[int]
    """Local ids of home experts, one for each (helper, expert), by helper."""
    lent_splits: list[int]
    """How many of them go to each rank."""
    borrowed_splits: list[int]
    """How many foreign experts come from each rank; they arrive in slot order."""
    any_spill: bool
    """Whether any rank of the group spills; False: nobody communicates."""

    @classmethod
    def of(cls, plan: Plan, rank: int) -> Traffic:
        """This rank's part of the plan."""
        lent = plan.lent_experts(rank)
        lent_splits = [0] * plan.num_ranks
        for spill in lent:
            lent_splits[spill.helper] += 1
        borrowed_splits = [0] * plan.num_ranks
        for expert in plan.foreign_experts(rank):
            borrowed_splits[expert // plan.experts_per_rank] += 1
        return cls(
            lent=[spill.expert - rank * plan.experts_per_rank for spill in lent],
            lent_splits=lent_splits,
            borrowed_splits=borrowed_splits,
            any_spill=bool(plan.spills),
        )

    @property
    def num_borrowed(self) -> int:
        return sum(self.borrowed_splits)


class Transfer:
    """Bundles on their way. Holds the send buffer until :meth:`wait`."""

    def __init__(self, received: torch.Tensor, sent: torch.Tensor | None, work) -> None:
        self._received, self._sent, self._work = received, sent, work

    def wait(self) -> torch.Tensor:
        """The received bundles ``[n, numel]``, usable on the current stream."""
        if self._work is not None:
            self._work.wait()
        self._sent = self._work = None
        return self._received


def fetch_weights(
    weights: Sequence[torch.Tensor],
    traffic: Traffic,
    like: torch.Tensor,
    group: dist.ProcessGroup | None,
    keep: bool,
) -> Transfer:
    """Start sending the lent experts' weights and receiving the borrowed ones.

    Args:
        weights: this rank's home experts, each ``[M, ., .]``, whole.
        traffic: from :meth:`Traffic.of`.
        like: bundles travel in this tensor's dtype, the one that the experts compute in.
        group: the EP group; every rank of it must call, or none where no rank spills.
        keep: receive into memory of the caller's own instead of the shared workspace.
    """
    layout = BundleLayout.of(weights)
    if keep or not traffic.any_spill:
        received = like.new_empty((traffic.num_borrowed, layout.numel))
    else:
        received = WORKSPACE.take(traffic.num_borrowed, layout.numel, like)
    if not traffic.any_spill:
        return Transfer(received, None, None)
    sent = like.new_empty((len(traffic.lent), layout.numel))
    for view, weight in zip(layout.views(sent), weights, strict=True):
        for place, expert in enumerate(traffic.lent):
            view[place].copy_(weight[expert])
    return _exchange(received, sent, traffic.borrowed_splits, traffic.lent_splits, group)


def return_gradients(
    gradients: Sequence[torch.Tensor], traffic: Traffic, group: dist.ProcessGroup | None
) -> Transfer:
    """Start sending the borrowed experts' gradients home; the mirror of :func:`fetch_weights`.

    Args:
        gradients: of the foreign experts in slot order, each ``[n, ., .]``.
        traffic: the one that fetched them.
        group: the EP group; every rank of it must call, or none where no rank spills.
    """
    layout = BundleLayout.of(gradients)
    received = gradients[0].new_empty((len(traffic.lent), layout.numel))
    if not traffic.any_spill:
        return Transfer(received, None, None)
    sent = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    return _exchange(received, sent, traffic.lent_splits, traffic.borrowed_splits, group)


def add_returned(
    gradients: Sequence[torch.Tensor], returned: torch.Tensor, traffic: Traffic
) -> None:
    """Add the helpers' gradients to the home gradients, in place.

    The sum over helpers runs in fp32 and is rounded once, so that its error does not grow with the
    number of helpers.

    Args:
        gradients: of the home experts, each ``[M, ., .]``.
        returned: bundles ``[len(traffic.lent), numel]`` from :func:`return_gradients`.
    """
    layout = BundleLayout.of(gradients)
    places: dict[int, list[int]] = {}
    for place, expert in enumerate(traffic.lent):
        places.setdefault(expert, []).append(place)
    for gradient, view in zip(gradients, layout.views(returned), strict=True):
        wide = torch.promote_types(gradient.dtype, torch.float32)
        for expert, from_helpers in places.items():
            total = gradient[expert].to(wide)
            for place in from_helpers:
                total = total + view[place]
            gradient[expert].copy_(total)


def _exchange(received, sent, recv_splits, send_splits, group) -> Transfer:
    work = dist.all_to_all_single(
        received, sent, recv_splits, send_splits, group=group, async_op=True
    )
    return Transfer(received, sent, work)

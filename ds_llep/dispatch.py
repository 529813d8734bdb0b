"""Dispatch and combine: tokens to the ranks that compute them, and results back to their tokens.

Both directions are the same two moves. *There*: one parcel for each token and rank, all-to-all, and
from the parcels to the rows of all their copies. *Back*: rows summed over the copies of a parcel,
all-to-all with the splits swapped, and a token's sum over its own rows and its parcels. Dispatch
goes there in forward and back in backward, combine the other way round, so one route serves all
four and every rank issues exactly one all-to-all for each, whatever the plan says.

Sums run in fp32 and are rounded once where they are made: on the rank that computed the rows and
once more on the token's own.

Between the two, rows are a pair: those of home slots and those of foreign slots. *There* leaves
them in one buffer and hands out two views; *back* reads two buffers, as the experts make them.

Shapes: ``T`` tokens of a rank, ``K`` experts per token, ``D`` hidden size, ``N`` rows, ``U``
parcels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import deepspeed.comm as dist
import torch

from ds_llep.route import Route, RouteMaps
from ds_llep.timeline import part

Fields = tuple[tuple[int, torch.dtype], ...]
"""What is in a parcel: elements and dtype, one after the other."""
_HEAD_START = 20_000  # cycles, ten microseconds
_ALIGNMENT = 16  # bytes that a thread of a GPU moves at once


class Dispatched(NamedTuple):
    """What a rank computes, by expert slot, and where it came from."""

    home_rows: torch.Tensor
    """``[N_home, D]``."""
    foreign_rows: torch.Tensor
    """``[N_foreign, D]``; both are views of one buffer."""
    scores_N: torch.Tensor
    """The score of each row, home slots first; in at least fp32."""
    arrived_UK: torch.Tensor
    """int32 on the device: the row of each copy in each parcel that arrived, else -1."""


def give_way(like: torch.Tensor) -> None:
    """Let a transfer that was just posted begin before a product takes all multiprocessors.

    It starts on another stream, some microseconds after what comes next on this one would, and then
    only when a whole product has ended.
    """
    if like.is_cuda:
        torch.cuda._sleep(_HEAD_START)


class DispatchBackward:
    """Dispatch's backward of one layer and micro-batch, up to the all-to-all.

    Who has the rows' gradients may start it early, so that they travel while the gradients of the
    weights are computed; dispatch itself does so otherwise.
    """

    def __init__(self, route: Route) -> None:
        self._route = route
        self._arriving: Callable[[], torch.Tensor] | None = None

    def start(
        self,
        grad_home: torch.Tensor,
        grad_foreign: torch.Tensor,
        grad_scores_N: torch.Tensor,
        arrived_UK: torch.Tensor,
    ) -> None:
        """Sum gradients over the copies of each parcel and start to send them back."""
        route = self._route
        fields = _gradient_fields(grad_home, grad_scores_N, arrived_UK)
        with part("rows"):
            sent = _new_parcels(len(arrived_UK), fields, grad_home)
            sums_UD, values_UK = _open(sent, fields)
            route.kernels.sum_rows(grad_home, grad_foreign, arrived_UK, out_UD=sums_UD)
            route.kernels.gather_values(grad_scores_N, arrived_UK, out_UK=values_UK)
        self._arriving = _all_to_all(sent, route.recv_splits, route.send_splits, route)
        give_way(sent)

    def finish(self, *gradients: torch.Tensor) -> list[torch.Tensor]:
        """Sums ``[U, D]`` and score gradients ``[U, K]``, of this rank's tokens elsewhere.

        ``gradients`` are those of :meth:`start`, which is called now if it was not before.
        """
        if self._arriving is None:
            self.start(*gradients)
        arriving, self._arriving = self._arriving, None
        grad_home, _, grad_scores_N, arrived_UK = gradients
        return _open(arriving(), _gradient_fields(grad_home, grad_scores_N, arrived_UK))


def dispatch(
    x_TD: torch.Tensor,
    scores_TK: torch.Tensor,
    route: Route,
    maps: RouteMaps,
    backward: DispatchBackward,
) -> Dispatched:
    """Send each token ``[T, D]`` and its scores to the ranks that compute it.

    Differentiable in both.
    """
    return Dispatched(*_Dispatch.apply(x_TD, scores_TK, route, backward, *maps))


def combine(
    out_home: torch.Tensor,
    out_foreign: torch.Tensor,
    arrived_UK: torch.Tensor,
    route: Route,
    maps: RouteMaps,
) -> torch.Tensor:
    """Send results home and sum them over K; ``[T, D]``.

    ``out_home`` and ``out_foreign`` have the shapes that :func:`dispatch` returned. Differentiable
    in both.
    """
    return _Combine.apply(out_home, out_foreign, arrived_UK, maps.own_TK, maps.sent_TK, route)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, scores_TK, route, backward, own_TK, sent_TK, target_TK):
        kernels = route.kernels
        with part("dispatch"):
            hidden, top_k = x_TD.shape[1], scores_TK.shape[1]
            score_dtype = torch.promote_types(scores_TK.dtype, torch.float32)
            fields = (hidden, x_TD.dtype), (top_k, score_dtype), (top_k, torch.int32)
            with part("rows"):
                sent = _new_parcels(sum(route.send_splits) + 1, fields, x_TD)
                tokens_UD, values_UK, targets_UK = _open(sent, fields)
                kernels.label_parcels(sent_TK, target_TK, scores_TK, targets_UK, values_UK)
                kernels.scatter_rows(x_TD, sent_TK, tokens_UD)
            arriving = _all_to_all(sent[:-1], route.send_splits, route.recv_splits, route)
            with part("rows"):
                rows_ND = x_TD.new_empty((route.num_rows + 1, hidden))
                scores_N = scores_TK.new_empty(route.num_rows + 1, dtype=score_dtype)
                kernels.scatter_rows(x_TD, own_TK, rows_ND, scores_TK, scores_N)
            tokens_UD, values_UK, targets_UK = _open(arriving(), fields)
            with part("rows"):
                arrived_UK = targets_UK.contiguous()
                kernels.scatter_rows(tokens_UD, arrived_UK, rows_ND, values_UK, scores_N)
        ctx.save_for_backward(own_TK, sent_TK, arrived_UK)
        ctx.kernels, ctx.backward, ctx.score_dtype = kernels, backward, scores_TK.dtype
        ctx.mark_non_differentiable(arrived_UK)
        home, foreign = rows_ND[: route.num_home_rows], rows_ND[route.num_home_rows : -1]
        return home, foreign, scores_N[:-1], arrived_UK

    @staticmethod
    def backward(ctx, grad_home, grad_foreign, grad_scores_N, _):
        own_TK, sent_TK, arrived_UK = ctx.saved_tensors
        with part("dispatch backward"):
            sums_UD, values_UK = ctx.backward.finish(
                grad_home, grad_foreign, grad_scores_N, arrived_UK
            )
            with part("rows"):
                grad_x = ctx.kernels.sum_rows(grad_home, grad_foreign, own_TK, sums_UD, sent_TK)
                grad_scores = grad_scores_N.new_empty(own_TK.shape, dtype=ctx.score_dtype)
                ctx.kernels.gather_values(
                    grad_scores_N, own_TK, values_UK, sent_TK, out_UK=grad_scores
                )
        return grad_x, grad_scores, *[None] * 5


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_home, out_foreign, arrived_UK, own_TK, sent_TK, route):
        ctx.save_for_backward(own_TK, sent_TK, arrived_UK)
        ctx.route = route
        with part("combine"):
            with part("rows"):
                sums_UD = route.kernels.sum_rows(out_home, out_foreign, arrived_UK)
            arriving = _all_to_all(sums_UD, route.recv_splits, route.send_splits, route)
            sums_UD = arriving()
            with part("rows"):
                return route.kernels.sum_rows(out_home, out_foreign, own_TK, sums_UD, sent_TK)

    @staticmethod
    def backward(ctx, grad_TD):
        own_TK, sent_TK, arrived_UK = ctx.saved_tensors
        kernels, route = ctx.route.kernels, ctx.route
        hidden = grad_TD.shape[1]
        with part("combine backward"):
            with part("rows"):
                sent_UD = grad_TD.new_empty((sum(route.send_splits) + 1, hidden))
                kernels.scatter_rows(grad_TD, sent_TK, sent_UD)
            arriving = _all_to_all(sent_UD[:-1], route.send_splits, route.recv_splits, route)
            with part("rows"):
                rows_ND = grad_TD.new_empty((route.num_rows + 1, hidden))
                kernels.scatter_rows(grad_TD, own_TK, rows_ND)
            arrived_UD = arriving()
            with part("rows"):
                kernels.scatter_rows(arrived_UD, arrived_UK, rows_ND)
        home, foreign = rows_ND[: route.num_home_rows], rows_ND[route.num_home_rows : -1]
        return home, foreign, *[None] * 4


def _new_parcels(count: int, fields: Fields, like: torch.Tensor) -> torch.Tensor:
    """A buffer of parcels ``[count, bytes]``, so that all that is in them travels at once."""
    return like.new_empty((count, offsets(fields)[-1]), dtype=torch.uint8)


def _open(parcels: torch.Tensor, fields: Fields) -> list[torch.Tensor]:
    """A view ``[count, numel]`` of each field."""
    return [
        parcels[:, start : start + numel * dtype.itemsize].view(dtype)
        for start, (numel, dtype) in zip(offsets(fields), fields, strict=False)
    ]


def offsets(fields: Fields) -> list[int]:
    """Where each field begins, and where all end, in bytes."""
    sizes = (-(-numel * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for numel, dtype in fields)
    return [0, *accumulate(sizes)]


def _gradient_fields(
    grad_ND: torch.Tensor, grad_scores_N: torch.Tensor, arrived_UK: torch.Tensor
) -> Fields:
    return (grad_ND.shape[1], grad_ND.dtype), (arrived_UK.shape[1], grad_scores_N.dtype)


def _all_to_all(
    parcels: torch.Tensor, send_splits: list[int], recv_splits: list[int], route: Route
) -> Callable[[], torch.Tensor]:
    """Start to exchange parcels; what is returned waits for them, on the current stream."""
    if len(send_splits) == 1:
        return lambda: parcels
    received = parcels.new_empty((sum(recv_splits), parcels.shape[1]))
    work = dist.all_to_all_single(
        received, parcels, recv_splits, send_splits, group=route.group, async_op=True
    )

    def wait() -> torch.Tensor:
        with part("all-to-all"):
            work.wait()
        return received

    return wait

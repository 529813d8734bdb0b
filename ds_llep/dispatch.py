"""Dispatch and combine: rows to the ranks that compute them, and results back to their tokens.

Both directions are the same two moves. *There*: gather rows into the send order, all-to-all,
regroup by expert. *Back*: undo the regrouping, all-to-all with the splits swapped. Dispatch goes
there in forward and back in backward, combine the other way round, so one :class:`Route` serves all
four and every rank issues exactly one all-to-all for each, whatever the plan says.

Between the two, rows are a pair: those of home slots and those of foreign slots. *There* leaves
them in one buffer and hands out two views; *back* reads two buffers, as the experts make them,
without joining them first.

Shapes: ``T`` tokens of a rank, ``K`` experts per token, ``D`` hidden size, ``N`` rows. A *copy* is
a (token, choice) pair, numbered ``t * K + k``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import deepspeed.comm as dist
import numpy as np
import torch

from ds_llep.kernels.select import KernelSet
from ds_llep.plan import Plan
from ds_llep.timeline import part


class RouteMaps(NamedTuple):
    """The index maps of a route, int64 on the device."""

    send_order: torch.Tensor
    """``[T * K]``: the copy at each place of the send buffer."""
    position_TK: torch.Tensor
    """``[T, K]``: the inverse, each copy's place in the send buffer."""
    arrival_order: torch.Tensor
    """``[N]``: the place in the receive buffer of each row, regrouped by expert slot."""
    arrival_position: torch.Tensor
    """``[N]``: its inverse."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where every row of one layer and micro-batch goes."""

    send_splits: list[int]
    """Rows to each rank of the EP group."""
    recv_splits: list[int]
    """Rows from each rank of the EP group."""
    rows_per_slot: list[int]
    """Rows of each of this rank's expert slots: home experts first, then foreign ones."""
    num_home_rows: int
    """How many of the rows, the first ones, are those of home slots."""
    group: dist.ProcessGroup | None
    kernels: KernelSet
    maps: RouteMaps | None


def make_route(
    selected_TK: torch.Tensor,
    plan: Plan,
    rank: int,
    group: dist.ProcessGroup | None,
    kernels: KernelSet,
) -> Route:
    """Turn the plan into this rank's splits and index maps.

    Args:
        selected_TK: expert ids ``[T, K]`` in ``[0, E)``.
        plan: the EP group's plan.
        rank: this rank in the EP group.
        group: the EP group.
        kernels: launchers that move the rows.
    """
    device = selected_TK.device
    num_ranks, per_rank = plan.num_ranks, plan.experts_per_rank

    # Copies sorted by expert, in token order within an expert, are cut into one run per rank.
    send_EP = plan.send_EP(rank)
    expert_start_E = _exclusive_cumsum(send_EP.sum(axis=1))
    run_start_EP = expert_start_E[:, None] + np.cumsum(send_EP, axis=1) - send_EP
    helper, expert = np.nonzero(send_EP.T)
    foreign = expert // per_rank != helper
    by_slot = np.lexsort((expert, foreign, helper))
    helper, expert = helper[by_slot], expert[by_slot]
    send_runs = run_start_EP[expert, helper], send_EP[expert, helper]

    # Rows arrive by source rank and, within one, by slot; the experts want them by slot.
    recv_PS = plan.recv_PE(rank)[:, list(plan.slots(rank))]
    arrival_start_PS = _exclusive_cumsum(recv_PS.ravel()).reshape(recv_PS.shape)
    arrival_runs = arrival_start_PS.T.ravel(), recv_PS.T.ravel()

    by_expert = torch.argsort(selected_TK.reshape(-1), stable=True)
    send_order = by_expert[_concat_runs(*send_runs, device)]
    arrival_order = _concat_runs(*arrival_runs, device)
    send_splits = send_EP.sum(axis=0).tolist()
    rows_per_slot = recv_PS.sum(axis=0).tolist()
    assert len(send_splits) == num_ranks and send_order.numel() == selected_TK.numel()
    return Route(
        send_splits=send_splits,
        recv_splits=recv_PS.sum(axis=1).tolist(),
        rows_per_slot=rows_per_slot,
        num_home_rows=sum(rows_per_slot[:per_rank]),
        group=group,
        kernels=kernels,
        maps=RouteMaps(
            send_order=send_order,
            position_TK=_inverse(send_order).view(selected_TK.shape),
            arrival_order=arrival_order,
            arrival_position=_inverse(arrival_order),
        ),
    )


def dispatch(
    x_TD: torch.Tensor, scores_TK: torch.Tensor | None, route: Route
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send each token ``[T, D]`` to the ranks that compute it.

    ``scores_TK`` multiplies the rows before the experts, for models that weigh their inputs; None
    for those that weigh the outputs. Differentiable in both.

    Returns:
        Rows by expert slot: ``[N_home, D]`` of home slots and ``[N_foreign, D]`` of foreign ones,
        views of one buffer.
    """
    return _Dispatch.apply(x_TD, scores_TK, route)


def combine(
    out_home: torch.Tensor,
    out_foreign: torch.Tensor,
    scores_TK: torch.Tensor | None,
    route: Route,
) -> torch.Tensor:
    """Send results home and sum them over K, weighted by ``scores_TK`` where given; ``[T, D]``.

    ``out_home`` and ``out_foreign`` have the shapes that :func:`dispatch` returned. The sum runs in
    fp32 and is rounded once. Differentiable in all three tensors.
    """
    return _Combine.apply(out_home, out_foreign, scores_TK, route)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, scores_TK, route):
        _save(ctx, route, x_TD if scores_TK is not None else None, scores_TK)
        with part("dispatch"):
            return _there(x_TD, scores_TK, route)

    @staticmethod
    def backward(ctx, grad_home, grad_foreign):
        route, x_TD, scores_TK = _load(ctx)
        with part("dispatch backward"):
            grad_rows = _back(grad_home, grad_foreign, route)
            grad_x = _sum_over_k(grad_rows, scores_TK, route)
            grad_scores = None
            if scores_TK is not None and ctx.needs_input_grad[1]:
                grad_scores = _score_gradient(grad_rows, x_TD, scores_TK, route)
        return grad_x, grad_scores, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_home, out_foreign, scores_TK, route):
        with part("combine"):
            rows = _back(out_home, out_foreign, route)
            _save(ctx, route, rows if scores_TK is not None else None, scores_TK)
            return _sum_over_k(rows, scores_TK, route)

    @staticmethod
    def backward(ctx, grad_TD):
        route, rows, scores_TK = _load(ctx)
        with part("combine backward"):
            grad_TD = grad_TD.contiguous()
            grad_scores = None
            if scores_TK is not None and ctx.needs_input_grad[2]:
                grad_scores = _score_gradient(rows, grad_TD, scores_TK, route)
            return *_there(grad_TD, scores_TK, route), grad_scores, None


def _there(
    x_TD: torch.Tensor, scores_TK: torch.Tensor | None, route: Route
) -> tuple[torch.Tensor, torch.Tensor]:
    with part("rows"):
        scale_N = None if scores_TK is None else scores_TK.reshape(-1)[route.maps.send_order]
        top_k = route.maps.position_TK.shape[1]
        rows = route.kernels.gather_rows(x_TD, route.maps.send_order // top_k, scale_N)
    rows = _all_to_all(rows, route.send_splits, route.recv_splits, route.group)
    with part("rows"):
        rows = route.kernels.gather_rows(rows, route.maps.arrival_order)
    return rows[: route.num_home_rows], rows[route.num_home_rows :]


def _back(home_rows: torch.Tensor, foreign_rows: torch.Tensor, route: Route) -> torch.Tensor:
    arrival_position = route.maps.arrival_position
    with part("rows"):
        rows = route.kernels.gather_rows(home_rows, arrival_position, tail_MD=foreign_rows)
    return _all_to_all(rows, route.recv_splits, route.send_splits, route.group)


def _sum_over_k(rows: torch.Tensor, scores_TK: torch.Tensor | None, route: Route) -> torch.Tensor:
    with part("rows"):
        return route.kernels.combine_rows(rows, route.maps.position_TK, scores_TK)


def _score_gradient(
    rows: torch.Tensor, y_TD: torch.Tensor, scores_TK: torch.Tensor, route: Route
) -> torch.Tensor:
    with part("rows"):
        dots_TK = route.kernels.row_dots(rows, route.maps.position_TK, y_TD)
        return dots_TK.to(scores_TK.dtype)


def _all_to_all(rows: torch.Tensor, send_splits, recv_splits, group) -> torch.Tensor:
    if len(send_splits) == 1:
        return rows
    with part("all-to-all"):
        received = rows.new_empty((sum(recv_splits), rows.shape[1]))
        dist.all_to_all_single(received, rows, recv_splits, send_splits, group=group)
        return received


def _save(ctx, route: Route, *tensors: torch.Tensor | None) -> None:
    # Index maps go through save_for_backward so that activation checkpointing frees them too.
    ctx.save_for_backward(*route.maps, *tensors)
    ctx.route = replace(route, maps=None)


def _load(ctx) -> tuple[Route, torch.Tensor | None, torch.Tensor | None]:
    saved = ctx.saved_tensors
    return replace(ctx.route, maps=RouteMaps(*saved[:4])), *saved[4:]


def _concat_runs(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> torch.Tensor:
    """Concatenate the integer runs ``start .. start + length - 1`` into one index on the device."""
    total = int(lengths.sum())
    shift, lengths = torch.from_numpy(
        np.stack((starts - _exclusive_cumsum(lengths), lengths)).astype(np.int64)
    ).to(device, non_blocking=True)
    # The known output size spares repeat_interleave its device-to-host synchronisation.
    shift = torch.repeat_interleave(shift, lengths, output_size=total)
    return torch.arange(total, device=device) + shift


def _exclusive_cumsum(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse

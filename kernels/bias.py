"""Biases of grouped products: added to rows, and their gradients.

A product's rows come group after group, and every group has a bias of its own; a row may have a
weight that its bias is multiplied with. Each row's program finds its group among the groups' ends,
so nothing as long as the rows is made on the host.

A bias gradient is a sum over up to all rows. One program for each group would leave the others idle
where one group has most rows, so chunks of rows are summed first and the chunks' sums then, by the
same kernel: a second, small launch, and the same bits on every run.

Shape letters: G groups, N rows, D columns. float64 inputs go to the twins in `reference_mlp.py`. No
function of Triton's own library is called; `rows.py` says why.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from . import reference_mlp
from .combining import add, group_at, unit_stride
from .tables import to_device

_CHUNK = 256  # rows that one program sums
_BLOCK_N, _BLOCK_D = 8, 128


@triton.jit(do_not_specialize=["G"])
def _add_bias_kernel(
    rows_ptr,
    bias_ptr,
    stop_ptr,
    weight_ptr,
    rows_stride,
    bias_stride,
    G,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    bias_ptr += group_at(n, stop_ptr, G, BLOCK_G) * bias_stride
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + n).to(tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        row = tl.load(rows_ptr + n * rows_stride + d, mask=d < D, other=0.0).to(tl.float32)
        row += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32) * weight
        tl.store(rows_ptr + n * rows_stride + d, row.to(rows_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["G"])
def _dot_bias_kernel(
    rows_ptr,
    bias_ptr,
    stop_ptr,
    out_ptr,
    rows_stride,
    bias_stride,
    G,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    bias_ptr += group_at(n, stop_ptr, G, BLOCK_G) * bias_stride
    total = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        row = tl.load(rows_ptr + n * rows_stride + d, mask=d < D, other=0.0).to(tl.float32)
        total += row * tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, tl.reduce(total, 0, add))


@triton.jit
def _sum_spans_kernel(
    rows_ptr,
    weight_ptr,
    spans_ptr,
    out_ptr,
    rows_stride,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    span = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(spans_ptr + 2 * span), tl.load(spans_ptr + 2 * span + 1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    for start in range(first, stop, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        place = n[:, None] * rows_stride + d[None, :]
        mask = (n < stop)[:, None] & (d < D)[None, :]
        row = tl.load(rows_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + n, mask=n < stop, other=0.0).to(tl.float32)
            row = row * weight[:, None]
        total += row
    tl.store(out_ptr + span * D + d, tl.reduce(total, 0, add), mask=d < D)


def add_bias(
    rows_ND: torch.Tensor,
    bias_GD: torch.Tensor,
    stop_G: torch.Tensor,
    weight_N: torch.Tensor | None = None,
) -> None:
    """As `reference_mlp.add_bias`; `rows_ND` and `bias_GD` contiguous along D."""
    if rows_ND.dtype == torch.float64:
        return reference_mlp.add_bias(rows_ND, bias_GD, stop_G, weight_N)
    N, D = rows_ND.shape
    if rows_ND.numel():
        _add_bias_kernel[(N,)](
            *(rows_ND, bias_GD, stop_G, None if weight_N is None else weight_N.contiguous()),
            *(rows_ND.stride(0), bias_GD.stride(0), len(stop_G), D),
            HAS_WEIGHT=weight_N is not None,
            **_blocks(len(stop_G), D),
        )


def gradient_of_bias_weight(
    grad_ND: torch.Tensor, bias_GD: torch.Tensor, stop_G: torch.Tensor
) -> torch.Tensor:
    """As `reference_mlp.gradient_of_bias_weight`; `bias_GD` contiguous along D."""
    if grad_ND.dtype == torch.float64:
        return reference_mlp.gradient_of_bias_weight(grad_ND, bias_GD, stop_G)
    grad_ND = unit_stride(grad_ND)
    N, D = grad_ND.shape
    out_N = grad_ND.new_zeros(N, dtype=torch.float32)
    if grad_ND.numel():
        _dot_bias_kernel[(N,)](
            *(grad_ND, bias_GD, stop_G, out_N),
            *(grad_ND.stride(0), bias_GD.stride(0), len(stop_G), D),
            **_blocks(len(stop_G), D),
        )
    return out_N


def gradient_of_bias(
    grad_ND: torch.Tensor, counts: Sequence[int], weight_N: torch.Tensor | None = None
) -> torch.Tensor:
    """As `reference_mlp.gradient_of_bias`."""
    if grad_ND.dtype == torch.float64:
        return reference_mlp.gradient_of_bias(grad_ND, counts, weight_N)
    chunks = -(-np.array(counts, dtype=np.int32) // _CHUNK)
    # Chunk after chunk, those of a group in a row; the last one ends where its group does.
    group = np.repeat(np.arange(len(counts)), chunks)
    within = np.arange(len(group)) - (np.cumsum(chunks) - chunks)[group]
    stop_G = np.cumsum(counts)
    first = (stop_G - counts)[group] + within * _CHUNK
    spans = np.stack((first, np.minimum(first + _CHUNK, stop_G[group])), axis=1)
    sums = _sum_spans(unit_stride(grad_ND), weight_N, spans)
    stop = np.cumsum(chunks)
    return _sum_spans(sums, None, np.stack((stop - chunks, stop), axis=1))


def _sum_spans(
    rows_ND: torch.Tensor, weight_N: torch.Tensor | None, spans: np.ndarray
) -> torch.Tensor:
    """fp32 sums of rows: one for each span, its first row and the one behind its last."""
    D = rows_ND.shape[1]
    out = rows_ND.new_empty((len(spans), D), dtype=torch.float32)
    if out.numel():
        _sum_spans_kernel[(len(spans), triton.cdiv(D, _BLOCK_D))](
            *(rows_ND, None if weight_N is None else weight_N.contiguous()),
            to_device(spans.astype(np.int32), rows_ND.device),
            *(out, rows_ND.stride(0), D),
            HAS_WEIGHT=weight_N is not None,
            BLOCK_N=_BLOCK_N,
            BLOCK_D=_BLOCK_D,
        )
    return out


def _blocks(num_groups: int, D: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(max(D, 16)), 1024)
    blocks = {"BLOCK": block, "BLOCK_G": triton.next_power_of_2(max(num_groups, 1))}
    return blocks | {"num_warps": min(max(block // 256, 1), 4)}

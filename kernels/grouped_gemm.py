"""Matrix products over groups of rows, one weight matrix for each group.

``torch._grouped_mm`` where it is one kernel (bf16 on Hopper and newer), a loop over the groups
elsewhere. Row counts are known on the host, so neither needs a device-to-host synchronisation, and
groups need no padding: no count has to be a multiple of anything, and empty groups are fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from .tables import to_device

_ALIGNMENT_BYTES = 16
_SLICES = 4


def grouped_gemm(
    rows_ND: torch.Tensor, weights_GFD: torch.Tensor, counts: Sequence[int], transpose: bool = True
) -> torch.Tensor:
    """Multiply each group of rows with its own matrix.

    Args:
        rows_ND: ``[N, D]``, group after group.
        weights_GFD: ``[G, F, D]``, or ``[G, D, F]`` with ``transpose=False``; the group stride may
            be anything, each matrix is contiguous.
        counts: rows of each group; their sum is N.
        transpose: multiply with the matrices' transposes, as a linear layer does.

    Returns:
        ``[N, F]``.
    """
    matrices = weights_GFD.transpose(1, 2) if transpose else weights_GFD
    if rows_ND.shape[0] == 0:
        return rows_ND.new_empty((0, matrices.shape[2]))
    if is_one_kernel(rows_ND, weights_GFD):
        return torch._grouped_mm(rows_ND, matrices, offs=_offsets(counts, rows_ND.device))
    out = rows_ND.new_empty((rows_ND.shape[0], matrices.shape[2]))
    for group, (start, stop) in _spans(counts):
        torch.mm(rows_ND[start:stop], matrices[group], out=out[start:stop])
    return out


def gate_up(
    rows_ND: torch.Tensor, w1_GFD: torch.Tensor, w3_GFD: torch.Tensor, counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`grouped_gemm` with two sets of matrices: gate and up, each [N, F]."""
    return grouped_gemm(rows_ND, w1_GFD, counts), grouped_gemm(rows_ND, w3_GFD, counts)


def add_grouped_gemm(
    out_ND: torch.Tensor, rows_NF: torch.Tensor, weights_GFD: torch.Tensor, counts: Sequence[int]
) -> None:
    """``out += grouped_gemm(rows, weights, counts, transpose=False)``, in slices of the rows.

    A product cannot be added where it is made, so it needs memory of its own: in slices, a quarter
    of what the whole one would.

    Args:
        out_ND: ``[N, D]``, changed in place.
        rows_NF: ``[N, F]``, group after group.
        weights_GFD: ``[G, F, D]``.
        counts: rows of each group; their sum is N.
    """
    num_rows, slice_rows = len(rows_NF), -(-len(rows_NF) // _SLICES) or 1
    ends = list(accumulate(counts))
    for first in range(0, num_rows, slice_rows):
        last = min(first + slice_rows, num_rows)
        within = [min(max(end, first), last) - first for end in ends]
        some = [end - start for start, end in zip([0, *within], within, strict=False)]
        out_ND[first:last] += grouped_gemm(rows_NF[first:last], weights_GFD, some, transpose=False)


def gradient_of_rows(
    grad_gate_NF: torch.Tensor,
    w1_GFD: torch.Tensor,
    grad_up_NF: torch.Tensor,
    w3_GFD: torch.Tensor,
    counts: Sequence[int],
) -> torch.Tensor:
    """`grad_gate @ w1 + grad_up @ w3` for each group.

    Args:
        grad_gate_NF, grad_up_NF: [N, F], group after group.
        w1_GFD, w3_GFD: [G, F, D]; the group stride may be anything.
        counts: rows of each group; their sum is N.

    Returns:
        [N, D].
    """
    grad_ND = grouped_gemm(grad_gate_NF, w1_GFD, counts, transpose=False)
    add_grouped_gemm(grad_ND, grad_up_NF, w3_GFD, counts)
    return grad_ND


def grouped_gemm_weight_gradient(
    grad_NF: torch.Tensor,
    rows_ND: torch.Tensor,
    counts: Sequence[int],
    out: torch.Tensor | None = None,
    beside: bool = False,
) -> torch.Tensor:
    """The gradient of :func:`grouped_gemm` with respect to its weights.

    Args:
        grad_NF: ``[N, F]``, gradient of the output.
        rows_ND: ``[N, D]``, the input rows.
        counts: rows of each group.
        out: ``[G, F, D]`` to write to; its group stride may be anything. None: new memory.
        beside: a transfer is under way, which makes no difference here.

    Returns:
        ``[G, F, D]``; zero for groups without rows.
    """
    shape = (len(counts), grad_NF.shape[1], rows_ND.shape[1])
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(shape) if out is None else out.zero_()
    if is_one_kernel(rows_ND, grad_NF):
        made = torch._grouped_mm(grad_NF.t(), rows_ND, offs=_offsets(counts, rows_ND.device))
        out = made if out is None else out.copy_(made)
    else:
        out = rows_ND.new_empty(shape) if out is None else out
        for group, (start, stop) in _spans(counts):
            torch.mm(grad_NF[start:stop].t(), rows_ND[start:stop], out=out[group])
    empty = [group for group, count in enumerate(counts) if count == 0]
    if empty:  # neither path writes these; an index on the host would wait for the device
        out.index_fill_(0, torch.tensor(empty).to(out.device, non_blocking=True), 0)
    return out


def is_one_kernel(*operands: torch.Tensor) -> bool:
    """Whether ``torch._grouped_mm`` takes these operands as one kernel."""
    return all(
        operand.is_cuda
        and operand.dtype == torch.bfloat16
        and operand.data_ptr() % _ALIGNMENT_BYTES == 0
        and operand.shape[-1] * operand.element_size() % _ALIGNMENT_BYTES == 0
        and operand.stride(0) * operand.element_size() % _ALIGNMENT_BYTES == 0
        and torch.cuda.get_device_capability(operand.device) >= (9, 0)
        for operand in operands
    )


def _offsets(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    return to_device(np.cumsum(counts, dtype=np.int32), device)


def _spans(counts: Sequence[int]):
    ends = list(accumulate(counts))
    for group, (count, end) in enumerate(zip(counts, ends, strict=True)):
        if count:
            yield group, (end - count, end)

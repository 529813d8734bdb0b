"""Grouped products of an MoE layer's experts, fused where PyTorch's grouped product is not.

Gate and up are one product, which reads the rows once; the gradient of the rows is the sum of two
products, rounded once; the weight gradient is written where it belongs and takes no longer for one
large group than for many small ones. The trade-off against `grouped_gemm.py`: Hopper, bf16 and fp16
only, rows and matrices aligned to 16 bytes (`supported`), and one tiling instead of a library's
choice.

Shape letters: G groups, N rows, D hidden size, F expert FFN size.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from .grouped_triton_rows import _gate_up_kernel, _product_kernel, can_add, can_pair
from .grouped_triton_wgrad import _wgrad_kernel, add_parts
from .grouped_work import Work, row_tiles, schedule

_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16
_INTERPRETED_PROGRAMS = 7


class Tiling(NamedTuple):
    """How a product is cut: tile, rows and columns of the result and depth of a step."""

    block_m: int
    block_n: int
    """For `gate_up` the columns of both together."""
    block_k: int
    warps: int
    stages: int
    """Steps whose operands are under way or in use."""
    band: int
    """Rows of tiles that are worked on together."""


HOPPER = Tiling(128, 256, 64, warps=8, stages=4, band=8)
"""The best of those measured for nearly every shape and product (docs/performance.md); never one of
several by row counts, as each would be compiled in the middle of training."""


def supported(*operands: torch.Tensor) -> bool:
    """Whether these kernels take such operands."""
    for operand in operands:  # every product asks, so without the host's time for generators
        *strides, last_stride = operand.stride()
        sizes = operand.data_ptr(), 2 * operand.shape[-1], *[2 * stride for stride in strides]
        if operand.dtype not in _DTYPES or last_stride != 1:
            return False
        if any([size % _ALIGNMENT_BYTES for size in sizes]):
            return False
    return True


def can_store(columns: int, dtype: torch.dtype) -> bool:
    """Whether these kernels can write rows of so many columns, as few as those of low ranks."""
    return columns * dtype.itemsize % _ALIGNMENT_BYTES == 0


def gate_up(
    rows_ND: torch.Tensor,
    w1_GFD: torch.Tensor,
    w3_GFD: torch.Tensor,
    counts: Sequence[int],
    tiling: Tiling = HOPPER,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each group's rows times the transposes of its two matrices.

    Args:
        rows_ND: [N, D], group after group.
        w1_GFD, w3_GFD: [G, F, D], one layout (`can_pair`); the group stride may be anything.
        counts: rows of each group; their sum is N.
        tiling: how it is cut.

    Returns:
        gate and up, each [N, F].
    """
    assert can_pair(w1_GFD, w3_GFD)
    (N, D), F = rows_ND.shape, w1_GFD.shape[1]
    results = [rows_ND.new_empty((N, F)) for _ in range(2)]
    if N == 0:
        return tuple(results)
    columns = tiling.block_n // 2
    tiles = row_tiles(counts, tiling.block_m, rows_ND.device)
    # Which matrix comes first in memory is the first of the pair.
    distance = w3_GFD.data_ptr() - w1_GFD.data_ptr()
    first, *targets = (w1_GFD, *results) if distance > 0 else (w3_GFD, *reversed(results))
    _launch(
        *(_gate_up_kernel, len(tiles) * triton.cdiv(F, columns), rows_ND.device),
        *(rows_ND, first, *targets, tiles, len(tiles), len(counts), N, D, F),
        *(rows_ND.stride(0), abs(distance) // w1_GFD.element_size(), *w1_GFD.stride()[:2]),
        **_meta(tiling, BLOCK_N=columns),
    )
    return tuple(results)


def product(
    rows_ND: torch.Tensor,
    weights_GFD: torch.Tensor,
    counts: Sequence[int],
    transpose: bool = True,
    tiling: Tiling = HOPPER,
) -> torch.Tensor:
    """What `grouped_gemm` computes, with the same arguments."""
    return _product([rows_ND], [weights_GFD], counts, transpose, tiling)


def dgrad(
    grad_gate_NF: torch.Tensor,
    w1_GFD: torch.Tensor,
    grad_up_NF: torch.Tensor,
    w3_GFD: torch.Tensor,
    counts: Sequence[int],
    tiling: Tiling = HOPPER,
) -> torch.Tensor:
    """`grad_gate @ w1 + grad_up @ w3` for each group, summed in fp32 and rounded once.

    Args:
        grad_gate_NF, grad_up_NF: [N, F], group after group, one layout.
        w1_GFD, w3_GFD: [G, F, D], one layout (`can_add`); the group stride may be anything.
        counts: rows of each group; their sum is N.
        tiling: how it is cut.

    Returns:
        [N, D].
    """
    assert can_add((grad_gate_NF, grad_up_NF), (w1_GFD, w3_GFD))
    return _product([grad_gate_NF, grad_up_NF], [w1_GFD, w3_GFD], counts, False, tiling)


def _product(rows, matrices, counts, transpose: bool, tiling: Tiling) -> torch.Tensor:
    N, K = rows[0].shape
    columns = matrices[0].shape[1 if transpose else 2]
    out = rows[0].new_empty((N, columns))
    if N == 0:
        return out
    tiles = row_tiles(counts, tiling.block_m, out.device)
    _launch(
        *(_product_kernel, len(tiles) * triton.cdiv(columns, tiling.block_n), out.device),
        *(rows[0], rows[-1], matrices[0], matrices[-1], out, tiles),
        *(len(tiles), len(counts), N, K, columns, rows[0].stride(0), *matrices[0].stride()[:2]),
        TRANSPOSE=transpose,
        SUM_OF_TWO=len(rows) == 2,
        **_meta(tiling),
    )
    return out


def wgrad(
    grad_NF: torch.Tensor,
    rows_ND: torch.Tensor,
    counts: Sequence[int],
    out: torch.Tensor | None = None,
    beside: bool = False,
    tiling: Tiling = HOPPER,
) -> torch.Tensor:
    """`grad.T @ rows` for each group; zero for groups without rows.

    Args:
        grad_NF, rows_ND: [N, F] and [N, D], group after group.
        counts: rows of each group; their sum is N.
        out: [G, F, D] to write to; its group stride may be anything.
        beside: a transfer is under way, which takes multiprocessors: tiles are dealt out while
            others are worked on, so that the other multiprocessors do more.
        tiling: how it is cut.

    Returns:
        `out`, or a new tensor.
    """
    F, D = grad_NF.shape[1], rows_ND.shape[1]
    if out is None:
        out = rows_ND.new_empty((len(counts), F, D))
    assert out.shape == (len(counts), F, D)
    if len(rows_ND) == 0:
        return out.zero_()
    block_m, block_n, block_k = tiling[:3]
    device, programs = rows_ND.device, _programs(rows_ND.device)
    tiles = triton.cdiv(F, block_m) * triton.cdiv(D, block_n)
    whole, cut = schedule(counts, tiles, block_k, programs, device)

    def launch(work: Work, target: torch.Tensor, in_parts: bool) -> None:
        hands = work.num_hands if beside else work.num_items
        _launch(
            *(_wgrad_kernel, hands, device, grad_NF, rows_ND, target),
            *(work.segment_of_item, work.segments, work.starts, work.queue),
            *(work.num_items, hands, int(beside), F, D, grad_NF.stride(0), rows_ND.stride(0)),
            *(len(target), *target.stride()[:2]),
            PARTS=in_parts,
            **_meta(tiling),
        )

    if whole.num_items:
        launch(whole, out, in_parts=False)
    if cut.num_items:
        parts = torch.empty((cut.num_items, block_m, block_n), dtype=torch.float32, device=device)
        launch(cut, parts, in_parts=True)
        add_parts(parts, out, cut, tiling.band)
    return out


def _launch(kernel, items: int, device: torch.device, *args: object, **meta: object) -> None:
    """Run as many programs as run at a time, or as there are items."""
    # Each time: Triton keeps an allocator for each thread, and autograd has threads of its own.
    triton.set_allocator(_scratch)
    kernel[(min(items, _programs(device)),)](*args, **meta)


def _scratch(num_bytes: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where programs keep the descriptors that they make."""
    return torch.empty(num_bytes, dtype=torch.int8, device="cuda")


def _meta(tiling: Tiling, **changes: int) -> dict[str, int]:
    meta = {"BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "BLOCK_K": tiling.block_k}
    meta |= {"BAND": tiling.band, "num_warps": tiling.warps, "num_stages": tiling.stages}
    return meta | changes


@functools.cache  # asking costs the host as much as a small launch
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count

"""Grouped products whose result has one row for each input row, as persistent TMA kernels.

One program for each multiprocessor walks over tiles of the result. The host lays the tiles out, as
it knows the row counts: a table names group, first row and end of each tile of rows, so that no
program searches. Operands arrive through tensor descriptors, which on Hopper are bulk copies
(elsewhere the compiler turns them into plain loads); where a tile reaches beyond its group it reads
its neighbour's rows, which cost time and are not stored.

Two tensors of one shape can be read as one: the distance between their addresses is a stride like
any other. So a single copy brings the same tile of two matrices, and a single wide product makes
gate and up. Loops over tiles are flattened with those within a tile, so that the next tile's
operands are fetched while a tile is stored.

Tiles that a short group does not fill are the price: on average half a tile a group.

Shape letters: G groups, N rows, D and F widths. No function of Triton's own library is called;
`rows.py` says why.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .tables import remember, to_device

_WRAP = 2**30  # rows that a clipped descriptor spans; 2**34 times as many bytes are 0 mod 2**64
_MOST = 2**31 - 2**16
_STRIDE_BYTES = 2**40  # strides of a descriptor are less than this


@triton.jit
def _tile_at(tile, num_rows, num_columns, BAND: tl.constexpr):
    """Row and column of a tile, in bands of BAND rows, column by column within a band: tiles that
    run at the same time form a block, and share what they read."""
    band = tile // (BAND * num_columns)
    within = tile % (BAND * num_columns)
    height = num_rows - band * BAND
    height = tl.where(height < BAND, height, BAND)
    return band * BAND + within % height, within // height


@triton.jit
def _store_clipped(target, value, row, stop, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store rows `row`, `row + 1`, ... as far as they lie before `stop`; see `clipped`."""
    wrap: tl.constexpr = 1073741824
    value = value.to(target.dtype).reshape([1, 1, ROWS, COLUMNS])
    target.store([wrap, stop, wrap - stop + row, column], value)


# The counts are other numbers at nearly every call: specialising would only compile anew.
@triton.jit(do_not_specialize=["num_row_tiles", "num_column_tiles", "steps"])
def _product_kernel(
    rows,
    more_rows,
    matrices,
    more_matrices,
    out,
    tiles_ptr,
    num_row_tiles,
    num_column_tiles,
    steps,
    TRANSPOSE: tl.constexpr,
    SUM_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    tl.assume(steps > 0)
    half: tl.constexpr = BLOCK_N // 2
    num_tiles = num_row_tiles * num_column_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row_tile, column_tile = _tile_at(tile, num_row_tiles, num_column_tiles, BAND)
        group = tl.load(tiles_ptr + 3 * row_tile)
        row = tl.load(tiles_ptr + 3 * row_tile + 1)
        stop = tl.load(tiles_ptr + 3 * row_tile + 2)
        column = column_tile * BLOCK_N
        total = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
        for step in range(steps * (2 if SUM_OF_TWO else 1)):
            left = rows
            right = matrices
            k = step * BLOCK_K
            if SUM_OF_TWO:
                if step >= steps:
                    left = more_rows
                    right = more_matrices
                    k = (step - steps) * BLOCK_K
            a = left.load([row, k])
            if TRANSPOSE:
                b = right.load([group, column, k]).reshape([BLOCK_N, BLOCK_K]).T
            else:
                b = right.load([group, k, column]).reshape([BLOCK_K, BLOCK_N])
            total = tl.dot(a, b, total)
        # In halves: what passes through shared memory leaves room for another stage of operands.
        first, second = total.reshape([BLOCK_M, 2, half]).permute(0, 2, 1).split()
        _store_clipped(out, first, row, stop, column, BLOCK_M, half)
        _store_clipped(out, second, row, stop, column + half, BLOCK_M, half)


@triton.jit(do_not_specialize=["num_row_tiles", "num_column_tiles", "steps"])
def _gate_up_kernel(
    rows,
    matrices,
    first_out,
    second_out,
    tiles_ptr,
    num_row_tiles,
    num_column_tiles,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    tl.assume(steps > 0)
    num_tiles = num_row_tiles * num_column_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row_tile, column_tile = _tile_at(tile, num_row_tiles, num_column_tiles, BAND)
        group = tl.load(tiles_ptr + 3 * row_tile)
        row = tl.load(tiles_ptr + 3 * row_tile + 1)
        stop = tl.load(tiles_ptr + 3 * row_tile + 2)
        column = column_tile * BLOCK_N
        total = tl.full([BLOCK_M, 2 * BLOCK_N], 0.0, tl.float32)
        for step in range(steps):
            k = step * BLOCK_K
            b = matrices.load([0, group, column, k]).reshape([2 * BLOCK_N, BLOCK_K]).T
            total = tl.dot(rows.load([row, k]), b, total)
        first, second = total.reshape([BLOCK_M, 2, BLOCK_N]).permute(0, 2, 1).split()
        _store_clipped(first_out, first, row, stop, column, BLOCK_M, BLOCK_N)
        _store_clipped(second_out, second, row, stop, column, BLOCK_M, BLOCK_N)


@remember
def row_tiles(counts: Sequence[int], block: int, device: torch.device) -> torch.Tensor:
    """Group, first row and the group's end for each tile of `block` rows, int32 [tiles, 3]."""
    # NumPy, as torch's repeat_interleave would wake all threads of the host for it.
    counts_G = np.array(counts, dtype=np.int64)
    stops_G = counts_G.cumsum()
    tiles_G = (counts_G + (block - 1)) // block
    group = np.repeat(np.arange(len(counts)), tiles_G)
    nth = np.arange(len(group)) - (tiles_G.cumsum() - tiles_G)[group]
    row = (stops_G - counts_G)[group] + nth * block
    return to_device(np.stack((group, row, stops_G[group]), axis=1).astype(np.int32), device)


def plain(x: torch.Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A descriptor of the whole tensor; what lies outside reads as zero."""
    return TensorDescriptor.from_tensor(x, list(block))


def clipped(x_ND: torch.Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A descriptor with which an access names the row where it ends, as `stop`.

    Its indices are (2**30, stop, 2**30 - stop + row, column): the third is out of range from the
    row `stop` on, and the first two make up for what was added to it. Addresses are computed modulo
    2**64, so 2**30 steps of 2**34 elements less a row are 2**30 rows backwards.
    """
    stride = x_ND.stride(0)
    shape = [_MOST, _MOST, _WRAP, x_ND.shape[1]]
    return TensorDescriptor(x_ND, shape, [2**34 - stride, stride, stride, 1], [1, 1, *block])


def can_pair(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether `pair` can describe these two."""
    distance = abs(second.data_ptr() - first.data_ptr())
    return first.stride() == second.stride() and 0 < distance < _STRIDE_BYTES


def pair(
    first: torch.Tensor, second: torch.Tensor, block: Sequence[int]
) -> tuple[TensorDescriptor, bool]:
    """One descriptor of two tensors of one layout, and whether the second one comes first in it."""
    swapped = second.data_ptr() < first.data_ptr()
    if swapped:
        first, second = second, first
    distance = (second.data_ptr() - first.data_ptr()) // first.element_size()
    shape, strides = [2, *first.shape], [distance, *first.stride()]
    return TensorDescriptor(first, shape, strides, [2, *block]), swapped

"""Grouped products whose result has one row for each input row, as persistent TMA kernels.

One program for each multiprocessor walks over tiles of the result. The host lays the tiles out, as
it knows the row counts: a table names group, first row and end of each tile of rows, so that no
program searches. Operands arrive through tensor descriptors, which on Hopper are bulk copies
(elsewhere the compiler turns them into plain loads); where a tile reaches beyond its group it reads
its neighbour's rows, which cost time and are not stored. Each program makes the descriptors for
itself: made by the host they would cost it as much again as the rest of a launch.

Two tensors of one shape can be read as one: the distance between their addresses is a stride like
any other. So a single copy brings the same tile of two matrices, and a single wide product makes
gate and up. Loops over tiles are flattened with those within a tile, so that the next tile's
operands are fetched while a tile is stored.

Tiles that a short group does not fill are the price: on average half a tile a group.

Shape letters: G groups, N rows, D and F widths. No function of Triton's own library is called;
`rows.py` says why.
"""

import torch
import triton
import triton.language as tl

_STRIDE_BYTES = 2**40  # strides of a descriptor are less than this


@triton.jit
def _plain(ptr, num_rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A descriptor of a matrix; what lies outside reads as zero."""
    return tl.make_tensor_descriptor(ptr, [num_rows, columns], [stride, 1], [ROWS, COLUMNS])


@triton.jit
def _stacked(
    ptr, num, num_rows, columns, stride, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A descriptor of `num` matrices, to access a block of one."""
    return tl.make_tensor_descriptor(
        ptr, [num, num_rows, columns], [stride, row_stride, 1], [1, ROWS, COLUMNS]
    )


@triton.jit
def _clipped(ptr, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A descriptor of a matrix with which an access names the row where it ends, as `stop`.

    Its indices are (2**30, stop, 2**30 - stop + row, column): the third is out of range from the
    row `stop` on, and the first two make up for what was added to it. Addresses are computed modulo
    2**64, so 2**30 steps of 2**34 elements less a row are 2**30 rows backwards; 2**34 times as many
    bytes are 0 modulo 2**64.
    """
    most: tl.constexpr = 2147418112  # 2**31 - 2**16
    wrap: tl.constexpr = 1073741824
    backwards = 17179869184 - stride.to(tl.int64)
    return tl.make_tensor_descriptor(
        ptr,
        [most, most, wrap, columns],
        [backwards, stride, stride, 1],
        [1, 1, ROWS, COLUMNS],
    )


@triton.jit
def _store_clipped(target, value, row, stop, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store rows `row`, `row + 1`, ... as far as they lie before `stop`; see `_clipped`."""
    wrap: tl.constexpr = 1073741824
    value = value.to(target.dtype).reshape([1, 1, ROWS, COLUMNS])
    target.store([wrap, stop, wrap - stop + row, column], value)


@triton.jit
def _tile_at(tile, num_rows, num_columns, BAND: tl.constexpr):
    """Row and column of a tile, in bands of BAND rows, column by column within a band: tiles that
    run at the same time form a block, and share what they read."""
    band = tile // (BAND * num_columns)
    within = tile % (BAND * num_columns)
    height = num_rows - band * BAND
    height = tl.where(height < BAND, height, BAND)
    return band * BAND + within % height, within // height


# Specialising on numbers, many of which are others at every call, would compile anew for each.
_NUMBERS = "num_row_tiles num_groups num_rows depth columns".split()
_NUMBERS += "row_stride distance group_stride matrix_stride".split()


@triton.jit(do_not_specialize=_NUMBERS)
def _product_kernel(
    rows_ptr,
    more_rows_ptr,
    matrices_ptr,
    more_matrices_ptr,
    out_ptr,
    tiles_ptr,
    num_row_tiles,
    num_groups,
    num_rows,
    depth,
    columns,
    row_stride,
    group_stride,
    matrix_stride,
    TRANSPOSE: tl.constexpr,
    SUM_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    half: tl.constexpr = BLOCK_N // 2
    height: tl.constexpr = BLOCK_N if TRANSPOSE else BLOCK_K
    width: tl.constexpr = BLOCK_K if TRANSPOSE else BLOCK_N
    matrix_height = columns if TRANSPOSE else depth
    matrix_width = depth if TRANSPOSE else columns
    rows = _plain(rows_ptr, num_rows, depth, row_stride, BLOCK_M, BLOCK_K)
    more_rows = rows
    if SUM_OF_TWO:
        more_rows = _plain(more_rows_ptr, num_rows, depth, row_stride, BLOCK_M, BLOCK_K)
    size = num_groups, matrix_height, matrix_width, group_stride, matrix_stride
    matrices = _stacked(matrices_ptr, *size, height, width)
    more_matrices = matrices
    if SUM_OF_TWO:
        more_matrices = _stacked(more_matrices_ptr, *size, height, width)
    out = _clipped(out_ptr, columns, columns, BLOCK_M, half)
    num_column_tiles = (columns + BLOCK_N - 1) // BLOCK_N
    steps = (depth + BLOCK_K - 1) // BLOCK_K
    tl.assume(steps > 0)
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


@triton.jit(do_not_specialize=_NUMBERS)
def _gate_up_kernel(
    rows_ptr,
    matrices_ptr,
    first_out_ptr,
    second_out_ptr,
    tiles_ptr,
    num_row_tiles,
    num_groups,
    num_rows,
    depth,
    columns,
    row_stride,
    distance: tl.int64,
    group_stride,
    matrix_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    rows = _plain(rows_ptr, num_rows, depth, row_stride, BLOCK_M, BLOCK_K)
    matrices = tl.make_tensor_descriptor(
        matrices_ptr,
        [2, num_groups, columns, depth],
        [distance, group_stride, matrix_stride, 1],
        [2, 1, BLOCK_N, BLOCK_K],
    )
    first_out = _clipped(first_out_ptr, columns, columns, BLOCK_M, BLOCK_N)
    second_out = _clipped(second_out_ptr, columns, columns, BLOCK_M, BLOCK_N)
    num_column_tiles = (columns + BLOCK_N - 1) // BLOCK_N
    steps = (depth + BLOCK_K - 1) // BLOCK_K
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


def can_pair(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether one descriptor can be of both."""
    distance = abs(second.data_ptr() - first.data_ptr())
    return first.stride() == second.stride() and 0 < distance < _STRIDE_BYTES


def can_add(*operands: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether two products can be summed: two tensors of one layout each."""
    return all(first.stride() == second.stride() for first, second in operands)

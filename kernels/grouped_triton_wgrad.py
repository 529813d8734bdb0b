"""Grouped weight gradients, `grad.T @ rows` for each group, as one persistent TMA kernel.

Tiles of one group take equally long, and those of a large group long: with one group that has all
rows, 276 tiles on 132 multiprocessors take as long as 396 would. So groups are worked on from large
to small, and the tiles of large groups that do not fill a round of all multiprocessors are cut
along the rows, as Stream-K does (arXiv 2301.03598). Each part is summed in fp32 to memory of its
own, and a second kernel adds the parts, always in the same order: the same bits on every run. The
price is that memory and the time to read it back; small groups are never cut.

Beside a transfer, which takes some of the multiprocessors, programs take the next items from a
queue, so that the others do more.

Shape letters: G groups, N rows, F and D widths. No function of Triton's own library is called;
`rows.py` says why.
"""

import torch
import triton
import triton.language as tl

from .grouped_triton_rows import _clipped, _stacked, _tile_at
from .grouped_work import Work

_HEIGHT = 16


@triton.jit
def _store_quarters(target, value, slot, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a tile to a slot, a quarter of the columns at a time to save shared memory."""
    half: tl.constexpr = BLOCK_N // 2
    quarter: tl.constexpr = BLOCK_N // 4
    left, right = value.reshape([BLOCK_M, 2, half]).permute(0, 2, 1).split()
    first, second = left.reshape([BLOCK_M, 2, quarter]).permute(0, 2, 1).split()
    target.store([slot, 0, 0], first.reshape([1, BLOCK_M, quarter]))
    target.store([slot, 0, quarter], second.reshape([1, BLOCK_M, quarter]))
    first, second = right.reshape([BLOCK_M, 2, quarter]).permute(0, 2, 1).split()
    target.store([slot, 0, half], first.reshape([1, BLOCK_M, quarter]))
    target.store([slot, 0, half + quarter], second.reshape([1, BLOCK_M, quarter]))


_NUMBERS = "num_items num_hands dealt num_rows num_columns grad_stride row_stride".split()
_NUMBERS += "num_out out_stride out_row_stride".split()


@triton.jit(do_not_specialize=_NUMBERS)
def _wgrad_kernel(
    grad_ptr,
    rows_ptr,
    out_ptr,
    items_ptr,
    segments_ptr,
    starts_ptr,
    queue_ptr,
    num_items,
    num_hands,
    dealt,
    num_rows,
    num_columns,
    grad_stride,
    row_stride,
    num_out,
    out_stride,
    out_row_stride,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    wrap: tl.constexpr = 1073741824
    half: tl.constexpr = BLOCK_N // 2
    grad = _clipped(grad_ptr, num_rows, grad_stride, BLOCK_K, BLOCK_M)
    rows = _clipped(rows_ptr, num_columns, row_stride, BLOCK_K, BLOCK_N)
    size = num_out, num_rows, num_columns, out_stride, out_row_stride
    if PARTS:
        size = num_out, BLOCK_M, BLOCK_N, out_stride, out_row_stride
    out = _stacked(out_ptr, *size, BLOCK_M, BLOCK_N // 4 if PARTS else half)
    num_row_tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    num_column_tiles = (num_columns + BLOCK_N - 1) // BLOCK_N
    # Every so manieth item, from this program's first on.
    hand = tl.program_id(0)
    first_item = hand
    end = num_items
    stride = tl.num_programs(0)
    if dealt > 0:
        hand = tl.atomic_add(queue_ptr, 1, sem="relaxed")
        stride = 1
    while hand < num_hands:
        if dealt > 0:
            first_item = tl.load(starts_ptr + hand)
            end = tl.load(starts_ptr + hand + 1)
        for item in tl.range(first_item, end, stride, flatten=True):
            segment_ptr = segments_ptr + 8 * tl.load(items_ptr + item)
            group = tl.load(segment_ptr)
            first_row = tl.load(segment_ptr + 1)
            last_row = tl.load(segment_ptr + 2)
            nth = item - tl.load(segment_ptr + 3)
            tile = tl.load(segment_ptr + 4)
            start = first_row
            stop = last_row
            if PARTS:
                parts = tl.load(segment_ptr + 6)
                part_rows = tl.load(segment_ptr + 7)
                tile += nth // parts
                start += nth % parts * part_rows
                stop = start + part_rows
                stop = tl.where(stop < last_row, stop, last_row)
            else:
                tile += nth
            row_tile, column_tile = _tile_at(tile, num_row_tiles, num_column_tiles, BAND)
            f = row_tile * BLOCK_M
            d = column_tile * BLOCK_N
            # A group without rows takes one step, in which all is out of range and reads as zero.
            steps = (stop - start + BLOCK_K - 1) // BLOCK_K
            steps = tl.where(steps > 1, steps, 1)
            tl.assume(steps > 0)
            total = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
            for step in range(steps):
                n = wrap - stop + start + step * BLOCK_K
                a = grad.load([wrap, stop, n, f]).reshape([BLOCK_K, BLOCK_M]).T
                b = rows.load([wrap, stop, n, d]).reshape([BLOCK_K, BLOCK_N])
                total = tl.dot(a, b, total)
            if PARTS:
                _store_quarters(out, total, item, BLOCK_M, BLOCK_N)
            else:
                left, right = total.reshape([BLOCK_M, 2, half]).permute(0, 2, 1).split()
                out.store([group, f, d], left.to(out.dtype).reshape([1, BLOCK_M, half]))
                out.store([group, f, d + half], right.to(out.dtype).reshape([1, BLOCK_M, half]))
        hand = num_hands
        if dealt > 0:
            hand = tl.atomic_add(queue_ptr, 1, sem="relaxed")
    if dealt > 0:
        if hand == num_hands + tl.num_programs(0) - 1:  # the last one to have asked
            tl.store(queue_ptr, 0)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "out_stride", "out_row_stride"])
def _add_parts_kernel(
    parts_ptr,
    out_ptr,
    first_items_ptr,
    items_ptr,
    segments_ptr,
    num_rows,
    num_columns,
    out_stride,
    out_row_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
    HEIGHT: tl.constexpr,
):
    """One program adds HEIGHT rows of one tile over its parts."""
    item = tl.load(first_items_ptr + tl.program_id(0))
    segment_ptr = segments_ptr + 8 * tl.load(items_ptr + item)
    group = tl.load(segment_ptr)
    parts = tl.load(segment_ptr + 6)
    tile = tl.load(segment_ptr + 4) + (item - tl.load(segment_ptr + 3)) // parts
    num_row_tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    num_column_tiles = (num_columns + BLOCK_N - 1) // BLOCK_N
    row_tile, column_tile = _tile_at(tile, num_row_tiles, num_column_tiles, BAND)
    row = (tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT))[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    within = row * BLOCK_N + column
    part_ptr = parts_ptr + item.to(tl.int64) * (BLOCK_M * BLOCK_N)
    total = tl.full([HEIGHT, BLOCK_N], 0.0, tl.float32)
    for _ in range(parts):
        total += tl.load(part_ptr + within)
        part_ptr += BLOCK_M * BLOCK_N
    row += row_tile * BLOCK_M
    column += column_tile * BLOCK_N
    to_ptr = out_ptr + group.to(tl.int64) * out_stride + row.to(tl.int64) * out_row_stride + column
    tl.store(to_ptr, total, mask=(row < num_rows) & (column < num_columns))


def add_parts(
    parts: torch.Tensor,
    out_GFD: torch.Tensor,
    cut: Work,
    band: int,
) -> None:
    """Add the parts of each tile and write them where they belong.

    Args:
        parts: fp32 [items, block_m, block_n].
        out_GFD: the result.
        cut: the work in parts.
        band: of the tiling.
    """
    _, block_m, block_n = parts.shape
    _add_parts_kernel[(cut.num_cut_tiles, block_m // _HEIGHT)](
        *(parts, out_GFD, cut.first_items, cut.segment_of_item, cut.segments),
        *(*out_GFD.shape[1:], *out_GFD.stride()[:2]),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BAND=band,
        HEIGHT=_HEIGHT,
    )

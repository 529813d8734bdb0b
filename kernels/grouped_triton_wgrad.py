"""Grouped weight gradients, `grad.T @ rows` for each group, as one persistent TMA kernel.

Tiles of one group take equally long, and those of a large group long: with one group that has all
rows, 276 tiles on 132 multiprocessors take as long as 396 would. So groups are worked on from large
to small, and the tiles of large groups that do not fill a round of all multiprocessors are cut
along the rows, as Stream-K does (arXiv 2301.03598). Each part is summed in fp32 to memory of its
own, and a second kernel adds the parts, always in the same order: the same bits on every run. The
price is that memory and the time to read it back; small groups are never cut.

Shape letters: G groups, N rows, F and D widths. No function of Triton's own library is called;
`rows.py` says why.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .grouped_triton_rows import _tile_at
from .tables import all_to_device, remember

# What a part costs beside its rows, in steps: writing 128 KB of fp32 and reading it back.
_PART_OVERHEAD = 8
_MOST_PARTS = 16
_TILES_PER_PROGRAM = 16
_ALIKE = 0.9
# Dealt items, a program gets one long one, or short ones in a row until it has so many steps: more
# would be further apart from those that run at the same time, and share less of what they read;
# with fewer, programs fill their pipelines more often.
_STEPS_OF_A_HAND = 64
_MOST_OF_A_HAND = 16
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


@triton.jit
def _walk(starts_ptr, num_items, dealt):
    """This program's items: where they start and end, and the step from one to the next.

    Every so manieth item, from its first on; or, dealt, some in a row, for more programs than run
    at a time.
    """
    program = tl.program_id(0)
    start = tl.load(starts_ptr + program, mask=dealt > 0, other=0)
    end = tl.load(starts_ptr + program + 1, mask=dealt > 0, other=0)
    start = tl.where(dealt > 0, start, program)
    end = tl.where(dealt > 0, end, num_items)
    return start, end, tl.where(dealt > 0, 1, tl.num_programs(0))


@triton.jit(do_not_specialize=["num_items", "num_row_tiles", "num_column_tiles", "dealt"])
def _wgrad_kernel(
    grad,
    rows,
    out,
    items_ptr,
    segments_ptr,
    starts_ptr,
    num_items,
    num_row_tiles,
    num_column_tiles,
    dealt,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    wrap: tl.constexpr = 1073741824
    half: tl.constexpr = BLOCK_N // 2
    first_item, end, stride = _walk(starts_ptr, num_items, dealt)
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


@triton.jit(do_not_specialize=["num_row_tiles", "num_column_tiles"])
def _add_parts_kernel(
    parts_ptr,
    out,
    first_items_ptr,
    items_ptr,
    segments_ptr,
    num_row_tiles,
    num_column_tiles,
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
    row_tile, column_tile = _tile_at(tile, num_row_tiles, num_column_tiles, BAND)
    row = tl.program_id(1) * HEIGHT
    within = (row + tl.arange(0, HEIGHT))[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    part_ptr = parts_ptr + item.to(tl.int64) * (BLOCK_M * BLOCK_N)
    total = tl.full([HEIGHT, BLOCK_N], 0.0, tl.float32)
    for _ in range(parts):
        total += tl.load(part_ptr + within)
        part_ptr += BLOCK_M * BLOCK_N
    value = total.to(out.dtype).reshape([1, HEIGHT, BLOCK_N])
    out.store([group, row_tile * BLOCK_M + row, column_tile * BLOCK_N], value)


class Segment(NamedTuple):
    """Consecutive items of work: tiles of one group, each in `parts` parts of `part_rows` rows."""

    group: int
    first_row: int
    last_row: int
    first_item: int
    first_tile: int
    num_tiles: int
    parts: int
    part_rows: int


class Work(NamedTuple):
    """Items in the order in which they are taken: program p takes p, p + programs, ..., or what it
    is dealt. Segments are int32 [S, 8], each row a `Segment`."""

    segments: np.ndarray
    num_items: int


class WorkTables(NamedTuple):
    """`Work` as kernels read it, int32 on the device."""

    num_items: int
    segment_of_item: torch.Tensor
    segments: torch.Tensor
    first_items: torch.Tensor
    """The first item of each tile that is in parts."""
    starts: torch.Tensor
    """Where programs start that are dealt items in a row, and where the last one ends."""


@remember
def scheduled(
    counts: Sequence[int], tiles: int, block_k: int, programs: int, device: torch.device
) -> list[WorkTables]:
    """What `schedule` finds, on the device."""
    found = []
    for segments, num_items in schedule(counts, tiles, block_k, programs):
        if not num_items:
            found.append(WorkTables(0, *[torch.empty(0, dtype=torch.int32)] * 4))
            continue
        _, first, last, _, _, tiles_of, parts_of, part_rows = segments.T
        # NumPy, as torch's repeat_interleave would wake all threads of the host for it.
        segment_of_item = np.repeat(np.arange(len(segments), dtype=np.int32), tiles_of * parts_of)
        parts = np.repeat(parts_of, np.where(parts_of > 1, tiles_of, 0))
        first_items = parts.cumsum(dtype=np.int32) - parts
        steps = np.maximum(-(-np.minimum(last - first, part_rows) // block_k), 1)
        starts = _deal(tiles_of * parts_of, steps)
        tables = segment_of_item, segments, first_items, starts
        found.append(WorkTables(num_items, *all_to_device(tables, device)))
    return found


def _deal(items: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Where programs start, for segments of so many items that take so many steps each."""
    hand = np.clip(_STEPS_OF_A_HAND // steps, 1, _MOST_OF_A_HAND)
    hands = -(-items // hand)
    nth = np.arange(hands.sum()) - np.repeat(hands.cumsum() - hands, hands)
    starts = np.repeat(items.cumsum() - items, hands) + nth * np.repeat(hand, hands)
    return np.concatenate((starts, items.sum(keepdims=True))).astype(np.int32)


def schedule(counts: Sequence[int], tiles: int, block_k: int, programs: int) -> tuple[Work, Work]:
    """What is computed whole and what in parts; in NumPy, as every micro-batch waits for it.

    Args:
        counts: rows of each group.
        tiles: tiles of each group's result.
        block_k: rows of one step.
        programs: how many run at the same time.
    """
    counts_G = np.array(counts, dtype=np.int64)
    group = np.argsort(-counts_G, kind="stable")
    counts_G, last_row = counts_G[group], counts_G.cumsum()[group]
    steps_G = np.maximum(-(-counts_G // block_k), 1)
    # A tile is long if one more on a program shows in the time of the whole.
    long = max(int(steps_G.sum()) * tiles // (programs * _TILES_PER_PROGRAM), 2 * _PART_OVERHEAD)
    cut_G, parts_G = np.zeros_like(counts_G), np.ones_like(counts_G)
    start = 0
    while start < len(group) and (steps := int(steps_G[start])) > long:
        # Groups of about one size fill rounds of all programs together.
        stop = start + int(np.count_nonzero(steps_G[start:] >= _ALIKE * steps))
        left_over = (stop - start) * tiles % programs
        parts = _best_parts(left_over, steps, programs)
        if parts > 1:
            for place in reversed(range(start, stop)):
                cut_G[place] = min(left_over, tiles)
                left_over -= cut_G[place]
            parts_G[start:stop] = parts
        start = stop

    def work(first_tile: np.ndarray, num_tiles: np.ndarray, parts: np.ndarray) -> Work:
        items = num_tiles * parts
        part_rows = -(-steps_G // parts) * block_k
        of_group = group, last_row - counts_G, last_row, items.cumsum() - items
        columns = np.stack((*of_group, first_tile, num_tiles, parts, part_rows), axis=1)
        segments = columns.astype(np.int32)[num_tiles > 0]
        return Work(segments, int(items.sum()))

    whole_G = tiles - cut_G
    return work(cut_G * 0, whole_G, parts_G * 0 + 1), work(whole_G, cut_G, parts_G)


def _best_parts(tiles: int, steps: int, programs: int) -> int:
    """Into how many parts to cut each of these tiles, so that they are done soonest."""

    def time(parts: int) -> int:
        overhead = _PART_OVERHEAD if parts > 1 else 0
        return -(-tiles * parts // programs) * (-(-steps // parts) + overhead)

    return min(range(1, _MOST_PARTS + 1), key=time)


def add_parts(
    parts: torch.Tensor,
    out_GFD: torch.Tensor,
    cut: WorkTables,
    grid: tuple[int, int],
    band: int,
) -> None:
    """Add the parts of each tile and write them where they belong.

    Args:
        parts: fp32 [items, block_m, block_n].
        out_GFD: the result.
        cut: the work in parts.
        grid: tiles along F and along D.
        band: of the tiling.
    """
    _, block_m, block_n = parts.shape
    _add_parts_kernel[(len(cut.first_items), block_m // _HEIGHT)](
        *(parts, TensorDescriptor.from_tensor(out_GFD, [1, _HEIGHT, block_n])),
        *(cut.first_items, cut.segment_of_item, cut.segments, *grid),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BAND=band,
        HEIGHT=_HEIGHT,
    )

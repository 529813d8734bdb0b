"""How the work of grouped products is laid out, as tables for their kernels (grouped_work.c).

The host knows the row counts, so no program has to search; in C, as every micro-batch waits for it.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .compiled import compiled
from .tables import remember, to_device

_COUNTS, _TABLES = 4, 5  # of `Work`, in this order


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
    is dealt. The tables are int32 on the device, and a little longer than what is in use."""

    num_items: int
    num_segments: int
    num_cut_tiles: int
    num_hands: int
    """Items in a row that are dealt together."""
    segment_of_item: torch.Tensor
    segments: torch.Tensor
    """A `Segment` after the other."""
    first_items: torch.Tensor
    """The first item of each tile that is in parts."""
    starts: torch.Tensor
    """Where each hand begins, and where the last one ends."""
    queue: torch.Tensor
    """How many hands have been dealt; zero before and after each launch."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        ValueError: there is no C compiler, or it failed.
    """
    instead = 'set "llep.kernels" to "torch"'
    loaded = compiled("the layout of grouped products", ["grouped_work.c"], instead)
    size, array = ctypes.c_int64, ctypes.c_void_p
    loaded.row_tiles.argtypes = (size, array, size, array)
    loaded.row_tiles.restype = size
    loaded.schedule.argtypes = (size, array, size, size, size, array, array)
    loaded.schedule.restype = ctypes.c_int
    return loaded


@remember
def row_tiles(counts: Sequence[int], block: int, device: torch.device) -> torch.Tensor:
    """Group, first row and the group's end for each tile of `block` rows, int32 [tiles, 3]."""
    counts_G = np.array(counts, dtype=np.int64)
    found = np.empty((sum(counts) // block + len(counts), 3), dtype=np.int32)
    tiles = library().row_tiles(len(counts), counts_G.ctypes.data, block, found.ctypes.data)
    return to_device(found[:tiles], device)


@remember
def schedule(
    counts: Sequence[int], tiles: int, block_k: int, programs: int, device: torch.device
) -> list[Work]:
    """What is computed whole and what in parts of the tiles of weight gradients.

    Args:
        counts: rows of each group.
        tiles: tiles of each group's result.
        block_k: rows of one step.
        programs: how many run at the same time.
        device: where the tables go, in a single copy.
    """
    counts_G = np.array(counts, dtype=np.int64)
    numbers = np.empty((2, _COUNTS + _TABLES), dtype=np.int64)
    arguments = len(counts), counts_G.ctypes.data, tiles, block_k, programs, numbers.ctypes.data
    _run(library().schedule, *arguments, None)  # how large the tables are
    whole, cut = numbers.tolist()
    sizes = whole[_COUNTS:] + cut[_COUNTS:]
    found = np.zeros(sum(sizes), dtype=np.int32)
    _run(library().schedule, *arguments, found.ctypes.data)
    tables = to_device(found, device).split(sizes)
    return [
        Work(*whole[:_COUNTS], *tables[:_TABLES]),
        Work(*cut[:_COUNTS], *tables[_TABLES:]),
    ]


def _run(function: Callable[..., int], *args: object) -> None:
    if function(*args):
        raise MemoryError("no memory to lay out the work of grouped products")

"""Memory for foreign experts: one workspace a process, and who lies where in everybody's.

All matrices of an expert travel as one *bundle*, a row of a ``[experts, numel]`` buffer, so that
nothing is written once per matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True)
class BundleLayout:
    """How the matrices of one expert lie in a bundle: one after the other."""

    shapes: tuple[torch.Size, ...]

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each matrix."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def numel(self) -> int:
        return sum(self.numels)

    def of(self, matrices: Sequence[int]) -> BundleLayout:
        """The layout of bundles with these matrices only."""
        return BundleLayout(tuple(self.shapes[matrix] for matrix in matrices))

    def views(self, bundles: torch.Tensor) -> list[torch.Tensor]:
        """``[n, numel]`` as one ``[n, ., .]`` view for each matrix."""
        parts, count = bundles.split_with_sizes(self.numels, dim=1), len(bundles)
        return [part.view(count, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Workspace:
    """Scratch memory for foreign weights, one per process and shared by all layers and engines."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, torch.Tensor] = {}
        self._claimed_by: Any = None
        self.in_flight: list[tuple[list[Any], list[Any]]] = []
        """Works that may still write here, each with what it must not outlive."""

    def claim(self, claimant: Any) -> bool:
        """Whether somebody else has had the workspace since ``claimant`` last claimed it."""
        changed, self._claimed_by = self._claimed_by != claimant, claimant
        return changed

    def view(self, rows: int, numel: int, like: torch.Tensor) -> torch.Tensor:
        """``[rows, numel]`` of ``like``'s dtype on its device; old content where that is no larger
        than what was asked for before, else uninitialised.
        """
        nbytes = rows * numel * like.element_size()
        buffer = self._buffers.get(like.device)
        if buffer is None or buffer.numel() < nbytes:
            # Freed first: old and new workspace never exist at the same time.
            self._buffers.pop(like.device, None)
            del buffer
            with torch.inference_mode(False):  # it outlives the inference mode it may be made in
                buffer = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
            self._buffers[like.device] = buffer
        return buffer[:nbytes].view(like.dtype).view(rows, numel)

    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


WORKSPACE = Workspace()


class Directory:
    """Which foreign experts lie where in one rank's workspace: a ring, first in, first out.

    Senders must know what a helper still has. So every rank keeps a directory of every helper it
    may send to, fed with the same plans in the same order, and nothing needs to be said.

    The experts that are not there yet get places in a row, where their GEMMs want them.
    """

    def __init__(self, size: int | None) -> None:
        """``size`` places; None: as many as one layer ever asked for."""
        self._grows = size is None
        self._set_size(size or 0)

    def _set_size(self, size: int) -> None:
        self.size = size
        self._occupant: list[tuple[int, int] | None] = [None] * size
        self._place_of: dict[tuple[int, int], int] = {}
        self._next = 0

    def place(self, layer: int, experts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Find room for all foreign experts of one layer at once.

        Returns:
            Their places, in the order of ``experts``; and (expert, place) of those that are not
            there yet.
        """
        if len(experts) > self.size:
            assert self._grows, f"{len(experts)} foreign experts in a workspace for {self.size}"
            self._set_size(len(experts))
        keys = [(layer, expert) for expert in experts]
        present = {self._place_of[key] for key in keys if key in self._place_of}
        start = self._find_room(len(keys) - len(present), present)
        if start is None:  # those that are there stand in the way: fetch all, in a row
            self.forget(lambda key: key in keys)
            start = self._find_room(len(keys), set())
        missing = [key for key in keys if key not in self._place_of]
        for place, key in enumerate(missing, start):
            self._place_of.pop(self._occupant[place], None)
            self._occupant[place], self._place_of[key] = key, place
        if missing:
            self._next = start + len(missing)
        places = [self._place_of[key] for key in keys]
        return places, [(key[1], self._place_of[key]) for key in missing]

    def forget(self, which=lambda key: True) -> None:
        """Drop the (layer, expert) pairs that ``which`` accepts."""
        for key in list(filter(which, self._place_of)):
            self._occupant[self._place_of.pop(key)] = None

    def _find_room(self, count: int, taken: set[int]) -> int | None:
        """The first of ``count`` places in a row without a taken one, from the next one around."""
        last = self.size - count
        starts = [*range(self._next, last + 1), *range(min(self._next, last + 1))]
        for start in starts:
            if taken.isdisjoint(range(start, start + count)):
                return start
        return None

"""Seconds of the single steps that a layer is made of: products, passes over rows, transfers.

A product over groups of rows is counted in whole tiles, as a GPU computes it: a group of 130 rows
costs two tiles of 128. A gradient of weights sums over the rows, so its tiles take as long as the
group has rows, and while the last ones of the largest group run, other processors idle. That, and
the time to read or write each matrix once, is all that the model knows of a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ds_llep.bench.machine import Machine, seconds
from ds_llep.bench.shapes import Shape

_TAIL = 0.5  # of the largest group's last tiles, how much finds no company: between none and all


class Products(NamedTuple):
    """Seconds by rank ``[P]`` of the products of some experts."""

    forward: np.ndarray
    hidden: np.ndarray
    """Backward up to the gradients of the rows, and the gradient of w2."""
    gate_up: np.ndarray
    """Backward: the gradients of w1 and w3."""


class Kernels:
    """Work within a rank, for one shape in one dtype."""

    def __init__(self, machine: Machine, shape: Shape, element_size: int) -> None:
        self._machine, self._shape, self.element_size = machine, shape, element_size
        self.row_bytes = shape.hidden_size * element_size
        self.expert_bytes = shape.expert_numel * element_size

    def passes(self, nbytes: np.ndarray | float) -> np.ndarray:
        """Seconds to read and write so many bytes, counted together."""
        return np.asarray(nbytes) / self._machine.memory_rate

    def activation(self, rows_P: np.ndarray) -> np.ndarray:
        """Seconds of SwiGLU in forward: gate and up read, one result written."""
        return self.passes(3 * rows_P * self._shape.ffn_size * self.element_size)

    def kept_bytes(self, rows_P: np.ndarray) -> np.ndarray:
        """Of dispatched rows, gate and up."""
        return rows_P * (self.row_bytes + 2 * self._shape.ffn_size * self.element_size)

    def products(self, rows_GP: np.ndarray, exist_GP: np.ndarray) -> Products:
        """Of groups of rows.

        Args:
            rows_GP: rows of each group on each rank.
            exist_GP: bool, the groups whose weight gradients are written, with rows or without.
        """
        D, F = self._shape.hidden_size, self._shape.ffn_size
        up, down = self._product(rows_GP, F, D), self._product(rows_GP, D, F)
        gradient = self._gradient(rows_GP, exist_GP, F, D)
        return Products(
            2 * up + down, up + 2 * down + self._gradient(rows_GP, exist_GP, D, F), 2 * gradient
        )

    def even_products(self, rows: float, groups: float, num_ranks: int) -> Products:
        """Of so many rows on each rank, if each ran at the best rate and nothing was padded."""
        D, F = self._shape.hidden_size, self._shape.ffn_size
        best = max(rate for _, rate in self._machine.grouped_rate)
        read = self.passes(groups * D * F * self.element_size)
        one = np.full(num_ranks, 2 * rows * D * F / best + read)
        return Products(3 * one, 4 * one, 2 * one)

    def _product(self, rows_GP: np.ndarray, width: int, depth: int) -> np.ndarray:
        """``[P]``: ``[rows, depth]`` by ``[depth, width]`` in each group."""
        high, wide = self._machine.tile
        flop_GP = 2.0 * _whole(rows_GP, high) * _whole(width, wide) * depth
        read = self.passes(width * depth * self.element_size)
        return (flop_GP / self._rate(rows_GP) + (rows_GP > 0) * read).sum(0)

    def _gradient(
        self, rows_GP: np.ndarray, exist_GP: np.ndarray, height: int, width: int
    ) -> np.ndarray:
        """``[P]``: ``[height, rows]`` by ``[rows, width]`` in each group."""
        high, wide = self._machine.tile
        rate_GP = self._rate(rows_GP)
        flop_GP = 2.0 * rows_GP * _whole(height, high) * _whole(width, wide)
        written = self.passes(height * width * self.element_size)
        tail_GP = 2.0 * rows_GP * high * wide / (rate_GP / self._machine.processors)
        tail_P = _TAIL * tail_GP.max(axis=0, initial=0)
        return (flop_GP / rate_GP + exist_GP * written).sum(0) + tail_P

    def _rate(self, rows_GP: np.ndarray) -> np.ndarray:
        rows, rates = zip(*self._machine.grouped_rate, strict=True)
        return np.interp(np.log(np.maximum(rows_GP, 1)), np.log(rows), rates)


class Links:
    """Transfers between the ranks of an EP group, of which each node holds a run."""

    def __init__(self, machine: Machine, num_ranks: int, ranks_per_node: int | None) -> None:
        self._machine = machine
        node_P = np.arange(num_ranks) // (ranks_per_node or machine.ranks_per_node)
        self._inside_PP = node_P[:, None] == node_P
        self._between_PP = ~self._inside_PP
        np.fill_diagonal(self._inside_PP, False)
        self._spans_nodes = bool(self._between_PP.any())

    @property
    def latency(self) -> float:
        """Seconds until the host has what a small all-gather brings."""
        return self._machine.latency_between if self._spans_nodes else self._machine.latency_inside

    def crossing(self, bytes_PP: np.ndarray) -> tuple[float, float]:
        """Bytes between ranks of one node, and between ranks of two."""
        inside, between = bytes_PP[self._inside_PP].sum(), bytes_PP[self._between_PP].sum()
        return float(inside), float(between)

    def all_to_all(self, bytes_PP: np.ndarray) -> float:
        """Seconds of an all-to-all: the busiest rank's, be it at sending, receiving or copying."""
        machine = self._machine
        links_P = self._busiest(bytes_PP, machine.all_to_all_inside, machine.all_to_all_between)
        return float(np.maximum(links_P, bytes_PP.diagonal() / machine.local_rate).max())

    def transfer(self, bytes_PP: np.ndarray) -> np.ndarray:
        """``[P]``: seconds of point-to-point transfers."""
        machine = self._machine
        return self._busiest(
            bytes_PP, machine.point_to_point_inside, machine.point_to_point_between
        )

    def _busiest(self, bytes_PP: np.ndarray, inside, between) -> np.ndarray:
        took_P = np.zeros(len(bytes_PP))
        for which_PP, points in ((self._inside_PP, inside), (self._between_PP, between)):
            crossing_PP = np.where(which_PP, bytes_PP, 0)
            for axis in (0, 1):
                took_P = np.maximum(took_P, seconds(points, crossing_PP.sum(axis)))
        return took_P


def _whole(amount, size: int):
    return np.ceil(np.asarray(amount) / size) * size

"""Low-rank factors beside a grouped product: ``b a x`` for each group's rows, forward and backward.

The sum of a matrix and its factors' product is never made: rows go through the ``r`` columns of
``a`` and on through ``b``. What lies between them is computed again for backward, which costs next
to nothing beside the matrix itself. The price: two more products, each added in a pass of its own.

Shapes: ``G`` experts, ``N`` rows, ``I`` input size, ``O`` output size, ``r`` rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from ds_llep.kernels.select import KernelSet


@dataclass(frozen=True)
class Factors:
    """``scale * b a`` for one matrix of each expert, or for several that share ``a``."""

    a_GrI: torch.Tensor
    b_GOr: Sequence[torch.Tensor]
    """One for each matrix."""
    scale: float
    counts: Sequence[int]
    """Rows of each group."""
    kernels: KernelSet

    def project(self, rows_NI: torch.Tensor) -> torch.Tensor:
        """``scale * a x``, ``[N, r]``: what lies between the factors."""
        return self.kernels.product(rows_NI, self.a_GrI, self.counts).mul_(self.scale)

    def add_to(self, outputs: Sequence[torch.Tensor], rows_NI: torch.Tensor) -> None:
        """Add ``scale * b a x`` to each matrix's output ``[N, O]``, in place."""
        inner_Nr = self.project(rows_NI)
        for out_NO, b_GOr in zip(outputs, self.b_GOr, strict=True):
            out_NO += self.kernels.product(inner_Nr, b_GOr, self.counts)

    def project_back(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """``scale * bᵀ g``, summed over the matrices, ``[N, r]``, from each output's gradient."""
        first, *others = zip(grads, self.b_GOr, strict=True)
        grad_Nr = self.kernels.product(*first, self.counts, transpose=False)
        for grad_NO, b_GOr in others:
            grad_Nr += self.kernels.product(grad_NO, b_GOr, self.counts, transpose=False)
        return grad_Nr.mul_(self.scale)

    def add_row_gradient(self, grad_NI: torch.Tensor, grad_Nr: torch.Tensor) -> None:
        """Add the part of the rows' gradient that comes through ``a``, in place.

        Args:
            grad_NI: the gradient of the rows so far.
            grad_Nr: as :meth:`project_back` gave it.
        """
        grad_NI += self.kernels.product(grad_Nr, self.a_GrI, self.counts, transpose=False)

    def gradients(
        self,
        rows_NI: torch.Tensor,
        grads: Sequence[torch.Tensor],
        grad_Nr: torch.Tensor,
        memory: Iterable[torch.Tensor | None],
    ) -> list[torch.Tensor]:
        """Gradients of ``a`` and of each ``b``.

        Args:
            rows_NI: the input.
            grads: of each output, ``[N, O]``.
            grad_Nr: as :meth:`project_back` gave it.
            memory: where they go, one for each; None: new memory.
        """
        inner_Nr = self.project(rows_NI)
        pairs = [(grad_Nr, rows_NI), *((grad_NO, inner_Nr) for grad_NO in grads)]
        gradient = self.kernels.gradient_of_weights
        return [
            gradient(*pair, self.counts, out)
            for pair, out in zip(pairs, islice(memory, len(pairs)), strict=True)
        ]

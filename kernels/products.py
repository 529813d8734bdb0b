"""The matrix products of the experts, each as what is fastest where it runs.

`grouped_gemm.py` has them from PyTorch, for every device and dtype. On Hopper and for 16-bit dtypes
`grouped_triton.py` fuses them: gate, up and SwiGLU in one kernel, both gradients of the rows into
one sum, weight gradients without regard to the size of a group. Which of them is used was measured
(docs/performance.md).

Shape letters: G groups, N rows, D hidden size, F expert FFN size.
"""

from collections.abc import Sequence

import torch

from . import grouped_triton
from .grouped_gemm import gradient_of_rows as _gradient_of_rows
from .grouped_gemm import grouped_gemm, grouped_gemm_weight_gradient
from .grouped_triton_rows import can_pair
from .swiglu import swiglu_forward

FUSED = {"gate_up_swiglu", "gradient_of_rows", "gradient_of_weights", "product"}


def gate_up_swiglu(
    rows_ND: torch.Tensor,
    w1_GFD: torch.Tensor,
    w3_GFD: torch.Tensor,
    counts: Sequence[int],
    weight_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.gate_up_swiglu`."""
    if _fused("gate_up_swiglu", rows_ND, w1_GFD, w3_GFD) and can_pair(w1_GFD, w3_GFD):
        return grouped_triton.gate_up(
            rows_ND, w1_GFD, w3_GFD, counts, swiglu=True, scale_N=weight_N
        )
    gate_NF, up_NF = (grouped_gemm(rows_ND, weights, counts) for weights in (w1_GFD, w3_GFD))
    return gate_NF, up_NF, swiglu_forward(gate_NF, up_NF, weight_N)


def product(
    rows_ND: torch.Tensor, weights_GFD: torch.Tensor, counts: Sequence[int], transpose: bool = True
) -> torch.Tensor:
    """As `grouped_gemm`."""
    if _fused("product", rows_ND, weights_GFD):
        return grouped_triton.product(rows_ND, weights_GFD, counts, transpose)
    return grouped_gemm(rows_ND, weights_GFD, counts, transpose)


def gradient_of_rows(
    grad_gate_NF: torch.Tensor,
    w1_GFD: torch.Tensor,
    grad_up_NF: torch.Tensor,
    w3_GFD: torch.Tensor,
    counts: Sequence[int],
) -> torch.Tensor:
    """As `grouped_gemm.gradient_of_rows`."""
    if _fused("gradient_of_rows", grad_gate_NF, w1_GFD, grad_up_NF, w3_GFD):
        return grouped_triton.dgrad(grad_gate_NF, w1_GFD, grad_up_NF, w3_GFD, counts)
    return _gradient_of_rows(grad_gate_NF, w1_GFD, grad_up_NF, w3_GFD, counts)


def gradient_of_weights(
    grad_NF: torch.Tensor, rows_ND: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor:
    """As `grouped_gemm_weight_gradient`."""
    if _fused("gradient_of_weights", grad_NF, rows_ND):
        return grouped_triton.wgrad(grad_NF, rows_ND, counts)
    return grouped_gemm_weight_gradient(grad_NF, rows_ND, counts)


def _fused(name: str, *operands: torch.Tensor) -> bool:
    first = operands[0]
    return (
        name in FUSED
        and first.is_cuda
        and torch.cuda.get_device_capability(first.device)[0] == 9
        and grouped_triton.supported(*operands)
    )

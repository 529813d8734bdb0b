"""The matrix products of the experts, each as what is fastest where it runs.

`grouped_gemm.py` has them from PyTorch, for every device and dtype. On Hopper and for 16-bit dtypes
`grouped_triton.py` fuses them, and is faster for all of them (docs/performance.md).

Shape letters: G groups, N rows, D hidden size, F expert FFN size.
"""

import functools
from collections.abc import Sequence

import torch

from . import grouped_gemm, grouped_triton, grouped_work


def gate_up(
    rows_ND: torch.Tensor, w1_GFD: torch.Tensor, w3_GFD: torch.Tensor, counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `grouped_gemm.gate_up`."""
    storable = grouped_triton.can_store(w1_GFD.shape[1], rows_ND.dtype)
    if storable and _fused(rows_ND, w1_GFD, w3_GFD) and grouped_triton.can_pair(w1_GFD, w3_GFD):
        return grouped_triton.gate_up(rows_ND, w1_GFD, w3_GFD, counts)
    return grouped_gemm.gate_up(rows_ND, w1_GFD, w3_GFD, counts)


def product(
    rows_ND: torch.Tensor, weights_GFD: torch.Tensor, counts: Sequence[int], transpose: bool = True
) -> torch.Tensor:
    """As `grouped_gemm.grouped_gemm`."""
    columns = weights_GFD.shape[1 if transpose else 2]
    if _fused(rows_ND, weights_GFD) and grouped_triton.can_store(columns, rows_ND.dtype):
        return grouped_triton.product(rows_ND, weights_GFD, counts, transpose)
    return grouped_gemm.grouped_gemm(rows_ND, weights_GFD, counts, transpose)


def gradient_of_rows(
    grad_gate_NF: torch.Tensor,
    w1_GFD: torch.Tensor,
    grad_up_NF: torch.Tensor,
    w3_GFD: torch.Tensor,
    counts: Sequence[int],
) -> torch.Tensor:
    """As `grouped_gemm.gradient_of_rows`."""
    alike = grouped_triton.can_add((grad_gate_NF, grad_up_NF), (w1_GFD, w3_GFD))
    if alike and _fused(grad_gate_NF, w1_GFD, grad_up_NF, w3_GFD):
        return grouped_triton.dgrad(grad_gate_NF, w1_GFD, grad_up_NF, w3_GFD, counts)
    return grouped_gemm.gradient_of_rows(grad_gate_NF, w1_GFD, grad_up_NF, w3_GFD, counts)


def gradient_of_weights(
    grad_NF: torch.Tensor,
    rows_ND: torch.Tensor,
    counts: Sequence[int],
    out: torch.Tensor | None = None,
    beside: bool = False,
) -> torch.Tensor:
    """As `grouped_gemm.grouped_gemm_weight_gradient`."""
    operands = (grad_NF, rows_ND) if out is None else (grad_NF, rows_ND, out)
    if _fused(*operands):
        return grouped_triton.wgrad(grad_NF, rows_ND, counts, out, beside)
    return grouped_gemm.grouped_gemm_weight_gradient(grad_NF, rows_ND, counts, out)


def prepare(device: torch.device) -> None:
    """Compile what the host needs for these products on the device.

    Raises:
        ValueError: there is no C compiler, or it failed.
    """
    if _is_hopper(device):
        grouped_work.library()


def _fused(*operands: torch.Tensor) -> bool:
    return _is_hopper(operands[0].device) and grouped_triton.supported(*operands)


@functools.cache  # asking costs the host as much as a small launch
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9

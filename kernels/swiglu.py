"""SwiGLU, forward and backward, each in one pass over memory.

Composed from PyTorch operations this is three to nine passes with fp32 temporaries; fused, every
element is read and written once and all arithmetic is fp32 in registers. A row may have a weight
that its activation is multiplied with: since the down projection is linear, that is the routing
weight of the expert's output, for the price of a multiplication, and its gradient is a sum along
the row that backward holds in registers anyway. Backward recomputes h, which costs one write and
saves keeping h from forward to backward.

One program walks along one row in blocks; where a block does not fill F, some of its lanes idle.

Shape letters: F expert FFN size, N rows. Tensors lie on the current device. float64 inputs go to
the twin in `reference.py`. No function of Triton's own library is called; `rows.py` says why.
"""

import torch
import triton
import triton.language as tl

from . import reference
from .combining import add, unit_stride


@triton.jit
def _sigmoid(x):
    # exp(-x) = inf gives 0, which is right.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    weight_ptr,
    h_ptr,
    gate_stride,
    up_stride,
    F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + n).to(tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        gate = tl.load(gate_ptr + n * gate_stride + f, mask=f < F, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + n * up_stride + f, mask=f < F, other=0.0).to(tl.float32)
        h = gate * _sigmoid(gate) * up
        if HAS_WEIGHT:
            h = h * weight
        tl.store(h_ptr + n * F + f, h.to(h_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def _backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    weight_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    dweight_ptr,
    gate_stride,
    up_stride,
    F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    weight = 1.0
    dweight = tl.full([BLOCK], 0.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + n).to(tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        dh = tl.load(dh_ptr + n * F + f, mask=f < F, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + n * gate_stride + f, mask=f < F, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + n * up_stride + f, mask=f < F, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        h = silu * up
        if HAS_WEIGHT:
            dweight += dh * h
            dh = dh * weight
            h = h * weight
        dgate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
        out = n * F + f
        tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=f < F)
        tl.store(dup_ptr + out, (dh * silu).to(dup_ptr.dtype.element_ty), mask=f < F)
        tl.store(h_ptr + out, h.to(h_ptr.dtype.element_ty), mask=f < F)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + n, tl.reduce(dweight, 0, add))


def _block(F: int) -> dict[str, int]:
    """The longest block of at most 1024 that wastes least of its last round, and its warps."""
    longest = min(triton.next_power_of_2(max(F, 16)), 1024)
    sizes = [size for size in (longest, longest // 2, longest // 4) if size >= 16]
    block = min(sizes, key=lambda size: triton.cdiv(F, size) * size)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 4)}


def swiglu_forward(
    gate_NF: torch.Tensor, up_NF: torch.Tensor, weight_N: torch.Tensor | None = None
) -> torch.Tensor:
    """`h = silu(gate) * up * weight`, computed in fp32 and rounded once.

    Args:
        gate_NF, up_NF: [N, F], one dtype of fp32, bf16, fp16 (float64: the twin's job); any row
            stride.
        weight_N: [N], any float dtype, or None for weights of one.

    Returns:
        [N, F] contiguous, in the inputs' dtype.
    """
    if gate_NF.dtype == torch.float64:
        return reference.swiglu_forward(gate_NF, up_NF, weight_N)
    assert gate_NF.shape == up_NF.shape and gate_NF.dtype == up_NF.dtype
    N, F = gate_NF.shape
    gate_NF, up_NF = unit_stride(gate_NF), unit_stride(up_NF)
    h_NF = gate_NF.new_empty((N, F))
    if h_NF.numel():
        _forward_kernel[(N,)](
            *(gate_NF, up_NF, None if weight_N is None else weight_N.contiguous(), h_NF),
            *(gate_NF.stride(0), up_NF.stride(0), F),
            HAS_WEIGHT=weight_N is not None,
            **_block(F),
        )
    return h_NF


def swiglu_backward(
    dh_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    weight_N: torch.Tensor | None = None,
    *,
    into_dh: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `swiglu_forward`, and its output once more.

    Args:
        dh_NF, gate_NF, up_NF: [N, F], one dtype of fp32, bf16, fp16 (float64: the twin's job); any
            row stride.
        weight_N: [N], as in forward.
        into_dh: h takes dh's memory, which must be contiguous and nobody else's; every element is
            read before it is written.

    Returns:
        (dgate, dup, h, dweight): three [N, F] contiguous in the inputs' dtype, of which h is what
        `swiglu_forward` returns; and fp32 [N], or None without weights.
    """
    if gate_NF.dtype == torch.float64:
        return reference.swiglu_backward(dh_NF, gate_NF, up_NF, weight_N, into_dh=into_dh)
    assert dh_NF.shape == gate_NF.shape == up_NF.shape
    assert dh_NF.dtype == gate_NF.dtype == up_NF.dtype
    assert not into_dh or dh_NF.is_contiguous()
    N, F = gate_NF.shape
    dh_NF, gate_NF, up_NF = dh_NF.contiguous(), unit_stride(gate_NF), unit_stride(up_NF)
    dgate_NF, dup_NF = (gate_NF.new_empty((N, F)) for _ in range(2))
    h_NF = dh_NF if into_dh else gate_NF.new_empty((N, F))
    dweight_N = None
    if weight_N is not None:
        weight_N = weight_N.contiguous()
        dweight_N = gate_NF.new_empty(N, dtype=torch.float32)
    if dgate_NF.numel():
        _backward_kernel[(N,)](
            *(dh_NF, gate_NF, up_NF, weight_N, dgate_NF, dup_NF, h_NF, dweight_N),
            *(gate_NF.stride(0), up_NF.stride(0), F),
            HAS_WEIGHT=weight_N is not None,
            **_block(F),
        )
    elif dweight_N is not None:
        dweight_N.zero_()
    return dgate_NF, dup_NF, h_NF, dweight_N

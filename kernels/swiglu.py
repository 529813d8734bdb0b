"""SwiGLU and gpt-oss' clamped form of it, forward and backward, each in one pass over memory.

Composed from PyTorch operations this is three to nine passes with fp32 temporaries; fused, every
element is read and written once and all arithmetic is fp32 in registers. A row may have a weight
that its activation is multiplied with: since the down projection is linear, that is the routing
weight of the expert's output, for the price of a multiplication, and its gradient is a sum along
the row that backward holds in registers anyway. Backward recomputes h, which costs one write and
saves keeping h from forward to backward.

One program walks along one row in blocks; where a block does not fill F, some of its lanes idle.

Shape letters: F expert FFN size, G groups, N rows. Tensors lie on the current device. float64
inputs go to the twin in `reference_mlp.py`. No function of Triton's own library is called;
`rows.py` says why.
"""

import torch
import triton
import triton.language as tl

from . import reference_mlp
from .combining import add, group_at, unit_stride
from .tables import HiddenBias


@triton.jit
def _sigmoid(x):
    # exp(-x) = inf gives 0, which is right.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gated(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    """The two factors of h, each followed by its slope. Comparisons keep NaN what it is."""
    if CLAMPED:
        gate_slope = tl.where(gate > limit, 0.0, 1.0)
        gate = tl.where(gate > limit, limit, gate)
        up_slope = tl.where(up > limit, 0.0, tl.where(up < -limit, 0.0, 1.0))
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        sigmoid = _sigmoid(alpha * gate)
        gated = gate * sigmoid
        gate_slope *= sigmoid + alpha * gated * (1.0 - sigmoid)
    else:
        sigmoid = _sigmoid(gate)
        gated = gate * sigmoid
        gate_slope = sigmoid + gated * (1.0 - sigmoid)
        up_slope = 1.0
    return gated, gate_slope, up, up_slope


@triton.jit(do_not_specialize=["G"])
def _forward_kernel(
    gate_ptr,
    up_ptr,
    weight_ptr,
    h_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    stop_ptr,
    gate_stride,
    up_stride,
    bias_stride,
    G,
    alpha,
    limit,
    F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + n).to(tl.float32)
    bias_at = n
    if HAS_BIAS:
        bias_at = group_at(n, stop_ptr, G, BLOCK_G) * bias_stride
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        gate = tl.load(gate_ptr + n * gate_stride + f, mask=f < F, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + n * up_stride + f, mask=f < F, other=0.0).to(tl.float32)
        if HAS_BIAS:
            gate += tl.load(gate_bias_ptr + bias_at + f, mask=f < F, other=0.0).to(tl.float32)
            up += tl.load(up_bias_ptr + bias_at + f, mask=f < F, other=0.0).to(tl.float32)
        gate, _, up, _ = _gated(gate, up, alpha, limit, CLAMPED)
        h = gate * up
        if HAS_WEIGHT:
            h = h * weight
        tl.store(h_ptr + n * F + f, h.to(h_ptr.dtype.element_ty), mask=f < F)


@triton.jit(do_not_specialize=["G"])
def _backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    weight_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    dweight_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    stop_ptr,
    gate_stride,
    up_stride,
    bias_stride,
    G,
    alpha,
    limit,
    F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    weight = 1.0
    dweight = tl.full([BLOCK], 0.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + n).to(tl.float32)
    bias_at = n
    if HAS_BIAS:
        bias_at = group_at(n, stop_ptr, G, BLOCK_G) * bias_stride
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        dh = tl.load(dh_ptr + n * F + f, mask=f < F, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + n * gate_stride + f, mask=f < F, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + n * up_stride + f, mask=f < F, other=0.0).to(tl.float32)
        if HAS_BIAS:
            gate += tl.load(gate_bias_ptr + bias_at + f, mask=f < F, other=0.0).to(tl.float32)
            up += tl.load(up_bias_ptr + bias_at + f, mask=f < F, other=0.0).to(tl.float32)
        gate, gate_slope, up, up_slope = _gated(gate, up, alpha, limit, CLAMPED)
        h = gate * up
        if HAS_WEIGHT:
            dweight += dh * h
            dh = dh * weight
            h = h * weight
        out = n * F + f
        dgate, dup = dh * up * gate_slope, dh * gate * up_slope
        tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=f < F)
        tl.store(dup_ptr + out, dup.to(dup_ptr.dtype.element_ty), mask=f < F)
        tl.store(h_ptr + out, h.to(h_ptr.dtype.element_ty), mask=f < F)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + n, tl.reduce(dweight, 0, add))


def _block(F: int) -> dict[str, int]:
    """The longest block of at most 1024 that wastes least of its last round, and its warps."""
    longest = min(triton.next_power_of_2(max(F, 16)), 1024)
    sizes = [size for size in (longest, longest // 2, longest // 4) if size >= 16]
    block = min(sizes, key=lambda size: triton.cdiv(F, size) * size)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 4)}


def _arguments(
    bias: HiddenBias | None, clamp: tuple[float, float] | None, strides: tuple[int, int]
) -> tuple[list, dict]:
    """What both kernels take behind their rows, and what they are compiled for."""
    biases, bias_stride, num_groups = (None, None, None), 0, 0
    if bias is not None:
        assert bias.gate_GF.stride() == bias.up_GF.stride() and bias.gate_GF.stride(1) == 1
        biases, bias_stride, num_groups = bias, bias.gate_GF.stride(0), len(bias.stop_G)
    constants = {
        "HAS_BIAS": bias is not None,
        "CLAMPED": clamp is not None,
        "BLOCK_G": triton.next_power_of_2(max(num_groups, 1)),
    }
    return [*biases, *strides, bias_stride, num_groups, *(clamp or (0.0, 0.0))], constants


def swiglu_forward(
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    weight_N: torch.Tensor | None = None,
    bias: HiddenBias | None = None,
    clamp: tuple[float, float] | None = None,
) -> torch.Tensor:
    """`h = silu(gate) * up * weight`, or gpt-oss' form, computed in fp32 and rounded once.

    Args:
        gate_NF, up_NF: [N, F], one dtype of fp32, bf16, fp16 (float64: the twin's job); any row
            stride.
        weight_N: [N], any float dtype, or None for weights of one.
        bias, clamp: as in the twin.

    Returns:
        [N, F] contiguous, in the inputs' dtype.
    """
    if gate_NF.dtype == torch.float64:
        return reference_mlp.swiglu_forward(gate_NF, up_NF, weight_N, bias, clamp)
    assert gate_NF.shape == up_NF.shape and gate_NF.dtype == up_NF.dtype
    N, F = gate_NF.shape
    gate_NF, up_NF = unit_stride(gate_NF), unit_stride(up_NF)
    h_NF = gate_NF.new_empty((N, F))
    arguments, constants = _arguments(bias, clamp, (gate_NF.stride(0), up_NF.stride(0)))
    if h_NF.numel():
        _forward_kernel[(N,)](
            *(gate_NF, up_NF, None if weight_N is None else weight_N.contiguous(), h_NF),
            *(*arguments, F),
            HAS_WEIGHT=weight_N is not None,
            **constants,
            **_block(F),
        )
    return h_NF


def swiglu_backward(
    dh_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    weight_N: torch.Tensor | None = None,
    bias: HiddenBias | None = None,
    clamp: tuple[float, float] | None = None,
    *,
    into_dh: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `swiglu_forward`, and its output once more.

    Args:
        dh_NF, gate_NF, up_NF: [N, F], one dtype of fp32, bf16, fp16 (float64: the twin's job); any
            row stride.
        weight_N, bias, clamp: as in forward.
        into_dh: h takes dh's memory, which must be contiguous and nobody else's; every element is
            read before it is written.

    Returns:
        (dgate, dup, h, dweight): three [N, F] contiguous in the inputs' dtype, of which h is what
        `swiglu_forward` returns; and fp32 [N], or None without weights.
    """
    if gate_NF.dtype == torch.float64:
        inputs = dh_NF, gate_NF, up_NF, weight_N, bias, clamp
        return reference_mlp.swiglu_backward(*inputs, into_dh=into_dh)
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
    arguments, constants = _arguments(bias, clamp, (gate_NF.stride(0), up_NF.stride(0)))
    if dgate_NF.numel():
        _backward_kernel[(N,)](
            *(dh_NF, gate_NF, up_NF, weight_N, dgate_NF, dup_NF, h_NF, dweight_N),
            *(*arguments, F),
            HAS_WEIGHT=weight_N is not None,
            **constants,
            **_block(F),
        )
    elif dweight_N is not None:
        dweight_N.zero_()
    return dgate_NF, dup_NF, h_NF, dweight_N

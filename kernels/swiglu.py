"""SwiGLU, forward and backward, each in one pass over memory.

Composed from PyTorch operations this is three to nine passes with fp32 temporaries; fused, every
element is read and written once and all arithmetic is fp32 in registers. Backward recomputes h,
which costs one write and saves keeping h from forward to backward.

Contiguous inputs are treated as one long row, so that no block is cut short at the end of a row of
F. Others, such as the two halves of a fused [N, 2F] projection, are walked row by row, without a
copy; there a block that F does not fill is the price.

Shape letters: F expert FFN size, N rows. Tensors lie on the current device. float64 inputs go to
the twin in `reference.py`. No function of Triton's own library is called; `rows.py` says why.
"""

import torch
import triton
import triton.language as tl

from . import reference


@triton.jit
def _sigmoid(x):
    # exp(-x) = inf gives 0, which is right.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _block(columns, blocks_per_row, BLOCK: tl.constexpr):
    """Row, column offsets and mask of this program, all int64: one row may be the whole tensor."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row
    column = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < columns


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    gate_stride,
    up_stride,
    columns,
    blocks_per_row,
    BLOCK: tl.constexpr,
):
    row, column, mask = _block(columns, blocks_per_row, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    h = gate * _sigmoid(gate) * up
    tl.store(h_ptr + row * columns + column, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    dh_stride,
    gate_stride,
    up_stride,
    columns,
    blocks_per_row,
    BLOCK: tl.constexpr,
):
    row, column, mask = _block(columns, blocks_per_row, BLOCK)
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    dgate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
    out = row * columns + column
    tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + out, (dh * silu).to(dup_ptr.dtype.element_ty), mask=mask)
    tl.store(h_ptr + out, (silu * up).to(h_ptr.dtype.element_ty), mask=mask)


def _launch(
    kernel, inputs_NF: tuple[torch.Tensor, ...], outputs: int, last: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Runs an elementwise kernel over [N, F] inputs.

    Its outputs are new contiguous tensors, but for the last one where that is given.
    """
    first = inputs_NF[0]
    assert all(x.dim() == 2 and x.shape == first.shape for x in inputs_NF)
    assert all(x.dtype == first.dtype for x in inputs_NF)
    N, F = first.shape
    assert last is None or last.is_contiguous()
    reused = () if last is None else (last,)
    outputs_NF = tuple(
        torch.empty((N, F), dtype=first.dtype, device=first.device)
        for _ in range(outputs - len(reused))
    )
    outputs_NF += reused
    if first.numel() == 0:
        return outputs_NF
    inputs_NF = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in inputs_NF)
    rows, columns = (1, N * F) if all(x.is_contiguous() for x in inputs_NF) else (N, F)
    block = min(triton.next_power_of_2(max(columns, 16)), 2048)
    blocks_per_row = triton.cdiv(columns, block)
    kernel[(rows * blocks_per_row,)](
        *inputs_NF,
        *outputs_NF,
        *(x.stride(0) for x in inputs_NF),
        columns,
        blocks_per_row,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 4),
    )
    return outputs_NF


def swiglu_forward(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    """`h = silu(gate) * up`, computed in fp32 and rounded once.

    Args:
        gate_NF, up_NF: [N, F], one dtype of fp32, bf16, fp16 (float64: the twin's job); any row
            stride.

    Returns:
        [N, F] contiguous, in the inputs' dtype.
    """
    if gate_NF.dtype == torch.float64:
        return reference.swiglu_forward(gate_NF, up_NF)
    (h_NF,) = _launch(_forward_kernel, (gate_NF, up_NF), outputs=1)
    return h_NF


def swiglu_backward(
    dh_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor, *, into_dh: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu_forward`, and its output once more.

    Args:
        dh_NF, gate_NF, up_NF: [N, F], one dtype of fp32, bf16, fp16 (float64: the twin's job); any
            row stride.
        into_dh: h takes dh's memory, which must be contiguous and nobody else's; every element is
            read before it is written.

    Returns:
        (dgate, dup, h), each [N, F] contiguous in the inputs' dtype; h is what `swiglu_forward`
        returns.
    """
    if gate_NF.dtype == torch.float64:
        return reference.swiglu_backward(dh_NF, gate_NF, up_NF, into_dh=into_dh)
    last = dh_NF if into_dh else None
    return _launch(_backward_kernel, (dh_NF, gate_NF, up_NF), outputs=3, last=last)

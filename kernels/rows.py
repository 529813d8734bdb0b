"""Row movement: gather rows by index, sum rows per token, and the dots for that sum's weights.

One program owns one output row (or one token) and walks along D in wide blocks, so that every load
and store is a run of contiguous elements and nothing is written twice: no atomics, and the same
bits on every run. The trade-off: tokens that share a row read it again each (the L2 cache serves
most of that), a very small D leaves most of a program idle, and each (K, D) is compiled anew: a
model has one or two of them, and the compiler drops the masks where blocks fill D.

Kernels call no function of Triton's own library (`tl.sum`, `tl.zeros`): those run in Triton's
interpreter only where TRITON_INTERPRET was set before Triton was first imported, and parts of
PyTorch import it early.

Shape letters: T tokens, K experts per token, D hidden size, N rows. Tensors lie on the current
device. Indices are not checked: an index out of range is an illegal memory access. float64 inputs
go to the twin in `reference.py`.
"""

import torch
import triton
import triton.language as tl

from . import reference


@triton.jit
def _add(a, b):
    return a + b


# T is another number at nearly every call: specialising on it would only compile anew.
@triton.jit(do_not_specialize=["T"])
def _gather_rows_kernel(
    x_ptr,
    tail_ptr,
    index_ptr,
    scale_ptr,
    rows_ptr,
    x_stride,
    tail_stride,
    T,
    D: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    t = tl.load(index_ptr + n)
    source_ptr = x_ptr + t * x_stride
    if HAS_TAIL:
        source_ptr = tl.where(t < T, source_ptr, tail_ptr + (t - T) * tail_stride)
    target_ptr = rows_ptr + n * D
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n).to(tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        value = tl.load(source_ptr + d, mask=d < D)
        if HAS_SCALE:
            value = (value.to(tl.float32) * scale).to(rows_ptr.dtype.element_ty)
        tl.store(target_ptr + d, value, mask=d < D)


@triton.jit
def _combine_rows_kernel(
    rows_ptr,
    position_ptr,
    weight_ptr,
    y_ptr,
    rows_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        total = tl.full([BLOCK_D], 0.0, tl.float32)
        # Unrolled: the K loads do not depend on each other and are in flight together.
        for k in tl.static_range(K):
            position = tl.load(position_ptr + t * K + k)
            value = tl.load(rows_ptr + position * rows_stride + d, mask=d < D, other=0.0)
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + t * K + k).to(tl.float32)
                total += value.to(tl.float32) * weight
            else:
                total += value.to(tl.float32)
        tl.store(y_ptr + t * D + d, total.to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _row_dots_kernel(
    rows_ptr,
    position_ptr,
    grad_ptr,
    dots_ptr,
    rows_stride,
    grad_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    position = tl.load(position_ptr + t * K + k, mask=k < K, other=0)
    row_ptr = rows_ptr + position[:, None] * rows_stride
    total = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        grad = tl.load(grad_ptr + t * grad_stride + d, mask=d < D, other=0.0)
        mask = (k < K)[:, None] & (d < D)[None, :]
        value = tl.load(row_ptr + d[None, :], mask=mask, other=0.0)
        total += value.to(tl.float32) * grad.to(tl.float32)[None, :]
    tl.store(dots_ptr + t * K + k, tl.reduce(total, 1, _add), mask=k < K)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch_sizes(D: int, most: int) -> dict[str, int]:
    """Block along D and its warps: 16-byte loads, several in flight for each thread."""
    block = min(triton.next_power_of_2(max(D, 16)), most)
    return {"BLOCK_D": block, "num_warps": min(max(block // 256, 1), 4)}


def gather_rows(
    x_TD: torch.Tensor,
    index_N: torch.Tensor,
    scale_N: torch.Tensor | None = None,
    *,
    tail_MD: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rows[n] = x[index[n]] * scale[n]`, multiplied in fp32 and rounded once.

    Args:
        x_TD: [T, D] fp32, bf16, fp16 (float64: the twin's job); any row stride.
        index_N: [N] int64, each in [0, T), or in [0, T + M) with a tail; repeats allowed.
        scale_N: [N], any float dtype, or None for a plain copy.
        tail_MD: [M, D] in x's dtype, any row stride: rows that are read as if they followed x's,
            without a copy of either; or None. T or M may be 0.

    Returns:
        [N, D] contiguous, in x's dtype.
    """
    if x_TD.dtype == torch.float64:
        return reference.gather_rows(x_TD, index_N, scale_N, tail_MD=tail_MD)
    assert x_TD.dim() == 2 and index_N.dim() == 1 and index_N.dtype == torch.int64
    assert scale_N is None or scale_N.shape == index_N.shape
    (N,), (T, D) = index_N.shape, x_TD.shape
    if tail_MD is not None:
        assert tail_MD.dtype == x_TD.dtype and tail_MD.shape[1:] == (D,)
        tail_MD = _unit_stride(tail_MD) if tail_MD.shape[0] else None
    x_TD, index_N = _unit_stride(x_TD), index_N.contiguous()
    scale_N = None if scale_N is None else scale_N.contiguous()
    rows_ND = torch.empty((N, D), dtype=x_TD.dtype, device=x_TD.device)
    if rows_ND.numel():
        _gather_rows_kernel[(N,)](
            *(x_TD, tail_MD, index_N, scale_N, rows_ND),
            *(x_TD.stride(0), 0 if tail_MD is None else tail_MD.stride(0), T, D),
            HAS_TAIL=tail_MD is not None,
            HAS_SCALE=scale_N is not None,
            **_launch_sizes(D, 4096),
        )
    return rows_ND


def combine_rows(
    rows_ND: torch.Tensor, position_TK: torch.Tensor, weight_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """`y[t] = sum_k weight[t, k] * rows[position[t, k]]`, summed in k order in fp32, rounded once.

    Args:
        rows_ND: [N, D] fp32, bf16, fp16 (float64: the twin's job); any row stride.
        position_TK: [T, K] int64, each in [0, N); repeats allowed.
        weight_TK: [T, K], any float dtype, or None for weights of one.

    Returns:
        [T, D] contiguous, in rows' dtype.
    """
    if rows_ND.dtype == torch.float64:
        return reference.combine_rows(rows_ND, position_TK, weight_TK)
    assert rows_ND.dim() == 2 and position_TK.dim() == 2 and position_TK.dtype == torch.int64
    assert weight_TK is None or weight_TK.shape == position_TK.shape
    (T, K), D = position_TK.shape, rows_ND.shape[1]
    rows_ND, position_TK = _unit_stride(rows_ND), position_TK.contiguous()
    weight_TK = None if weight_TK is None else weight_TK.contiguous()
    y_TD = torch.empty((T, D), dtype=rows_ND.dtype, device=rows_ND.device)
    if y_TD.numel():
        _combine_rows_kernel[(T,)](
            *(rows_ND, position_TK, weight_TK, y_TD, rows_ND.stride(0), D, K),
            HAS_WEIGHT=weight_TK is not None,
            **_launch_sizes(D, 2048 if K <= 8 else 1024),
        )
    return y_TD


def row_dots(
    rows_ND: torch.Tensor, position_TK: torch.Tensor, grad_TD: torch.Tensor
) -> torch.Tensor:
    """`dots[t, k] = <rows[position[t, k]], grad[t]>`, accumulated in fp32.

    Args:
        rows_ND: [N, D] fp32, bf16, fp16 (float64 here or in grad: the twin's job); any row stride.
        position_TK: [T, K] int64, each in [0, N); repeats allowed.
        grad_TD: [T, D], any of the same dtypes; any row stride.

    Returns:
        [T, K] fp32.
    """
    if torch.float64 in (rows_ND.dtype, grad_TD.dtype):
        return reference.row_dots(rows_ND, position_TK, grad_TD)
    assert rows_ND.dim() == 2 and position_TK.dim() == 2 and position_TK.dtype == torch.int64
    (T, K), D = position_TK.shape, rows_ND.shape[1]
    assert grad_TD.shape == (T, D)
    rows_ND, grad_TD = _unit_stride(rows_ND), _unit_stride(grad_TD)
    dots_TK = torch.empty((T, K), dtype=torch.float32, device=rows_ND.device)
    if dots_TK.numel():
        block_k = triton.next_power_of_2(K)
        _row_dots_kernel[(T,)](
            *(rows_ND, position_TK.contiguous(), grad_TD, dots_TK),
            *(rows_ND.stride(0), grad_TD.stride(0), D, K),
            BLOCK_K=block_k,
            BLOCK_D=min(triton.next_power_of_2(max(D, 16)), max(4096 // block_k, 256)),
            num_warps=4,
        )
    return dots_TK

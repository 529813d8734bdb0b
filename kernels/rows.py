"""Row movement: rows of tokens to the rows of their copies, and sums over copies back to tokens.

Both walk a map [U, K] from a token's choices to rows. `scatter_rows` reads each token once and
writes it to all of its rows, `sum_rows` reads all rows of a token and writes their sum once: no
byte moves twice, there are no atomics, and sums give the same bits on every run. One program owns
one token and walks along D in wide blocks, so that every load and store is a run of contiguous
elements. The trade-off: a very small D leaves most of a program idle, and each (K, D) is compiled
anew: a model has one or two of them, and the compiler drops the masks where blocks fill D.

Kernels call no function of Triton's own library (`tl.sum`, `tl.zeros`): those run in Triton's
interpreter only where TRITON_INTERPRET was set before Triton was first imported, and parts of
PyTorch import it early.

Shape letters: U tokens or parcels, K experts per token, D hidden size, N rows. Tensors lie on the
current device. Maps are not checked: an entry out of range is an illegal memory access. float64
inputs go to the twin in `reference.py`.
"""

import torch
import triton
import triton.language as tl

from . import reference
from .combining import unit_stride


@triton.jit
def _scatter_rows_kernel(
    x_ptr,
    target_ptr,
    rows_ptr,
    values_ptr,
    row_values_ptr,
    x_stride,
    target_stride,
    rows_stride,
    values_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64)
    target_ptr += u * target_stride
    if HAS_VALUES:
        for k in tl.static_range(K):
            n = tl.load(target_ptr + k).to(tl.int64)
            row_value = tl.load(values_ptr + u * values_stride + k)
            row_value = row_value.to(row_values_ptr.dtype.element_ty)
            tl.store(row_values_ptr + n, row_value, mask=n >= 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        value = tl.load(x_ptr + u * x_stride + d, mask=d < D)
        for k in tl.static_range(K):
            n = tl.load(target_ptr + k).to(tl.int64)
            tl.store(rows_ptr + n * rows_stride + d, value, mask=d < tl.where(n >= 0, D, 0))


@triton.jit(do_not_specialize=["copies"])
def _gather_values_kernel(
    values_ptr,
    source_ptr,
    parcels_ptr,
    sent_ptr,
    out_ptr,
    parcels_stride,
    out_stride,
    copies,
    K: tl.constexpr,
    HAS_PARCELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    copy = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = (copy // K).to(tl.int64)
    k = copy % K
    n = tl.load(source_ptr + copy, mask=copy < copies, other=-1)
    value = tl.load(values_ptr + n, mask=n >= 0, other=0.0)
    if HAS_PARCELS:
        code = tl.load(sent_ptr + copy, mask=copy < copies, other=-1)
        place = tl.where(code >= 0, code, -code - 2)
        parcel_ptr = parcels_ptr + place.to(tl.int64) * parcels_stride + k
        value += tl.load(parcel_ptr, mask=place >= 0, other=0.0)
    value = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + u * out_stride + k, value, mask=copy < copies)


@triton.jit(do_not_specialize=["num_home"])
def _sum_rows_kernel(
    home_ptr,
    foreign_ptr,
    source_ptr,
    parcels_ptr,
    sent_ptr,
    sums_ptr,
    num_home,
    home_stride,
    foreign_stride,
    source_stride,
    parcels_stride,
    sums_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    HAS_FOREIGN: tl.constexpr,
    HAS_PARCELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64)
    source_ptr += u * source_stride
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        total = tl.full([BLOCK_D], 0.0, tl.float32)
        # Unrolled: the loads do not depend on each other and are in flight together.
        for k in tl.static_range(K):
            n = tl.load(source_ptr + k).to(tl.int64)
            row_ptr = home_ptr + n * home_stride
            if HAS_FOREIGN:
                foreign_row_ptr = foreign_ptr + (n - num_home) * foreign_stride
                row_ptr = tl.where(n < num_home, row_ptr, foreign_row_ptr)
            value = tl.load(row_ptr + d, mask=d < tl.where(n >= 0, D, 0), other=0.0)
            total += value.to(tl.float32)
        if HAS_PARCELS:
            for k in tl.static_range(K):
                n = tl.load(sent_ptr + u * K + k).to(tl.int64)
                parcel_ptr = parcels_ptr + n * parcels_stride
                value = tl.load(parcel_ptr + d, mask=d < tl.where(n >= 0, D, 0), other=0.0)
                total += value.to(tl.float32)
        tl.store(sums_ptr + u * sums_stride + d, total.to(sums_ptr.dtype.element_ty), mask=d < D)


def _launch_sizes(D: int, most: int) -> dict[str, int]:
    """Block along D and its warps: 16-byte loads, several in flight for each thread."""
    block = min(triton.next_power_of_2(max(D, 16)), most)
    return {"BLOCK_D": block, "num_warps": min(max(block // 256, 1), 4)}


def scatter_rows(
    x_UD: torch.Tensor,
    target_UK: torch.Tensor,
    rows_ND: torch.Tensor,
    values_UK: torch.Tensor | None = None,
    values_N: torch.Tensor | None = None,
) -> None:
    """`rows[target[u, k]] = x[u]`, and `values_N[target[u, k]] = values[u, k]` where given.

    Args:
        x_UD: [U, D] fp32, bf16, fp16 (float64: the twin's job); any row stride.
        target_UK: [U, K] int32, any row stride, each below N - 1 and, unless negative, different
            from all others; negative: nowhere.
        rows_ND: [N, D] in x's dtype, any row stride, changed in place. Its last row takes what goes
            nowhere.
        values_UK: [U, K], any float dtype and row stride; or None.
        values_N: [N], a float dtype, changed in place; or None.
    """
    if torch.float64 in (x_UD.dtype, None if values_N is None else values_N.dtype):
        return reference.scatter_rows(x_UD, target_UK, rows_ND, values_UK, values_N)
    (U, K), D = target_UK.shape, rows_ND.shape[1]
    assert x_UD.shape == (U, D) and x_UD.dtype == rows_ND.dtype and target_UK.dtype == torch.int32
    assert rows_ND.stride(1) == 1 and target_UK.stride(1) == 1
    assert (values_UK is None) == (values_N is None)
    if values_UK is not None:
        assert values_UK.shape == (U, K)
        values_UK = unit_stride(values_UK)
    x_UD = unit_stride(x_UD)
    if U:
        _scatter_rows_kernel[(U,)](
            *(x_UD, target_UK, rows_ND, values_UK, values_N),
            *(x_UD.stride(0), target_UK.stride(0), rows_ND.stride(0)),
            *(0 if values_UK is None else values_UK.stride(0), D, K),
            HAS_VALUES=values_UK is not None,
            **_launch_sizes(D, 4096),
        )


def gather_values(
    values_N: torch.Tensor,
    source_UK: torch.Tensor,
    parcels_VK: torch.Tensor | None = None,
    sent_UK: torch.Tensor | None = None,
    *,
    out_UK: torch.Tensor,
) -> None:
    """`out[u, k] = values[source[u, k]] + parcels[v, k]`, the undoing of `scatter_rows`' values and
    of `label_parcels`.

    Args:
        values_N: [N], a float dtype.
        source_UK: [U, K] int32, each below N; negative: 0.
        parcels_VK: [V, K] in the same dtype, any row stride; or None.
        sent_UK: [U, K] int32: v, or -(v + 2); -1: 0. With parcels only.
        out_UK: [U, K], any float dtype and row stride, changed in place.
    """
    assert source_UK.is_contiguous() and out_UK.shape == source_UK.shape and out_UK.stride(1) == 1
    if parcels_VK is not None:
        assert parcels_VK.dtype == values_N.dtype and parcels_VK.stride(1) == 1
        assert sent_UK.shape == source_UK.shape and sent_UK.is_contiguous()
    copies = source_UK.numel()
    if copies:
        _gather_values_kernel[(triton.cdiv(copies, 1024),)](
            *(values_N, source_UK, parcels_VK, sent_UK, out_UK),
            *(0 if parcels_VK is None else parcels_VK.stride(0), out_UK.stride(0), copies),
            K=source_UK.shape[1],
            HAS_PARCELS=parcels_VK is not None,
            BLOCK=1024,
            num_warps=4,
        )


def sum_rows(
    home_ND: torch.Tensor,
    foreign_MD: torch.Tensor,
    source_UK: torch.Tensor,
    parcels_VD: torch.Tensor | None = None,
    sent_UK: torch.Tensor | None = None,
    *,
    out_UD: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y[u] = sum_k rows[source[u, k]] + sum_k parcels[sent[u, k]]`, in fp32, rounded once.

    The order of the sum is that of k, rows before parcels.

    Args:
        home_ND: [N, D] fp32, bf16, fp16 (float64: the twin's job); any row stride.
        foreign_MD: [M, D] in the same dtype: rows that are read as if they followed home's.
        source_UK: [U, K] int32, any row stride, each below N + M; negative: nothing.
        parcels_VD: [V, D] in the same dtype, any row stride; or None.
        sent_UK: [U, K] int32, each below V; negative: nothing. With parcels only.
        out_UD: [U, D] in the same dtype, any row stride, where y goes; None: new memory.

    Returns:
        [U, D].
    """
    if home_ND.dtype == torch.float64:
        return reference.sum_rows(
            home_ND, foreign_MD, source_UK, parcels_VD, sent_UK, out_UD=out_UD
        )
    (U, K), D = source_UK.shape, home_ND.shape[1]
    if out_UD is None:
        out_UD = home_ND.new_empty((U, D))
    assert home_ND.dtype == foreign_MD.dtype == out_UD.dtype and out_UD.shape == (U, D)
    assert out_UD.stride(1) == 1 and source_UK.stride(1) == 1
    home_ND, foreign_MD = unit_stride(home_ND), unit_stride(foreign_MD)
    if parcels_VD is not None:
        assert parcels_VD.dtype == home_ND.dtype and parcels_VD.stride(1) == 1
        assert sent_UK.shape == (U, K) and sent_UK.is_contiguous()
    if U:
        _sum_rows_kernel[(U,)](
            *(home_ND, foreign_MD, source_UK, parcels_VD, sent_UK, out_UD, len(home_ND)),
            *(home_ND.stride(0), foreign_MD.stride(0), source_UK.stride(0)),
            *(0 if parcels_VD is None else parcels_VD.stride(0), out_UD.stride(0), D, K),
            HAS_FOREIGN=len(foreign_MD) > 0,
            HAS_PARCELS=parcels_VD is not None,
            **_launch_sizes(D, 2048 if K <= 8 else 1024),
        )
    return out_UD

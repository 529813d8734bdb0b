"""Parcels: their places in the send buffer, and what is written on them.

Places depend on all blocks of tokens before. `address_copies` of `routes.py` has left each block's
number of parcels for each rank; every block adds up those before it.

Kernels call no function of Triton's own library; `rows.py` says why.

Shape letters: T tokens of this rank, K experts per token, P ranks of the group, U parcels.
"""

import torch
import triton
import triton.language as tl

from . import counts, reference
from .combining import add


@triton.jit(do_not_specialize=["T"])
def _place_kernel(
    sent_ptr,
    parcels_ptr,
    first_ptr,
    T,
    P: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_P)
    place = tl.load(first_ptr + ranks, mask=ranks < P, other=0)
    for start in range(0, block, BLOCK_B):
        before = start + tl.arange(0, BLOCK_B)
        parcels_ptrs = parcels_ptr + before[:, None] * BLOCK_P + ranks[None, :]
        parcels = tl.load(parcels_ptrs, mask=(before < block)[:, None], other=0)
        place += tl.reduce(parcels, 0, add)
    reached = tl.full([BLOCK_T, BLOCK_P], 0, tl.int32)
    for k in tl.static_range(K):
        to = tl.load(sent_ptr + t * K + k, mask=t < T, other=-1)
        reached += (to[:, None] == ranks[None, :]).to(tl.int32)
    places = place[None, :] + tl.associative_scan(reached, 0, add) - reached
    for k in tl.static_range(K):
        code = tl.load(sent_ptr + t * K + k, mask=t < T, other=-1)
        to = tl.where(code >= 0, code, -code - 2)
        here = tl.where(to[:, None] == ranks[None, :], places, 0)
        found = tl.reduce(here, 1, add)
        sent = tl.where(code >= 0, found, tl.where(code == -1, -1, -(found + 2)))
        tl.store(sent_ptr + t * K + k, sent, mask=t < T)


@triton.jit(do_not_specialize=["copies"])
def _label_kernel(
    sent_ptr,
    target_ptr,
    values_ptr,
    targets_ptr,
    weights_ptr,
    target_stride,
    weight_stride,
    copies,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    copy = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(sent_ptr + copy, mask=copy < copies, other=-1)
    place = tl.where(code >= 0, code, -code - 2).to(tl.int64)
    k = copy % K
    target = tl.load(target_ptr + copy, mask=copy < copies, other=-1)
    tl.store(targets_ptr + place * target_stride + k, target, mask=place >= 0)
    value = tl.load(values_ptr + copy, mask=copy < copies, other=0.0)
    value = value.to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + place * weight_stride + k, value, mask=place >= 0)


def place_parcels(sent_TK: torch.Tensor, parcels: torch.Tensor, first_P: torch.Tensor) -> None:
    """Give each parcel its place in the send buffer.

    Args:
        sent_TK: int32 [T, K], from `address_copies`, changed in place: ranks p become places u.
            Places of a rank are given in token order.
        parcels: from `address_copies`.
        first_P: [P] int32: the first place of each rank's parcels.
    """
    (T, K), P = sent_TK.shape, first_P.shape[0]
    if T:
        _place_kernel[(len(parcels),)](
            *(sent_TK, parcels, first_P, T, P, K, counts.TOKENS, parcels.shape[1]),
            BLOCK_B=32,
            num_warps=4,
        )


def label_parcels(
    sent_TK: torch.Tensor,
    target_TK: torch.Tensor,
    values_TK: torch.Tensor,
    targets_UK: torch.Tensor,
    values_UK: torch.Tensor,
) -> None:
    """Write on each parcel which rows its copies are, and their values.

    Args:
        sent_TK, target_TK: as from `address_copies` and `place_parcels`.
        values_TK: [T, K], any float dtype.
        targets_UK: [U + 1, K] int32, any row stride, changed in place: the row of each copy, -1 for
            choices that this parcel does not serve and for parcels that no token uses.
        values_UK: [U + 1, K], a float dtype, any row stride, changed in place where `targets_UK` is
            not -1.

    The last row of both takes what goes nowhere.
    """
    if values_UK.dtype == torch.float64:
        return reference.label_parcels(sent_TK, target_TK, values_TK, targets_UK, values_UK)
    copies = sent_TK.numel()
    targets_UK.fill_(-1)
    if copies:
        _label_kernel[(triton.cdiv(copies, 1024),)](
            *(sent_TK, target_TK, values_TK.contiguous(), targets_UK, values_UK),
            *(targets_UK.stride(0), values_UK.stride(0), copies, sent_TK.shape[1]),
            BLOCK=1024,
            num_warps=4,
        )

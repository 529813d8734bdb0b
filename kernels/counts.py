"""What planning needs to know of a rank's routing, counted on the device in one launch.

Integer atomics add up what blocks of tokens found: their order does not matter.

Kernels call no function of Triton's own library; `rows.py` says why.

Shape letters: T tokens of this rank, K experts per token, E experts, P ranks of the group.
"""

import torch
import triton
import triton.language as tl

from . import reference
from .combining import add, larger

_TOKENS = 128  # of a block


@triton.jit(do_not_specialize=["T"])
def _count_kernel(
    selected_ptr,
    scores_ptr,
    report_ptr,
    T,
    E: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BINS: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.arange(0, BLOCK_P)
    counts = tl.full([BINS], 0, tl.int32)
    reached = tl.full([BLOCK_T, BLOCK_P], 0, tl.int32)
    odd = tl.full([BLOCK_T], 0, tl.int32)
    for k in tl.static_range(K):
        e = tl.load(selected_ptr + t * K + k, mask=t < T, other=0)
        known = (e >= 0) & (e < E)
        # Two bins more: copies of unknown experts, and what is no copy.
        bins = tl.where(t < T, tl.where(known, e, E), E + 1).to(tl.int32)
        counts += tl.histogram(bins, BINS)
        home = tl.where(known & (t < T), e // (E // P), -1).to(tl.int32)
        reached = larger(reached, (home[:, None] == rank[None, :]).to(tl.int32))
        score = tl.load(scores_ptr + t * K + k, mask=t < T, other=0.0).to(tl.float32)
        odd += ((score != score) | (score - score != 0.0)).to(tl.int32)
    bin = tl.arange(0, BINS)
    # Expert counts, then the unknown ones two fields behind the ranks.
    field = tl.where(bin < E, bin, E + P)
    tl.atomic_add(report_ptr + field, counts.to(tl.int64), mask=(bin <= E) & (counts > 0))
    tokens = tl.reduce(reached, 0, add)
    tl.atomic_add(report_ptr + E + rank, tokens.to(tl.int64), mask=rank < P)
    odd_sum = tl.reduce(odd, 0, add)
    tl.atomic_add(report_ptr + E + P + 1, odd_sum.to(tl.int64))


def count_copies(
    selected_TK: torch.Tensor,
    scores_TK: torch.Tensor,
    num_experts: int,
    num_ranks: int,
    report: torch.Tensor,
) -> None:
    """Add to `report` what planning needs to know of this rank's routing.

    Args:
        selected_TK: [T, K] int64 expert ids; a rank is home to E / P consecutive ones.
        scores_TK: [T, K], any float dtype.
        num_experts, num_ranks: E and P.
        report: [>= E + P + 2] int64, changed in place, of which more fields may follow for the
            caller's use: copies of each expert; tokens with an expert at home on each rank; copies
            of experts outside [0, E); scores that are NaN or infinite.
    """
    if scores_TK.dtype == torch.float64:
        return reference.count_copies(selected_TK, scores_TK, num_experts, num_ranks, report)
    T, K = selected_TK.shape
    if T:
        _count_kernel[(triton.cdiv(T, _TOKENS),)](
            *(selected_TK.contiguous(), scores_TK.contiguous(), report, T),
            *(num_experts, num_ranks, K, _TOKENS, max(triton.next_power_of_2(num_ranks), 2)),
            triton.next_power_of_2(num_experts + 2),
            num_warps=4,
        )

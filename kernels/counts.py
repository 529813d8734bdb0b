"""What planning needs to know of a rank's routing, counted on the device in one launch.

Integer atomics add up what blocks of tokens found: their order does not matter. What each block
found of each expert is kept for `routes.py`, which tells from it where a copy stands among all of
its expert's: no sort is needed.

Kernels call no function of Triton's own library; `rows.py` says why.

Shape letters: T tokens of this rank, K experts per token, E experts, P ranks of the group.
"""

import torch
import triton
import triton.language as tl

from .combining import add

TOKENS = 128  # of a block


@triton.jit(do_not_specialize=["T", "version"])
def _count_kernel(
    selected_ptr,
    scores_ptr,
    report_ptr,
    blocks_ptr,
    T,
    version,
    E: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERT_BINS: tl.constexpr,
    RANK_BINS: tl.constexpr,
):
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    copy = t[:, None] * K + k[None, :]
    is_copy = (t < T)[:, None] & (k < K)[None, :]
    selected = tl.load(selected_ptr + copy, mask=is_copy, other=0)
    # Two experts more, at home on ranks that do not exist: all unknown ones, and what is no copy.
    e = tl.where((selected >= 0) & (selected < E), selected, E)
    e = tl.where(is_copy, e, E + 1).to(tl.int32)
    home = e // (E // P)
    # Its token's copies at the same home, and those that come before it. Copies are compared with
    # each other, since homes may be more than choices.
    there = tl.full([BLOCK_T, BLOCK_K], 0, tl.int32)
    before = tl.full([BLOCK_T, BLOCK_K], 0, tl.int32)
    for j in tl.static_range(K):
        other = tl.load(selected_ptr + t * K + j, mask=t < T, other=0)
        other = tl.where((other >= 0) & (other < E), other, E).to(tl.int32)
        same = (home == (other // (E // P))[:, None]).to(tl.int32)
        there += same
        before += tl.where(k[None, :] > j, same, 0)
    alone = tl.where(there == 1, e, E)
    first = tl.where(before == 0, home, P)
    # The order of copies does not matter: the compiler may choose it.
    copies = tl.histogram(tl.reshape(e, [BLOCK_T * BLOCK_K], can_reorder=True), EXPERT_BINS)
    alone = tl.histogram(tl.reshape(alone, [BLOCK_T * BLOCK_K], can_reorder=True), EXPERT_BINS)
    reached = tl.histogram(tl.reshape(first, [BLOCK_T * BLOCK_K], can_reorder=True), RANK_BINS)
    bin = tl.arange(0, EXPERT_BINS)
    tl.store(blocks_ptr + block * E + bin, copies, mask=bin < E)
    # Unknown experts' copies are counted behind the ranks.
    field = report_ptr + tl.where(bin < E, bin, 2 * E + P)
    tl.atomic_add(field, copies.to(tl.int64), mask=(bin <= E) & (copies > 0))
    tl.atomic_add(report_ptr + E + bin, alone.to(tl.int64), mask=(bin < E) & (alone > 0))
    rank = tl.arange(0, RANK_BINS)
    tl.atomic_add(report_ptr + 2 * E + rank, reached.to(tl.int64), mask=rank < P)
    score = tl.load(scores_ptr + copy, mask=is_copy, other=0.0)
    if score.dtype != tl.float64:
        score = score.to(tl.float32)
    odd = ((score != score) | (score - score != 0.0)).to(tl.int32)
    odd = tl.reduce(tl.reduce(odd, 1, add), 0, add)
    tl.atomic_add(report_ptr + 2 * E + P + 1, odd.to(tl.int64))
    if block == 0:
        tl.store(report_ptr + 2 * E + P + 2, version)


def count_copies(
    selected_TK: torch.Tensor,
    scores_TK: torch.Tensor,
    num_experts: int,
    num_ranks: int,
    version: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What planning needs to know of this rank's routing.

    Args:
        selected_TK: [T, K] int64 expert ids; a rank is home to E / P consecutive ones.
        scores_TK: [T, K], any float dtype.
        num_experts, num_ranks: E and P.
        version: any number.

    Returns:
        int64 [2 E + P + 3]: copies of each expert; how many of them are their token's only one at
        the expert's home; tokens with an expert at home on each rank; copies of experts outside
        [0, E); scores that are NaN or infinite; the version. And what `address_copies` needs.
    """
    T, K = selected_TK.shape
    blocks = max(triton.cdiv(T, TOKENS), 1)
    report = selected_TK.new_zeros(2 * num_experts + num_ranks + 3)
    blocks_BE = selected_TK.new_empty((blocks, num_experts), dtype=torch.int32)
    _count_kernel[(blocks,)](
        *(selected_TK.contiguous(), scores_TK.contiguous(), report, blocks_BE, T, version),
        *(num_experts, num_ranks, K, TOKENS, triton.next_power_of_2(K)),
        *(triton.next_power_of_2(num_experts + 2), triton.next_power_of_2(num_ranks + 2)),
        num_warps=4,
    )
    return report, blocks_BE

"""Routing on the device: where every copy of a token goes.

A *copy* is a (token, choice) pair. A token travels to a rank once, however many of its copies are
computed there; on the way it is a *parcel*, a row of the send buffer.

Blocks of tokens are independent but for two things, which depend on all blocks before: where a copy
stands among its expert's, and places in the send buffer. For the first, counting has left what each
block found of each expert. So the addresses come next, with every block's number of parcels for
each rank, which `parcels.py` adds up: two small launches, no sort, no atomics, and the same places
on every run.

Kernels call no function of Triton's own library; `rows.py` says why.

Shape letters: T tokens of this rank, K experts per token, E experts, P ranks of the group.
"""

import torch
import triton
import triton.language as tl

from . import counts
from .combining import add, larger

_TOGETHER = 32  # tokens of a block that are looked at together: a row of all experts for each


@triton.jit
def _clip(x, most):
    return tl.where(x < 0, 0, tl.where(x > most, most, x))


@triton.jit(do_not_specialize=["rank"])
def _run_kernel(
    counts_ptr,
    tokens_ptr,
    end_ptr,
    shift_ptr,
    counts_stride,
    rank,
    E: tl.constexpr,
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    p = tl.arange(0, BLOCK_P)
    entry = e[:, None] * P + p[None, :]
    mask = (e < E)[:, None] & (p < P)[None, :]
    tokens = tl.load(tokens_ptr + entry, mask=mask, other=0).to(tl.int32)
    before = tl.full([BLOCK_E], 0, tl.int32)
    for source in range(rank):
        count = tl.load(counts_ptr + source * counts_stride + e, mask=e < E, other=0)
        before += count.to(tl.int32)
    own = tl.load(counts_ptr + rank * counts_stride + e, mask=e < E, other=0).to(tl.int32)
    # A rank's rows by slot: home experts, then foreign ones.
    is_home = (e // (E // P))[:, None] == p[None, :]
    home = tl.where(is_home, tokens, 0)
    foreign = tokens - home
    first_home = tl.associative_scan(home, 0, add) - home
    first_foreign = tl.associative_scan(foreign, 0, add) - foreign
    first_foreign += tl.reduce(home, 0, add)[None, :]
    slot = tl.where(is_home, first_home, first_foreign)
    # Copies of earlier ranks fill an expert's segments from the left, then this rank's.
    start = tl.associative_scan(tokens, 1, add) - tokens
    earlier = _clip(before[:, None] - start, tokens)
    sent = _clip((before + own)[:, None] - start, tokens) - earlier
    first = tl.associative_scan(own, 0, add) - own
    end = first[:, None] + tl.associative_scan(sent, 1, add)
    tl.store(end_ptr + entry, end, mask=mask)
    tl.store(shift_ptr + entry, slot + earlier - (end - sent), mask=mask)


@triton.jit(do_not_specialize=["T", "rank"])
def _address_kernel(
    selected_ptr,
    blocks_ptr,
    end_ptr,
    shift_ptr,
    own_ptr,
    sent_ptr,
    target_ptr,
    parcels_ptr,
    T,
    rank,
    E: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    block = tl.program_id(0)
    ranks = tl.arange(0, BLOCK_P)
    experts = tl.arange(0, BLOCK_E)
    # Copies sorted by expert: those of lower experts come first, then those of blocks before.
    start_E = tl.load(end_ptr + experts * P - 1, mask=(experts > 0) & (experts < E), other=0)
    for start in range(0, block, BLOCK_B):
        before = start + tl.arange(0, BLOCK_B)
        counts_ptrs = blocks_ptr + before[:, None] * E + experts[None, :]
        mask = (before < block)[:, None] & (experts < E)[None, :]
        start_E += tl.reduce(tl.load(counts_ptrs, mask=mask, other=0), 0, add)
    parcels = tl.full([BLOCK_P], 0, tl.int32)
    for first in range(0, BLOCK_T, TOGETHER):
        t = block * BLOCK_T + first + tl.arange(0, TOGETHER)
        chosen = tl.full([TOGETHER, BLOCK_E], 0, tl.int32)
        for k in tl.static_range(K):
            e = tl.load(selected_ptr + t * K + k, mask=t < T, other=-1).to(tl.int32)
            chosen += (e[:, None] == experts[None, :]).to(tl.int32)
        position_TE = start_E[None, :] + tl.associative_scan(chosen, 0, add) - chosen
        start_E += tl.reduce(chosen, 0, add)
        reached = tl.full([TOGETHER, BLOCK_P], 0, tl.int32)
        for k in tl.static_range(K):
            copy = t * K + k
            e = tl.load(selected_ptr + copy, mask=t < T, other=0)
            e = tl.where((e >= 0) & (e < E), e, 0)  # an error, which the host does not know of yet
            e = e.to(tl.int32)
            is_e = e[:, None] == experts[None, :]
            position = tl.reduce(tl.where(is_e, position_TE, 0), 1, add)
            position_TE += is_e.to(tl.int32)  # of a token that chooses it twice
            # The first rank whose run ends behind the position, by bisection; or else the last one.
            to = tl.full([TOGETHER], 0, tl.int32)
            step = BLOCK_P // 2
            while step > 0:
                last = to + step - 1
                mask = (t < T) & (last < P - 1)
                end = tl.load(end_ptr + e * P + last, mask=mask, other=2147483647)
                to = tl.where(position < end, to, to + step)
                step = step // 2
            row = position + tl.load(shift_ptr + e * P + to, mask=t < T, other=0)
            own = to == rank
            tl.store(own_ptr + copy, tl.where(own, row, -1), mask=t < T)
            tl.store(target_ptr + copy, row, mask=t < T)
            here = (to[:, None] == ranks[None, :]).to(tl.int32)
            again = tl.reduce(here * reached, 1, larger) > 0
            # The rank stands for the place until the next kernel knows it.
            sent = tl.where(own, -1, tl.where(again, -(to + 2), to))
            tl.store(sent_ptr + copy, sent, mask=t < T)
            reached = larger(reached, here)
        parcels += tl.reduce(reached, 0, add)
    tl.store(parcels_ptr + block * BLOCK_P + ranks, parcels)


def _block_p(num_ranks: int) -> int:
    return max(triton.next_power_of_2(num_ranks), 2)


def find_runs(counts_PE: torch.Tensor, tokens_EP: torch.Tensor, rank: int) -> torch.Tensor:
    """What `address_copies` needs of a plan whose experts are cut by source, on its device.

    The twin is `find_runs` of `ds_llep/route.py`.

    Args:
        counts_PE: [P, E] int64, any row stride: copies of each expert that each rank's tokens have.
        tokens_EP: [E, P], an integer dtype, the plan: copies of each expert that each rank
            computes. An expert's copies, by source rank and token, are cut into segments of these
            lengths.
        rank: this rank.

    Returns:
        int32 [2, E, P].
    """
    E, P = tokens_EP.shape
    assert counts_PE.shape == (P, E) and counts_PE.stride(1) == 1
    block_e, block_p = triton.next_power_of_2(E), _block_p(P)
    runs_2EP = counts_PE.new_empty((2, E, P), dtype=torch.int32)
    _run_kernel[(1,)](
        *(counts_PE, tokens_EP.contiguous(), *runs_2EP, counts_PE.stride(0), rank),
        *(E, P, block_e, block_p),
        num_warps=16 if block_e * block_p > 4096 else 4,
    )
    return runs_2EP


def address_copies(
    selected_TK: torch.Tensor,
    blocks_BE: torch.Tensor,
    runs_2EP: torch.Tensor,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which rank computes each copy of this rank's tokens, and in which of its rows.

    Args:
        selected_TK: [T, K] int64 expert ids; ids outside [0, E) get some address.
        blocks_BE: int32 [B, E] from `count_copies`.
        runs_2EP: int32 [2, E, P]. When all copies are sorted by expert, stably, those of each
            expert that each rank computes are a run: the place behind it, and what is to be added
            to a copy's place to get its row.
        rank: this rank, to which nothing is sent.

    Returns:
        Three int32 [T, K], and what `place_parcels` needs beside them. `own`: the row of a copy
        that is computed here, else -1. `sent`: the rank p that computes the copy, for the first of
        a token's copies there; -(p + 2) for the others; -1 for own copies. `target`: the row of the
        copy on the rank that computes it: rows are in the order of the rank's experts, home before
        foreign ones, then of source ranks, then of tokens.
    """
    (T, K), (_, E, P) = selected_TK.shape, runs_2EP.shape
    assert runs_2EP.dtype == torch.int32 and runs_2EP.is_contiguous()
    own, sent, target = selected_TK.new_empty((3, T, K), dtype=torch.int32)
    blocks, block_e, block_p = len(blocks_BE), triton.next_power_of_2(E), _block_p(P)
    parcels = selected_TK.new_empty((blocks, block_p), dtype=torch.int32)
    if T:
        _address_kernel[(blocks,)](
            *(selected_TK.contiguous(), blocks_BE, *runs_2EP),
            *(own, sent, target, parcels, T, rank, E, P, K),
            *(counts.TOKENS, min(_TOGETHER, counts.TOKENS), block_e, block_p),
            BLOCK_B=32,
            num_warps=4 if block_e <= 128 else 8,
        )
    return own, sent, target, parcels

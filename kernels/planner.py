"""Least-Loaded Assignment on the device: the plan's integers, without a wait for the host.

The algorithm is sequential, so one program of one warp walks the experts and keeps the ranks' loads
in registers: it is slower than a CPU core at each step, and nothing but the result leaves the
device. Experts are never sorted. The next one is the largest key (load, then lower id) below the
last one's among the experts whose home is over capacity, one reduction over all of them: experts
that stay at home cost nothing, and balanced loads no step at all.

Its twin is `make_plan` with planner "lla" (ds_llep/plan.py, which explains the rules): the same
integers, also where doubles decide. Kernels call no function of Triton's own library, as rows.py
says.

Shape letters: E experts, P ranks, M = E / P experts at home on a rank.
"""

import struct

import torch
import triton
import triton.language as tl

from .combining import add, larger, smaller

# Above every effective load and every key; shifted right by the bits of a rank still above loads.
NOTHING = tl.constexpr(2**62)


@triton.jit
def _next_expert(key_PM, below, effective_P, capacity):
    """The largest key under `below` of an expert whose home is over capacity, or -1."""
    spills = (key_PM < below) & (effective_P > capacity)[:, None]
    return tl.reduce(tl.reduce(tl.where(spills, key_PM, -1), 1, larger), 0, larger)


# Numbers of the config: specialising on their values would only compile anew.
@triton.jit(
    do_not_specialize=["threshold_bits", "factor_bits", "min_tokens", "max_foreign_experts"]
)
def _plan_lla_kernel(
    counts_ptr,
    tokens_ptr,
    capped_ptr,
    counts_stride,
    threshold_bits,
    factor_bits,
    min_tokens,
    max_foreign_experts,
    P: tl.constexpr,
    M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNROLL: tl.constexpr,
):
    p = tl.arange(0, BLOCK_P)
    m = tl.arange(0, BLOCK_M)
    expert_PM = p[:, None] * M + m[None, :]
    exists_PM = (p < P)[:, None] & (m < M)[None, :]
    load_PM = tl.full([BLOCK_P, BLOCK_M], 0, tl.int64)
    for first in range(0, P, UNROLL):
        # Unrolled: the loads do not depend on each other and are in flight together.
        for k in tl.static_range(UNROLL):
            row_ptr = counts_ptr + (first + k) * counts_stride
            row_PM = tl.load(row_ptr + expert_PM, mask=exists_PM & (first + k < P), other=0)
            load_PM += row_PM.to(tl.int64)

    # A rank's effective load: what it was assigned and its home experts that are not placed yet.
    effective_P = tl.reduce(load_PM, 1, add)
    total = tl.reduce(effective_P, 0, add)
    largest = tl.reduce(effective_P, 0, larger)
    # The host's IEEE operations on the host's integers, all below 2^53: the host's doubles.
    threshold = threshold_bits.to(tl.float64, bitcast=True)
    factor = factor_bits.to(tl.float64, bitcast=True)
    ratio = (largest * P).to(tl.float64) / tl.maximum(total, 1).to(tl.float64)
    mean = total // P
    # A factor may be as large as a double: no capacity needs to be above all tokens.
    capacity = tl.minimum(factor * mean.to(tl.float64), total.to(tl.float64)).to(tl.int64)
    capacity = tl.maximum(tl.where(mean > 0, capacity, total), 1)
    capacity = tl.where(ratio < threshold, total, capacity)  # bypassed: nothing is over it

    place_PM = BLOCK_P * BLOCK_M - 1 - (p[:, None] * BLOCK_M + m[None, :])
    key_PM = tl.where(load_PM > 0, load_PM * (BLOCK_P * BLOCK_M) + place_PM, -1)
    kept_PM = load_PM
    foreign_experts_P = tl.full([BLOCK_P], 0, tl.int32)
    capped_P = tl.full([BLOCK_P], 0, tl.int64)

    key = _next_expert(key_PM, NOTHING, effective_P, capacity)
    while key >= 0:
        load = key // (BLOCK_P * BLOCK_M)
        place = BLOCK_P * BLOCK_M - 1 - key % (BLOCK_P * BLOCK_M)
        home = place // BLOCK_M
        expert = home * M + place % BLOCK_M
        is_home_P = p == home
        overload = tl.reduce(tl.where(is_home_P, effective_P - capacity, 0), 0, add)
        spilled = tl.minimum(load, overload)
        effective_P -= tl.where(is_home_P, spilled, 0)
        helper_P = (p < P) & (p != home) & (foreign_experts_P < max_foreign_experts)
        taken_P = tl.full([BLOCK_P], 0, tl.int64)
        rest = spilled
        looking = rest > 0
        while looking:
            candidate_P = tl.where(helper_P, effective_P * BLOCK_P + p, NOTHING)
            candidate = tl.reduce(candidate_P, 0, smaller)
            helper = candidate % BLOCK_P
            helper_load = candidate // BLOCK_P
            room = capacity - helper_load
            least_load = helper_load
            if room <= 0:
                least_load = tl.reduce(tl.where(p < P, effective_P, NOTHING), 0, smaller)
            # Not where less loaded ranks are at their limit, nor where there is no helper.
            helps = helper_load <= least_load
            chunk = tl.minimum(rest, room)
            chunk = tl.where(chunk < min_tokens, rest, chunk)
            chunk = tl.where(helps, chunk, 0)
            taken_P += tl.where(p == helper, chunk, 0)
            effective_P += tl.where(p == helper, chunk, 0)
            rest -= chunk
            looking = helps & (rest > 0)
        foreign_experts_P += (taken_P > 0).to(tl.int32)
        effective_P += tl.where(is_home_P, rest, 0)
        capped = tl.minimum(capped_P + rest, effective_P - capacity)
        capped_P = tl.where(is_home_P, capped, capped_P)
        kept_PM = tl.where(key_PM == key, load - spilled + rest, kept_PM)
        tl.store(tokens_ptr + expert * P + p, taken_P, mask=taken_P > 0)
        key = _next_expert(key_PM, key, effective_P, capacity)
    tl.store(tokens_ptr + expert_PM * P + p[:, None], kept_PM, mask=exists_PM)
    tl.store(capped_ptr, tl.reduce(capped_P, 0, add))


def plan_lla(
    counts_PE: torch.Tensor,
    capacity_factor: float,
    imbalance_threshold: float,
    min_tokens_per_gemm: int,
    max_foreign_experts: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The assignment that `make_plan` makes with planner "lla", on the device of the counts.

    One kernel after one memset, no device-to-host synchronisation.

    Args:
        counts_PE: integers >= 0 [P, E], row p is rank p's tokens per expert; any row stride. E is
            a multiple of P.
        capacity_factor, imbalance_threshold: >= 1.
        min_tokens_per_gemm: >= 0.
        max_foreign_experts: >= 0, or None for no limit.

    Returns:
        int64 [E, P], tokens of expert e computed on rank p (`Plan.tokens_EP`), and int64 [],
        `Plan.capped_tokens`.
    """
    assert counts_PE.dim() == 2 and not counts_PE.is_floating_point()
    P, E = counts_PE.shape
    assert P and E and E % P == 0
    if counts_PE.stride(1) != 1:
        counts_PE = counts_PE.contiguous()
    block_p, block_m = triton.next_power_of_2(P), triton.next_power_of_2(E // P)
    # One allocation, so one memset.
    plan = torch.zeros(E * P + 1, dtype=torch.int64, device=counts_PE.device)
    _plan_lla_kernel[(1,)](
        *(counts_PE, plan, plan[-1:], counts_PE.stride(0)),
        # Triton would make fp32 of a Python float.
        *(_bits(imbalance_threshold), _bits(capacity_factor)),
        min(max(min_tokens_per_gemm, 1), 2**62),
        E if max_foreign_experts is None else min(max_foreign_experts, E),
        P=P,
        M=E // P,
        BLOCK_P=block_p,
        BLOCK_M=block_m,
        UNROLL=min(block_p, 8),
        num_warps=1,
    )
    return plan[:-1].view(E, P), plan[-1]


def _bits(x: float) -> int:
    """The double's bits as an int64."""
    return struct.unpack("<q", struct.pack("<d", x))[0]

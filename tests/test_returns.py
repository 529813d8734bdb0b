"""The return of foreign experts' gradients by itself: what arrives, in how many messages."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import deepspeed.comm as dist
import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from ds_llep.fetch import Exchange
from ds_llep.plan import Plan
from ds_llep.returns import BUNDLES_PER_ROUND, GradientReturn
from ds_llep.workspace import BundleLayout

PER_RANK = 8  # experts
LAYOUT = BundleLayout((torch.Size([5, 3]), torch.Size([3, 5]), torch.Size([2, 7])))


def some_plan(num_ranks: int, seed: int) -> Plan:
    """Every expert has a random set of helpers, rank 0's first all others and its next ones one."""
    rng = np.random.default_rng(seed)
    tokens_EP = rng.integers(1, 100, (num_ranks * PER_RANK, num_ranks))
    helps_EP = rng.random(tokens_EP.shape) < 0.3
    helps_EP[:PER_RANK] = False
    helps_EP[0] = True
    helps_EP[range(1, PER_RANK), rng.integers(1, num_ranks, PER_RANK - 1)] = True
    return Plan((tokens_EP * helps_EP).T, tokens_EP * helps_EP, bypassed=False)


def gradient_of(expert: int, rank: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """What a rank computes of an expert's gradient, ``[., .]`` for each matrix."""
    generator = torch.Generator().manual_seed(seed * 1000 + 10 * expert + rank)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in LAYOUT.shapes]


def give_back(dtype: torch.dtype, seed: int) -> dict:
    """Whether all that is home on this rank has its sum, and the messages of each batch."""
    world, rank = dist.get_world_size(), dist.get_rank()
    plan, device = some_plan(world, seed), get_accelerator().current_device_name()
    groups._create_expert_and_data_parallel(world)
    exchange = Exchange.of_home_ranks(groups._get_expert_parallel_group(f"ep_size_{world}"))
    homecoming = GradientReturn(exchange, plan, LAYOUT)
    for matrix, memory in enumerate(homecoming.memory(torch.empty(0, dtype=dtype, device=device))):
        for slot, expert in enumerate(plan.foreign_experts(rank)):
            memory[slot] = gradient_of(expert, rank, dtype, seed)[matrix]
    home = range(rank * PER_RANK, (rank + 1) * PER_RANK)
    own = [gradient_of(expert, rank, dtype, seed) for expert in home]
    gradients = [torch.stack(matrices).to(device) for matrices in zip(*own, strict=True)]
    post, batches = dist.batch_isend_irecv, []

    def noted(operations):
        batches.append([(op.op, op.peer, op.tensor.numel()) for op in operations])
        return post(operations)

    with mock.patch.object(dist, "batch_isend_irecv", noted):
        homecoming.start()
        homecoming.finish(gradients)
    wrong = []
    for local, expert in enumerate(home):
        totals = [part.to(torch.promote_types(dtype, torch.float32)) for part in own[local]]
        for spill in plan.spills:
            if spill.expert == expert:
                parts = gradient_of(expert, spill.helper, dtype, seed)
                totals = [total + part for total, part in zip(totals, parts, strict=True)]
        for matrix, total in enumerate(totals):
            if not torch.equal(gradients[matrix][local].cpu(), total.to(dtype)):
                wrong.append((expert, matrix))
    return {"wrong": wrong, "batches": batches}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sums_and_messages(pools, dtype, seed):
    """Bit for bit the sum in the order of helpers, rounded once; in a round, one message a pair."""
    pool = pools(4)
    results = pool.run(give_back, dtype, seed)
    plan = some_plan(len(results), seed)
    helpers = Counter(spill.expert for spill in plan.spills)
    assert helpers[0] == len(results) - 1 and helpers[1] == 1
    assert sum(spill.home == 0 for spill in plan.spills) > BUNDLES_PER_ROUND
    for rank, result in enumerate(results):
        assert not result["wrong"], (seed, rank, result["wrong"])
        for batch in result["batches"]:
            assert len({message[:2] for message in batch}) == len(batch)
            received = sum(numel for kind, _, numel in batch if kind == "irecv")
            assert received <= BUNDLES_PER_ROUND * LAYOUT.numel
        for kind, ends in (("isend", "helper"), ("irecv", "home")):
            bundles = sum(getattr(spill, ends) == rank for spill in plan.spills)
            moved = [numel for batch in result["batches"] for *at, numel in batch if at[0] == kind]
            assert sum(moved) == bundles * LAYOUT.numel

"""What a forward keeps alive under ZeRO-3, byte for byte, and the tracker that counts it on CPU."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ds_llep.bench.live_bytes import StorageTracker
from ds_llep.bench.memory import Shape, measure

SOURCES = ("owner", "shards")
N = 1000
BYTES = 4 * N


def test_counts_each_storage_until_it_is_freed():
    with StorageTracker() as memory:
        a = torch.zeros(N)
        views = [a[1:], a.view(10, -1), a.detach(), a.add_(1)]
        assert memory.live() == BYTES
        b = torch.cat([a, a])
        copies = torch.split_copy(b, N)  # one op, two new storages
        assert memory.live() == 5 * BYTES
        del a, b
        assert memory.live() == 3 * BYTES, "the views hold the first one"
        del views, copies
        assert memory.live() == 0


def test_what_is_older_does_not_count():
    older = torch.zeros(N)
    with StorageTracker() as memory:
        views = [older[1:], older.add_(1), torch.nn.Parameter(older)]
        assert memory.live() == 0
        new = older + 1
        assert memory.live() == BYTES
        torch.add(older, 1, out=older)
    assert memory.live() == BYTES and views and new.numel() == N


def test_allocations_out_of_sight():
    """torch.tensor() allocates before it calls an op; out= resizes what is there."""
    with StorageTracker() as memory:
        a = torch.tensor([1.0] * N)
        assert memory.live() == BYTES
        out = torch.empty(0)
        torch.add(a, 1, out=out)
        assert memory.live() == memory.peak() == 2 * BYTES
    assert out.numel() == N


def test_peak():
    with StorageTracker() as memory:
        a = torch.zeros(N)
        b = a + 1  # the peak
        del b
        c = torch.zeros(N // 2)
        assert (memory.live(), memory.peak()) == (BYTES * 3 // 2, BYTES * 2)
        memory.reset_peak()
        del a
        a = torch.zeros(N)
        assert memory.peak() == BYTES * 3 // 2, "one was freed before the other was allocated"
        ((a + 1) + 1).sum()
        assert memory.peak() == BYTES * 7 // 2 and c.numel() < N


def test_saved_tensors_that_python_does_not_see():
    with StorageTracker() as memory:
        x = torch.ones(N, requires_grad=True)
        loss = x.exp().sum()  # exp saves its result
        assert memory.live() == 2 * BYTES + 4
        loss.backward()  # frees it and makes a gradient
        assert memory.live() == 2 * BYTES + 4
        x.grad = None
        assert memory.live() == BYTES + 4
        loss = x.exp().sum()
        del loss
        assert memory.live() == BYTES


class _Backward(torch.autograd.Function):
    """Allocates in backward as DeepSpeed's hooks and the experts do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.repeat(3))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        return grad + torch.zeros(7 * N).sum() + saved.sum()


def test_backward_of_custom_functions_and_hooks():
    held = []
    with StorageTracker() as memory:
        x = torch.ones(N, requires_grad=True)
        x.register_hook(lambda grad: held.append(torch.zeros(5 * N)))
        x.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None))
        loss = _Backward.apply(x).sum()
        assert memory.live() == 4 * BYTES + 4
        memory.reset_peak()
        loss.backward()
        assert memory.peak() >= 4 * BYTES + 7 * BYTES
        assert memory.live() == BYTES + 5 * BYTES + 4
    held.clear()
    assert memory.live() == BYTES + 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_second_forward_of_checkpointing(reentrant):
    with StorageTracker() as memory:
        x = torch.ones(N, requires_grad=True)
        loss = checkpoint(
            lambda x: x.exp().exp().exp().sum(),
            x,
            use_reentrant=reentrant,
            preserve_rng_state=False,
        )
        assert memory.live() == BYTES + 4
        memory.reset_peak()
        loss.backward()
        assert memory.peak() >= BYTES * 5
        assert memory.live() == 2 * BYTES + 4 and loss.numel() == 1


def allocated(work) -> tuple[int, object]:
    """What PyTorch's CPU allocator gave out less what it got back; and the result of the work."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = work()
    return sum(event.self_cpu_memory_usage for event in profile.function_events), result


def test_agrees_with_the_allocator():
    layers = [torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 64))
    x = torch.randn(32, 64)
    with StorageTracker() as memory:
        model(x).sum().backward()
        before = memory.live()
        forward, loss = allocated(lambda: model(x).sum())
        assert memory.live() - before == forward > x.nbytes
        backward, _ = allocated(loss.backward)
        assert memory.live() - before == forward + backward == loss.nbytes


def kept(mode: str, layers: list[int], checkpointing: str) -> list[dict[str, int]]:
    """What is measured at each number of layers."""
    gc.freeze()  # what imports made: to go through it takes a third of the time of an engine
    shapes = [Shape(count, hidden=128, ffn=256, experts=8, tokens=16) for count in layers]
    return [measure(shape, mode, 2, checkpointing) for shape in shapes]


@pytest.fixture
def four_ranks(pools):
    pool = pools(4)
    if pool.world_size != 4:
        pytest.skip("under ZeRO-3 with EP 2, experts are only sharded where EDP is 2")
    return pool


@pytest.mark.parametrize("mode", ["autoep", *SOURCES])
def test_gathered_weights_do_not_outlive_their_layer(four_ranks, mode):
    """AutoEP's autograd graph saves views of them, which keep them alive; ours does not."""
    few, many = four_ranks.run(kept, mode, [2, 6], "none")[0]
    growth, experts = ((many[key] - few[key]) / 4 for key in ("kept", "experts"))
    assert experts == 8 // 2 * 3 * 128 * 256 * 2
    if mode == "autoep":
        assert growth >= experts, "AutoEP keeps no gathered weights: there is nothing to compare"
    else:
        assert growth < experts / 4


@pytest.mark.parametrize("mode", ["autoep", *SOURCES])
def test_checkpointing_keeps_no_weights(four_ranks, mode):
    (found,) = four_ranks.run(kept, mode, [2], "non_reentrant")[0]
    assert found["kept"] < found["experts"] / 4

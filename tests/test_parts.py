"""The rooms between plan and layer: routes, bundles, workspace, grouped products, activations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llep import LLEPConfig, make_plan
from ds_llep.dispatch import combine, dispatch, make_route
from ds_llep.experts import Activation
from ds_llep.kernels.grouped_gemm import (
    add_grouped_gemm,
    grouped_gemm,
    grouped_gemm_weight_gradient,
)
from ds_llep.kernels.select import select_kernels
from ds_llep.returns import Sum

CPU = select_kernels("torch", torch.device("cpu"))
PLAN_ALWAYS = LLEPConfig(imbalance_threshold=1.0, min_tokens_per_gemm=1)


@st.composite
def routings(draw):
    """Expert ids ``[T, K]`` of every rank, ragged, with hot experts and ranks without tokens."""
    num_ranks = draw(st.sampled_from([1, 2, 3, 4]))
    num_experts = num_ranks * draw(st.integers(1, 3))
    top_k = draw(st.integers(1, min(3, num_experts)))
    hot = draw(st.integers(0, num_experts - 1))
    tokens = draw(st.lists(st.integers(0, 9), min_size=num_ranks, max_size=num_ranks))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    heat = torch.ones(num_experts)
    heat[hot] = draw(st.sampled_from([1.0, 5.0, 1000.0]))
    ids = [
        torch.multinomial(heat.expand(count, -1), top_k, generator=generator)
        if count
        else torch.empty((0, top_k), dtype=torch.int64)
        for count in tokens
    ]
    return ids, num_experts


@given(routings())
@settings(deadline=None)
def test_routes_meet(routing):
    """Played through by hand for all ranks: every row arrives in its expert's slot, and returns."""
    ids, num_experts = routing
    num_ranks = len(ids)
    counts_PE = np.stack([np.bincount(i.reshape(-1), minlength=num_experts) for i in ids])
    plan = make_plan(counts_PE, PLAN_ALWAYS)
    routes = [make_route(ids[rank], plan, rank, None, CPU) for rank in range(num_ranks)]
    sent = []
    for rank, route in enumerate(routes):
        # A row says where it comes from: rank, copy, expert.
        copies = route.maps.send_order
        experts = ids[rank].reshape(-1)[copies]
        rows = torch.stack((torch.full_like(copies, rank), copies, experts), dim=1)
        sent.append(rows.split(route.send_splits))
    for rank, route in enumerate(routes):
        pieces = [sent[source][rank] for source in range(num_ranks)]
        assert [len(piece) for piece in pieces] == route.recv_splits
        received = torch.cat(pieces)
        rows = received[route.maps.arrival_order]
        for slot, piece in zip(plan.slots(rank), rows.split(route.rows_per_slot), strict=True):
            assert (piece[:, 2] == slot).all()
            assert piece[:, 0].tolist() == sorted(piece[:, 0].tolist())
        home_slots = route.rows_per_slot[: plan.experts_per_rank]
        assert route.num_home_rows == sum(home_slots)
        assert (rows[: route.num_home_rows, 2] // plan.experts_per_rank == rank).all()
        assert (rows[route.num_home_rows :, 2] // plan.experts_per_rank != rank).all()
        assert torch.equal(rows[route.maps.arrival_position], received)
        assert len(rows) == plan.rank_load_P[rank]
        positions = route.maps.position_TK.reshape(-1)
        assert torch.equal(route.maps.send_order[positions], torch.arange(len(positions)))


@pytest.mark.parametrize("weighs", ["before", "after"])
def test_dispatch_and_combine_gradients(weighs, seed):
    """gradcheck in fp64, on a rank of its own."""
    torch.manual_seed(seed)
    ids = torch.multinomial(torch.ones(5, 6), 3)
    counts_PE = torch.bincount(ids.reshape(-1), minlength=6).view(1, 6).numpy()
    route = make_route(ids, make_plan(counts_PE, PLAN_ALWAYS), 0, None, CPU)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    before, after = (scores, None) if weighs == "before" else (None, scores)

    def layer(x, scores):
        before, after = (scores, None) if weighs == "before" else (None, scores)
        home_rows, foreign_rows = dispatch(x, before, route)
        return combine(home_rows.sin(), foreign_rows.sin(), after, route)

    assert torch.autograd.gradcheck(layer, (x, scores))
    expected = torch.zeros_like(x)
    for k in range(3):
        row = x * scores[:, k : k + 1] if before is not None else x
        expected = expected + row.sin() * (scores[:, k : k + 1] if after is not None else 1)
    assert torch.allclose(layer(x, scores), expected)


def test_returned_gradients_are_rounded_once():
    """Helpers' bf16 gradients are summed in fp32: small ones do not vanish one by one."""
    gradients = [torch.full((2, 1, 1), 256.0, dtype=torch.bfloat16)]
    total = Sum(gradients)
    for _ in range(8):
        total.add(1, [torch.full((1, 1, 1), 0.5, dtype=torch.bfloat16)])
    total.add(0, [torch.full((1, 1, 1), 4.0, dtype=torch.bfloat16)])
    total.flush()
    assert gradients[0].flatten().tolist() == [260.0, 260.0]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [[5, 0, 1, 10], [0, 0, 3], [0, 0], [1], [17, 3, 0, 0, 129]])
def test_grouped_gemm(counts, dtype, seed):
    """Any row counts, empty groups, strided groups; budget: twice a plain matmul's own error."""
    torch.manual_seed(seed)
    num_groups, d, f, rows = len(counts), 16, 24, sum(counts)
    x = torch.randn(rows, d).to(DEVICE, dtype)
    grad = torch.randn(rows, f).to(DEVICE, dtype)
    # Matrices of one group lie in a longer bundle, as foreign experts' do.
    bundles = torch.randn(num_groups, f * d + 8).to(DEVICE, dtype)
    weights = bundles[:, : f * d].unflatten(1, (f, d))
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    try:
        found = [
            grouped_gemm(x, weights, counts),
            grouped_gemm(grad, weights, counts, transpose=False),
            grouped_gemm_weight_gradient(grad, x, counts),
        ]
    finally:
        torch.use_deterministic_algorithms(False)

    def naive(dtype):
        pieces = zip(x.to(dtype).split(counts), grad.to(dtype).split(counts), strict=True)
        forward, backward, weight = [], [], []
        for matrix, (x_g, grad_g) in zip(weights.to(dtype), pieces, strict=True):
            forward.append(x_g @ matrix.t())
            backward.append(grad_g @ matrix)
            weight.append(grad_g.t() @ x_g)
        return torch.cat(forward), torch.cat(backward), torch.stack(weight)

    for ours, theirs, wide in zip(found, naive(dtype), naive(torch.float64), strict=True):
        assert ours.shape == wide.shape and ours.dtype == dtype
        error, budget = ((t.double() - wide).norm() for t in (ours, theirs))
        assert error <= 2 * budget + 1e-6 * wide.norm(), (seed, counts)


@pytest.mark.parametrize("counts", [[5, 0, 1, 10], [0, 0, 3], [0, 0], [1], [2, 1], [40, 3, 0, 129]])
def test_add_grouped_gemm(counts, seed):
    """Slices of the rows that cut groups, that are empty, and fewer rows than slices."""
    torch.manual_seed(seed)
    rows, weights = torch.randn(sum(counts), 24), torch.randn(len(counts), 24, 16)
    out = torch.randn(sum(counts), 16)
    rows, weights, out = (tensor.to(DEVICE) for tensor in (rows, weights, out))
    expected = out + grouped_gemm(rows, weights, counts, transpose=False)
    add_grouped_gemm(out, rows, weights, counts)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", ["swiglu", "swiglu_oai", "swiglu_clamped", "geglu_tanh"])
def test_activations(name, seed):
    """Backward of every form AutoEP registers, against gradcheck's finite differences."""
    torch.manual_seed(seed)
    activation = Activation(name, 1.702, 2.0, CPU)
    gate, up, grad = (torch.randn(7, 5, dtype=torch.float64) for _ in range(3))
    grad_gate, grad_up, act = activation.backward(grad.clone(), gate, up)
    assert torch.allclose(act, activation.forward(gate, up))
    step = 1e-6
    for wiggled, analytic in ((0, grad_gate), (1, grad_up)):
        inputs = [[gate, up], [gate, up]]
        inputs[0][wiggled] = inputs[0][wiggled] + step
        inputs[1][wiggled] = inputs[1][wiggled] - step
        difference = activation.forward(*inputs[0]) - activation.forward(*inputs[1])
        assert torch.allclose(grad * difference / (2 * step), analytic, atol=1e-5)
    assert math.isfinite(grad_gate.sum().item())

"""The rooms between plan and layer: dispatch on one rank, grouped products, activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_llep import LLEPConfig, make_plan
from ds_llep.activation import Activation
from ds_llep.dispatch import DispatchBackward, combine, dispatch
from ds_llep.kernels.grouped_gemm import (
    add_grouped_gemm,
    grouped_gemm,
    grouped_gemm_weight_gradient,
)
from ds_llep.kernels.select import select_kernels
from ds_llep.route import Addresses, find_runs, make_route

CPU = select_kernels("torch", torch.device("cpu"))
PLAN_ALWAYS = LLEPConfig(imbalance_threshold=1.0, min_tokens_per_gemm=1)


@pytest.mark.parametrize("top_k", [1, 3])
def test_dispatch_and_combine_gradients(top_k, seed):
    """gradcheck in fp64, on a rank of its own; experts that weigh, and are no straight line."""
    torch.manual_seed(seed)
    selected = torch.multinomial(torch.ones(5, 6), top_k)
    counts = torch.bincount(selected.reshape(-1), minlength=6).view(1, 6).numpy()
    plan = make_plan(counts, PLAN_ALWAYS)
    runs = torch.from_numpy(find_runs(plan, 0))
    reached_PP, alone_PE = np.full((1, 1), 5), counts * (top_k == 1)
    route = make_route(reached_PP, alone_PE, plan, 0, None, CPU, top_k)
    addresses = Addresses(*CPU.address_copies(selected, torch.empty(0), runs, 0))
    maps = addresses.place(torch.from_numpy(route.first_P), CPU)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(5, top_k, dtype=torch.float64, requires_grad=True)

    def layer(x, scores):
        dispatched = dispatch(x, scores, route, maps, DispatchBackward(route))
        rows, none, scores_N, arrived = dispatched
        assert len(none) == len(arrived) == 0
        out = rows.sin() * scores_N.unsqueeze(1)
        return combine(out, none, arrived, route, maps)

    assert torch.autograd.gradcheck(layer, (x, scores))
    expected = x.sin() * scores.sum(1, keepdim=True)
    assert torch.allclose(layer(x, scores), expected)


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


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "weighed"])
@pytest.mark.parametrize("name", ["swiglu", "swiglu_oai", "swiglu_clamped", "geglu_tanh"])
def test_activations(name, weighed, seed):
    """Backward of every form AutoEP registers, against its finite differences."""
    torch.manual_seed(seed)
    activation = Activation(name, 1.702, 2.0, CPU)
    gate, up, grad = (torch.randn(7, 5, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(7, dtype=torch.float64) if weighed else None
    inputs = [gate, up, weight]
    *gradients, act, grad_weight = activation.backward(grad.clone(), *inputs)
    assert torch.allclose(act, activation.forward(*inputs))
    if weighed:
        gradients.append(grad_weight)
        ones = activation.forward(gate, up, None)
        assert torch.allclose(act, ones * weight.unsqueeze(1))
    else:
        assert grad_weight is None
    step = 1e-6
    for wiggled, analytic in enumerate(gradients):
        up_and_down = []
        for change in (step, -step):
            changed = inputs.copy()
            changed[wiggled] = changed[wiggled] + change
            up_and_down.append(activation.forward(*changed))
        slope = grad * (up_and_down[0] - up_and_down[1]) / (2 * step)
        # A weight is one of a row.
        slope = slope.sum(1) if wiggled == 2 else slope
        assert torch.allclose(slope, analytic, atol=1e-5), wiggled
        assert analytic.isfinite().all()


@pytest.mark.parametrize("name", ["swiglu", "swiglu_oai", "swiglu_clamped", "geglu_tanh"])
def test_activations_keep_their_dtype(name, seed):
    """bf16 rows and fp32 weights, as in training; and the rows' gradients within their rounding."""
    torch.manual_seed(seed)
    activation = Activation(name, 1.702, 2.0, CPU)
    gate, up, grad = (torch.randn(7, 50, dtype=torch.bfloat16) for _ in range(3))
    weight = torch.randn(7)
    wide = activation.backward(*(x.double() for x in (grad, gate, up, weight)))
    found = activation.backward(grad, gate, up, weight)
    assert [x.dtype for x in found] == [torch.bfloat16] * 3 + [torch.float32]
    assert torch.equal(found[2], activation.forward(gate, up, weight))
    for one, exact in zip(found, wide, strict=True):
        assert (one.double() - exact).norm() <= 0.02 * exact.norm()

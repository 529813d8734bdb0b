"""A matrix and its bias in one parameter, and AutoEP's experts with biases."""

from __future__ import annotations

import pytest
import torch

from ds_llep.biased import BiasedExperts, empty_joint, join, split

SIZES = [(5, 7), (7, 5), (6, 6), (20, 3), (3, 20)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_join_and_split(size, seed):
    F, D = size
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(4, F, D, generator=generator)
    bias = torch.randn(4, F, generator=generator)
    joined = join(matrix, bias)
    found = split(joined, F)
    assert torch.equal(found[0], matrix) and torch.equal(found[1], bias)
    assert all(part.data_ptr() for part in found) and found[0][0].is_contiguous()
    nothing = joined.clone()
    for part in split(nothing, F):
        part.zero_()
    assert not nothing.any(), "what is neither matrix nor bias is not zero"
    assert joined.shape[1] * D - F * D - F < D, "more rows than a bias fills"


def test_fresh_memory_is_zero_where_nothing_is(seed):
    like = torch.full((64, 64), float("nan"))
    del like  # the allocator may hand out its memory again
    joined = empty_joint(3, 5, 4, like=torch.empty(0))
    matrix, bias = split(joined, 5)
    matrix.fill_(1.0)
    bias.fill_(1.0)
    assert joined.sum() == 3 * (5 * 4 + 5)


def exact(x, counts, w1, w2, w3, form):
    """Rows of each expert through its MLP, without joining or grouping anything."""
    outputs, start = [], 0
    for expert, count in enumerate(counts):
        rows = x[start : start + count]
        start += count
        gate, up = (rows @ m[expert].T + b[expert] for m, b in (w1, w3))
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        hidden = gate * torch.sigmoid(gate * form.alpha) * (up + 1)
        outputs.append(hidden @ w2[0][expert].T + w2[1][expert])
    return torch.cat(outputs)


class Form:
    alpha, limit = 1.702, 2.0


@pytest.mark.parametrize("use_grouped_mm", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 8, 1], [0, 0, 0, 16]], ids=str)
def test_biased_experts(use_grouped_mm, counts, seed):
    """As AutoEP calls them, rows of padding at the end and all."""
    E, D, F, padding = 4, 8, 16, 5
    torch.manual_seed(seed)
    experts = BiasedExperts(
        *(D, F, E, use_grouped_mm),
        disable_triton_grouped_mm=True,
        activation="swiglu_oai",
        activation_alpha=Form.alpha,
        activation_limit=Form.limit,
    )
    shapes = {"w1": (F, D), "w2": (D, F), "w3": (F, D)}
    parts = {
        name: [torch.randn(E, *shape), torch.randn(E, shape[0])] for name, shape in shapes.items()
    }
    for name, (matrix, bias) in parts.items():
        setattr(experts, name, torch.nn.Parameter(join(matrix, bias)))
    N = sum(counts)
    x, grad = torch.randn(N + padding, D), torch.randn(N, D)
    x_ours = x.clone().requires_grad_()
    y = experts(x_ours, torch.tensor(counts))[:N]
    y.backward(grad)
    found = [y.detach(), x_ours.grad[:N]]
    for name, shape in shapes.items():
        found += split(getattr(experts, name).grad, shape[0])

    def reference(dtype):
        leaves = {
            name: [part.to(dtype).clone().requires_grad_() for part in both]
            for name, both in parts.items()
        }
        rows = x[:N].to(dtype).clone().requires_grad_()
        out = exact(rows, counts, *leaves.values(), Form)
        out.backward(grad.to(dtype))
        grads = [part.grad for name in shapes for part in leaves[name]]
        return [out.detach(), rows.grad, *grads]

    naive, wide = reference(torch.float32), reference(torch.float64)
    for one, one_naive, one_exact in zip(found, naive, wide, strict=True):
        allowed = 2 * (one_naive - one_exact).norm() + 1e-6 * one_exact.norm()
        assert (one - one_exact).norm() <= allowed, seed

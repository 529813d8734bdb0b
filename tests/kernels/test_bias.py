"""Biases of grouped products and their gradients, against fp64."""

import pytest
import torch

COUNTS = [[4], [3, 0, 9, 1], [0, 0], []]
WIDTHS = [1, 37, 1100]


@pytest.fixture(params=[False, True], ids=["plain", "weighed"])
def draw_weights(request, draw):
    return lambda n: draw.normal(n) if request.param else None


@pytest.fixture(params=COUNTS, ids=str)
def counts(request):
    return request.param


@pytest.fixture(params=WIDTHS)
def D(request):
    return request.param


def stops(counts, device):
    return torch.tensor(counts, device=device).cumsum(0).int()


def groups(counts, device):
    ids = [group for group, count in enumerate(counts) for _ in range(count)]
    return torch.tensor(ids, device=device, dtype=torch.int64)


def weighed(x_ND, weight_N):
    return x_ND if weight_N is None else x_ND * weight_N.to(x_ND.dtype).unsqueeze(1)


def test_add_bias(counts, D, dtype, draw, draw_weights, kernels, within_budget):
    N, G = sum(counts), len(counts)
    rows_ND, bias_GD = draw.normal(N, D, dtype=dtype), draw.normal(G, 2 * D, dtype=dtype)[:, D:]
    weight_N, group_N = draw_weights(N), groups(counts, draw.device)
    exact = rows_ND.double() + weighed(bias_GD.double()[group_N], weight_N)
    naive = rows_ND + weighed(bias_GD[group_N], weight_N)
    kernels.add_bias(rows_ND, bias_GD, stops(counts, draw.device), weight_N)
    within_budget(rows_ND, naive, exact)


@pytest.mark.parametrize("counts", [*COUNTS, [0, 0, 700, 0, 5, 300, 256]], ids=str)
@pytest.mark.parametrize("D", [1, 37, 150])
def test_gradient_of_bias(counts, D, dtype, draw, draw_weights, kernels, within_budget):
    N, G = sum(counts), len(counts)
    grad_ND, weight_N = draw.normal(N, D, dtype=dtype), draw_weights(N)

    def summed(wide):
        rows = weighed(grad_ND.to(wide), weight_N)
        return rows.new_zeros(G, D).index_add(0, groups(counts, draw.device), rows)

    found_GD = kernels.gradient_of_bias(grad_ND, counts, weight_N)
    assert found_GD.dtype == torch.float32
    within_budget(found_GD, summed(torch.float32), summed(torch.float64))
    again_GD = kernels.gradient_of_bias(grad_ND, counts, weight_N)
    assert torch.equal(found_GD, again_GD), draw.seed


def test_gradient_of_its_weight(counts, D, dtype, draw, kernels, within_budget):
    N, G = sum(counts), len(counts)
    grad_ND, bias_GD = draw.normal(N, D, dtype=dtype), draw.normal(G, 2 * D, dtype=dtype)[:, D:]
    group_N = groups(counts, draw.device)
    found_N = kernels.gradient_of_bias_weight(grad_ND, bias_GD, stops(counts, draw.device))
    assert found_N.dtype == torch.float32
    naive, exact = (
        (grad_ND.to(wide) * bias_GD.to(wide)[group_N]).sum(1)
        for wide in (torch.float32, torch.float64)
    )
    within_budget(found_N, naive, exact)


def test_any_layout_of_the_gradient(layout, draw, kernels):
    counts, grad_ND = [3, 0, 4], draw.normal(7, 37)
    bias_GD, stop_G = draw.normal(3, 37), stops(counts, draw.device)
    for function, *arguments in (
        (kernels.gradient_of_bias, counts),
        (kernels.gradient_of_bias_weight, bias_GD, stop_G),
    ):
        expected = function(grad_ND, *arguments)
        torch.testing.assert_close(function(layout(grad_ND), *arguments), expected)


def test_float64_is_not_rounded(draw, kernels):
    counts, rows_ND = [3, 0, 4], draw.normal(7, 9).double() / 3
    bias_GD, stop_G = draw.normal(3, 9).double() / 3, stops(counts, draw.device)
    weight_N, group_N = draw.normal(7).double() / 3, groups(counts, draw.device)
    dot_N = kernels.gradient_of_bias_weight(rows_ND, bias_GD, stop_G)
    torch.testing.assert_close(dot_N, (rows_ND * bias_GD[group_N]).sum(1))
    total_GD = kernels.gradient_of_bias(rows_ND, counts, weight_N)
    exact_GD = torch.zeros_like(bias_GD).index_add(0, group_N, weighed(rows_ND, weight_N))
    torch.testing.assert_close(total_GD, exact_GD)
    expected_ND = rows_ND + weighed(bias_GD[group_N], weight_N)
    kernels.add_bias(rows_ND, bias_GD, stop_G, weight_N)
    torch.testing.assert_close(rows_ND, expected_ND)

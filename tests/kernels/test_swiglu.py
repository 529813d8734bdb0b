"""SwiGLU and gpt-oss' form against their formulas in fp64 and PyTorch's autograd of those."""

from functools import partial

import pytest
import torch
from deepspeed.moe.ep_experts import get_expert_activation

from ds_llep.kernels import reference_mlp, swiglu
from ds_llep.kernels.tables import HiddenBias

SIZES = [(40, 1), (3, 17), (4, 64), (7, 130), (2, 2500), (0, 8), (3, 0)]


@pytest.fixture(params=[False, True], ids=["plain", "weighed"])
def draw_weights(request, draw):
    """Draws weights of rows; None where rows have none."""
    return lambda n: draw.normal(n) if request.param else None


def exact_swiglu(gate_NF, up_NF, weight_N=None):
    h_NF = gate_NF / (1 + torch.exp(-gate_NF)) * up_NF
    return h_NF if weight_N is None else h_NF * weight_N.unsqueeze(1)


def gradients(swiglu_forward, dh_NF, gate_NF, up_NF, weight_N, dtype) -> list[torch.Tensor]:
    """What autograd makes of it in a dtype: dgate, dup, h and, with weights, dweight."""
    inputs = [x for x in (gate_NF, up_NF, weight_N) if x is not None]
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    h_NF = swiglu_forward(*inputs)
    dgate, dup, *dweight = torch.autograd.grad(h_NF, inputs, dh_NF.to(dtype))
    return [dgate, dup, h_NF.detach(), *dweight]


def exact_backward(*inputs) -> list[torch.Tensor]:
    return gradients(exact_swiglu, *inputs, torch.float64)


def naive_backward(dh_NF, *inputs) -> list[torch.Tensor]:
    """What PyTorch gives in dh's dtype, one rounding for every operation."""

    def naive(gate_NF, up_NF, weight_N=None):
        h_NF = torch.nn.functional.silu(gate_NF) * up_NF
        return h_NF if weight_N is None else h_NF * weight_N.unsqueeze(1)

    return gradients(naive, dh_NF, *inputs, dh_NF.dtype)


def given(backward: tuple) -> list[torch.Tensor]:
    """What a backward returns, less the gradient of weights that there are not."""
    *tensors, dweight_N = backward
    return tensors if dweight_N is None else [*tensors, dweight_N]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size, dtype, draw, draw_weights, kernels, within_budget):
    dh_NF, gate_NF, up_NF = (draw.normal(*size, dtype=dtype) * 2 for _ in range(3))
    weight_N = draw_weights(size[0])
    inputs = dh_NF, gate_NF, up_NF, weight_N
    exact, naive = exact_backward(*inputs), naive_backward(*inputs)
    within_budget(kernels.swiglu_forward(gate_NF, up_NF, weight_N), naive[2], exact[2])
    ours = kernels.swiglu_backward(*inputs)
    assert len(ours) == 4 and (ours[3] is None) == (weight_N is None)
    if weight_N is not None:
        assert ours[3].dtype == torch.float32 and ours[3].shape == weight_N.shape
        naive[3] = naive_backward(*(x.float() for x in inputs))[3]
    for one, one_naive, one_exact in zip(given(ours), naive, exact, strict=True):
        within_budget(one, one_naive, one_exact)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_triton_is_as_good_as_its_twin(size, dtype, draw, draw_weights, within_budget):
    inputs = [*(draw.normal(*size, dtype=dtype) * 2 for _ in range(3)), draw_weights(size[0])]
    ours, twin = swiglu.swiglu_backward(*inputs), reference_mlp.swiglu_backward(*inputs)
    for one, one_twin, exact in zip(given(ours), given(twin), exact_backward(*inputs), strict=True):
        within_budget(one, one_twin, exact)


@pytest.mark.parametrize("F", [37, 1100])
def test_backward_recomputes_the_same_h(F, dtype, draw, draw_weights, kernels):
    dh_NF, *inputs = (draw.normal(5, F, dtype=dtype) for _ in range(3))
    inputs.append(draw_weights(5))
    h_NF = kernels.swiglu_backward(dh_NF, *inputs)[2]
    assert torch.equal(h_NF, kernels.swiglu_forward(*inputs)), draw.seed


def test_h_may_take_the_memory_of_dh(dtype, draw, draw_weights, kernels):
    inputs = [*(draw.normal(5, 37, dtype=dtype) for _ in range(3)), draw_weights(5)]
    expected = given(kernels.swiglu_backward(*inputs))
    found = kernels.swiglu_backward(*inputs, into_dh=True)
    assert all(map(torch.equal, given(found), expected)), draw.seed
    assert found[2].data_ptr() == inputs[0].data_ptr()


def test_weights_of_one_change_nothing(dtype, draw, kernels):
    inputs = [draw.normal(5, 37, dtype=dtype) for _ in range(3)]
    ones = torch.ones(5, device=draw.device)
    h_NF = kernels.swiglu_forward(*inputs[1:])
    assert torch.equal(kernels.swiglu_forward(*inputs[1:], ones), h_NF), draw.seed
    plain, weighed = kernels.swiglu_backward(*inputs), kernels.swiglu_backward(*inputs, ones)
    assert all(map(torch.equal, plain[:3], weighed[:3])), draw.seed


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weights_of_other_dtypes(weight_dtype, dtype, draw, kernels):
    inputs = [draw.normal(3, 37, dtype=dtype) for _ in range(3)]
    weight_N = draw.normal(3, dtype=weight_dtype)
    found = kernels.swiglu_backward(*inputs, weight_N)
    expected = kernels.swiglu_backward(*inputs, weight_N.float())
    assert all(map(torch.equal, found, expected)), draw.seed
    assert torch.equal(kernels.swiglu_forward(*inputs[1:], weight_N), found[2]), draw.seed


def test_weights_of_zero(dtype, draw, kernels):
    """Nothing comes out, nothing goes back, and the weight's own gradient is what it always is."""
    inputs = [draw.normal(5, 37, dtype=dtype) for _ in range(3)]
    weight_N = draw.normal(5)
    expected_N = kernels.swiglu_backward(*inputs, weight_N)[3]
    weight_N[1::2] = 0
    assert not kernels.swiglu_forward(*inputs[1:], weight_N)[1::2].any()
    *tensors, dweight_N = kernels.swiglu_backward(*inputs, weight_N)
    for x_NF in tensors:
        assert not x_NF[1::2].any() and x_NF[::2].any(1).all()
    assert torch.equal(dweight_N, expected_N) and expected_N.all(), draw.seed


def test_any_layout(layout, dtype, draw, kernels):
    inputs = [*(draw.normal(3, 37, dtype=dtype) for _ in range(3)), draw.normal(3)]
    strided_N = inputs[3].repeat_interleave(2)[::2]
    # Never both of gate and up, so that each must be read with its own stride.
    for laid_out in [
        [inputs[0], layout(inputs[1]), inputs[2], strided_N],
        [layout(inputs[0]), inputs[1], layout(inputs[2]), inputs[3]],
    ]:
        # Not equal bit for bit: PyTorch's own silu differs between its vector and its scalar path.
        h_NF = kernels.swiglu_forward(*laid_out[1:])
        torch.testing.assert_close(h_NF, kernels.swiglu_forward(*inputs[1:]))
        ours, plain = kernels.swiglu_backward(*laid_out), kernels.swiglu_backward(*inputs)
        for one, one_plain in zip(given(ours), given(plain), strict=True):
            torch.testing.assert_close(one, one_plain)


def test_halves_of_a_fused_projection(dtype, draw, kernels):
    gate_up_N2F = draw.normal(6, 2 * 33, dtype=dtype)
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=1)
    h_NF = kernels.swiglu_forward(gate_NF, up_NF)
    plain_NF = kernels.swiglu_forward(gate_NF.contiguous(), up_NF.contiguous())
    torch.testing.assert_close(h_NF, plain_NF)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_large_gates_neither_overflow_nor_vanish(dtype, draw, kernels):
    gate_NF = torch.tensor([[-1000.0, -100.0, 0.0, 100.0, 1000.0]], device=draw.device, dtype=dtype)
    dh_NF, up_NF = (draw.normal(1, 5, dtype=dtype) for _ in range(2))
    weight_N = draw.normal(1)
    weighed = kernels.swiglu_backward(dh_NF, gate_NF, up_NF, weight_N)
    assert all(x.isfinite().all() for x in weighed)
    dgate_NF, dup_NF, h_NF, _ = kernels.swiglu_backward(dh_NF, gate_NF, up_NF)
    slope = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=draw.device, dtype=dtype)
    torch.testing.assert_close(dgate_NF, dh_NF * up_NF * slope)
    torch.testing.assert_close(dup_NF, dh_NF * gate_NF.relu())
    torch.testing.assert_close(h_NF, up_NF * gate_NF.relu())


def test_float64_is_not_rounded(draw, kernels):
    inputs = [draw.normal(4, 9).double() / 3 for _ in range(3)]
    for weights in ([], [draw.normal(4).double() / 3]):
        exact = exact_backward(*inputs, *(weights or [None]))
        for one, one_exact in zip(
            given(kernels.swiglu_backward(*inputs, *weights)), exact, strict=True
        ):
            torch.testing.assert_close(one, one_exact)
        h_NF = kernels.swiglu_forward(*inputs[1:], *weights)
        torch.testing.assert_close(h_NF, exact[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 40 GB of GPU memory")
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "halves"])
def test_more_than_2_to_the_31_elements(fused, draw):
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    F = 2048
    N = 2**31 // F + 8
    fresh = {"dtype": torch.bfloat16, "device": "cuda"}
    if fused:
        gate_NF, up_NF = torch.empty(N, 2 * F, **fresh).chunk(2, dim=1)
    else:
        gate_NF, up_NF = torch.empty(N, F, **fresh), torch.empty(N, F, **fresh)
    for x in (gate_NF, up_NF):
        x[-8:] = draw.normal(8, F, dtype=torch.bfloat16)
    tails = gate_NF[-8:].clone(), up_NF[-8:].clone()
    weight_N = draw.normal(N)
    h_NF = swiglu.swiglu_forward(gate_NF, up_NF, weight_N)
    assert torch.equal(h_NF[-8:], swiglu.swiglu_forward(*tails, weight_N[-8:])), draw.seed
    del h_NF
    ours = swiglu.swiglu_backward(up_NF, gate_NF, up_NF, weight_N)
    expected = swiglu.swiglu_backward(tails[1], *tails, weight_N[-8:])
    for one, one_tail in zip(ours, expected, strict=True):
        assert torch.equal(one[-8:], one_tail), draw.seed


@pytest.fixture(params=[None, (1.702, 1.5)], ids=["silu", "clamped"])
def clamp(request):
    return request.param


def formula(clamp, groups_N, gate_NF, up_NF, gate_bias_GF, up_bias_GF, weight_N):
    """In the inputs' dtype; with `clamp` by AutoEP's own function."""
    gate, up = gate_NF + gate_bias_GF[groups_N], up_NF + up_bias_GF[groups_N]
    if clamp is None:
        h_NF = torch.nn.functional.silu(gate) * up
    else:
        h_NF = get_expert_activation("swiglu_oai").fn(gate, up, *clamp)
    return h_NF * weight_N.unsqueeze(1)


@pytest.mark.parametrize("counts", [[3, 0, 9, 1], [7]], ids=str)
@pytest.mark.parametrize("F", [17, 64, 1100])
def test_biases(F, counts, clamp, dtype, draw, kernels, within_budget):
    N, G = sum(counts), len(counts)
    dh_NF, gate_NF, up_NF = (draw.normal(N, F, dtype=dtype) for _ in range(3))
    joined = draw.normal(G, 3 * F, dtype=dtype)  # a row stride of its own, the same for both
    weight_N = draw.normal(N)
    stop_G = torch.tensor(counts, device=draw.device).cumsum(0).int()
    bias = HiddenBias(joined[:, :F], joined[:, 2 * F :], stop_G)
    groups_N = torch.tensor([g for g, count in enumerate(counts) for _ in range(count)])
    inputs = gate_NF, up_NF, *bias[:2], weight_N
    form = partial(formula, clamp, groups_N.to(draw.device))

    def values(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        h_NF = form(*leaves)
        dgate, dup, dweight = torch.autograd.grad(h_NF, [*leaves[:2], leaves[4]], dh_NF.to(dtype))
        return dgate, dup, h_NF.detach(), dweight

    exact, naive, naive32 = (values(wide) for wide in (torch.float64, dtype, torch.float32))
    h_NF = kernels.swiglu_forward(gate_NF, up_NF, weight_N, bias, clamp)
    found = kernels.swiglu_backward(dh_NF, gate_NF, up_NF, weight_N, bias, clamp)
    assert torch.equal(h_NF, found[2]), draw.seed
    for one, one_naive, one_exact in zip(found, [*naive[:3], naive32[3]], exact, strict=True):
        within_budget(one, one_naive, one_exact)


def test_slopes_at_the_clamps(dtype, draw, kernels):
    """Beyond a limit nothing goes back; gate has none below."""
    gate_NF = torch.tensor([[-90.0, 1.0, 3.0, 1.0, 1.0]], device=draw.device, dtype=dtype)
    up_NF = torch.tensor([[1.0, 1.0, 1.0, 3.0, -3.0]], device=draw.device, dtype=dtype)
    dh_NF = draw.normal(1, 5, dtype=dtype)
    dgate, dup, h_NF, _ = kernels.swiglu_backward(dh_NF, gate_NF, up_NF, clamp=(1.0, 2.0))
    assert [x != 0 for x in dgate[0].tolist()] == [False, True, False, True, True], draw.seed
    assert [x != 0 for x in dup[0].tolist()] == [False, True, True, False, False], draw.seed
    assert h_NF[0, 4] == -h_NF[0, 1] / 2 and h_NF[0, 3] == h_NF[0, 1] * 3 / 2

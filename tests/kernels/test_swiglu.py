"""SwiGLU against its formula in fp64 and PyTorch's autograd of that formula."""

import pytest
import torch

from ds_llep.kernels import reference, swiglu

SIZES = [(40, 1), (3, 17), (4, 64), (7, 130), (2, 2500), (0, 8), (3, 0)]


def exact_swiglu(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    return gate_NF / (1 + torch.exp(-gate_NF)) * up_NF


def exact_backward(dh_NF, gate_NF, up_NF):
    gate_NF, up_NF = (x.double().detach().requires_grad_() for x in (gate_NF, up_NF))
    h_NF = exact_swiglu(gate_NF, up_NF)
    h_NF.backward(dh_NF.double())
    return gate_NF.grad, up_NF.grad, h_NF.detach()


def autograd_backward(dh_NF, gate_NF, up_NF):
    """What PyTorch gives in the dtype itself, one rounding for every operation."""
    gate_NF, up_NF = (x.detach().requires_grad_() for x in (gate_NF, up_NF))
    h_NF = torch.nn.functional.silu(gate_NF) * up_NF
    h_NF.backward(dh_NF)
    return gate_NF.grad, up_NF.grad, h_NF.detach()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size, dtype, draw, kernels, within_budget):
    dh_NF, gate_NF, up_NF = (draw.normal(*size, dtype=dtype) * 2 for _ in range(3))
    exact = exact_backward(dh_NF, gate_NF, up_NF)
    naive = autograd_backward(dh_NF, gate_NF, up_NF)
    within_budget(kernels.swiglu_forward(gate_NF, up_NF), naive[2], exact[2])
    for ours, one_naive, one_exact in zip(
        kernels.swiglu_backward(dh_NF, gate_NF, up_NF), naive, exact, strict=True
    ):
        within_budget(ours, one_naive, one_exact)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_triton_is_as_good_as_its_twin(size, dtype, draw, within_budget):
    inputs_NF = [draw.normal(*size, dtype=dtype) * 2 for _ in range(3)]
    ours, twin = swiglu.swiglu_backward(*inputs_NF), reference.swiglu_backward(*inputs_NF)
    for one, one_twin, exact in zip(ours, twin, exact_backward(*inputs_NF), strict=True):
        within_budget(one, one_twin, exact)


def test_backward_recomputes_the_same_h(dtype, draw, kernels):
    dh_NF, gate_NF, up_NF = (draw.normal(5, 37, dtype=dtype) for _ in range(3))
    h_NF = kernels.swiglu_backward(dh_NF, gate_NF, up_NF)[2]
    assert torch.equal(h_NF, kernels.swiglu_forward(gate_NF, up_NF)), draw.seed


def test_h_may_take_the_memory_of_dh(dtype, draw, kernels):
    dh_NF, gate_NF, up_NF = (draw.normal(5, 37, dtype=dtype) for _ in range(3))
    expected = kernels.swiglu_backward(dh_NF, gate_NF, up_NF)
    found = kernels.swiglu_backward(dh_NF, gate_NF, up_NF, into_dh=True)
    assert all(map(torch.equal, found, expected)), draw.seed
    assert found[2].data_ptr() == dh_NF.data_ptr()


def test_any_layout(layout, dtype, draw, kernels):
    inputs_NF = [draw.normal(5, 37, dtype=dtype) for _ in range(3)]
    # One of three, so that each input must be read with its own stride.
    laid_out_NF = [inputs_NF[0], layout(inputs_NF[1]), inputs_NF[2]]
    h_NF = kernels.swiglu_forward(*laid_out_NF[1:])
    # Not equal bit for bit: PyTorch's own silu differs between its vector and its scalar path.
    torch.testing.assert_close(h_NF, kernels.swiglu_forward(*inputs_NF[1:]))
    ours, plain = kernels.swiglu_backward(*laid_out_NF), kernels.swiglu_backward(*inputs_NF)
    for one, one_plain in zip(ours, plain, strict=True):
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
    dgate_NF, dup_NF, h_NF = kernels.swiglu_backward(dh_NF, gate_NF, up_NF)
    slope = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=draw.device, dtype=dtype)
    torch.testing.assert_close(dgate_NF, dh_NF * up_NF * slope)
    torch.testing.assert_close(dup_NF, dh_NF * gate_NF.relu())
    torch.testing.assert_close(h_NF, up_NF * gate_NF.relu())


def test_float64_is_not_rounded(draw, kernels):
    inputs_NF = [draw.normal(4, 9).double() / 3 for _ in range(3)]
    for ours, exact in zip(
        kernels.swiglu_backward(*inputs_NF), exact_backward(*inputs_NF), strict=True
    ):
        torch.testing.assert_close(ours, exact)
    h_NF = kernels.swiglu_forward(*inputs_NF[1:])
    torch.testing.assert_close(h_NF, exact_swiglu(*inputs_NF[1:]))


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
    h_NF = swiglu.swiglu_forward(gate_NF, up_NF)
    assert torch.equal(h_NF[-8:], swiglu.swiglu_forward(*tails)), draw.seed
    del h_NF
    ours = swiglu.swiglu_backward(up_NF, gate_NF, up_NF)
    for one, one_tail in zip(ours, swiglu.swiglu_backward(tails[1], *tails), strict=True):
        assert torch.equal(one[-8:], one_tail), draw.seed

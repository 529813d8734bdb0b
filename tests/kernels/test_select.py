"""Which kernels run where, and what a user reads when the wish cannot be granted."""

import sys

import pytest
import torch

from ds_llep.kernels import grouped_gemm, reference, reference_mlp, rows, select
from ds_llep.kernels.select import select_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto():
    assert select_kernels("auto", CPU).name == "torch"
    assert select_kernels("auto", CUDA).name == "triton"


def test_sets_are_complete():
    torch_set, triton_set = select_kernels("torch", CUDA), select_kernels("triton", CUDA)
    assert (torch_set.name, triton_set.name) == ("torch", "triton")
    renamed = {"product": "grouped_gemm", "gradient_of_weights": "grouped_gemm_weight_gradient"}
    for name in torch_set._fields[1:]:
        launcher, twin = getattr(triton_set, name), getattr(torch_set, name)
        assert launcher.__name__ == name and launcher is not twin
        if name in ("plan_lla", "find_runs"):
            assert twin is None  # the host plans
        else:
            name = renamed.get(name, name)
            rooms = reference, reference_mlp, grouped_gemm
            assert twin is next(getattr(room, name) for room in rooms if hasattr(room, name))


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # makes `import triton` an ImportError
    assert select_kernels("auto", CUDA).name == "torch"
    assert select_kernels("torch", CUDA).name == "torch"
    with pytest.raises(ValueError, match=r"llep\.kernels.*cannot be imported.*pip install") as info:
        select_kernels("triton", CUDA)
    assert '"torch"' in str(info.value)


def test_triton_on_a_cpu(monkeypatch):
    if not torch.cuda.is_available():
        assert select_kernels("triton", CPU).sum_rows is rows.sum_rows  # the interpreter
    monkeypatch.setattr(select, "_compiled", lambda: True)
    with pytest.raises(ValueError, match=r'llep\.kernels.*"cpu".*"auto" or "torch".*INTERPRET'):
        select_kernels("triton", CPU)


def test_misspelt_choice():
    with pytest.raises(ValueError, match="llep.kernels is 'Triton'.*'auto', 'triton', 'torch'"):
        select_kernels("Triton", CPU)

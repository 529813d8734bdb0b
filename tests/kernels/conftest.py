"""Fixtures of the kernel tests, which run on a GPU or, without one, in Triton's interpreter."""

import os
import secrets

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Early enough, although other tests share this process: @triton.jit reads the variable when it
    # decorates, and our kernels are decorated when `rows` and `swiglu` are first imported, which
    # only these tests and `select_kernels("triton", ...)` do. Triton itself may have come before
    # (torch._dynamo imports it); the kernels call none of its library functions for that reason.
    os.environ["TRITON_INTERPRET"] = "1"

from ds_llep.kernels.select import KernelSet, select_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Fresh memory is full of NaN, so that an element nobody wrote shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(7).isnan().all(), "torch.empty no longer fills with NaN"
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(autouse=True)
def interpreter_rounds_to_nearest(monkeypatch):
    """Triton's interpreter truncates fp32 to bf16, twice the error of a GPU, which rounds."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncating_cast = InterpreterBuilder.cast_impl

    def cast(self, source, target_type):
        if (source.dtype.scalar, target_type.scalar) != (tl.float32, tl.bfloat16):
            return truncating_cast(self, source, target_type)
        rounded = torch.tensor(source.data, dtype=torch.float32).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), target_type.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)


@pytest.fixture(autouse=True)
def interpreter_combines_slices(monkeypatch):
    """Triton's interpreter calls a reduction's or scan's function element by element; this is the
    same function on whole slices, some hundred times as fast."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import ReduceOps, ScanOps

    def generic_reduce(self, input):
        (x,) = input
        assert self.axis is not None and not self.keep_dims
        slices = np.moveaxis(x.handle.data, self.axis, 0)
        while len(slices) > 1:
            halves = (self.to_tensor(half, x.dtype) for half in np.split(slices, 2))
            slices = self.combine_fn.fn(*halves).handle.data
        return [self.to_tensor(slices[0], x.dtype)]

    def generic_scan(self, input):
        (x,) = input
        first, *others = np.moveaxis(x.handle.data, self.axis, 0)
        found = [self.to_tensor(first, x.dtype)]
        for one in others:
            found.append(self.combine_fn.fn(found[-1], self.to_tensor(one, x.dtype)))
        stacked = np.stack([one.handle.data.reshape(first.shape) for one in found], self.axis)
        return [self.to_tensor(stacked, x.dtype)]

    monkeypatch.setattr(ReduceOps, "generic_reduce", generic_reduce)
    monkeypatch.setattr(ScanOps, "generic_scan", generic_scan)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def twin(device) -> KernelSet:
    return select_kernels("torch", device)


@pytest.fixture(params=["torch", "triton"])
def kernels(request, device) -> KernelSet:
    return select_kernels(request.param, device)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


class Draw:
    """Random inputs from a fresh seed, which a failing test prints; TEST_SEED sets it."""

    def __init__(self, device: torch.device):
        self.seed = int(os.environ.get("TEST_SEED") or secrets.randbelow(2**31))
        self.device = device
        self._generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype)

    def index(self, *shape: int, high: int) -> torch.Tensor:
        return torch.randint(max(high, 1), shape, generator=self._generator).to(self.device)

    def permutation(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self._generator).to(self.device)


@pytest.fixture
def draw(device) -> Draw:
    draw = Draw(device)
    print(f"TEST_SEED={draw.seed}")
    return draw


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    assert x.shape == exact.shape
    difference = torch.linalg.vector_norm(x.double() - exact).item()
    return difference / (torch.linalg.vector_norm(exact).item() or 1.0)


@pytest.fixture
def within_budget(draw):
    """Asserts err(ours) <= 2 * err(PyTorch in the same dtype) + 1e-6, both against fp64."""

    def check(ours: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor) -> None:
        assert exact.dtype == torch.float64 and ours.dtype == baseline.dtype
        error, allowed = relative_error(ours, exact), 2 * relative_error(baseline, exact) + 1e-6
        assert error <= allowed, f"error {error:.3g} > {allowed:.3g}; TEST_SEED={draw.seed}"

    return check


def nan_padded(x: torch.Tensor) -> torch.Tensor:
    """The same values at a row stride wider than the row, with NaN between the rows."""
    padded = x.new_full((x.shape[0], x.shape[1] + 5), float("nan"))
    padded[:, 3 : 3 + x.shape[1]] = x
    return padded[:, 3 : 3 + x.shape[1]]


def column_major(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


@pytest.fixture(params=[nan_padded, column_major], ids=lambda layout: layout.__name__)
def layout(request):
    return request.param

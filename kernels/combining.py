"""What `tl.reduce` and `tl.associative_scan` combine with, and how launchers take strided tensors.

Triton has such functions in its own library, which these kernels do not call; `rows.py` says why.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def smaller(a, b):
    return tl.where(a < b, a, b)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last stride is 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()

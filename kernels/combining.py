"""What several kernels share: what `tl.reduce` and `tl.associative_scan` combine with, how a row
finds its group, and how launchers take strided tensors.

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


@triton.jit
def group_at(n, stop_ptr, G, BLOCK_G: tl.constexpr):
    """The group that row n is in: how many groups end before it."""
    g = tl.arange(0, BLOCK_G)
    stop = tl.load(stop_ptr + g, mask=g < G, other=2147483647)
    return tl.reduce(tl.where(stop <= n, 1, 0), 0, add).to(tl.int64)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last stride is 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()

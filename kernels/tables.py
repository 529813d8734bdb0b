"""Small tables that the host makes for kernels."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

_REMEMBERED = 16


class HiddenBias(NamedTuple):
    """The biases of an expert's hidden layer, for rows that come group after group."""

    gate_GF: torch.Tensor
    up_GF: torch.Tensor
    """[G, F] both, in the rows' dtype; one row stride, which may be anything."""
    stop_G: torch.Tensor
    """[G] int32: where each group ends."""


def to_device(table: np.ndarray, device: torch.device) -> torch.Tensor:
    """The table on the device, without a wait for it.

    A copy from memory that is not pinned may wait for all that the device still has to do.
    """
    on_host = torch.from_numpy(table)
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


def remember(make: Callable) -> Callable:
    """Keep the last few tables that `make(counts, ...)` made: products of one layer share them.

    Each belongs to the stream on which it was copied.
    """

    @functools.lru_cache(maxsize=_REMEMBERED)
    def kept(stream: object, *args: object) -> object:
        return make(*args)

    @functools.wraps(make)
    def wrapper(counts: Sequence[int], *args: object) -> object:
        stream = torch.accelerator.current_stream() if torch.cuda.is_initialized() else None
        return kept(stream, tuple(counts), *args)

    return wrapper


def all_to_device(tables: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tables of one dtype on the device, in a single copy."""
    joined = to_device(np.concatenate([table.reshape(-1) for table in tables]), device)
    parts = joined.split([table.size for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]

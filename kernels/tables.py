"""Small tables that the host makes for kernels."""

from typing import NamedTuple

import numpy as np
import torch


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

"""Small tables that the host makes for kernels."""

import numpy as np
import torch


def to_device(table: np.ndarray, device: torch.device) -> torch.Tensor:
    """The table on the device, without a wait for it.

    A copy from memory that is not pinned may wait for all that the device still has to do.
    """
    on_host = torch.from_numpy(table)
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)

"""Which kernels run: Triton's or their plain-PyTorch twins.

The choice is made once, per device, and handed on as one `KernelSet`. Triton is imported only after
it was chosen, so that a machine without it works; the price is that a broken Triton is found at
this call and not at import.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import grouped_gemm, reference, reference_mlp

CHOICES = ("auto", "triton", "torch")


class KernelSet(NamedTuple):
    """The launchers; `reference.py` and
    `reference_mlp.py` document each, and both sets have the same signatures."""

    name: str
    """`"triton"` or `"torch"`."""
    count_copies: Callable
    address_copies: Callable
    place_parcels: Callable
    label_parcels: Callable
    scatter_rows: Callable
    gather_values: Callable
    sum_rows: Callable
    swiglu_forward: Callable
    swiglu_backward: Callable
    add_bias: Callable
    gradient_of_bias_weight: Callable
    gradient_of_bias: Callable
    gate_up: Callable
    """In `grouped_gemm.py`, like the next three."""
    product: Callable
    """`grouped_gemm.grouped_gemm`."""
    gradient_of_rows: Callable
    gradient_of_weights: Callable
    """`grouped_gemm.grouped_gemm_weight_gradient`."""
    plan_lla: Callable | None
    """The planner "lla" on the device (`planner.py`); None: the host plans."""
    find_runs: Callable | None
    """After `plan_lla`, what `address_copies` needs of the plan (`routes.py`); None: as above."""


def _torch_kernels() -> KernelSet:
    return KernelSet(
        "torch",
        count_copies=reference.count_copies,
        address_copies=reference.address_copies,
        place_parcels=reference.place_parcels,
        label_parcels=reference.label_parcels,
        scatter_rows=reference.scatter_rows,
        gather_values=reference.gather_values,
        sum_rows=reference.sum_rows,
        swiglu_forward=reference_mlp.swiglu_forward,
        swiglu_backward=reference_mlp.swiglu_backward,
        add_bias=reference_mlp.add_bias,
        gradient_of_bias_weight=reference_mlp.gradient_of_bias_weight,
        gradient_of_bias=reference_mlp.gradient_of_bias,
        gate_up=grouped_gemm.gate_up,
        product=grouped_gemm.grouped_gemm,
        gradient_of_rows=grouped_gemm.gradient_of_rows,
        gradient_of_weights=grouped_gemm.grouped_gemm_weight_gradient,
        plan_lla=None,
        find_runs=None,
    )


def _triton_kernels() -> KernelSet:
    from . import bias, counts, parcels, planner, products, routes, rows, swiglu

    found = {}
    for module in (bias, counts, parcels, planner, products, routes, rows, swiglu):
        found |= vars(module)
    return KernelSet("triton", *(found[name] for name in KernelSet._fields[1:]))


def _compiled() -> bool:
    """Whether the kernels need a GPU: the environment at their import counts, not today's."""
    import triton

    from .rows import _sum_rows_kernel

    return isinstance(_sum_rows_kernel, triton.JITFunction)


def select_kernels(choice: str, device: torch.device) -> KernelSet:
    """The kernels for tensors on `device`.

    Args:
        choice: the config's `llep.kernels`. `"auto"`: Triton on a CUDA (or ROCm) device where it
            can be imported, else PyTorch; `"triton"`: Triton or an error; `"torch"`: PyTorch.
        device: where the tensors will be.

    Raises:
        ValueError: `choice` is none of these; or it is `"triton"` and Triton cannot be imported, or
            `device` is a CPU and Triton's interpreter is off, or there is no C compiler for what
            the host does on `device`.
    """
    if choice not in CHOICES:
        raise ValueError(
            f"llep.kernels is {choice!r}; valid values: {', '.join(map(repr, CHOICES))}. "
            'Leave it out for "auto".'
        )
    device = torch.device(device)
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return _torch_kernels()
    try:
        import triton  # noqa: F401  (apart from ours, so that a bug in ours is not taken for this)
    except ImportError as error:
        if choice == "auto":
            return _torch_kernels()
        raise ValueError(
            f'llep.kernels is "triton", but Triton cannot be imported here ({error}). Install it '
            '(pip install triton), or set llep.kernels to "auto" or "torch" in the DeepSpeed JSON.'
        ) from error
    from . import products

    kernels = _triton_kernels()
    if device.type == "cpu" and _compiled():
        raise ValueError(
            f'llep.kernels is "triton", but the device is "{device}", where Triton runs only in '
            'its interpreter. Set llep.kernels to "auto" or "torch" in the DeepSpeed JSON, or, to '
            "test the kernels, set TRITON_INTERPRET=1 in the environment before Python starts."
        )
    products.prepare(device)
    return kernels

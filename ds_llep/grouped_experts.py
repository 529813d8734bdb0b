"""Experts that are modules of one kind, computed together: one call for all experts of a rank.

Where an expert does no more to its rows than linear layers and elementwise functions, one call of
it may take the rows of all experts, if each linear layer multiplies every expert's rows with that
expert's matrix. Then each function runs once, and not once for each expert.

What an expert does is not read from its class or its source, but watched while it runs: a mode sees
every function of PyTorch that it calls. The first that is not known to be the same for one expert's
rows as for all ends the attempt, before it runs, and experts are called one by one. So nothing can
be out of date, and low-rank adapters, say, need no code here. The price is some microseconds for
each function, and a look at every expert's settings in every forward.

Shapes: ``G`` experts, ``N`` rows, ``D`` columns in, ``F`` columns out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch.nn import Module, functional
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ds_llep.kernels.grouped_gemm import is_one_kernel
from ds_llep.kernels.select import KernelSet
from ds_llep.kernels.tables import to_device

Tensors = Sequence[torch.Tensor]
Matched = Mapping[torch.nn.Parameter, Tensors]
"""For each parameter of one expert, those of all."""

_FUNCTIONS = (
    *("abs", "add", "clamp", "div", "exp", "mul", "neg", "pow", "relu", "sigmoid", "sqrt"),
    *("square", "sub", "tanh"),
)
_METHODS = *_FUNCTIONS, "__pow__", "__rpow__", "__rsub__", "__rdiv__", "float", "to", "type_as"
_ACTIVATIONS = (
    *("elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish"),
    *("relu", "relu6", "sigmoid", "silu", "softplus", "tanh"),
)
_ELEMENTWISE = {
    *(getattr(torch, name) for name in _FUNCTIONS),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    *(getattr(functional, name) for name in _ACTIVATIONS),
}
_PLAIN = bool, int, float, str, torch.dtype
_DTYPE = torch.Tensor.dtype.__get__
_OWN_CALLS = "forward", "_compiled_call_impl"  # where a module itself has them, not its class
_NOT_SETTINGS = vars(Module()).keys() - {"training"}


def match_parameters(experts: Sequence[Module]) -> Matched | None:
    """Each parameter of the first expert with those of all in its place.

    None where one expert's call cannot stand for the others': they have different settings, or
    hooks, or buffers.
    """
    if _has_any_global_hook():
        return None
    found: list[list[torch.Tensor]] = []
    first: list[Any] = []
    for expert in experts:
        settings, parameters = [], []
        if not _look(expert, settings, parameters):
            return None
        found.append(parameters)
        first = first or settings
        try:
            if settings != first:
                return None
        except Exception:  # of values that cannot be compared, such as tensors
            return None
    return dict(zip(found[0], zip(*found, strict=True), strict=True))


def _look(module: Module, settings: list[Any], parameters: list[torch.Tensor]) -> bool:
    """Add what a module and those in it have; False where it may do more than its class says."""
    held = vars(module)
    if (
        held["_buffers"]
        or held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or not held.keys().isdisjoint(_OWN_CALLS)
    ):
        return False
    settings.append(type(module))
    settings += [item for item in held.items() if item[0] not in _NOT_SETTINGS]
    for name, parameter in held["_parameters"].items():
        if parameter is not None:
            if type(parameter) is not torch.nn.Parameter:
                return False
            settings.append(name)
            parameters.append(parameter)
    for name, child in held["_modules"].items():
        settings.append(name)
        if child is not None and not _look(child, settings, parameters):
            return False
    return True


def can_group(experts: Sequence[Module], hidden_size: int, kernels: KernelSet) -> bool:
    """Whether experts are alike and do what can be done for all at once, tried on two rows."""
    parameters = match_parameters(experts[:1])
    if not parameters or match_parameters(experts) is None:
        return False
    own = {parameter: (parameter,) for parameter in parameters}
    rows_ND = next(iter(own)).new_ones((2, hidden_size))
    try:
        with torch.enable_grad():  # without it, autograd functions look like any others
            return compute_together(experts[0], own, rows_ND, (2,), kernels) is not None
    except Exception:  # a layer that needs autocast, say
        return False


def compute_together(
    expert: Module,
    parameters: Matched,
    rows_ND: torch.Tensor,
    counts: Sequence[int],
    kernels: KernelSet,
) -> torch.Tensor | None:
    """The experts' output for their rows, ``[N, D]``, differentiable.

    Args:
        expert: one of them, called once.
        parameters: for each parameter of it, those of all experts.
        rows_ND: expert after expert.
        counts: rows of each expert.
        kernels: what the products run as.

    Returns:
        None if that cannot be done.
    """

    def linear(rows: torch.Tensor, weights: Tensors, biases: Tensors = ()) -> torch.Tensor:
        flat_ND, *tensors = map(_cast, (rows.flatten(0, -2), *weights, *biases))
        out_NF = _Linear.apply(flat_ND, counts, kernels, *tensors)
        return out_NF.view(*rows.shape[:-1], out_NF.shape[-1])

    rows = rows_ND.view(1, 1, *rows_ND.shape)
    watch = _Watch(rows, parameters, linear)
    try:
        with watch:
            out = expert(rows)
    except _NotTogether:
        return None
    out = out[0] if isinstance(out, tuple) else out
    return out.flatten(0, -2) if watch.follows(out) else None


class _NotTogether(Exception):
    """An expert does something that is not known to be the same for the rows of others."""


class _Watch(TorchFunctionMode):
    """Sees the functions that an expert calls, and lets those pass that act on each row alike."""

    def __init__(
        self, rows: torch.Tensor, parameters: Matched, linear: Callable[..., torch.Tensor]
    ) -> None:
        super().__init__()
        self._input, self._parameters, self._linear = rows, parameters, linear
        # Another one inside of an autograd function, whose backward would not be known.
        self._grad_mode = torch.is_grad_enabled()
        self._followed = WeakTensorKeyDictionary({rows: True})
        self._ended = False

    def follows(self, value: Any) -> bool:
        """Whether a value is a tensor known to have a row for each of the input's."""
        is_tensor = isinstance(value, torch.Tensor)
        return is_tensor and not self._ended and value in self._followed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == _DTYPE:
            return func(*args)
        if torch.is_grad_enabled() != self._grad_mode:
            self._end()
        if func is functional.linear:
            out = self._call_linear(*args, **kwargs)
        elif self._is_elementwise(func, args, kwargs):
            out = func(*args, **kwargs)
        else:
            self._end()
        self._followed[out] = True
        return out

    def _call_linear(self, input, weight, bias=None) -> torch.Tensor:
        given = [weight] if bias is None else [weight, bias]
        if not self.follows(input) or any(one not in self._parameters for one in given):
            self._end()
        return self._linear(input, *(self._parameters[one] for one in given))

    def _is_elementwise(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
        if func is functional.dropout:
            if kwargs["training"] and kwargs["p"] > 0:
                return False
        elif func not in _ELEMENTWISE:
            return False
        # Experts may yet have to be called one by one, with the input as it is.
        if "out" in kwargs or (kwargs.get("inplace") and args[0] is self._input):
            return False
        return all(
            value is None or isinstance(value, _PLAIN) or self.follows(value)
            for value in (*args, *kwargs.values())
        )

    def _end(self) -> NoReturn:
        self._ended = True  # also where the expert catches what is raised
        raise _NotTogether


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    """As autocast does for a linear layer."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class _Linear(torch.autograd.Function):
    """A linear layer of every expert; the weights of all, then the biases of all or none.

    One kernel where there is one, which wants one tensor of all weights. Weights that lie apart are
    copied into one then, in forward and again in backward, so that nothing is kept between.
    """

    @staticmethod
    def forward(ctx, rows_ND, counts, kernels, *tensors):
        ctx.save_for_backward(rows_ND, *tensors)
        ctx.counts, ctx.kernels = counts, kernels
        weights, biases = tensors[: len(counts)], tensors[len(counts) :]
        if is_one_kernel(rows_ND, weights[0]):
            out_NF = kernels.product(rows_ND, _joined(weights), counts)
            if biases:
                stop_G = to_device(np.cumsum(counts, dtype=np.int32), rows_ND.device)
                kernels.add_bias(out_NF, _joined(biases), stop_G)
            return out_NF
        out_NF = rows_ND.new_empty((len(rows_ND), len(weights[0])))
        for index, (rows, out) in enumerate(_by_group(counts, rows_ND, out_NF)):
            if biases:
                torch.addmm(biases[index], rows, weights[index].t(), out=out)
            else:
                torch.mm(rows, weights[index].t(), out=out)
        return out_NF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NF):
        (rows_ND, *tensors), counts, kernels = ctx.saved_tensors, ctx.counts, ctx.kernels
        size, grad_NF = len(counts), grad_NF.contiguous()
        weights, (need_rows, _, _, *need) = tensors[:size], ctx.needs_input_grad
        need_weights, need_biases = any(need[:size]), any(need[size:])
        grad_rows, grad_weights, grad_biases = None, [None] * size, [None] * len(need[size:])
        if is_one_kernel(rows_ND, weights[0]):
            if need_rows:
                grad_rows = kernels.product(grad_NF, _joined(weights), counts, transpose=False)
            if need_weights:
                grad_weights = kernels.gradient_of_weights(grad_NF, rows_ND, counts).unbind()
            if need_biases:
                found_GF = kernels.gradient_of_bias(grad_NF, counts, None)
                grad_biases = found_GF.to(grad_NF.dtype).unbind()
        else:
            groups = list(_by_group(counts, rows_ND, grad_NF))
            if need_rows:
                pairs = zip(weights, groups, strict=True)
                grad_rows = torch.cat([torch.mm(grad, weight) for weight, (_, grad) in pairs])
            if need_weights:
                grad_weights = [torch.mm(grad.t(), rows) for rows, grad in groups]
            if need_biases:
                grad_biases = [grad.sum(0) for _, grad in groups]
        return grad_rows, None, None, *grad_weights, *grad_biases


def _by_group(counts: Sequence[int], *tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(counts) for tensor in tensors), strict=True)


def _joined(tensors: Tensors) -> torch.Tensor:
    """``[G, ...]``: a view where the tensors lie at equal distances in one buffer, else a copy."""
    first = tensors[0]
    step = tensors[1].data_ptr() - first.data_ptr() if len(tensors) > 1 else first.nbytes
    buffer = first.untyped_storage().data_ptr()
    evenly = step >= first.nbytes and all(
        tensor.is_contiguous()
        and tensor.data_ptr() == first.data_ptr() + index * step
        and tensor.untyped_storage().data_ptr() == buffer
        for index, tensor in enumerate(tensors)
    )
    if not evenly:
        return torch.stack(tensors)
    stride = step // first.element_size(), *first.stride()
    return first.as_strided((len(tensors), *first.shape), stride)

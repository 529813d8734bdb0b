"""The activation between an expert's projections, times the weight of each row.

SwiGLU and its clamped form (gpt-oss, MiniMax-M3) have fused kernels; AutoEP's other forms are
composed from its own functions and PyTorch's autograd, at the price of more passes over memory.

Shapes: ``F`` expert FFN size, ``N`` rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from deepspeed.moe.ep_experts import get_expert_activation

from ds_llep.kernels.select import KernelSet
from ds_llep.kernels.tables import HiddenBias


@dataclass(frozen=True)
class Activation:
    """``act(gate, up)`` times a row's weight and its backward, for every form that AutoEP has."""

    name: str
    alpha: float
    limit: float
    kernels: KernelSet

    def forward(
        self,
        gate_NF: torch.Tensor,
        up_NF: torch.Tensor,
        weight_N: torch.Tensor | None,
        bias: HiddenBias | None = None,
    ) -> torch.Tensor:
        """``[N, F]`` from two ``[N, F]`` and, unless all weights are one, ``[N]``.

        The biases are added first.
        """
        if self._fused:
            return self.kernels.swiglu_forward(gate_NF, up_NF, weight_N, bias, self._clamp)
        assert bias is None, f"AutoEP's {self.name} has no biases"
        act_NF = get_expert_activation(self.name).fn(gate_NF, up_NF, self.alpha, self.limit)
        if weight_N is None:
            return act_NF
        return (act_NF.to(weight_N.dtype) * weight_N.unsqueeze(1)).to(act_NF.dtype)

    def backward(
        self,
        grad_NF: torch.Tensor,
        gate_NF: torch.Tensor,
        up_NF: torch.Tensor,
        weight_N: torch.Tensor | None,
        bias: HiddenBias | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Gradients of gate and up; the forward's result once more, which is cheaper than saving
        it; and the gradient of the weight.

        It may take the memory of ``grad_NF``, which must be contiguous and the caller's alone.
        """
        if self._fused:
            inputs = grad_NF, gate_NF, up_NF, weight_N, bias, self._clamp
            return self.kernels.swiglu_backward(*inputs, into_dh=True)
        inputs = [gate_NF, up_NF] if weight_N is None else [gate_NF, up_NF, weight_N]
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            act_NF = self.forward(*inputs[:2], inputs[2] if weight_N is not None else None)
        grads = torch.autograd.grad(act_NF, inputs, grad_NF)
        return *grads[:2], act_NF.detach(), grads[2] if weight_N is not None else None

    @property
    def _fused(self) -> bool:
        return self.name in ("swiglu", "swiglu_oai")

    @property
    def _clamp(self) -> tuple[float, float] | None:
        return (self.alpha, self.limit) if self.name == "swiglu_oai" else None

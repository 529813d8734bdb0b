"""The experts of a rank: a gated MLP for each home and each foreign expert, differentiable as one.

One autograd function covers both kinds, so that the graph has the same nodes on every rank whatever
the plan says. It keeps the *parameters* for backward, not views of their gathered weights: under
ZeRO-3 the gathered weights are then free between forward and backward, and ZeRO's own pre-backward
hook gathers them again. Foreign weights are likewise fetched again unless the config keeps them.

Order of work, chosen so that transfers hide behind home GEMMs:

    forward:   start fetch | home experts | wait | foreign experts
    backward:  start fetch | home experts but for w1, w3 | wait | foreign experts | start return
               | home gradients of w1, w3 | wait | add

The layer has started the fetch before, where the weights' source allows it; starting it here again
makes sure of it, also where checkpointing has run other layers in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed.moe.ep_experts import GroupedExperts, get_expert_activation

from ds_llep.fetch import Exchange, ForeignWeights
from ds_llep.kernels.grouped_gemm import (
    add_grouped_gemm,
    grouped_gemm,
    grouped_gemm_weight_gradient,
)
from ds_llep.kernels.select import KernelSet
from ds_llep.plan import Plan
from ds_llep.returns import GradientReturn
from ds_llep.timeline import part


class LLEPGroupedExperts(GroupedExperts):
    """AutoEP's grouped experts, same parameters, that also compute foreign experts."""

    def forward(
        self,
        home_rows: torch.Tensor,
        foreign_rows: torch.Tensor,
        *,
        job: ExpertJob,
        rows_per_slot: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply each slot's expert to its rows.

        Args:
            home_rows: ``[N_home, D]``, grouped by slot.
            foreign_rows: ``[N_foreign, D]``, likewise; empty where nothing is borrowed.
            job: the rest of what the layer knows. By keyword, since ZeRO-3's hooks look for
                tensors in positional arguments.
            rows_per_slot: rows of each slot: home experts, then foreign ones.

        Returns:
            Results for both, in the same shapes.
        """
        home_counts = rows_per_slot[: self.num_experts]
        foreign_counts = rows_per_slot[self.num_experts :]
        activation = Activation(
            self.activation, self.activation_alpha, self.activation_limit, job.kernels
        )
        weights = self.w1, self.w2, self.w3
        return _ExpertMLP.apply(
            home_rows, foreign_rows, *weights, job, activation, home_counts, foreign_counts
        )


@dataclass(frozen=True)
class ExpertJob:
    """What the experts need beside rows and weights."""

    plan: Plan
    exchange: Exchange
    foreign: ForeignWeights
    keep_foreign: bool
    """Keep foreign weights between forward and backward instead of fetching them again."""
    kernels: KernelSet


@dataclass(frozen=True)
class Activation:
    """``act(gate, up)`` and its backward, for every form that AutoEP registers."""

    name: str
    alpha: float
    limit: float
    kernels: KernelSet

    def forward(self, gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
        """``[N, F]`` from two ``[N, F]``."""
        if self.name == "swiglu":
            return self.kernels.swiglu_forward(gate_NF, up_NF)
        return get_expert_activation(self.name).fn(gate_NF, up_NF, self.alpha, self.limit)

    def backward(
        self, grad_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of gate and up, and the activation once more: it is cheaper than saving it.

        It may take the memory of ``grad_NF``, which must be contiguous and the caller's alone.
        """
        if self.name == "swiglu":
            return self.kernels.swiglu_backward(grad_NF, gate_NF, up_NF, into_dh=True)
        with torch.enable_grad():
            gate_NF, up_NF = gate_NF.detach().requires_grad_(), up_NF.detach().requires_grad_()
            act_NF = self.forward(gate_NF, up_NF)
        grad_gate, grad_up = torch.autograd.grad(act_NF, (gate_NF, up_NF), grad_NF)
        return grad_gate, grad_up, act_NF.detach()


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, home_rows, foreign_rows, w1, w2, w3, job, activation, home_counts, foreign_counts
    ):
        with _no_autocast(home_rows):
            home = _in_dtype_of(home_rows, w1, w2, w3)
            with part("fetch"):
                job.foreign.start()
            with part("home experts"):
                out_home, *hidden_home = _mlp_forward(home_rows, home, home_counts, activation)
            with part("wait for foreign"):
                bundles = job.foreign.wait()
            foreign = job.foreign.layout.views(bundles)
            with part("foreign experts"):
                out_foreign, *hidden_foreign = _mlp_forward(
                    foreign_rows, foreign, foreign_counts, activation
                )
        # The same number of tensors on every rank: activation checkpointing counts them.
        ctx.save_for_backward(
            *(home_rows, foreign_rows),
            *(w1, w2, w3),
            *hidden_home,
            *hidden_foreign,
            bundles.clone() if job.keep_foreign else None,
        )
        ctx.settings = (job, activation, home_counts, foreign_counts)
        return out_home, out_foreign

    @staticmethod
    def backward(ctx, home_grad, foreign_grad):
        home_rows, foreign_rows, w1, w2, w3, *hidden, bundles = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # so that gate and up are freed once they are used
        hidden_home, hidden_foreign = hidden[:2], hidden[2:]
        del hidden
        job, activation, home_counts, foreign_counts = ctx.settings
        need_rows, need_weights = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2:5]
        need = (need_rows, any(need_weights))
        with _no_autocast(home_rows):
            home = _in_dtype_of(home_rows, w1, w2, w3)
            if bundles is None:
                with part("fetch backward"):
                    job.foreign.start()
            with part("home experts backward"):
                home_step = _hidden_backward(
                    home_grad.contiguous(), hidden_home, home, home_counts, activation, *need
                )
            if bundles is None:
                with part("wait for foreign backward"):
                    bundles = job.foreign.wait()
            foreign = job.foreign.layout.views(bundles)
            with part("foreign experts backward"):
                foreign_step = _hidden_backward(
                    foreign_grad.contiguous(),
                    hidden_foreign,
                    foreign,
                    foreign_counts,
                    activation,
                    *need,
                )
                grad_rows = home_step.grad_rows, foreign_step.grad_rows
                if not any(need_weights):
                    return *grad_rows, *[None] * 7
                foreign_gradients = _weight_gradients(foreign_step, foreign_rows, foreign_counts)
                del foreign_step  # its gate and up gradients are used up
            homecoming = GradientReturn(job.exchange, job.plan)
            with part("gradient return"):
                homecoming.start(foreign_gradients)
            with part("home experts backward"):
                gradients = _weight_gradients(home_step, home_rows, home_counts)
            with part("gradient return"):
                homecoming.finish(gradients)
        grad_weights = [
            gradient.to(weight.dtype) if needed else None
            for gradient, weight, needed in zip(gradients, (w1, w2, w3), need_weights, strict=True)
        ]
        return *grad_rows, *grad_weights, *[None] * 4


@dataclass
class _HiddenBackward:
    """Gradients behind the hidden layer; those of w1 and w3 follow from the first two."""

    grad_gate: torch.Tensor | None
    grad_up: torch.Tensor
    grad_w2: torch.Tensor | None
    grad_rows: torch.Tensor | None


def _mlp_forward(
    rows_ND: torch.Tensor,
    weights: Sequence[torch.Tensor],
    counts: Sequence[int],
    activation: Activation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``w2(act(w1 x, w3 x))`` for each group of rows: output, gate and up."""
    w1, w2, w3 = weights
    gate_NF = grouped_gemm(rows_ND, w1, counts)
    up_NF = grouped_gemm(rows_ND, w3, counts)
    out_ND = grouped_gemm(activation.forward(gate_NF, up_NF), w2, counts)
    return out_ND, gate_NF, up_NF


def _hidden_backward(
    grad_ND: torch.Tensor,
    hidden: list[torch.Tensor],
    weights: Sequence[torch.Tensor],
    counts: Sequence[int],
    activation: Activation,
    need_rows: bool,
    need_weights: bool,
) -> _HiddenBackward:
    """From the output's gradient to the hidden layer's; empties ``hidden`` (gate and up)."""
    w1, w2, w3 = weights
    gate_NF, up_NF = hidden
    hidden.clear()
    grad_act = grouped_gemm(grad_ND, w2, counts, transpose=False)
    grad_gate, grad_up, act_NF = activation.backward(grad_act, gate_NF, up_NF)
    del grad_act, gate_NF, up_NF
    grad_w2 = grouped_gemm_weight_gradient(grad_ND, act_NF, counts) if need_weights else None
    del act_NF
    grad_rows = None
    if need_rows:
        grad_rows = grouped_gemm(grad_gate, w1, counts, transpose=False)
        add_grouped_gemm(grad_rows, grad_up, w3, counts)
    return _HiddenBackward(grad_gate, grad_up, grad_w2, grad_rows)


def _weight_gradients(
    step: _HiddenBackward, rows_ND: torch.Tensor, counts: Sequence[int]
) -> list[torch.Tensor]:
    """Gradients of w1, w2, w3, each ``[G, ., .]``; gives back the gate's gradient in between."""
    grad_w1 = grouped_gemm_weight_gradient(step.grad_gate, rows_ND, counts)
    step.grad_gate = None
    grad_w3 = grouped_gemm_weight_gradient(step.grad_up, rows_ND, counts)
    return [grad_w1, step.grad_w2, grad_w3]


def _in_dtype_of(rows: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
    # AutoEP computes in the dtype of the rows; a no-op unless autocast keeps wider parameters.
    return [weight.detach().to(rows.dtype) for weight in weights]


def _no_autocast(rows: torch.Tensor) -> torch.autocast:
    # Dtypes are settled before the experts; autocast would recast inside the GEMMs.
    return torch.autocast(rows.device.type, enabled=False)

"""The gated MLPs of some experts, each over its group of rows, forward and backward by hand.

By hand, because backward comes in two halves: what other ranks wait for first, the gradients of the
weights w1 and w3 when those are on their way. The price is that every product's gradient is
written out.

Shapes: ``G`` experts, ``N`` rows, ``D`` hidden size, ``F`` expert FFN size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import NamedTuple

import numpy as np
import torch

from ds_llep.activation import Activation
from ds_llep.biased import empty_joint, split
from ds_llep.kernels.tables import HiddenBias, to_device
from ds_llep.low_rank import Factors


class Scales(NamedTuple):
    """By what low-rank factors beside the matrices are multiplied; None: there are none."""

    gate_up: float | None = None
    down: float | None = None


@dataclass
class HiddenBackward:
    """Gradients behind the hidden layer; those of w1 and w3 follow from the first two."""

    grad_gate: torch.Tensor | None
    grad_up: torch.Tensor
    grad_w2: torch.Tensor | None
    grad_rows: torch.Tensor | None
    grad_scores: torch.Tensor | None
    grad_inner: torch.Tensor | None
    """Between the factors of gate and up."""
    grad_down_factors: list[torch.Tensor]
    memory: Sequence[torch.Tensor | None]
    """Where the gradients of w1, w2 and w3 go; None: new memory."""
    factor_memory: Sequence[torch.Tensor | None]
    """Likewise of the factors of gate and up."""


@dataclass(frozen=True)
class GatedMLPs:
    """``w2(act(w1 x + b1, w3 x + b3) * score) + b2 * score`` for each group of rows.

    Each matrix may have low-rank factors beside it, which add to what it gives.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    w3: torch.Tensor
    """``[G, F, D]``, w2 ``[G, D, F]``; the group stride may be anything."""
    counts: Sequence[int]
    """Rows of each group."""
    activation: Activation
    hidden_bias: HiddenBias | None = None
    out_bias_GD: torch.Tensor | None = None
    gate_up_factors: Factors | None = None
    down_factors: Factors | None = None

    @classmethod
    def of(
        cls,
        weights: Sequence[torch.Tensor],
        counts: Sequence[int],
        activation: Activation,
        hidden_size: int,
        has_bias: bool,
        scales: Scales,
    ) -> GatedMLPs:
        """From w1, w2 and w3, which hold the biases as well where there are some.

        Behind them the factors that have a scale: of gate and up ``a [G, r, D]``, ``b [G, F, r]``
        of gate and ``b`` of up; of w2 ``a [G, r, F]`` and ``b [G, D, r]``.
        """
        (w1, w2, w3), rest = weights[:3], list(weights[3:])
        factors = {}
        for name, scale, size in zip(("gate_up", "down"), scales, (3, 2), strict=True):
            if scale is not None:
                (a, *b), rest = rest[:size], rest[size:]
                factors[f"{name}_factors"] = Factors(a, b, scale, counts, activation.kernels)
        assert not rest, f"{len(rest)} weights without a use"
        if not has_bias:
            return cls(w1, w2, w3, counts, activation, **factors)
        ffn_size = w2.shape[2]
        (w1, gate), (w3, up) = split(w1, ffn_size), split(w3, ffn_size)
        w2, out = split(w2, hidden_size)
        stop_G = to_device(np.cumsum(counts, dtype=np.int32), w1.device)
        biases = HiddenBias(gate, up, stop_G), out
        return cls(w1, w2, w3, counts, activation, *biases, **factors)

    def forward(
        self, rows_ND: torch.Tensor, scores_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, and what backward needs: gate and up, without their biases."""
        kernels = self.activation.kernels
        hidden = kernels.gate_up(rows_ND, self.w1, self.w3, self.counts)
        if self.gate_up_factors is not None:
            self.gate_up_factors.add_to(hidden, rows_ND)
        act_NF = self.activation.forward(*hidden, scores_N, self.hidden_bias)
        out_ND = kernels.product(act_NF, self.w2, self.counts)
        if self.down_factors is not None:
            self.down_factors.add_to((out_ND,), act_NF)
        if self.out_bias_GD is not None:
            kernels.add_bias(out_ND, self.out_bias_GD, self.hidden_bias.stop_G, scores_N)
        return out_ND, *hidden

    def backward(
        self,
        grad_ND: torch.Tensor,
        hidden: list[torch.Tensor],
        scores_N: torch.Tensor | None,
        need_rows: bool,
        need_weights: Sequence[bool],
        make_memory: Callable[[torch.Tensor], Sequence[torch.Tensor]] | None = None,
    ) -> HiddenBackward:
        """From the output's gradient to the hidden layer's; empties ``hidden`` (gate and up).

        ``need_weights`` says whether the gradients of the matrices are asked for, and whether those
        of the factors are. ``make_memory`` gives them their memory, like its argument, in the
        order of :meth:`of`. It is called late, when the first of them is made.
        """
        kernels, counts = self.activation.kernels, self.counts
        gate_up, down = self.gate_up_factors, self.down_factors
        need_matrices, need_factors = need_weights
        gate_NF, up_NF = hidden
        hidden.clear()
        grad_ND = grad_ND.contiguous()
        grad_act = kernels.product(grad_ND, self.w2, counts, transpose=False)
        if down is not None:
            inner = down.project_back((grad_ND,))
            down.add_row_gradient(grad_act, inner)
        grad_gate, grad_up, act_NF, grad_scores = self.activation.backward(
            grad_act, gate_NF, up_NF, scores_N, self.hidden_bias
        )
        del grad_act, gate_NF, up_NF
        if self.out_bias_GD is not None and scores_N is not None:
            stop_G = self.hidden_bias.stop_G
            grad_scores += kernels.gradient_of_bias_weight(grad_ND, self.out_bias_GD, stop_G)
        memory = repeat(None)
        if make_memory is not None and any(need_weights):
            memory = iter(make_memory(grad_ND))
        step = HiddenBackward(
            *(grad_gate, grad_up, None, None, grad_scores, None, []),
            memory=[*islice(memory, 3 * need_matrices)],
            factor_memory=[*islice(memory, 3 * (need_factors and gate_up is not None))],
        )
        if need_matrices:
            step.grad_w2 = self._gradient(grad_ND, act_NF, scores_N, out=step.memory[1])
        if need_factors and down is not None:
            step.grad_down_factors = down.gradients(act_NF, (grad_ND,), inner, islice(memory, 2))
        del act_NF
        if gate_up is not None:
            step.grad_inner = gate_up.project_back((grad_gate, grad_up))
        if need_rows:
            grads = grad_gate, self.w1, grad_up, self.w3
            step.grad_rows = kernels.gradient_of_rows(*grads, counts)
            if gate_up is not None:
                gate_up.add_row_gradient(step.grad_rows, step.grad_inner)
        return step

    def weight_gradients(
        self,
        step: HiddenBackward,
        rows_ND: torch.Tensor,
        need_weights: Sequence[bool],
        start: Callable[[], bool] = lambda: False,
    ) -> list[torch.Tensor]:
        """Gradients of the weights as :meth:`of` took them, of the matrices or the factors or both;
        gives back the gate's gradient in between.

        ``start`` is called before the last of them, and says whether it has started a transfer.
        """
        need_matrices, need_factors = need_weights
        factors = []
        if need_factors and self.gate_up_factors is not None:
            grads = step.grad_gate, step.grad_up
            factors = self.gate_up_factors.gradients(
                rows_ND, grads, step.grad_inner, step.factor_memory
            )
        factors += step.grad_down_factors
        if not need_matrices:
            start()
            return factors
        # Beside it the gradients of the rows travel.
        grad_w1 = self._gradient(step.grad_gate, rows_ND, out=step.memory[0], beside=True)
        step.grad_gate = None
        travels = start()
        grad_w3 = self._gradient(step.grad_up, rows_ND, out=step.memory[2], beside=travels)
        return [grad_w1, step.grad_w2, grad_w3, *factors]

    def _gradient(
        self,
        grad_NF: torch.Tensor,
        rows_ND: torch.Tensor,
        weight_N: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        beside: bool = False,
    ) -> torch.Tensor:
        """The gradient of one of the three, that of its biases with it, in ``out`` if given."""
        kernels, counts = self.activation.kernels, self.counts
        if self.hidden_bias is None:
            return kernels.gradient_of_weights(grad_NF, rows_ND, counts, out, beside)
        num_rows, num_columns = grad_NF.shape[1], rows_ND.shape[1]
        if out is None:
            out = empty_joint(len(counts), num_rows, num_columns, like=rows_ND)
        else:
            out[:, num_rows:].zero_()  # some of it is neither matrix nor bias
        matrix, bias = split(out, num_rows)
        kernels.gradient_of_weights(grad_NF, rows_ND, counts, matrix, beside)
        bias.copy_(kernels.gradient_of_bias(grad_NF, counts, weight_N))
        return out

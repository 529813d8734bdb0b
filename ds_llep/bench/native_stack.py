"""DeepSpeed's own MoE layers to measure, with a switch to llep's on the same weights.

The layers are ``deepspeed.moe.layer.MoE``, which drop nothing, and llep changes the class of what
is inside them in place. So the bench switches by the same move, and both modes share weights, gate
and memory. DeepSpeed runs as fast as its options allow here: without random token selection and
without noise on the second choice, neither of which matters where nothing is dropped, and through
its sparse routes, the only dispatch that 0.19.8 has beside Tutel's, which llep refuses.

A workload's experts are forced where the gate has its logits: they are squeezed between -1 and 1,
and those of the wanted experts lifted above all others. Softmax, top-k, capacity and the gradients
of the gate's weights remain DeepSpeed's. The price: gate values lie closer together than a trained
gate's, which changes no shape and no traffic.
"""

from __future__ import annotations

import types
from unittest import mock

import deepspeed.comm as dist
import numpy as np
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.utils import groups
from torch import nn

from ds_llep.bench.batch import Batch
from ds_llep.bench.shapes import Shape
from ds_llep.moe import BalancedMOELayer

CLASSES = {"deepspeed": MOELayer, "llep": BalancedMOELayer}
LIFT = 3.0  # more than the 2 by which squeezed logits may differ


class NativeBatch(Batch):
    """Routing in which a token's experts are distinct, as DeepSpeed's gate chooses them.

    An expert that a workload gives to a token twice is its choice once, and another choice is drawn
    evenly from all others.
    """

    def _draw_ids(self, step: int, layer: int) -> torch.Tensor:
        ids_TK = super()._draw_ids(step, layer)
        rng = np.random.default_rng([self._seed, step, layer, dist.get_rank()])
        scores_TE = torch.from_numpy(rng.random((len(ids_TK), self._shape.num_experts)))
        return scores_TE.scatter_(1, ids_TK, 2.0).topk(ids_TK.shape[1]).indices


class GatedMLP(nn.Module):
    """An expert of three matrices, without biases."""

    def __init__(self, hidden_size: int, ffn_size: int, **options) -> None:
        super().__init__()
        self.gate, self.up = (
            nn.Linear(hidden_size, ffn_size, bias=False, **options) for _ in range(2)
        )
        self.down = nn.Linear(ffn_size, hidden_size, bias=False, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def make_expert(shape: Shape, gated: bool, **options) -> nn.Module:
    """One expert, with options of :class:`torch.nn.Linear`."""
    D, F = shape.hidden_size, shape.ffn_size
    if gated:
        return GatedMLP(D, F, **options)
    return nn.Sequential(nn.Linear(D, F, **options), nn.GELU(), nn.Linear(F, D, **options))


class NativeStack(nn.Module):
    """DeepSpeed's MoE layers one after the other, ``[B, S, D]`` to ``[B, S, D]``.

    Gates are the same on every rank, and so is an expert wherever it is; no two experts are.
    """

    def __init__(
        self,
        shape: Shape,
        gated: bool,
        layers: int,
        ep_size: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__()
        groups._create_expert_and_data_parallel(ep_size)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        for index in range(layers):
            layer = MoE(
                shape.hidden_size,
                make_expert(shape, gated, dtype=dtype, device=device),
                shape.num_experts,
                ep_size,
                shape.top_k,
                min_capacity=0,
                drop_tokens=False,
                use_rts=False,
                top2_2nd_expert_sampling=False,
            )
            layer.set_deepspeed_parallelism()
            experts = layer.deepspeed_moe.experts.deepspeed_experts
            first = dist.get_rank(group=layer.deepspeed_moe.ep_group) * len(experts)
            for number, expert in enumerate(experts, index * shape.num_experts + first):
                _draw_weights(expert, seed * 100_000 + number)
            self.layers.append(layer.to(device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if index:  # keeps the scale of activations from layer to layer
                x = nn.functional.rms_norm(x, x.shape[-1:])
            x, _, _ = layer(x)
        return x

    def switch(self, mode: str) -> None:
        """Run as DeepSpeed's layers or, once llep has adopted them, as llep's."""
        for layer in self.layers:
            layer.deepspeed_moe.__class__ = CLASSES[mode]


def _draw_weights(expert: nn.Module, seed: int) -> None:
    device = next(expert.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.normal_(generator=generator).mul_(parameter.shape[-1] ** -0.5)


def force_choices(gate: TopKGate, ids_TK: torch.Tensor) -> None:
    """Fix the experts that a gate chooses, which differ within a token; see above for how."""
    name = {1: "top1gating", 2: "top2gating"}.get(gate.k, "topkgating")
    choose = getattr(sharded_moe, name)
    lift_TE = torch.zeros(len(ids_TK), gate.wg.out_features, device=ids_TK.device)
    lift_TE.scatter_(1, ids_TK, LIFT)

    def lifted(logits_TE, *others, **named):
        return choose(torch.tanh(logits_TE) + lift_TE, *others, **named)

    def forward(gate, *args):
        # The gate multiplies by its weight itself, so nothing else is between that and its choice.
        with mock.patch.object(sharded_moe, name, lifted):
            return TopKGate.forward(gate, *args)

    gate.forward = types.MethodType(forward, gate)

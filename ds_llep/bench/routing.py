"""Routing by decree: the experts that a workload or a test wants, with the router's own scores."""

from __future__ import annotations

import types

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_count import count_tokens_per_expert


def force_routing(layer: AutoEPMoELayer, ids_TK: torch.Tensor) -> None:
    """Fix the experts that a layer's router chooses; their scores stay the router's own."""
    counts_E = count_tokens_per_expert(ids_TK, layer.num_experts)

    def forward(router, x_TD, expert_bias=None):
        logits = router.gate(x_TD).float()
        sigmoid = router.score_func == "sigmoid"
        scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, dim=-1)
        top_TK = scores.gather(1, ids_TK)
        if router.route_norm:
            top_TK = top_TK / (top_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return top_TK * router.route_scale, ids_TK, counts_E

    layer.router.forward = types.MethodType(forward, layer.router)

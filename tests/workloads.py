"""Routings to test with: a function of name, shape, layer and seed alone."""

from __future__ import annotations

import torch

NAMES = ("balanced", "one_hot_expert", "hot_rank", "idle_ranks", "empty_rank", "per_layer")


def tokens_on_rank(name: str, num_tokens: int, rank: int) -> int:
    """T of this rank: ``empty_rank`` leaves rank 1 without any token."""
    return 0 if name == "empty_rank" and rank == 1 else num_tokens


def expert_ids(
    name: str, num_tokens: int, top_k: int, num_experts: int, ep_size: int, layer: int, seed: int
) -> torch.Tensor:
    """``[T, K]`` int64, K distinct experts for every token.

    balanced: uniform. one_hot_expert: every token's first choice is expert 0. hot_rank: all
    choices are experts of EP rank 0, as far as K allows. idle_ranks: only rank 0's experts and the
    very last one get tokens, few of them. empty_rank: one_hot_expert (see tokens_on_rank).
    per_layer: a hot expert that differs from layer to layer. ids_above_256: experts 256 to 259 are
    hot, 260 to 263 warm.

    A rank has no rows or many: the error of a gradient made of a row or two is a random draw.
    """
    generator = torch.Generator().manual_seed(seed)
    heat = torch.ones(num_experts)
    per_rank = num_experts // ep_size
    if name in ("one_hot_expert", "empty_rank"):
        heat[0] = 1e4
    elif name == "per_layer":
        heat[(5 * layer + 3) % num_experts] = 1e4
    elif name == "hot_rank":
        heat[:per_rank] = 1e9
    elif name == "idle_ranks":
        heat[:] = 1e-9
        heat[: max(per_rank // 2, 1)] = 1e4
        heat[-1] = 1.0
    elif name == "ids_above_256":
        heat[256:260], heat[260:264] = 1e4, 3e3
    elif name != "balanced":
        raise ValueError(f"unknown workload {name!r}; known: {NAMES}")
    if num_tokens == 0:
        return torch.empty((0, top_k), dtype=torch.int64)
    return torch.multinomial(heat.expand(num_tokens, -1), top_k, generator=generator)

"""Tiny models with random LoRA adapters by PEFT, and what each expert is to have of its layer's."""

from __future__ import annotations

from unittest import mock

import families
import pytest
import torch

peft = pytest.importorskip("peft")


def adapted(seed: int, family: str = "qwen3_moe", **settings) -> peft.PeftModel:
    """The family's model with random adapters, the same on every rank."""
    settings = {"target_modules": ["q_proj", "v_proj"], **settings}
    model = families.build(family, seed)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    )


def all_experts(family: str):
    """Every token takes every expert, so that rounding cannot send it elsewhere."""
    usual = families.FAMILIES[family]

    def config():
        changed = usual()
        names = "num_experts", "n_routed_experts", "num_local_experts"
        changed.num_experts_per_tok = next(
            getattr(changed, name) for name in names if hasattr(changed, name)
        )
        return changed

    return mock.patch.dict(families.FAMILIES, {family: config})


def own_factors(
    wrapper, tensors: tuple[torch.Tensor, torch.Tensor], home: slice, interleaved: bool = False
) -> dict[str, torch.Tensor]:
    """What the experts at home are to have of the wrapper's A and B, or of their gradients."""
    (a, b), experts = tensors, wrapper.num_experts
    rank = len(a) // experts
    a = torch.stack([a[e * rank : (e + 1) * rank] for e in range(experts)])[home]
    b = torch.stack([b[:, e::experts] for e in range(experts)])[home]
    if wrapper.parameter_name == "down_proj":
        return {"down_lora_A": a, "down_lora_B": b}
    half = b.shape[1] // 2
    gate, up = (b[:, ::2], b[:, 1::2]) if interleaved else (b[:, :half], b[:, half:])
    return {"gate_up_lora_A": a, "gate_lora_B": gate, "up_lora_B": up}

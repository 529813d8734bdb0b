"""Which models may be converted: what AutoEP would change or lose is refused before it shards.

Only a preset that names the model's type, or a description that the user wrote on purpose, says how
a router scores and what stands beside the experts. AutoEP's guesses, and what it would leave behind
of a block, are errors here. The price: a family without a preset costs its user a few lines of JSON
(docs/families.md), even where AutoEP would have guessed right.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import MoELayerSpec
from deepspeed.module_inject.auto_ep_presets.registry import (
    PRESET_MODELS,
    preset_name_for_hf_model_type,
    unsupported_preset_for_hf_model_type,
)

from ds_llep import gpt_oss
from ds_llep.config import SECTION


def check_family(model: torch.nn.Module, expert_parallel: Any) -> None:
    """Refuse a model that AutoEP would not convert into the same function; changes nothing.

    Dense models pass: they have no MoE layer to convert, which is found out later.

    Args:
        model: as it was given to ``deepspeed.initialize``.
        expert_parallel: the engine's parsed ``"expert_parallel"`` section.

    Raises:
        ValueError: on every rank, since it depends on nothing but the model and the JSON; what is
            wrong and the JSON that resolves it.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    chosen = (
        expert_parallel.preset_model is not None or expert_parallel.moe_layer_pattern is not None
    )
    if not chosen and not _has_preset(model_type):
        block = _some_moe_block(model)
        if block is not None:
            raise ValueError(_unknown(model, model_type, block))
        return
    parser = AutoEP(model, copy.copy(expert_parallel))  # it fills in what the model's config says
    for spec in parser.ep_parser():
        lost = _lost(model.get_submodule(spec.moe_module_name), spec)
        if lost:
            raise ValueError(
                f'"{SECTION}.enabled" is true, but AutoEP would drop {", ".join(lost)} of '
                f"{spec.moe_module_name!r} ({spec.model_family}). Shared experts are kept if "
                '"expert_parallel" names them: "has_shared_experts": true, '
                '"shared_experts_pattern" and, if they have a gate, "shared_experts_gate_pattern". '
                "AutoEP has no place for anything else: train this model without it."
            )
        recorded = spec.router_logits_capture_target != "none"
        if getattr(config, "output_router_logits", False) and not recorded:
            raise ValueError(
                "the model's config has output_router_logits, but AutoEP hands out none for layers "
                "that no preset describes, so there would be no auxiliary loss. Set it to false."
            )
        greedy = model_type == "deepseek_v2" and getattr(config, "topk_method", None) == "greedy"
        if greedy and (spec.num_expert_groups or 1) > 1:
            raise ValueError(
                "the model's config has topk_method 'greedy', so its routers ignore n_group="
                f"{spec.num_expert_groups}, but AutoEP's would choose by groups. Add "
                '"num_expert_groups": 1, "num_limited_groups": 1 to "expert_parallel".'
            )


def _has_preset(model_type: str | None) -> bool:
    """Whether AutoEP knows the type, be it to refuse it with an explanation of its own."""
    if model_type is None:
        return False
    lookups = preset_name_for_hf_model_type, unsupported_preset_for_hf_model_type
    return any(lookup(model_type) is not None for lookup in lookups)


def _some_moe_block(model: torch.nn.Module) -> str | None:
    """The name of the first module that holds experts; None in a dense model."""
    for name, module in model.named_modules():
        if name.split(".")[-1] == "experts" or "Experts" in type(module).__name__:
            return name.rpartition(".")[0]
    return None


def _unknown(model: torch.nn.Module, model_type: str | None, block: str) -> str:
    supported = sorted(kind for preset in PRESET_MODELS.values() for kind in preset.hf_model_types)
    example = {
        "moe_layer_pattern": re.sub(r"\d+", r"\\d+", re.escape(block)),
        "router_pattern": "gate",
        "expert_pattern": "experts",
        "num_experts_attr": "num_experts",
        "top_k_attr": "num_experts_per_tok",
        "score_func": "softmax",
        "route_norm": True,
    }
    return (
        f'"{SECTION}.enabled" is true, but {type(model).__name__} has MoE blocks ({block!r}) of '
        f"model_type {model_type!r}, for which AutoEP has no preset. It has for "
        f"{', '.join(supported)}. Another model can be described, if its blocks are built like "
        f'theirs: "expert_parallel": {json.dumps(example)[:-1]}, ...}}, each value as in the model '
        "(docs/families.md says what they mean and how to check the result). Otherwise set "
        f'"{SECTION}.enabled" to false.'
    )


def _lost(block: torch.nn.Module, spec: MoELayerSpec) -> list[str]:
    """Parameters and buffers of a block that AutoEP's layer has no place for."""
    kept = [rf"{spec.router_name}\.(weight|bias)", r"(.*\.)?e_score_correction_bias"]
    for name in filter(None, (spec.expert_w1_name, spec.expert_w2_name, spec.expert_w3_name)):
        kept.append(rf"{spec.experts_name}\.(\d+\.)?{name}(\.weight)?")
        if spec.model_family == gpt_oss.NAME:
            kept.append(rf"{spec.experts_name}\.{name}_bias")
    for name in filter(None, (spec.shared_experts_name, spec.shared_experts_gate_name)):
        kept.append(rf"{name}\..+")
    pattern = re.compile("|".join(kept))
    return [name for name in block.state_dict() if not pattern.fullmatch(name)]

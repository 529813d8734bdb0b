"""Models that AutoEP would turn into another function are refused, with the JSON that helps."""

from __future__ import annotations

import json
import re

import engines
import families
import pytest
import torch
import transformers
from deepspeed.module_inject.auto_ep_config import parse_autoep_config

from ds_llep.families import check_family

OTHERS = {
    "olmoe": ("num_experts", r"model\.layers\.[01]\.mlp"),
    "granitemoe": ("num_local_experts", r"model\.layers\.[01]\.block_sparse_moe"),
    "jetmoe": ("num_local_experts", r"model\.layers\.[01]\.mlp"),
}
"""Model types without a preset: the attribute for the experts' number, their MoE blocks."""
SHARED = {"has_shared_experts": True, "shared_experts_pattern": "shared_experts"}
LAYERS = {"moe_layer_pattern": r"model\.layers\.\d+\.mlp", "num_experts_attr": "num_experts"}
GLM = {**LAYERS, "num_experts_attr": "n_routed_experts", "score_func": "sigmoid"}


def check(model, **expert_parallel) -> None:
    check_family(model, parse_autoep_config({"enabled": True, **expert_parallel}))


def message(model, **expert_parallel) -> str:
    with pytest.raises(ValueError) as caught:
        check(model, **expert_parallel)
    return str(caught.value)


def other(model_type: str):
    experts, _ = OTHERS[model_type]
    settings = {**families.SMALL, experts: 8, "num_experts_per_tok": 2, "intermediate_size": 48}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_presets_pass(family):
    """And nothing of the section changes: AutoEP fills it in from the model's config."""
    config = parse_autoep_config({"enabled": True})
    before = vars(config).copy()
    check_family(families.build(family, seed=1), config)
    assert vars(config) == before


def test_dense_models_pass():
    config = transformers.AutoConfig.for_model("qwen3", **families.SMALL, intermediate_size=64)
    check(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("model_type", OTHERS)
def test_others_are_refused(model_type):
    model = other(model_type)
    text = message(model)
    assert repr(model_type) in text and '"llep.enabled" to false' in text
    supported = re.search("It has for (.*?)\\.", text).group(1).split(", ")
    assert {families.FAMILIES[family]().model_type for family in families.FAMILIES} <= {*supported}
    # What it suggests is JSON that describes the blocks of this model.
    (example,) = re.findall(r'"expert_parallel": (\{.*?), \.\.\.\}', text)
    found = re.compile(json.loads(example + "}")["moe_layer_pattern"])
    names = [name for name, _ in model.named_modules() if found.fullmatch(name)]
    assert len(names) == 2 and all(re.fullmatch(OTHERS[model_type][1], name) for name in names)


def test_unknown_without_config():
    model = other("olmoe")
    del model.config
    assert "None" in message(model)


def test_described_or_chosen_models_pass():
    check(families.build("olmoe", seed=1), **LAYERS)
    check(families.build("olmoe", seed=1), preset_model="qwen3_moe")
    check(families.build("glm4_moe", seed=1), **GLM, **SHARED)


def test_what_would_be_lost():
    text = message(families.build("glm4_moe", seed=1), **GLM)
    names = [f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert f"drop {', '.join(names)} of 'model.layers.1.mlp'" in text
    assert '"has_shared_experts": true' in text
    text = message(families.build("qwen2_moe", seed=1), preset_model="mixtral")
    assert "shared_expert_gate.weight" in text
    # A router that AutoEP copies only in part, and experts with biases.
    model = families.build("olmoe", seed=1)
    block = model.model.layers[1].mlp
    block.gate.register_buffer("expert_bias", torch.ones(8))
    block.experts.down_proj_bias = torch.nn.Parameter(torch.ones(8, 32))
    assert "drop gate.expert_bias, experts.down_proj_bias of" in message(model, **LAYERS)


def test_groups_that_routers_ignore():
    model = families.build("deepseek_v2", seed=1, topk_method="greedy")
    text = message(model)
    assert "n_group=2" in text and '"num_expert_groups": 1, "num_limited_groups": 1' in text
    check(model, num_expert_groups=1, num_limited_groups=1)
    check(families.build("deepseek_v2", seed=1, topk_method="greedy", n_group=1))
    check(families.build("deepseek_v3", seed=1, topk_method="greedy"))  # its routers do not ask


def test_auxiliary_loss_of_described_models():
    model = families.build("olmoe", seed=1, output_router_logits=True)
    assert "output_router_logits" in message(model, **LAYERS)
    check(families.build("mixtral", seed=1, output_router_logits=True))


def refused(llep: dict | None) -> str:
    """What ``deepspeed.initialize`` raises on this rank."""
    model = families.build("olmoe", seed=1)
    try:
        engines.initialize(model, engines.ds_config(1, 2, llep=llep))
    except ValueError as error:
        return str(error)
    return ""


def test_on_every_rank(pools):
    pool = pools(4)
    assert all("'olmoe', for which AutoEP has no preset" in text for text in pool.run(refused, {}))
    # Without llep it is AutoEP's to say.
    assert not any("llep" in text for text in pool.run(refused, None))

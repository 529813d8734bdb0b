"""One layer's experts: from the model's layout to AutoEP's by DeepSpeed, and back by us."""

from __future__ import annotations

import types

import pytest
import torch
from deepspeed.moe.ep_repack import repack_expert_weights

from ds_llep.gpt_oss import to_autoep
from ds_llep.layouts import layer_to_hf

E, F, D = 6, 5, 4


def experts_module(storage: str, transposed: bool) -> torch.nn.Module:
    if storage == "module_list":
        projections = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
        return torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {name: torch.nn.Linear(*sizes, bias=False) for name, sizes in projections.items()}
            )
            for _ in range(E)
        )
    shapes = {"gate_up_proj": (E, 2 * F, D), "down_proj": (E, D, F)}
    module = torch.nn.Module()
    for name, (_, rows, columns) in shapes.items():
        shape = (E, columns, rows) if transposed else (E, rows, columns)
        module.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))
    return module


@pytest.mark.parametrize(
    "storage, transposed", [("fused_3d", False), ("fused_3d", True), ("module_list", False)]
)
def test_experts_come_back(storage, transposed, seed):
    torch.manual_seed(seed)
    module = experts_module(storage, transposed)
    apart = storage == "module_list"
    spec = types.SimpleNamespace(
        model_family="qwen3_moe",
        num_experts=E,
        experts_name="mlps",
        expert_storage=storage,
        expert_w1_name="gate_proj" if apart else "gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name="up_proj" if apart else None,
    )
    parts = [repack_expert_weights(module, spec, rank, 2) for rank in range(2)]
    whole = map(torch.cat, zip(*parts, strict=True))
    tensors = dict(zip(("experts.w1", "experts.w2", "experts.w3"), whole, strict=True))
    expected = {f"mlps.{name}": value for name, value in module.state_dict().items()}
    shapes = {name: value.shape for name, value in expected.items()}
    found = layer_to_hf(spec, tensors, shapes)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gpt_oss(seed):
    """gate and up take turns in the last dimension, and every expert has its biases."""
    torch.manual_seed(seed)
    shapes = {
        "gate_up_proj": (E, D, 2 * F),
        "gate_up_proj_bias": (E, 2 * F),
        "down_proj": (E, F, D),
        "down_proj_bias": (E, D),
    }
    expected = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights = zip(("w1", "w2", "w3"), to_autoep(**expected), strict=True)
    spec = types.SimpleNamespace(
        model_family="gpt_oss", experts_name="experts", ffn_hidden_size=F, hidden_size=D
    )
    found = layer_to_hf(spec, {f"experts.{name}": value for name, value in weights}, {})
    assert found.keys() == {f"experts.{name}" for name in expected}
    for name, value in expected.items():
        assert torch.equal(found[f"experts.{name}"], value)
    assert all(value.is_contiguous() for value in found.values())
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) == len(found)


@pytest.mark.parametrize(
    "ours, owner, theirs",
    [
        ("router.gate.weight", None, "gating.weight"),
        ("router.gate.bias", None, "gating.bias"),
        ("router.e_score_correction_bias", "gating", "gating.e_score_correction_bias"),
        ("router.e_score_correction_bias", "", "e_score_correction_bias"),
        ("shared_experts.up_proj.weight", None, "shared_mlp.up_proj.weight"),
        ("shared_experts_gate.weight", None, "shared_gate.weight"),
        ("other.weight", None, "other.weight"),
    ],
)
def test_names_around_the_experts(ours, owner, theirs):
    spec = types.SimpleNamespace(
        router_name="gating",
        e_score_correction_bias_path=owner,
        shared_experts_name="shared_mlp",
        shared_experts_gate_name="shared_gate",
    )
    value = torch.randn(3)
    assert layer_to_hf(spec, {ours: value}, {}) == {theirs: value}

"""gpt-oss, which AutoEP does not know by itself: converted, it computes what transformers does."""

from __future__ import annotations

import engines
import layers
import pytest
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_presets import registry
from families import build
from quantized import write_mxfp4
from transformers import AutoModelForCausalLM, Mxfp4Config

from ds_llep import gpt_oss
from ds_llep.biased import BiasedExperts, split

NAMES = gpt_oss._PARAMETERS


def convert(model: torch.nn.Module, **options) -> torch.nn.Module:
    """The model with AutoEP's layers, all experts on this one process."""
    auto_ep = AutoEP(model, parse_autoep_config({"enabled": True, **options}))
    auto_ep.replace_moe_layers(auto_ep.ep_parser(), 1, 0)
    return model


def results(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and all gradients, under AutoEP's names."""
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    found = {"logits": output.logits.detach()}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, grad in grads.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            prefix = name[: -len("gate_up_proj")]
            weights = gpt_oss.to_autoep(*(grads[prefix + name] for name in NAMES))
            found |= {f"{prefix}w{i}": weight for i, weight in enumerate(weights, 1)}
        elif ".mlp.experts." not in name or ".w" in name[-4:]:
            found[name.replace(".mlp.router.gate.", ".mlp.router.")] = grad
    return found


@pytest.mark.parametrize("use_grouped_mm", [False, True])
def test_same_as_transformers(use_grouped_mm, seed):
    torch.manual_seed(seed)
    ids = torch.randint(0, 96, (2, 24))
    expected = results(build("gpt_oss", seed).double(), ids)
    theirs = results(build("gpt_oss", seed), ids)
    converted = convert(build("gpt_oss", seed), use_grouped_mm=use_grouped_mm)
    ours = results(converted, ids)
    experts = [m for m in converted.modules() if isinstance(m, BiasedExperts)]
    assert len(experts) == 2 and ours.keys() == expected.keys()
    for index in range(2):
        prefix = f"model.layers.{index}.mlp."
        for name in ("experts.w1", "experts.w2", "experts.w3", "router.weight", "router.bias"):
            assert expected[prefix + name].any()
    errors = (layers.errors(found, expected) for found in (ours, theirs))
    assert not layers.over_budget(*errors), seed


def test_router_logits(seed):
    torch.manual_seed(seed)
    ids = torch.randint(0, 96, (1, 12))
    theirs, ours = build("gpt_oss", seed), convert(build("gpt_oss", seed), use_grouped_mm=False)
    found = [
        model(input_ids=ids, output_router_logits=True).router_logits for model in (theirs, ours)
    ]
    for logits, expected in zip(*found, strict=True):
        torch.testing.assert_close(logits, expected)


def test_registered_once():
    preset, repack = registry.PRESET_MODELS["gpt_oss"], gpt_oss.auto_ep_layer.repack_expert_weights
    gpt_oss.register()
    assert registry.PRESET_MODELS["gpt_oss"] is preset
    assert gpt_oss.auto_ep_layer.repack_expert_weights is repack


@pytest.mark.parametrize("frozen", NAMES)
def test_bias_and_matrix_are_trained_together(frozen):
    model = build("gpt_oss", 0)
    getattr(model.model.layers[1].mlp.experts, frozen).requires_grad_(False)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp': .* are one parameter"):
        convert(model)


def test_frozen_experts():
    model = build("gpt_oss", 0)
    for name in NAMES[:2]:
        getattr(model.model.layers[0].mlp.experts, name).requires_grad_(False)
    experts = convert(model).model.layers[0].mlp.experts
    assert [w.requires_grad for w in (experts.w1, experts.w2, experts.w3)] == [False, True, False]


def test_mxfp4_checkpoint(tmp_path, seed):
    """Loaded dequantized, its experts are what the blocks stand for."""
    meant = write_mxfp4(tmp_path, seed)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    for name, tensor in meant.items():
        assert torch.equal(loaded.get_parameter(name), tensor), name
    loaded.save_pretrained(tmp_path / "once", save_original_format=False)  # docs/checkpoints.md
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once").state_dict()
    assert again.keys() == meant.keys()
    assert not [name for name in meant if not torch.equal(again[name], meant[name])]
    experts = convert(loaded).model.layers[0].mlp.experts
    gate_up = meant["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(split(experts.w1, 64)[0], gate_up[..., ::2].transpose(1, 2))
    assert torch.equal(split(experts.w3, 64)[0], gate_up[..., 1::2].transpose(1, 2))


def test_quantized_experts_are_refused():
    model = build("gpt_oss", 0)
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(
        experts.gate_up_proj.detach().to(torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match="quantized .*Mxfp4Config\\(dequantize=True\\)"):
        convert(model)


def train(stage: int, llep: bool, seed: int, directory: str) -> dict:
    """Two steps, a checkpoint, another engine that loads it; what is not as it should be."""
    config = engines.ds_config(stage, 2, "fp32", {} if llep else None)
    engine = engines.initialize(build("gpt_oss", seed), config)
    for step in range(2):
        inputs = engines.batch(torch.float32, seed + step)
        engine.backward(engine(**inputs).loss)
        engine.step()
    for layer in engines.moe_layers(engine.module) if llep else ():
        context = layer.llep
        assert context.costs == context.rates.costs(32, 48, 2, 2, 4, 2), "biases taken for size"
    state = engines.full_state(engine)
    engine.save_checkpoint(directory)
    engine.destroy()
    other = engines.initialize(build("gpt_oss", seed + 1), config)
    before = engines.full_state(other)
    other.load_checkpoint(directory)
    after = engines.full_state(other)
    other.destroy()
    biases, padded = {}, []
    for name, tensor in state.items():
        if name.endswith((".w1", ".w2", ".w3")):
            size = 32 if name.endswith("w2") else 48
            matrix, biases[name] = split(tensor, size)
            rest = tensor[:, size:].flatten(1)[:, size:]
            padded += [name] if rest.any() or not rest.numel() else []
    return {
        "unequal": layers.unequal(after, state),
        "unchanged": [name for name, bias in biases.items() if not bias.any()]
        + [name for name in biases if torch.equal(before[name], state[name])],
        "padded": padded,
        "losses": biases,
    }


@pytest.mark.parametrize("stage, llep", [(1, True), (3, True), (2, False)])
def test_checkpoints_hold_biases(pools, stage, llep, seed, tmp_path):
    for result in pools(2).run(train, stage, llep, seed, str(tmp_path)):
        assert len(result["losses"]) == 6
        assert not result["unequal"] and not result["unchanged"] and not result["padded"], seed

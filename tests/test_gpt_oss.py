"""gpt-oss, which AutoEP does not know by itself: converted, it computes what transformers does."""

from __future__ import annotations

import json

import engines
import layers
import pytest
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_presets import registry
from families import build
from safetensors.torch import load_file, save_file
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


def quantize(matrix_EFD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks and scales of MXFP4, 32 numbers a block, and what they stand for as ``[E, D, F]``."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    E, F, D = matrix_EFD.shape
    blocks = matrix_EFD.reshape(E, F, D // 32, 32)
    power = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    codes = (blocks.unsqueeze(-1) / 2 ** power[..., None, None] - values).abs().argmin(-1)
    meant = values[codes] * 2 ** power[..., None]
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed, (power + 127).to(torch.uint8), meant.reshape(E, F, D).transpose(1, 2)


def test_mxfp4_checkpoint(tmp_path, seed):
    """Loaded dequantized; as it is, refused by name."""
    model = build("gpt_oss", seed)
    config = model.config
    config.intermediate_size = 64  # whole blocks
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    meant = {}
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            shape = tensors.pop(name).transpose(1, 2).shape
            blocks, scales, meant[name] = quantize(torch.randn(shape))
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "config.json").write_text(json.dumps(settings))

    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    assert len(meant) == 4
    for name, tensor in meant.items():
        torch.testing.assert_close(loaded.get_parameter(name).float(), tensor)
    experts = convert(loaded).model.layers[0].mlp.experts
    gate_up = meant["model.layers.0.mlp.experts.gate_up_proj"]
    torch.testing.assert_close(split(experts.w1, 64)[0].float(), gate_up[..., ::2].transpose(1, 2))
    torch.testing.assert_close(split(experts.w3, 64)[0].float(), gate_up[..., 1::2].transpose(1, 2))


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

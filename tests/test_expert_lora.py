"""LoRA on routed experts: as PEFT computes it, sharded, borrowed and saved like the experts."""

from __future__ import annotations

from types import SimpleNamespace

import accelerate
import deepspeed.comm as dist
import engines
import families
import layers
import lora_models
import pytest
import torch

import ds_llep
from ds_llep.lora import adapter_state_dict

peft = pytest.importorskip("peft")

NAMES = {"qwen3_moe": ["gate_proj", "up_proj", "down_proj"], "mixtral": ["w1", "w2", "w3"]}
RANKS = {"mlp.experts.gate_up_proj": 2}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def gradients(engine, inputs, ids) -> dict:
    """Logits and gradients of one forward and backward of an engine."""
    engines.set_routing(engine.module, ids)
    output = engine(**inputs)
    engine.backward(output.loss)
    found = {"logits": output.logits.detach(), "input": inputs["inputs_embeds"].grad}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found[name] = engines.safe_get_full_grad(parameter).detach().clone()
    return found


def reference(seed, settings, inputs, ids, ep_size, dtype) -> dict:
    """The same from the unsharded model, with the factors of this rank's experts."""
    model = lora_models.adapted(seed, **settings).to(inputs["labels"].device, dtype)
    engines.force_hf_routing(model.get_base_model(), ids)
    embeds = inputs["inputs_embeds"].detach().to(dtype).requires_grad_()
    output = model(inputs_embeds=embeds, labels=inputs["labels"])
    output.loss.backward()
    engines.average_gradients(model)
    expected = {"logits": output.logits.detach(), "input": embeds.grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".experts." not in name:
            expected[name] = parameter.grad
    for name, module in model.named_modules():
        if getattr(module, "parameter_name", None):
            grads = module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad
            per_rank = module.num_experts // layers.fit(ep_size)
            first = dist.get_rank() % layers.fit(ep_size) * per_rank
            prefix = name.removesuffix(".base_layer")
            own = lora_models.own_factors(module, grads, slice(first, first + per_rank))
            expected |= {f"{prefix}.{factor}": gradient for factor, gradient in own.items()}
    return expected


def parity(seed, stage, ep_size, checkpointing, settings, llep) -> SimpleNamespace:
    model = lora_models.adapted(seed, **settings)
    engines.enable_checkpointing(model, checkpointing)
    engine = engines.initialize(model, engines.ds_config(stage, ep_size, llep=llep))
    ids = engines.routing("hot_rank", model.config, ep_size, seed)
    inputs = engines.batch(torch.float32, seed)
    found = gradients(engine, inputs, ids)
    status = ds_llep.status(engine)
    engine.destroy()
    wide, narrow = (
        reference(seed, settings, inputs, ids, ep_size, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert found.keys() == wide.keys(), found.keys() ^ wide.keys()
    return SimpleNamespace(
        over=layers.over_budget(layers.errors(found, wide), layers.errors(narrow, wide)),
        spilled=status["spilled_tokens"],
        factors={name: bool(found[name].any()) for name in found if ".experts." in name},
    )


@pytest.mark.parametrize(
    "stage, ep_size, checkpointing, settings, llep",
    [
        (0, 2, "none", {"target_parameters": BOTH}, {}),
        (1, 4, "none", {"target_parameters": BOTH, "use_rslora": True}, {}),
        (2, 2, "non_reentrant", {"target_parameters": BOTH[:1]}, {"backward_weights": "keep"}),
        (2, 4, "reentrant", {"target_parameters": BOTH[1:], "target_modules": []}, {}),
        (3, 2, "non_reentrant", {"target_parameters": BOTH}, {}),
        (3, 2, "none", {"target_modules": NAMES["qwen3_moe"]}, {"weight_source": "owner"}),
        (3, 4, "none", {"target_parameters": BOTH}, {"backward_weights": "keep"}),
    ],
)
def test_gradients(pools, stage, ep_size, checkpointing, settings, llep, seed):
    results = pools(4).run(parity, seed, stage, ep_size, checkpointing, settings, llep)
    for rank, result in enumerate(results):
        assert not result.over, f"rank {rank}, seed {seed}: {result.over}"
        assert all(result.spilled), "a layer has lent no expert"
    for name in results[0].factors:
        assert any(result.factors[name] for result in results), f"{name} is zero on all ranks"
    kinds = {name.rpartition(".")[2] for name in results[0].factors}
    expected = {"gate_up_lora_A", "gate_lora_B", "up_lora_B", "down_lora_A", "down_lora_B"}
    targets = settings.get("target_parameters", BOTH)
    if BOTH[0] not in targets:
        expected = {"down_lora_A", "down_lora_B"}
    if BOTH[1] not in targets:
        expected -= {"down_lora_A", "down_lora_B"}
    assert kinds == expected


def inputs_on_cpu(seed: int) -> dict[str, torch.Tensor]:
    batch = engines.batch(torch.float32, seed)
    return {name: value.detach().cpu() for name, value in batch.items()}


def logits_of(engine, seed: int) -> torch.Tensor:
    engine.eval()
    with torch.no_grad():
        return engine(**engines.batch(torch.float32, seed)).logits.cpu()


def train(engine, seed: int, steps: int = 2) -> None:
    engine.train()
    for step in range(steps):
        engine.backward(engine(**engines.batch(torch.float32, seed + step)).loss)
        engine.step()


def whole_state(engine, way: str):
    """What there is to be saved, in the ways of ds_llep, Accelerate and HF Trainer."""
    if way == "ours":
        return adapter_state_dict(engine)
    if way == "trainer's":
        return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    accelerator = SimpleNamespace(
        distributed_type=accelerate.DistributedType.DEEPSPEED,
        deepspeed_config=engine._config._param_dict,
    )
    return accelerate.Accelerator.get_state_dict(accelerator, engine)


def train_and_save(family, stage, ep_size, way, settings, directory, seed):
    with lora_models.all_experts(family):
        model = lora_models.adapted(seed, family, **settings)
    engine = engines.initialize(model, engines.ds_config(stage, ep_size, llep={}))
    before = logits_of(engine, seed)
    train(engine, seed)
    state = whole_state(engine, way)
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="adapter_state_dict"):
            model.save_pretrained(f"{directory}/incomplete")
        model.save_pretrained(directory, state_dict=state)
    results = before, logits_of(engine, seed)
    engine.destroy()
    return inputs_on_cpu(seed), *results


@pytest.mark.parametrize(
    "family, stage, ep_size, way, settings",
    [
        ("qwen3_moe", 0, 4, "accelerate's", {"target_parameters": BOTH}),
        ("qwen3_moe", 3, 2, "trainer's", {"target_modules": NAMES["qwen3_moe"]}),
        ("mixtral", 1, 2, "accelerate's", {"target_modules": NAMES["mixtral"]}),
        ("deepseek_v3", 2, 2, "ours", {"target_parameters": BOTH, "rank_pattern": RANKS}),
        ("gpt_oss", 3, 4, "ours", {"target_parameters": BOTH}),
        ("qwen2_moe", 2, 2, "ours", {"target_parameters": BOTH, "modules_to_save": ["lm_head"]}),
    ],
)
def test_saved_adapter_loads_in_plain_peft(
    pools, family, stage, ep_size, way, settings, tmp_path, seed
):
    """Before and after training, the plain model computes the same."""
    case = family, stage, ep_size, way, settings
    results = pools(4).run(train_and_save, *case, str(tmp_path), seed)
    with lora_models.all_experts(family):
        untrained = lora_models.adapted(seed, family, **settings).eval()
        base = families.build(family, seed)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    for inputs, before, after in results:
        assert (after - before).norm() > 1e-3 * before.norm()
        for model, logits in ((untrained, before), (loaded, after)):
            with torch.no_grad():
                plain = model(**inputs).logits
            assert (plain - logits).norm() <= 1e-4 * logits.norm()

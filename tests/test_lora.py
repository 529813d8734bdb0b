"""LoRA by PEFT: adapters beside frozen experts train and save; others are refused by name."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import deepspeed.comm as dist
import engines
import families
import layers
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from lora_models import adapted, all_experts

import ds_llep
from ds_llep.kernels.select import select_kernels
from ds_llep.lora import adapter_state_dict, adapters_kept

peft = pytest.importorskip("peft")

WRAPPED = r"base_model\.model\.model\.layers\.\d+\.mlp"
"""What AutoEP has to be told to find layers inside PEFT's wrapper by itself."""


def thaw(model: torch.nn.Module, *names: str) -> list[torch.nn.Parameter]:
    """Train what has one of ``names`` in its name as well; all that is trained."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.requires_grad_()
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def counted_gradients():
    """A list that gets one entry for each gradient of expert weights that layers compute."""
    counted = []

    def select(*args):
        kernels = select_kernels(*args)

        def gradient(*tensors):
            counted.append("weights")
            return kernels.gradient_of_weights(*tensors)

        return kernels._replace(gradient_of_weights=gradient)

    with mock.patch("ds_llep.layer.select_kernels", select):
        yield counted


def one_step(seed, stage, ep_size, llep, checkpointing, only, thawed, input_grad):
    """Gradients of one backward, and what was sent and computed for them."""
    model = adapted(seed, layers_to_transform=only)
    trained = thaw(model, *thawed)
    engines.enable_checkpointing(model, checkpointing)
    config = engines.ds_config(stage, ep_size, llep=llep)
    if llep is None:
        config["expert_parallel"]["moe_layer_pattern"] = WRAPPED
    engine = engines.deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
    ids = engines.routing("hot_rank", model.config, ep_size, seed)
    inputs = engines.batch(torch.float32, seed)
    inputs["inputs_embeds"] = inputs["inputs_embeds"].detach().requires_grad_(input_grad)
    engines.set_routing(engine.module, ids)
    log = SimpleNamespace(inputs=inputs, ids=ids, status=ds_llep.status(engine))
    with engines.point_to_point(engine) as messages, counted_gradients() as log.computed:
        output = engine(**inputs)
        engine.backward(output.loss)
    log.back = [key for kind in ("isend", "irecv") for key in messages[kind] if key[1] != "forward"]
    log.ahead = [key for key in messages["isend"] if key[1] == "forward"]
    log.found = {"logits": output.logits.detach(), "input": inputs["inputs_embeds"].grad}
    for name, parameter in engine.module.named_parameters():
        gradient = engines.safe_get_full_grad(parameter) if parameter.requires_grad else None
        log.found[name] = None if gradient is None else gradient.detach().clone()
    engine.destroy()
    return log


def reference(seed, log, ep_size, only, thawed, input_grad) -> dict:
    """The same from the unsharded model in fp64."""
    model = adapted(seed, layers_to_transform=only).double().to(log.inputs["labels"].device)
    thaw(model, *thawed)
    engines.force_hf_routing(model.get_base_model(), log.ids)
    embeds = log.inputs["inputs_embeds"].detach().double().requires_grad_(input_grad)
    output = model(inputs_embeds=embeds, labels=log.inputs["labels"])
    output.loss.backward()
    engines.average_gradients(model)
    expected = {"logits": output.logits.detach(), "input": embeds.grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected |= engines.autoep_view(name, parameter.grad, ep_size)
    return expected


def parity(seed, stage, ep_size, checkpointing, only, thawed, input_grad) -> dict:
    case = checkpointing, only, thawed, input_grad
    ours = one_step(seed, stage, ep_size, {"backward_weights": "keep"}, *case)
    # Without llep, DeepSpeed does not start under ZeRO 1 and 2 where all experts are frozen.
    theirs = one_step(seed, stage if stage == 3 else 0, ep_size, None, *case)
    expected = reference(seed, ours, ep_size, *case[1:])
    errors = [layers.errors(log.found, expected) for log in (ours, theirs)]
    return {
        "over": layers.over_budget(*errors),
        "compared": sorted(errors[0]),
        "trained": sorted(name for name, value in expected.items() if value is not None),
        "active": ours.status["active"],
        "ahead": len(ours.ahead),
        "back": ours.back,
        "computed": len(ours.computed),
    }


# Which layers are adapted, what is trained beside the adapters, and whether inputs need gradients.
@pytest.mark.parametrize(
    "stage, ep_size, checkpointing, only, thawed, input_grad",
    [
        (0, 2, "none", None, (), True),
        (1, 4, "none", None, (), True),
        (2, 2, "non_reentrant", None, (), False),
        (3, 2, "reentrant", None, (), True),
        (3, 4, "non_reentrant", None, (), True),
        (1, 2, "none", [1], (), False),
        (2, 2, "none", [1], (".gate.weight",), False),
        (3, 4, "none", [1], (".gate.weight",), False),
        (2, 2, "none", None, ("layers.1.mlp.experts.",), True),
        (3, 2, "none", None, ("layers.0.mlp.experts.down_proj",), True),
    ],
)
def test_gradients(pools, stage, ep_size, checkpointing, only, thawed, input_grad, seed):
    case = seed, stage, ep_size, checkpointing, only, thawed, input_grad
    results = pools(4).run(parity, *case)
    for rank, result in enumerate(results):
        assert result["active"]
        assert not result["over"], f"rank {rank}, seed {seed}: {result['over']}"
        layers_adapted = len(only or (0, 1))
        lora = [name for name in result["trained"] if ".lora_" in name]
        assert len(lora) == 4 * layers_adapted, lora  # A and B for q and v
        assert "small tensors" in result["compared"]
        trains_experts = any("experts" in name for name in thawed)
        assert any("experts.w" in name for name in result["trained"]) == trains_experts
        assert bool(result["computed"]) == trains_experts
        if not trains_experts:  # forward has kept the weights, so gradients would be all
            assert not result["back"], result["back"]
    assert sum(result["ahead"] for result in results), "nothing was spilled"
    if trains_experts:
        assert any(result["back"] for result in results), "no gradient returned"


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize(
    "settings, where, why",
    [
        ({"target_modules": "all-linear"}, "mlp.gate", "adapts a router"),
        ({"modules_to_save": ["mlp"]}, "mlp", "adapts routed experts"),
        ({"modules_to_save": ["experts"]}, "mlp.experts", "adapts routed experts"),
        ({"modules_to_save": ["gate"]}, "mlp.gate", "adapts a router"),
        ({"target_parameters": ["mlp.gate.weight"]}, "mlp.gate", "adapts a router"),
    ],
    ids=["all-linear", "block", "saved_experts", "saved_router", "router"],
)
def test_refused(family, settings, where, why, seed):
    """Before anything is replaced, by the name of what is wrapped, with what to do instead."""
    model = adapted(seed, family, **settings)
    with pytest.raises(ValueError, match=rf"layers\.\d+\.{where}' {why}.*(instead|out of)"):
        with adapters_kept(model, SimpleNamespace(moe_layer_pattern=None)):
            raise AssertionError("AutoEP was let loose on it")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_quantised_experts_are_refused(dtype, seed):
    model = adapted(seed)
    experts = model.get_base_model().model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj' is quantised"):
        with adapters_kept(model, SimpleNamespace(moe_layer_pattern=None)):
            raise AssertionError("AutoEP was let loose on it")


def test_lost_adapters_are_an_error(seed):
    """Whatever is replaced and however it was wrapped."""
    model = adapted(seed)
    attention = model.get_base_model().model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"1 .*layers\.0\.self_attn\.q_proj\.lora_A"):
        with adapters_kept(model, SimpleNamespace(moe_layer_pattern=None)):
            attention.q_proj.lora_A["default"] = torch.nn.Linear(32, 4, bias=False)


def refused_then_trained(stage: int, seed: int) -> str:
    model = adapted(seed, modules_to_save=["mlp"])
    config = engines.ds_config(stage, 2, llep={})
    with pytest.raises(ValueError, match="adapts routed experts") as error:
        engines.initialize(model, config)
    # All parameters, frozen ones too: DeepSpeed puts frozen experts into a group of their own.
    engine = engines.initialize(adapted(seed), config)
    losses = []
    for _ in range(3):
        output = engine(**engines.batch(torch.float32, seed))
        engine.backward(output.loss)
        engine.step()
        losses.append(engines.mean_over_ranks(output.loss))
    assert losses[2] < losses[0]
    with pytest.raises(ValueError, match="moe_layer_pattern"):  # a user's pattern is his own
        own = engines.ds_config(stage, 2, llep={})
        own["expert_parallel"]["moe_layer_pattern"] = r"model\.layers\.\d+\.mlp"
        engines.initialize(adapted(seed), own)
    engine.destroy()
    return str(error.value)


@pytest.mark.parametrize("stage", [1, 2])
def test_refused_on_every_rank(pools, stage, seed):
    assert len(set(pools(4).run(refused_then_trained, stage, seed))) == 1


SAVED = {
    "qwen3_moe": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "qwen2_moe": {"target_modules": r".*\.(q_proj|shared_expert\.up_proj|shared_expert_gate)"},
}


def train_and_save(family: str, stage: int, way: str, directory: str, seed: int):
    with all_experts(family):
        model = adapted(seed, family, **SAVED[family])
    engine = engines.initialize(model, engines.ds_config(stage, 2, llep={}))
    for step in range(2):
        loss = engine(**engines.batch(torch.float32, seed + step)).loss
        engine.backward(loss)
        engine.step()
    if way == "ours":
        state = adapter_state_dict(engine)
    elif stage == 3:  # the ways of HF Trainer
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    else:
        state = model.state_dict()
    if dist.get_rank() == 0:
        model.save_pretrained(directory, state_dict=state)
    trained = {
        name: safe_get_full_fp32_param(parameter).detach().cpu().clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    engine.eval()
    with torch.no_grad():
        logits = engine(**engines.batch(torch.float32, seed)).logits.cpu()
    inputs = {
        name: value.detach().cpu() for name, value in engines.batch(torch.float32, seed).items()
    }
    engine.destroy()
    return inputs, logits, trained


@pytest.mark.parametrize(
    "family, stage, way",
    [
        ("qwen3_moe", 1, "trainer's"),
        ("qwen3_moe", 3, "ours"),
        ("qwen2_moe", 2, "ours"),
        ("qwen2_moe", 3, "trainer's"),
    ],
)
def test_saved_adapter_loads_in_plain_peft(pools, family, stage, way, tmp_path, seed):
    results = pools(4).run(train_and_save, family, stage, way, str(tmp_path), seed)
    with all_experts(family):
        base = families.build(family, seed)
        before = adapted(seed, family, **SAVED[family])
    untrained = {name: value for name, value in before.named_parameters() if value.requires_grad}
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True).eval()
    found = {name: value for name, value in loaded.named_parameters() if value.requires_grad}
    for inputs, logits, trained in results:
        assert len(found) == len(trained)
        for name, value in trained.items():
            name = name.replace("shared_experts_gate", "shared_expert_gate")
            name = name.replace("shared_experts", "shared_expert")
            assert torch.equal(found[name], value), name
            assert not torch.equal(untrained[name], value), f"{name} was not trained"
        with torch.no_grad():
            again = loaded(**inputs).logits
        assert (again - logits).norm() <= 1e-4 * logits.norm()


def consolidate_trained_experts(seed: int) -> None:
    engine = engines.initialize(families.build("qwen3_moe", seed), engines.ds_config(3, 2, llep={}))
    with pytest.raises(ValueError, match="trains routed experts"):
        adapter_state_dict(engine)
    with pytest.raises(ValueError, match="exclude_frozen_parameters"):
        engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    engine.destroy()


def test_trained_experts_are_no_adapter(pools, seed):
    pools(4).run(consolidate_trained_experts, seed)

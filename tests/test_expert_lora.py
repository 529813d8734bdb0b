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
from ds_llep.lora import adapter_state_dict, adapters_kept

peft = pytest.importorskip("peft")

NAMES = {"qwen3_moe": ["gate_proj", "up_proj", "down_proj"], "mixtral": ["w1", "w2", "w3"]}
RANKS = {"mlp.experts.gate_up_proj": 2}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def build(seed: int, settings: dict) -> peft.PeftModel:
    """``trained`` in the settings: parameters of the model itself that are trained as well."""
    settings = dict(settings)
    trained = settings.pop("trained", "nothing")
    model = lora_models.adapted(seed, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith(trained):
            parameter.requires_grad_()
    return model


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
    model = build(seed, settings).to(inputs["labels"].device, dtype)
    engines.force_hf_routing(model.get_base_model(), ids)
    embeds = inputs["inputs_embeds"].detach().to(dtype).requires_grad_()
    output = model(inputs_embeds=embeds, labels=inputs["labels"])
    output.loss.backward()
    engines.average_gradients(model)
    expected = {"logits": output.logits.detach(), "input": embeds.grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (".experts." in name and ".lora_" in name):
            name = name.replace(".base_layer", "") if ".experts." in name else name
            expected |= engines.autoep_view(name, parameter.grad, ep_size)
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
    model = build(seed, settings)
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
        (2, 2, "none", {"target_parameters": BOTH, "trained": "down_proj"}, {}),
    ],
)
def test_gradients(pools, stage, ep_size, checkpointing, settings, llep, seed):
    results = pools(4).run(parity, seed, stage, ep_size, checkpointing, settings, llep)
    for rank, result in enumerate(results):
        assert not result.over, f"rank {rank}, seed {seed}: {result.over}"
        assert all(result.spilled), "a layer has lent no expert"
    for name in results[0].factors:
        assert any(result.factors[name] for result in results), f"{name} is zero on all ranks"
    kinds = {name.rpartition(".")[2] for name in results[0].factors} - {"w2"}
    assert any(name.endswith(".w2") for name in results[0].factors) == ("trained" in settings)
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


LAYER_1 = {
    "moe_layer_pattern": r"base_model\.model\.model\.layers\.1\.mlp",
    "router_pattern": "gate",
    "expert_pattern": "experts",
    "num_experts_attr": "num_experts",
    "top_k_attr": "num_experts_per_tok",
    "score_func": "softmax",
    "route_norm": True,
}
"""AutoEP leaves the other layers alone, with PEFT's wrappers."""


def train_and_save(family, stage, ep_size, way, settings, described, directory, seed):
    with lora_models.all_experts(family):
        model = lora_models.adapted(seed, family, **settings)
    config = engines.ds_config(stage, ep_size, llep={})
    config["expert_parallel"].update(described)
    engine = engines.initialize(model, config)
    before = logits_of(engine, seed)
    train(engine, seed)
    state = whole_state(engine, way)
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="adapter_state_dict"):
            model.save_pretrained(f"{directory}/incomplete")
        model.save_pretrained(directory, state_dict=state)
        assert not any("_lora_" in name for name in state), "rank 0's factors alone"
    after = logits_of(engine, seed)
    engine.destroy()
    dist.barrier()
    with lora_models.all_experts(family):
        base = families.build(family, seed)
    model = peft.PeftModel.from_pretrained(base, directory, is_trainable=True)
    engine = engines.initialize(model, config)
    again = logits_of(engine, seed)
    engine.destroy()
    return inputs_on_cpu(seed), before, after, again


@pytest.mark.parametrize(
    "family, stage, ep_size, way, settings, described",
    [
        ("qwen3_moe", 0, 4, "accelerate's", {"target_parameters": BOTH}, {}),
        ("qwen3_moe", 1, 2, "ours", {"target_parameters": BOTH}, LAYER_1),
        ("qwen3_moe", 3, 2, "trainer's", {"target_modules": NAMES["qwen3_moe"]}, {}),
        ("mixtral", 1, 2, "accelerate's", {"target_modules": NAMES["mixtral"]}, {}),
        ("deepseek_v3", 2, 2, "ours", {"target_parameters": BOTH, "rank_pattern": RANKS}, {}),
        ("gpt_oss", 3, 4, "ours", {"target_parameters": BOTH}, {}),
        (
            *("qwen2_moe", 2, 2, "ours"),
            *({"target_parameters": BOTH, "modules_to_save": ["lm_head"]}, {}),
        ),
    ],
)
def test_saved_adapter_loads_in_plain_peft(
    pools, family, stage, ep_size, way, settings, described, tmp_path, seed
):
    """Before and after training, the plain model computes the same; and an engine goes on there."""
    case = family, stage, ep_size, way, settings, described
    results = pools(4).run(train_and_save, *case, str(tmp_path), seed)
    with lora_models.all_experts(family):
        untrained = lora_models.adapted(seed, family, **settings).eval()
        base = families.build(family, seed)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    for inputs, before, after, again in results:
        assert (after - before).norm() > 1e-3 * before.norm()
        for model, logits in ((untrained, before), (loaded, after), (loaded, again)):
            with torch.no_grad():
                plain = model(**inputs).logits
            assert (plain - logits).norm() <= 1e-4 * logits.norm()


def state_of(engine) -> dict[str, torch.Tensor]:
    """This rank's parameters and optimizer state."""
    state = {name: value.detach().clone() for name, value in engine.module.named_parameters()}
    for index, values in enumerate(engine.basic_optimizer.state.values()):
        for key, value in values.items():
            if torch.is_tensor(value):
                state[f"optimizer/{index}/{key}"] = value.detach().clone()
    return state


def resumed(stage, exclude, targets, directory, seed) -> list[str]:
    """What a checkpoint does not bring back, at once or in one more step."""
    config = engines.ds_config(stage, 2, llep={})
    engine = engines.initialize(lora_models.adapted(seed, target_parameters=targets), config)
    train(engine, seed)
    engine.save_checkpoint(directory, client_state={"mine": 5}, exclude_frozen_parameters=exclude)
    saved = state_of(engine)
    train(engine, seed + 2, 1)
    after = state_of(engine)
    engine.destroy()

    model = lora_models.adapted(seed, target_parameters=targets)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + parameter.requires_grad)
    engine = engines.initialize(model, config)
    state = engine.load_checkpoint(
        directory, load_module_strict=not exclude, load_optimizer_states=False
    )[1]
    assert state["mine"] == 5 and not any("adapter" in key for key in state), state.keys()
    weights = {name: value for name, value in saved.items() if "optimizer" not in name}
    found = {name: value for name, value in state_of(engine).items() if name in weights}
    different = layers.unequal(found, weights)
    engine.load_checkpoint(directory, load_module_strict=not exclude)
    different += layers.unequal(state_of(engine), saved)
    train(engine, seed + 2, 1)
    different += layers.unequal(state_of(engine), after)
    engine.destroy()
    if not targets or torch.distributed.get_world_size() < 4:
        return different

    config = engines.ds_config(stage, 4, llep={})
    engine = engines.initialize(lora_models.adapted(seed, target_parameters=targets), config)
    with pytest.raises(ValueError, match="at EP size 4, the checkpoint has those of EP size 2"):
        engine.load_checkpoint(directory)
    engine.destroy()
    return different


@pytest.mark.parametrize(
    "stage, exclude, targets", [(0, False, BOTH), (1, True, BOTH), (2, False, BOTH), (2, False, [])]
)
def test_checkpoint(pools, stage, exclude, targets, tmp_path, seed):
    results = pools(4).run(resumed, stage, exclude, targets, str(tmp_path), seed)
    assert not any(results), results


def switched_off(stage, targets, seed) -> None:
    settings = {"target_parameters": BOTH, "target_modules": targets}
    with lora_models.all_experts("qwen3_moe"):
        model = lora_models.adapted(seed, **settings)
        plain = families.build("qwen3_moe", seed)
    engine = engines.initialize(model, engines.ds_config(stage, 2, llep={}))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapted = logits_of(engine, seed)
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        bare = logits_of(engine, seed)
    with torch.no_grad():
        expected = plain(**inputs_on_cpu(seed)).logits
    assert (bare - expected).norm() <= 1e-4 * expected.norm()
    assert (adapted - expected).norm() > 1e-2 * expected.norm()
    assert torch.equal(logits_of(engine, seed), adapted)
    assert all(parameter.requires_grad for parameter in trained)
    for method, args in (
        ("merge_and_unload", ()),
        ("merge_adapter", ()),
        ("unload", ()),
        ("load_adapter", ("somewhere", "default")),
    ):
        with pytest.raises(ValueError, match=f"{method} is not supported"):
            getattr(model, method)(*args)
    with pytest.raises(ValueError, match="adapter_state_dict"):
        engine.save_16bit_model("nowhere")
    engine.destroy()


@pytest.mark.parametrize("stage, targets", [(1, ["q_proj"]), (3, [])])
def test_disabled_and_refused_after_start(pools, stage, targets, seed):
    pools(4).run(switched_off, stage, targets, seed)


def given_parameters(kind: str, stage: int, seed: int) -> None:
    """What the caller made from the parameters before AutoEP replaced them."""
    model = lora_models.adapted(seed, target_parameters=BOTH)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = engines.ds_config(stage, 2, llep={})
    arguments = {"model": model, "config": config, "model_parameters": trained}
    if kind == "optimizer":
        del arguments["model_parameters"], config["optimizer"]
        arguments["optimizer"] = torch.optim.AdamW(trained, lr=1e-2)
    engine = engines.deepspeed.initialize(**arguments)[0]
    before = state_of(engine)
    train(engine, seed, 1)
    after = state_of(engine)
    changed = {name for name in layers.unequal({n: after[n] for n in before}, before)}
    factors = {name for name, parameter in engine.module.named_parameters() if "lora_" in name}
    assert changed == factors, changed ^ factors
    engine.destroy()


# Under ZeRO 1 and 2 DeepSpeed wants groups of experts' parameters in a given optimizer.
@pytest.mark.parametrize("kind, stage", [("list", 1), ("optimizer", 0)])
def test_factors_take_the_place_of_given_parameters(pools, kind, stage, seed):
    pools(4).run(given_parameters, kind, stage, seed)


def transposed(model) -> None:
    for layer in model.get_base_model().model.layers:
        layer.mlp.experts.get_base_layer().is_transposed = True


@pytest.mark.parametrize(
    "family, settings, change, why",
    [
        (
            "qwen3_moe",
            {},
            lambda model: model.add_adapter("other", model.peft_config["default"]),
            r"has 2 adapters \(default, other\)",
        ),
        ("qwen3_moe", {}, lambda model: model.merge_adapter(), "is merged"),
        ("qwen3_moe", {}, lambda model: model.base_model.disable_adapter_layers(), "disabled"),
        ("qwen3_moe", {}, transposed, "Qwen3MoeExperts keeps its experts in a layout"),
        ("qwen3_moe", {"bias": "all"}, None, "bias='all'"),
        (
            "gpt_oss",
            {"target_parameters": ["experts.gate_up_proj_bias"]},
            None,
            "cannot be trained under expert parallelism",
        ),
    ],
)
def test_refused(family, settings, change, why, seed):
    """Before anything is replaced, by the name of what is wrapped."""
    model = lora_models.adapted(seed, family, **{"target_parameters": BOTH, **settings})
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.experts.*{why}"):
        with adapters_kept(model, SimpleNamespace(moe_layer_pattern=None)):
            raise AssertionError("AutoEP was let loose on it")


def test_add_adapter_is_refused(seed):
    model = families.build("qwen3_moe", seed)
    model.add_adapter(peft.LoraConfig(target_parameters=BOTH))
    with pytest.raises(ValueError, match="get_peft_model"):
        with adapters_kept(model, SimpleNamespace(moe_layer_pattern=None)):
            raise AssertionError("AutoEP was let loose on it")


def refused_universal(seed: int) -> str:
    model = lora_models.adapted(seed, target_parameters=BOTH)
    names = [name for name, _ in model.named_parameters()]
    config = engines.ds_config(1, 2, llep={}, checkpoint={"load_universal": True})
    with pytest.raises(ValueError, match="checkpoint.load_universal") as error:
        engines.initialize(model, config)
    assert [name for name, _ in model.named_parameters()] == names, "wrappers are gone"
    return str(error.value)


def test_universal_checkpoints_are_refused(pools, seed):
    assert len(set(pools(4).run(refused_universal, seed))) == 1

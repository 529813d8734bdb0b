"""Whole engines under every ZeRO stage: gradients, loss curves, modes of running.

The budget is AutoEP's own error against the fp64 reference: twice that, plus 1e-6.
"""

from __future__ import annotations

from unittest import mock

import deepspeed
import deepspeed.comm as dist
import engines
import layers
import pytest
import torch
import workloads
from families import build
from transformers.modeling_outputs import CausalLMOutput

import ds_llep
from ds_llep import make_plan
from ds_llep.rates import Rates

needs_gpu_for_fp16 = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="DeepSpeed has no fp16 engine on CPU"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gradients(
    stage: int, ep_size: int, dtype: str, checkpointing: str, workload: str, seed: int, llep: dict
) -> dict:
    """On every rank: tensors over budget, and the status of the engine with llep."""
    found, statuses = [], []
    for section in (None, llep):
        model = build("qwen3_moe", seed, DTYPES[dtype])
        engines.enable_checkpointing(model, checkpointing)
        engine = engines.initialize(model, engines.ds_config(stage, ep_size, dtype, section))
        ids = engines.routing(workload, model.config, ep_size, seed)
        inputs = engines.batch(DTYPES[dtype], seed)
        found.append(engines.engine_gradients(engine, inputs, ids))
        statuses.append(ds_llep.status(engine))
        engine.destroy()
    reference = build("qwen3_moe", seed, DTYPES[dtype]).double().to(inputs["labels"].device)
    expected = engines.reference_gradients(reference, inputs, ids, ep_size)
    theirs, ours = (layers.errors(tensors, expected) for tensors in found)
    over = layers.over_budget(ours, theirs)
    return {"over": over, "theirs": theirs, "statuses": statuses}


# A covering selection: every value of every factor, and the pairs that share code or hooks.
@pytest.mark.parametrize(
    "world, ep_size, stage, dtype, checkpointing, workload",
    [
        (4, 2, 0, "fp32", "none", "one_hot_expert"),
        (4, 2, 0, "bf16", "reentrant", "hot_rank"),
        (4, 2, 1, "fp32", "non_reentrant", "per_layer"),
        (4, 2, 1, "bf16", "none", "balanced"),
        (4, 2, 2, "fp32", "reentrant", "idle_ranks"),
        (4, 2, 2, "bf16", "non_reentrant", "one_hot_expert"),
        (4, 2, 3, "fp32", "none", "per_layer"),
        (4, 2, 3, "bf16", "none", "hot_rank"),
        (4, 2, 3, "fp32", "reentrant", "one_hot_expert"),
        (4, 2, 3, "fp32", "non_reentrant", "hot_rank"),
        (4, 2, 3, "fp32", "none", "balanced"),
        (4, 4, 3, "fp32", "none", "one_hot_expert"),
        (4, 4, 3, "bf16", "reentrant", "idle_ranks"),
        (4, 4, 2, "fp32", "non_reentrant", "hot_rank"),
        (4, 4, 0, "fp32", "none", "per_layer"),
        (2, 2, 3, "fp32", "none", "one_hot_expert"),
        (2, 2, 3, "bf16", "non_reentrant", "hot_rank"),
        (2, 2, 1, "fp32", "reentrant", "per_layer"),
        pytest.param(2, 2, 2, "fp16", "none", "one_hot_expert", marks=needs_gpu_for_fp16),
    ],
)
def test_gradients(pools, world, ep_size, stage, dtype, checkpointing, workload, seed):
    pool = pools(world)
    results = pool.run(gradients, stage, ep_size, dtype, checkpointing, workload, seed, {})
    for rank, result in enumerate(results):
        assert not result["over"], f"rank {rank}, seed {seed}: {result['over']}"
        expected = {"logits", "input", "lm_head.weight", "small tensors"}
        expected |= {f"model.layers.{i}.mlp.experts.w{w}" for i in range(2) for w in (1, 2, 3)}
        assert expected <= set(result["theirs"]), result["theirs"]
        off, on = result["statuses"]
        assert off == {"active": False}
        assert on["active"] and on["layers"] == 2
        assert on["ep_size"] == min(ep_size, pool.world_size)
        assert on["ep_size"] * on["edp_size"] == pool.world_size
        if workload != "balanced":
            assert sum(on["foreign_experts"]) > 0, "nothing was spilled: the test tests nothing"


RATES = {
    "tflops": 0.001,  # so slow that nearly every move pays
    "inside_gbytes": 50.0,
    "between_gbytes": 5.0,
    "expert_us": 0.5,
    "exposed": 0.25,
    "spill_us": 2.5,
}


# Given rates, so that plans are the same in every run. On GPUs there is one node of two ranks.
@pytest.mark.parametrize(
    "ep_size, stage, dtype, checkpointing, workload, ranks_per_node",
    [
        (4, 1, "fp32", "none", "one_hot_expert", 2),
        (4, 3, "bf16", "non_reentrant", "hot_rank", 2),
        (4, 0, "fp32", "reentrant", "idle_ranks", 1),
        (2, 3, "fp32", "none", "per_layer", 1),
    ],
)
def test_gradients_with_planner_cost(
    pools, ep_size, stage, dtype, checkpointing, workload, ranks_per_node, seed
):
    pool = pools(4)
    cost = {"ranks_per_node": ranks_per_node, **RATES}
    case = stage, ep_size, dtype, checkpointing, workload, seed, {"planner": "cost", "cost": cost}
    for rank, result in enumerate(pool.run(gradients, *case)):
        assert not result["over"], f"rank {rank}, seed {seed}: {result['over']}"
        on = result["statuses"][1]
        assert on["planner"] == "cost" and on["rates"] == {**RATES, "source": "given"}
        assert on["nodes"] == [r // ranks_per_node for r in range(pool.world_size)]
        assert sum(on["spilled_tokens"]) > 0, "nothing was spilled: the test tests nothing"


def priced(stage: int, section: dict, seed: int) -> dict:
    """What a layer plans with, what is said at the start, and the status."""
    said, seen = [], []

    def plan(counts_PE, config, costs, nodes_P):
        seen.append((costs, nodes_P.tolist()))
        return make_plan(counts_PE, config, costs, nodes_P)

    with (
        mock.patch("ds_llep.active._say", said.append),
        mock.patch("ds_llep.layer.make_plan", plan),
    ):
        config = engines.ds_config(stage, 2, "bf16", section)
        engine = engines.initialize(build("qwen3_moe", seed, torch.bfloat16), config)
        engine(**engines.batch(torch.bfloat16, seed))
    model = engine.module.config
    sizes = model.hidden_size, model.moe_intermediate_size, model.num_experts_per_tok
    status = ds_llep.status(engine)
    engine.destroy()
    return {"said": said, "seen": seen, "sizes": sizes, "status": status}


@pytest.mark.parametrize("backward_weights, fetches", [("refetch", 2), ("keep", 1)])
def test_prices_of_a_layer(pools, backward_weights, fetches, seed):
    """Layers plan with the prices of their own sizes in the dtype that they run in."""
    section = {"planner": "cost", "cost": RATES, "backward_weights": backward_weights}
    for result in pools(4).run(priced, 1, section, seed):
        expected = Rates.of(RATES).costs(
            *result["sizes"], num_ranks=2, element_size=2, fetches=fetches
        )
        assert result["seen"] == [(expected, [0, 0])] * 2


def test_nodes_of_every_ep_group(pools, seed):
    """With ZeRO-3's shards a rank plans for all EP groups, each with its own nodes."""
    pool = pools(4)
    cost = {**RATES, "ranks_per_node": 3}
    section = {"planner": "cost", "cost": cost, "weight_source": "shards"}
    for result in pool.run(priced, 3, section, seed):
        nodes = [found for _, found in result["seen"]]
        assert nodes == ([[0, 0], [0, 1]] if pool.world_size == 4 else [[0, 0]]) * 2


def test_rates_measured_at_the_start(pools, tmp_path, seed):
    """Once; what is said of it names where rates and nodes are from. Nothing of it with "lla"."""
    pool = pools(4)
    path = tmp_path / "rates.json"
    section = {"planner": "cost", "cost": {"file": str(path), "ranks_per_node": 100}}
    rates = []
    for source in ("measured", f"from {path}"):
        results = pool.run(priced, 1, section, seed)
        for result in results:
            assert result["status"]["rates"]["source"].endswith(source)
            rates.append({**result["status"]["rates"], "source": None})
        (line,) = [line for line in results[0]["said"] if line.startswith("llep: rates")]
        assert f"{source}); 1 node(s) as configured" in line
        assert not any(result["said"] for result in results[1:])
    assert all(found == rates[0] for found in rates)
    for result in pool.run(priced, 1, {"planner": "lla", "kernels": "torch"}, seed):
        assert result["status"]["rates"] is None
        assert result["status"]["nodes"] == [0] * pool.world_size
        assert not any("rates" in line for line in result["said"])


class MoEBlocks(torch.nn.Module):
    """Only the MoE blocks of a model: attention cannot do without tokens, they can."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.model = model.config, torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(torch.nn.Module() for _ in model.model.layers)
        for ours, theirs in zip(self.model.layers, model.model.layers, strict=True):
            ours.mlp = theirs.mlp

    def forward(self, inputs_embeds, labels):
        x = inputs_embeds
        for layer in self.model.layers:
            x = x + layer.mlp(x)
        return CausalLMOutput(loss=x.square().sum() / 100, logits=x)


def without_tokens(stage: int, ep_size: int, seed: int) -> dict:
    """Gradients where rank 1 has no token at all, in an engine."""
    found = []
    for section in (None, {}):
        model = MoEBlocks(build("qwen3_moe", seed))
        engine = engines.initialize(model, engines.ds_config(stage, ep_size, llep=section))
        tokens = workloads.tokens_on_rank("empty_rank", engines.SEQ_LEN, dist.get_rank())
        inputs = engines.batch(torch.float32, seed, tokens)
        ids = engines.routing("one_hot_expert", model.config, ep_size, seed)
        ids = [ids_TK[:tokens] for ids_TK in ids]
        found.append(engines.engine_gradients(engine, inputs, ids))
        status = ds_llep.status(engine)
        engine.destroy()
    reference = MoEBlocks(build("qwen3_moe", seed)).double().to(inputs["labels"].device)
    expected = engines.reference_gradients(reference, inputs, ids, ep_size)
    theirs, ours = (layers.errors(tensors, expected) for tensors in found)
    over = layers.over_budget(ours, theirs)
    return {"over": over, "compared": list(ours), "spilled": sum(status["spilled_tokens"])}


@pytest.mark.parametrize("stage, ep_size", [(0, 4), (2, 2), (3, 2), (3, 4)])
def test_rank_without_tokens(pools, stage, ep_size, seed):
    for rank, result in enumerate(pools(4).run(without_tokens, stage, ep_size, seed)):
        assert not result["over"], f"rank {rank}, seed {seed}: {result['over']}"
        assert {"input", "model.layers.1.mlp.experts.w1"} <= set(result["compared"])
        assert result["spilled"] > 0


def loss_curve(stage: int, ep_size: int, seed: int, gas: int, dtype: str, steps: int = 20) -> dict:
    """Losses of AutoEP, ours and the fp64 reference over optimizer steps with clipping."""
    overrides = {"gradient_clipping": 0.5, "gradient_accumulation_steps": gas}
    curves = {}
    for name, section in (("theirs", None), ("ours", {})):
        model = build("qwen3_moe", seed, DTYPES[dtype])
        engine = engines.initialize(
            model, engines.ds_config(stage, ep_size, dtype, section, **overrides)
        )
        curves[name] = []
        for micro_step in range(steps * gas):
            ids = engines.routing("per_layer", model.config, ep_size, seed + micro_step)
            engines.set_routing(engine.module, ids)
            loss = engine(**engines.batch(DTYPES[dtype], seed + micro_step)).loss
            engine.backward(loss)
            engine.step()
            curves[name].append(engines.mean_over_ranks(loss))
        assert engine.global_steps == steps
        spilled = sum(ds_llep.status(engine).get("spilled_tokens", [])) > 0
        engine.destroy()
    curves["reference"], norms = engines.reference_curve(
        build("qwen3_moe", seed, DTYPES[dtype]).double(),
        *(DTYPES[dtype], ep_size, seed, steps, gas),
        max_norm=0.5,
    )
    clipped = max(norms) > overrides["gradient_clipping"]
    return {**curves, "clipped": clipped, "spilled": spilled}


@pytest.mark.parametrize(
    "stage, ep_size, gas, dtype",
    [
        (0, 4, 1, "fp32"),
        (1, 2, 1, "fp32"),
        (2, 2, 2, "fp32"),
        (3, 2, 2, "fp32"),
        (3, 2, 1, "bf16"),
        (1, 4, 1, "bf16"),
    ],
)
def test_loss_curves(pools, stage, ep_size, gas, dtype, seed):
    result = pools(4).run(loss_curve, stage, ep_size, seed, gas, dtype)[0]
    theirs, ours, reference = (
        torch.tensor(result[name], dtype=torch.float64) for name in ("theirs", "ours", "reference")
    )
    assert result["spilled"] and result["clipped"]
    assert reference[-4:].mean() < reference[:4].mean(), "the reference does not learn"
    error_theirs, error_ours = ((curve - reference).norm() for curve in (theirs, ours))
    assert error_ours <= 2 * error_theirs + 1e-6 * reference.norm(), (error_ours, error_theirs)


def modes(stage: int, seed: int) -> dict:
    """Evaluation, generation and training, in turn, against AutoEP with the same weights."""
    found = {}
    for name, section in (("theirs", None), ("ours", {})):
        model = build("qwen3_moe", seed)
        engine = engines.initialize(model, engines.ds_config(stage, 2, "fp32", section))
        inputs = engines.batch(torch.float32, seed)
        prompt = inputs["labels"][:, :5]
        engine.eval()
        with torch.no_grad():
            evaluated = engine(**inputs).logits
        with torch.inference_mode():
            inferred = engine(**inputs).logits
        generated = engine.module.generate(
            prompt, max_new_tokens=5, do_sample=False, synced_gpus=True, pad_token_id=0
        )
        engine.train()
        output = engine(**inputs)
        engine.backward(output.loss)
        engine.step()
        with torch.no_grad():
            after = engine(**inputs).logits
        status = ds_llep.status(engine)
        engine.destroy()
        found[name] = [
            tensor.detach().clone().cpu()
            for tensor in (evaluated, inferred, generated, output.logits, after)
        ]
    return {**found, "spilled": sum(status["spilled_tokens"])}


@pytest.mark.parametrize("stage", [2, 3])
def test_eval_generate_train(pools, stage, seed):
    for result in pools(4).run(modes, stage, seed):
        evaluated, inferred, generated, trained, after = result["ours"]
        assert torch.equal(evaluated, inferred) and torch.equal(evaluated, trained)
        assert not torch.equal(trained, after), "the step changed nothing"
        for ours, theirs in zip(result["ours"], result["theirs"], strict=True):
            assert (ours - theirs).float().norm() <= 1e-5 * theirs.float().norm()
        assert torch.equal(generated, result["theirs"][2])
        assert result["spilled"] > 0


def resume(stage: int, save_with: bool, directory: str, seed: int) -> dict:
    """Train, save, load into an engine with llep switched over, compare, train on with both."""

    def start(llep: bool):
        model = build("qwen3_moe", seed)
        return engines.initialize(model, engines.ds_config(stage, 2, "fp32", {} if llep else None))

    def train(engine, steps) -> list[float]:
        losses = []
        for step in steps:
            ids = engines.routing("per_layer", engine.module.config, 2, seed + step)
            engines.set_routing(engine.module, ids)
            loss = engine(**engines.batch(torch.float32, seed + step)).loss
            engine.backward(loss)
            engine.step()
            losses.append(engines.mean_over_ranks(loss))
        return losses

    saved = start(save_with)
    train(saved, range(3))
    saved.save_checkpoint(directory, client_state={"step": 3})
    before = engines.full_state(saved)
    loaded = start(not save_with)
    fresh = engines.full_state(loaded)
    path, client_state = loaded.load_checkpoint(directory)
    after = engines.full_state(loaded)
    result = {
        "path": path,
        "step": client_state["step"],
        "active": [ds_llep.status(engine)["active"] for engine in (saved, loaded)],
        "different": [name for name in before if not torch.equal(before[name], after[name])],
        "was_equal": all(torch.equal(before[name], fresh[name]) for name in fresh if "." in name),
        "compared": sorted(before),
        "losses": [train(engine, range(3, 6)) for engine in (saved, loaded)],
    }
    saved.destroy()
    loaded.destroy()
    return result


@pytest.mark.parametrize("save_with", [True, False], ids=["saved_on", "saved_off"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoints_switch_over(pools, stage, save_with, tmp_path, seed):
    for result in pools(4).run(resume, stage, save_with, str(tmp_path), seed):
        assert result["path"] and result["step"] == 3
        assert result["active"] == [save_with, not save_with]
        assert not result["different"], result["different"]
        assert not result["was_equal"], "the engine had the saved weights before loading"
        assert any(name.endswith("/exp_avg_sq") for name in result["compared"])
        went_on, resumed = result["losses"]
        assert went_on == pytest.approx(resumed, rel=1e-5)


def two_engines(seed: int) -> dict:
    """A trained model and a frozen reference of it, each with settings of its own."""
    trained = engines.initialize(
        build("qwen3_moe", seed), engines.ds_config(3, 2, "fp32", {"backward_weights": "keep"})
    )
    frozen_config = engines.ds_config(3, 4, "fp32", {"imbalance_threshold": 1000.0})
    del frozen_config["optimizer"]
    frozen_model = build("qwen3_moe", seed).requires_grad_(False)
    frozen = deepspeed.initialize(model=frozen_model, config=frozen_config)[0]
    off = engines.initialize(build("qwen3_moe", seed), engines.ds_config(2, 2))
    frozen.eval()
    inputs = engines.batch(torch.float32, seed)
    losses = []
    for _ in range(2):
        with torch.no_grad():
            reference = frozen(**inputs).logits
        output = trained(**inputs)
        losses.append((output.loss + 0.1 * (output.logits - reference).square().mean()).item())
        trained.backward(output.loss)
        trained.step()
    with torch.no_grad():
        unchanged = frozen(**inputs).logits
    statuses = [ds_llep.status(engine) for engine in (trained, frozen, off)]
    for engine in (trained, frozen, off):
        engine.destroy()
    return {
        "statuses": statuses,
        "losses": losses,
        "unchanged": torch.equal(reference, unchanged),
    }


def test_two_engines(pools, seed):
    pool = pools(4)
    for result in pool.run(two_engines, seed):
        trained, frozen, off = result["statuses"]
        assert trained["active"] and frozen["active"] and not off["active"]
        assert (trained["ep_size"], frozen["ep_size"]) == (2, pool.world_size)
        assert frozen["bypassed"] == [True, True] and trained["bypassed"] != [True, True]
        assert result["losses"][1] < result["losses"][0]
        assert result["unchanged"]


def frozen_parameters(stage: int, freeze: str, seed: int) -> dict:
    """Gradients where a part of the parameters is frozen, ours and AutoEP's."""
    found = []
    for section in (None, {}):
        model = build("qwen3_moe", seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(freeze not in name)
        engine = engines.initialize(model, engines.ds_config(stage, 2, "fp32", section))
        ids = engines.routing("hot_rank", model.config, 2, seed)
        found.append(engines.engine_gradients(engine, engines.batch(torch.float32, seed), ids))
        trainable = {n: p.requires_grad for n, p in engine.module.named_parameters()}
        engine.destroy()
    theirs, ours = found
    return {
        "trainable": trainable,
        "have_gradient": [name for name in ours if ours[name] is not None],
        "over": [
            name
            for name, gradient in theirs.items()
            if gradient is not None
            and not (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9
        ],
    }


# All experts frozen leaves ZeRO-2 with an empty parameter group, which DeepSpeed does not survive.
@pytest.mark.parametrize(
    "stage, freeze", [(2, ".down_proj"), (2, ".gate."), (3, ".experts."), (3, ".gate.")]
)
def test_frozen_parameters(pools, stage, freeze, seed):
    for result in pools(4).run(frozen_parameters, stage, freeze, seed):
        assert not result["over"], result["over"]
        frozen = {name for name, trainable in result["trainable"].items() if not trainable}
        assert frozen and len(frozen) < len(result["trainable"])
        assert not frozen & set(result["have_gradient"])

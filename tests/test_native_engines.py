"""Engines over DeepSpeed's own MoE layers, balanced and not: the same training, step by step.

Both engines start every step from the same checkpoint and get the same input, so that no rounding
can send a token elsewhere; between them there is rounding and nothing else.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import deepspeed
import deepspeed.comm as dist
import deepspeed.moe.layer
import engines
import layers
import natives
import pytest
import torch
from deepspeed.comm.comm import comms_logger
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.moe.utils import has_moe_layers, split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups, safe_get_full_grad
from test_moe import refused

import ds_llep

NATIVE = deepspeed.moe.layer.MoE
CLIP = 0.05  # far below the norm of the gradients


def build(ep_size: int, seed: int, kind=natives.Model, **options) -> natives.Model:
    """Two layers with other numbers of experts, one residual; ``options`` change both."""
    return kind(lambda *args, **usual: NATIVE(*args, **usual | options), layers.fit(ep_size), seed)


def start(model, stage: int, llep: dict | None, split: bool = True, **sections):
    """The engine of a model, whose MoE parameters are in groups of their own or left to it."""
    params = list(model.parameters())
    if split:
        params = split_params_into_different_moe_groups_for_optimizer(
            {"params": params, "name": "all"}
        )
    config = engines.ds_config(stage, 1, llep=llep, **sections)
    del config["expert_parallel"]
    return deepspeed.initialize(model=model, model_parameters=params, config=config)[0]


def inputs(model: natives.Model, count: int, seed: int) -> list[torch.Tensor]:
    moes = [model.residual, model.plain]
    return [natives.draw(moes, 48, torch.float32, seed + each)[0] for each in range(count)]


def step(engine, batches: list[torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Losses, gradients and their norm, then the parameters and the optimizer's state.

    Between forward and backward of every micro-batch is a forward of the others in eval mode.
    """
    found = {}
    for number, x in enumerate(batches):
        torch.manual_seed(seed + 10 * number + dist.get_rank())
        loss = engine(x)
        engine.eval()
        with torch.no_grad():
            found[f"eval {number}"] = engine(batches[number - 1][:, :20]).detach()
        engine.train()
        engine.backward(loss)
        found[f"loss {number}"] = loss.detach()
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                found[f"gradient of {name}"] = safe_get_full_grad(parameter).detach().clone()
        engine.step()
    found["norm"] = torch.tensor(float(engine.get_global_grad_norm() or 0))
    for name, parameter in engine.module.named_parameters():
        found[name] = parameter.detach().clone()
    for index, values in enumerate(engine.basic_optimizer.state.values()):
        for key, value in values.items():
            found[f"{key} {index}"] = torch.as_tensor(value).detach().clone()
    return {name: tensor.to(loss.device) for name, tensor in found.items()}


def check(
    results: list[tuple[dict[str, dict[str, float]], dict]], seed: int, spills: bool = True
) -> None:
    """Both engines did the same, and ours balanced."""
    for rank, (off, status) in enumerate(results):
        for moment, errors in off.items():
            wrong = {name: error for name, error in errors.items() if not error < 1e-4}
            assert not wrong, f"{moment}, rank {rank}, seed {seed}: {wrong}"
        assert status["active"]
        if spills:
            assert min(status["foreign_experts"]) > 0, "nothing was spilled: this tests nothing"


def train(stage: int, ep_size: int, seed: int, folder: str, **options):
    """Two micro-batches to a step, clipped gradients, and each engine's checkpoint in both."""
    sections = {"gradient_accumulation_steps": 2, "gradient_clipping": CLIP}
    split = stage == 2  # else DeepSpeed makes the groups itself
    models = [build(ep_size, seed, **options) for _ in range(2)]
    both = [
        start(model, stage, llep, split, **sections)
        for model, llep in zip(models, (None, {}), strict=True)
    ]
    theirs, ours = models
    assert has_moe_layers(ours) == has_moe_layers(theirs) == (True, natives.EXPERTS)
    assert both[1].num_experts == both[0].num_experts
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    off, foreign = {}, []
    for moment, source in enumerate((None, *both)):
        if source is not None:
            source.save_checkpoint(f"{folder}/{moment}")
            for engine in both:
                path, _ = engine.load_checkpoint(f"{folder}/{moment}")
                assert path is not None
        batches = inputs(theirs, 2, seed + moment)
        found = [step(engine, batches, seed) for engine in both]
        off[f"step {moment}"] = layers.errors(found[1], found[0])
        if stage:
            assert found[0]["norm"] > CLIP, "nothing was clipped"
        status = ds_llep.status(both[1])
        foreign.append(status["foreign_experts"])
    status["foreign_experts"] = [max(layer) for layer in zip(*foreign, strict=True)]
    for engine in both:
        engine.destroy()
    return off, status


@pytest.mark.parametrize(
    "stage, ep_size, options",
    [
        (0, 4, {}),
        (1, 1, {}),
        (1, 2, {"k": 1, "drop_tokens": True, "capacity_factor": 0.7}),
        (2, 2, {}),
        (2, 4, {"drop_tokens": True}),
    ],
    ids=str,
)
def test_training(pools, stage, ep_size, options, seed, tmp_path):
    """Expert gradients are also reduced over the ranks that hold the same experts."""
    results = pools(4).run(train, stage, ep_size, seed, str(tmp_path), **options)
    check(results, seed, spills=ep_size > 1 and not options)  # dropping may have balanced enough


def over_stages(seed: int) -> dict[str, dict[str, float]]:
    """Errors of ZeRO-1's and ZeRO-2's gradients, against those without ZeRO."""
    batches, found = None, []
    for stage in range(3):
        model = build(2, seed)
        engine = start(model, stage, {}, gradient_accumulation_steps=3)
        batches = batches or inputs(model, 3, seed)
        found.append(step(engine, batches, seed))
        engine.destroy()
    gradients = [{n: t for n, t in each.items() if "gradient of" in n} for each in found]
    return {f"ZeRO-{n}": layers.errors(gradients[n], gradients[0]) for n in (1, 2)}


def test_stages_agree(pools, seed):
    """Three micro-batches to a step, EP smaller than the world."""
    for off in pools(4).run(over_stages, seed):
        assert all(max(errors.values()) < 1e-4 for errors in off.values()), f"seed {seed}: {off}"


def in_bf16(stage: int, seed: int, **sections) -> tuple[float, float]:
    """Errors of all gradients together, ours and theirs, against an fp32 engine whose weights
    have the same values."""
    batches, found = None, []
    for llep, bf16 in ((None, False), (None, True), ({}, True)):
        model = build(2, seed).bfloat16().float()
        engine = start(model, stage, llep, **sections, bf16={"enabled": bf16})
        batches = batches or [x.bfloat16() for x in inputs(model, 1, seed)]
        dtype = torch.bfloat16 if bf16 else torch.float32
        stepped = step(engine, [x.to(dtype) for x in batches], seed)
        gradients = [t.double().flatten() for n, t in stepped.items() if "gradient of" in n]
        found.append(torch.cat(gradients))
        status = ds_llep.status(engine)
        engine.destroy()
    assert min(status["foreign_experts"]) > 0, "nothing was spilled"
    wide, theirs, ours = found
    return (ours - wide).norm().item(), (theirs - wide).norm().item()


@pytest.mark.parametrize("stage, accumulate_in", [(0, None), (1, "fp32"), (2, None)], ids=str)
def test_bf16(pools, stage, accumulate_in, seed):
    """Single tensors are held to the budget in test_moe.py; an expert with few rows has too much
    of a random draw for that where its gradients are also reduced in bf16."""
    sections = {"data_types": {"grad_accum_dtype": accumulate_in}}
    for ours, theirs in pools(4).run(in_bf16, stage, seed, **sections):
        assert ours <= 2 * theirs + 1e-6, f"seed {seed}"


def evaluate(engine, x: torch.Tensor, seed: int) -> torch.Tensor:
    engine.eval()
    torch.manual_seed(seed + dist.get_rank())  # the choice of second experts is drawn here too
    with torch.no_grad():
        return engine(x).detach()


def other_ep_size(seed: int, folder: str):
    """Losses of engines with EP 4 that have loaded only the model of engines with EP 2."""
    off = {}
    for writer, llep in (("theirs", None), ("ours", {})):
        model = build(2, seed)
        source = start(model, 1, llep)
        (x,) = inputs(model, 1, seed)
        step(source, [x], seed)
        source.save_checkpoint(f"{folder}/{writer}")
        expected = {"loss": evaluate(source, x, seed)}
        for reader, section in (("theirs", None), ("ours", {})):
            engine = start(build(4, seed + 1), 1, section)
            engine.load_checkpoint(f"{folder}/{writer}", load_module_only=True)
            found = {"loss": evaluate(engine, x, seed)}
            off[f"{reader} from {writer}"] = layers.errors(found, expected)
            status = ds_llep.status(engine)
            engine.destroy()
        source.destroy()
    return off, status


def test_checkpoint_of_another_ep_size(pools, seed, tmp_path):
    check(pools(4).run(other_ep_size, seed, str(tmp_path)), seed)


class Checkpointed(natives.Model):
    """Both layers under DeepSpeed's activation checkpointing."""

    checkpoint = staticmethod(deepspeed.checkpointing.checkpoint)

    def forward(self, x):
        def both(x):
            (y, aux, _), (z, more, _) = self.residual(x), self.plain(x)
            return y + z, aux + more

        y, aux = self.checkpoint(both, x.detach().requires_grad_())
        return self.head(torch.tanh(y)).square().mean() + aux


class NonReentrant(Checkpointed):
    checkpoint = staticmethod(deepspeed.checkpointing.non_reentrant_checkpoint)


@contextlib.contextmanager
def new_groups():
    """EP groups that DeepSpeed makes now, and not those of an earlier test."""
    names = ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(groups, name, {}))
            stack.enter_context(mock.patch.object(groups, f"{name}_RANKS", {}))
        yield
        ranks = dist.get_all_ranks_from_group(groups._get_expert_parallel_group("ep_size_2"))
        assert dist.get_world_size() < 4 or ranks[1] - ranks[0] == 2


def one_step(around, stage: int, seed: int, kind=natives.Model, compiled=False, **sections):
    """Differences after a step of each engine, both made inside of ``around()``; our status."""
    found = []
    with around():
        for llep in (None, {}):
            model = build(2, seed, kind)
            engine = start(model, stage, llep, **sections)
            if compiled and llep is not None:
                engine.compile(backend="eager")
            found.append(step(engine, inputs(model, 1, seed), seed))
            status = ds_llep.status(engine)
            engine.destroy()
    return {"one step": layers.errors(found[1], found[0])}, status


@contextlib.contextmanager
def logger_restored():
    """As before afterwards: all engines of a process share it."""
    with mock.patch.object(comms_logger, "enabled", False):
        yield


ON_CPU = {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
# What is around the engines, and what they are made with.
WAYS = {
    "reentrant": (contextlib.nullcontext, {"stage": 2, "kind": Checkpointed}),
    "non-reentrant": (contextlib.nullcontext, {"stage": 1, "kind": NonReentrant}),
    "offload, ZeRO-1": (contextlib.nullcontext, {"stage": 1, **ON_CPU}),
    "offload, ZeRO-2": (contextlib.nullcontext, {"stage": 2, **ON_CPU}),
    "data before experts": (new_groups, {"stage": 2, "use_data_before_expert_parallelism": True}),
    "communication logged": (logger_restored, {"stage": 1, "comms_logger": {"enabled": True}}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(pools, way, seed):
    around, options = WAYS[way]
    check(pools(4).run(one_step, around, seed=seed, **options), seed)


def test_compiled(pools, seed):
    """Against DeepSpeed's layers as they are: on GPUs, their own gradients change when compiled."""
    check(pools(2).run(one_step, contextlib.nullcontext, 2, seed, compiled=True), seed)


def inference(seed: int):
    model = natives.Model(ds_llep.MoE, 1, seed)
    engine = deepspeed.init_inference(model, dtype=torch.float32)
    (x,) = inputs(model, 1, seed)
    with torch.no_grad():
        return engine(x).isfinite().item(), type(model.plain.deepspeed_moe) is MOELayer


def test_inference_engine(pools, seed):
    """llep is for ``deepspeed.initialize``."""
    for finite, native in pools(2).run(inference, seed):
        assert finite and native


class ModelParallel:
    """Megatron's kind of ``mpu``: all ranks share every layer."""

    def get_model_parallel_world_size(self):
        return dist.get_world_size()

    def get_model_parallel_rank(self):
        return dist.get_rank()

    def get_model_parallel_group(self):
        return dist.get_world_group()

    def get_data_parallel_world_size(self):
        return 1

    def get_data_parallel_rank(self):
        return 0

    def get_data_parallel_group(self):
        return groups._clone_world_group()


class Stage(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = NATIVE(natives.HIDDEN, natives.mlp(), 2)

    def forward(self, x):
        return self.moe(x)[0]


def start_up(how: str) -> tuple[str, str]:
    """What ``deepspeed.initialize`` raises."""
    config, options = engines.ds_config(1, 1, llep={}), {}
    del config["expert_parallel"]
    with mock.patch.object(groups, "mpu", None):
        if how == "PipelineModule":
            model = deepspeed.pipe.PipelineModule([Stage(), Stage()], dist.get_world_size())
        else:
            model = Stage()
        if how == "mpu":
            options["mpu"] = ModelParallel()
        return refused(deepspeed.initialize, model=model, config=config, **options)


REFUSED = {
    "PipelineModule": ["is a PipelineModule", "without pipeline parallelism"],
    "mpu": ["tensor-parallel over 2 ranks", "Set that to 1"],
}


@pytest.mark.parametrize("how", REFUSED)
def test_refused_at_start_up(pools, how):
    for kind_of_error, message in pools(2).run(start_up, how):
        assert kind_of_error == "ValueError", message
        assert all(word in message for word in REFUSED[how]), message

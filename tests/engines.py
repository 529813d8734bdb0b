"""Whole DeepSpeed engines on rank processes, with and without llep, and an fp64 reference.

The reference is the unsharded Hugging Face model in fp64, run by every rank on its own tokens with
gradients averaged over the world. Routing can be fixed for all of them alike (workloads.py), so
that rounding cannot send a token elsewhere.
"""

from __future__ import annotations

import contextlib
import re
import types
from unittest import mock

import deepspeed
import deepspeed.comm as dist
import families
import torch
import workloads
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from layers import fit

from ds_llep.bench.routing import force_routing

SEQ_LEN = 24


def ds_config(
    stage: int,
    ep_size: int,
    dtype: str = "fp32",
    llep: dict | None = None,
    lr: float = 1e-2,
    zero: dict | None = None,
    **sections,
) -> dict:
    """A DeepSpeed config; ``llep=None`` leaves the section out, ``zero`` adds to ZeRO's."""
    ep_size = fit(ep_size)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1_000_000,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": lr, "torch_adam": True, "eps": 1e-4, "weight_decay": 0.01},
        },
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 10_000,
            **(zero or {}),
        },
        "expert_parallel": {"enabled": True, "autoep_size": ep_size},
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if dtype == "fp16":
        config[dtype]["initial_scale_power"] = 8
    if llep is not None:
        config["llep"] = {
            "enabled": True,
            "imbalance_threshold": 1.0,
            "min_tokens_per_gemm": 1,
            **llep,
        }
    config.update(sections)
    return config


def initialize(model: torch.nn.Module, config: dict):
    """The engine that ``deepspeed.initialize`` makes, with every parameter trained."""
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


@contextlib.contextmanager
def sizes(num_experts: int, hidden: int = 72, ffn: int = 40, num_layers: int = 2):
    """``build("qwen3_moe")`` and ``batch`` make models and inputs of these sizes."""
    usual = families.FAMILIES["qwen3_moe"]

    def config():
        changed = usual()
        # Set one by one: in a dict of the whole config an expert's number has two names.
        changed.num_experts, changed.moe_intermediate_size = num_experts, ffn
        return changed

    small = {"hidden_size": hidden, "num_hidden_layers": num_layers}
    with (
        mock.patch.dict(families.SMALL, small),
        mock.patch.dict(families.FAMILIES, qwen3_moe=config),
    ):
        yield


def moe_layers(module: torch.nn.Module) -> list[AutoEPMoELayer]:
    return [layer for layer in module.modules() if isinstance(layer, AutoEPMoELayer)]


def expert_weights(engine) -> list[torch.nn.Parameter]:
    """w1, w2, w3 of the first layer, of the second, ..."""
    experts = [layer.experts for layer in moe_layers(engine.module)]
    return [weight for module in experts for weight in (module.w1, module.w2, module.w3)]


def enable_checkpointing(model: torch.nn.Module, kind: str) -> None:
    if kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.train()


def batch(model_dtype: torch.dtype, seed: int, tokens: int = SEQ_LEN) -> dict[str, torch.Tensor]:
    """This rank's input embeddings and labels."""
    generator = torch.Generator().manual_seed(seed * 1000 + dist.get_rank())
    hidden, vocab = families.SMALL["hidden_size"], families.SMALL["vocab_size"]
    embeds = torch.randn((1, tokens, hidden), generator=generator).to(model_dtype)
    labels = torch.randint(0, vocab, (1, tokens), generator=generator)
    device = get_accelerator().current_device_name()
    return {"inputs_embeds": embeds.to(device).requires_grad_(), "labels": labels.to(device)}


def routing(workload: str, config, ep_size: int, seed: int) -> list[torch.Tensor]:
    """One ``[T, K]`` for each layer, for this rank."""
    ep_size = fit(ep_size)
    return [
        workloads.expert_ids(
            workload,
            SEQ_LEN,
            config.num_experts_per_tok,
            config.num_experts,
            ep_size,
            layer,
            seed * 1000 + 10 * layer + dist.get_rank(),
        ).to(get_accelerator().current_device_name())
        for layer in range(config.num_hidden_layers)
    ]


def force_hf_routing(model: torch.nn.Module, ids: list[torch.Tensor]) -> None:
    """:func:`~ds_llep.bench.routing.force_routing` for an unsharded Qwen3-MoE."""

    def forward(gate, hidden):
        logits = torch.nn.functional.linear(hidden, gate.weight)
        scores = torch.softmax(logits.float(), dim=-1).gather(1, gate.forced_ids)
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, scores.to(logits.dtype), gate.forced_ids

    for layer, ids_TK in zip(model.model.layers, ids, strict=True):
        layer.mlp.gate.forced_ids = ids_TK
        layer.mlp.gate.forward = types.MethodType(forward, layer.mlp.gate)


def set_routing(module: torch.nn.Module, ids: list[torch.Tensor]) -> None:
    """Fix the routing of every AutoEP layer."""
    for layer, ids_TK in zip(moe_layers(module), ids, strict=True):
        force_routing(layer, ids_TK)


def mean_over_ranks(value: torch.Tensor) -> float:
    mean = value.detach().double().clone()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def engine_gradients(engine, inputs: dict, ids: list[torch.Tensor]) -> dict:
    """Logits, input gradient and every parameter's averaged gradient of one forward, backward."""
    set_routing(engine.module, ids)
    output = engine(**inputs)
    engine.backward(output.loss)
    found = {"logits": output.logits.detach(), "input": inputs["inputs_embeds"].grad}
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        found[name] = None if gradient is None else gradient.detach().clone()
    return found


@contextlib.contextmanager
def point_to_point(engine):
    """Record what this rank sends and receives in batches of messages, and where.

    Yields ``{"isend": {key: [bytes of each message]}, "irecv": likewise, "passed": [place]}``. A
    place is an MoE layer's index and a direction; a key is a place, the size of the group, sender
    and receiver.
    """
    rank, post = dist.get_rank(), dist.batch_isend_irecv
    found = {"isend": {}, "irecv": {}, "passed": []}

    def record(operations):
        for op in operations:
            ends = (rank, op.peer) if op.op == "isend" else (op.peer, rank)
            key = (*found["passed"][-1], dist.get_world_size(group=op.group), *ends)
            found[op.op].setdefault(key, []).append(op.tensor.nbytes)
        return post(operations)

    for index, layer in enumerate(moe_layers(engine.module)):
        ahead, back = (index, "forward"), (index, "backward")
        layer.register_forward_pre_hook(lambda *_, at=ahead: found["passed"].append(at))
        layer.register_full_backward_pre_hook(lambda *_, at=back: found["passed"].append(at))
    with mock.patch.object(dist, "batch_isend_irecv", record):
        yield found


def reference_gradients(model, inputs: dict, ids: list[torch.Tensor], ep_size: int) -> dict:
    """The same from the unsharded fp64 model, with AutoEP's names and this rank's experts."""
    force_hf_routing(model, ids)
    inputs = {**inputs, "inputs_embeds": inputs["inputs_embeds"].detach().double()}
    inputs["inputs_embeds"].requires_grad_()
    output = model(**inputs)
    output.loss.backward()
    average_gradients(model)
    found = {"logits": output.logits.detach(), "input": inputs["inputs_embeds"].grad}
    for name, parameter in model.named_parameters():
        found.update(autoep_view(name, parameter.grad, ep_size))
    return found


def average_gradients(model: torch.nn.Module) -> None:
    """Mean over all ranks; a parameter that only some ranks used counts as zero on the others."""
    for parameter in model.parameters():
        used = torch.tensor(float(parameter.grad is not None), device=parameter.device)
        dist.all_reduce(used)
        if used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def autoep_view(
    name: str, tensor: torch.Tensor | None, ep_size: int, is_gpt_oss: bool = False
) -> dict:
    """An unsharded tensor under AutoEP's name, cut to the experts of this rank.

    gpt-oss' biases by themselves, as ``w1_bias`` and so on.
    """
    if tensor is None:
        return {name: None}
    if name.endswith("mlp.gate.weight"):
        return {name.replace("mlp.gate", "mlp.router.gate"): tensor}
    if ".mlp.router." in name:
        return {name.replace("mlp.router", "mlp.router.gate"): tensor}
    if ".mlp.shared_expert" in name:  # some families have them in the plural, as AutoEP does
        return {re.sub(r"\.shared_expert(_gate)?\.", r".shared_experts\1.", name): tensor}
    if ".mlp.experts." not in name:
        return {name: tensor}
    ep_size = fit(ep_size)
    per_rank = tensor.shape[0] // ep_size
    ep_rank = dist.get_rank() % ep_size
    tensor = tensor[ep_rank * per_rank : (ep_rank + 1) * per_rank]
    prefix, _, kind = name.rpartition(".")
    if is_gpt_oss:
        kind, bias, _ = kind.partition("_bias")
        wide = tensor if bias else tensor.transpose(1, 2)
        if kind == "down_proj":
            return {f"{prefix}.w2{bias}": wide}
        return {f"{prefix}.w1{bias}": wide[:, ::2], f"{prefix}.w3{bias}": wide[:, 1::2]}
    if kind == "down_proj":
        return {f"{prefix}.w2": tensor}
    half = tensor.shape[1] // 2
    return {f"{prefix}.w1": tensor[:, :half], f"{prefix}.w3": tensor[:, half:]}


def reference_curve(
    model: torch.nn.Module,
    dtype: torch.dtype,
    ep_size: int,
    seed: int,
    steps: int,
    gas: int,
    max_norm: float,
) -> tuple[list[float], list[float]]:
    """Losses by micro-step and gradient norms by step of the fp64 model, with AdamW, clipping."""
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = ds_config(0, ep_size)["optimizer"]["params"]
    del settings["torch_adam"]  # not PyTorch's own
    optimizer = torch.optim.AdamW(params, **settings)
    model.to(get_accelerator().current_device_name())
    losses, norms = [], []
    for micro_step in range(steps * gas):
        force_hf_routing(model, routing("per_layer", model.config, ep_size, seed + micro_step))
        inputs = batch(dtype, seed + micro_step)  # the values that the engines see
        loss = model(**{**inputs, "inputs_embeds": inputs["inputs_embeds"].double()}).loss
        (loss / gas).backward()
        losses.append(mean_over_ranks(loss))
        if (micro_step + 1) % gas == 0:
            average_gradients(model)
            norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm).item())
            optimizer.step()
            optimizer.zero_grad()
    return losses, norms


def full_state(engine) -> dict[str, torch.Tensor]:
    """Every fp32 parameter, whole, and this rank's part of the optimizer's state."""
    state = {}
    for name, parameter in engine.module.named_parameters():
        state[name] = safe_get_full_fp32_param(parameter).detach().clone()
    # Not state_dict(): ZeRO-3 swaps the parameters that it would look its keys up in.
    for index, values in enumerate(engine.basic_optimizer.state.values()):
        for key, value in values.items():
            if torch.is_tensor(value):
                state[f"optimizer/{index}/{key}"] = value.detach().clone()
    return state

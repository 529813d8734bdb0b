"""MoE layers to measure: AutoEP's, with a switch to llep's on the same weights.

The layers are the routed experts of a shape and their router, nothing else of a model. llep changes
the class of AutoEP's layers in place, so the bench switches by the same move, and both modes share
parameters, optimizer and memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.utils import groups

from ds_llep.activate import adopt
from ds_llep.bench.shapes import Shape
from ds_llep.biased import BiasedExperts, has_bias
from ds_llep.config import LLEPConfig
from ds_llep.experts import LLEPBiasedExperts, LLEPGroupedExperts
from ds_llep.fetch import Exchange
from ds_llep.layer import LLEPMoELayer
from ds_llep.monitor import Statistics
from ds_llep.probe import measure_rates
from ds_llep.ranks import RankTable
from ds_llep.rates import H200, Rates, find_rates

CLASSES = {  # of layers, of their experts without and with biases
    "ep": (AutoEPMoELayer, GroupedExperts, BiasedExperts),
    "llep": (LLEPMoELayer, LLEPGroupedExperts, LLEPBiasedExperts),
}


class _Block(torch.nn.Module):
    """One MoE block in the names that AutoEP's preset for Qwen3-MoE looks for."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        E, D, F = shape.num_experts, shape.hidden_size, shape.ffn_size
        self.mlp = torch.nn.Module()
        self.mlp.gate = torch.nn.Linear(D, E, bias=False, dtype=dtype, device=device)
        self.mlp.experts = torch.nn.Module()
        for name, size in (("gate_up_proj", (2 * F, D)), ("down_proj", (D, F))):
            weight = torch.randn(E, *size, dtype=dtype, device=device).mul_(size[1] ** -0.5)
            setattr(self.mlp.experts, name, torch.nn.Parameter(weight))


class Stack(torch.nn.Module):
    """MoE layers one after the other, ``[B, S, D]`` to ``[B, S, D]``; one is the bare layer.

    Weights are drawn from ``seed``, the same on every rank; AutoEP then keeps each rank's experts.
    """

    def __init__(
        self, shape: Shape, layers: int, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = torch.nn.Module()
        blocks = (_Block(shape, dtype, device) for _ in range(layers))
        self.model.layers = torch.nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.model.layers):
            if index:  # keeps the scale of activations from layer to layer
                x = torch.nn.functional.rms_norm(x, x.shape[-1:])
            x = block.mlp(x)
        return x

    @property
    def layers(self) -> list[AutoEPMoELayer]:
        return [block.mlp for block in self.model.layers]


def expert_parallel(shape: Shape, ep_size: int, dtype: torch.dtype) -> dict:
    """The DeepSpeed section that makes AutoEP take a :class:`Stack`, at its fastest options."""
    on_gpu = get_accelerator().device_name() != "cpu"
    # What torch._grouped_mm takes: rows of whole 16 bytes, and on GPUs only bf16.
    aligned = not any(size * dtype.itemsize % 16 for size in (shape.hidden_size, shape.ffn_size))
    return {
        "enabled": True,
        "autoep_size": ep_size,
        "preset_model": "qwen3_moe",
        "top_k": shape.top_k,
        "route_norm": True,
        "combine_impl": "fused_weighted_sum" if on_gpu else "auto",
        "use_grouped_mm": aligned and (dtype == torch.bfloat16 or not on_gpu),
    }


def shard(stack: Stack, section: dict, config: LLEPConfig) -> Statistics:
    """Make AutoEP take the stack's layers, and llep after it; what llep's layers will record."""
    ep_size = section["autoep_size"]
    groups._create_expert_and_data_parallel(ep_size)
    ep_group = groups._get_expert_parallel_group(f"ep_size_{ep_size}")
    auto_ep = AutoEP(stack, parse_autoep_config(section))
    auto_ep.replace_moe_layers(auto_ep.ep_parser(), ep_size, dist.get_rank(group=ep_group))
    for layer in stack.layers:
        layer.set_deepspeed_parallelism()
        layer.to(get_accelerator().current_device_name())
    named = {f"layer {index}": layer for index, layer in enumerate(stack.layers)}
    exchange, rates = make_exchange(ep_size, config, next(stack.parameters()).dtype)
    return adopt(named, config, exchange, rates=rates)


def make_exchange(ep_size: int, config: LLEPConfig, dtype: torch.dtype) -> tuple[Exchange, Rates]:
    """What llep's layers share when they move weights, and what planner "cost" reckons with.

    The EP groups exist. All ranks call: rates may be measured.
    """
    name = f"ep_size_{ep_size}"
    ep_group = groups._get_expert_parallel_group(name)
    table, rates = RankTable.of_group(ep_group), H200
    if config.planner == "cost":
        edp_group = groups._get_expert_data_parallel_group(name)
        table = RankTable.gather(ep_group, edp_group, config.cost.ranks_per_node)
        settings = config.kernels, dtype
        rates, _ = find_rates(config.cost, partial(measure_rates, table, ep_group, *settings))
        table = table.alone()
    exchange = Exchange(
        table, ep_group, sharded=False, always_ready=True, cache=config.weight_cache
    )
    return exchange, rates


def make_engine(
    model: torch.nn.Module,
    section: dict,
    config: LLEPConfig,
    dtype: torch.dtype,
    stage: int,
    **adam,
):
    """A DeepSpeed engine around a stack or a whole model: ZeRO, AdamW, AutoEP's layers and llep."""
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, **adam}},
        "zero_optimization": {"stage": stage},
        "expert_parallel": section,
        "llep": config.model_dump(mode="json"),
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
    parameters = model.parameters()
    return deepspeed.initialize(model=model, model_parameters=parameters, config=settings)[0]


def switch(layers: Iterable[AutoEPMoELayer], mode: str) -> None:
    """Let layers that llep has adopted run as AutoEP's (``"ep"``) or as llep's (``"llep"``)."""
    for layer in layers:
        layer.__class__, *experts = CLASSES[mode]
        layer.experts.__class__ = experts[has_bias(layer.experts)]


def results(stack: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of one forward and backward, by name."""
    stack.zero_grad()
    x = x.detach().requires_grad_()
    y = stack(x)
    y.backward(grad)
    found = {"output": y.detach(), "gradient of input": x.grad}
    for name, parameter in stack.named_parameters():
        name = name.removeprefix("model.layers.")
        found[f"gradient of {name}"] = parameter.grad
    return found


def variants(section: dict) -> list[dict]:
    """AutoEP's options that may or may not make it faster, as attributes of its layers."""
    plain = {"gate_up_impl": "separate", "async_split_plan": False}
    if get_accelerator().device_name() == "cpu":
        return [plain]
    choices = [plain, {**plain, "async_split_plan": True}]
    if section["use_grouped_mm"] and not get_accelerator().prefer_triton_grouped_mm():
        choices += [{**choice, "gate_up_impl": "fused"} for choice in choices]
    return choices


def set_variant(layers: Iterable[AutoEPMoELayer], variant: dict) -> None:
    """Let AutoEP's layers run with these options."""
    for layer in layers:
        layer.async_split_plan = variant["async_split_plan"]
        layer.experts.gate_up_impl = variant["gate_up_impl"]


@contextmanager
def in_dtype(module: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The module's parameters in ``dtype``; gradients made with them are gone afterwards."""
    narrow = {parameter: parameter.data for parameter in module.parameters()}
    try:
        for parameter, data in narrow.items():
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in narrow.items():
            parameter.grad = None
            parameter.data = data


@contextmanager
def widened(stack: Stack, dtype: torch.dtype) -> Iterator[None]:
    """The stack's parameters in ``dtype``, and AutoEP's plainest code, as a reference."""
    settings = [(layer, "combine_impl", "weighted_sum") for layer in stack.layers]
    for name in ("use_grouped_mm", "use_triton_grouped_mm"):
        settings += [(layer.experts, name, False) for layer in stack.layers]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        with in_dtype(stack, dtype):
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)

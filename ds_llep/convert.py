"""DeepSpeed's own MoE layers in a model: found, refused where they must be, and converted."""

from __future__ import annotations

from typing import Any

import deepspeed.moe.layer
from deepspeed.moe.experts import Experts
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch.nn import Module
from torch.nn.modules.dropout import _DropoutNd

from ds_llep.bundle import ModuleLayout, trained
from ds_llep.config import SECTION, LLEPConfig
from ds_llep.fetch import Exchange
from ds_llep.grouped_experts import can_group
from ds_llep.kernels.select import select_kernels
from ds_llep.moe import BalancedMOELayer, MoE, MoEContext
from ds_llep.monitor import Statistics
from ds_llep.rates import H200, Rates
from ds_llep.recorder import Recorder


def find_layers(model: Module) -> dict[str, deepspeed.moe.layer.MoE]:
    """DeepSpeed's MoE layers in a model, by name."""
    native = deepspeed.moe.layer.MoE
    return {name: module for name, module in model.named_modules() if isinstance(module, native)}


def status(model: Module) -> dict[str, list[bool]]:
    """What :func:`ds_llep.status` says of these layers alone; nothing where there are none."""
    contexts = [layer.deepspeed_moe.llep for layer in find_layers(model).values()]
    return {"grouped_experts": [context.grouped for context in contexts]} if contexts else {}


def check_native(ds_config: Any, config: LLEPConfig, in_pipeline: bool, tp_size: int) -> None:
    """Refuse what cannot be combined with balancing DeepSpeed's own MoE layers.

    Args:
        ds_config: the engine's parsed ``DeepSpeedConfig``.
        config: its ``"llep"`` section.
        in_pipeline: whether the model is a ``PipelineModule``.
        tp_size: ranks that share the model's other layers.

    Raises:
        ValueError: on every rank; what, and the change that resolves it.
    """
    expert_parallel = ds_config.expert_parallel_config
    obstacle = None
    if ds_config.zero_config.stage > 2:
        # DeepSpeed's own words, which come too late: it has made its groups by then.
        obstacle = (
            "native DeepSpeed MoE is not supported with ZeRO Stage 3. Use AutoEP "
            '("expert_parallel", for Hugging Face models) or choose ZeRO stage 1/2'
        )
    elif expert_parallel is not None and expert_parallel.enabled:
        obstacle = (
            'the model has such layers and "expert_parallel" is enabled, which is for Hugging '
            "Face models. Remove one of the two"
        )
    elif in_pipeline:
        obstacle = "the model is a PipelineModule. Train it without pipeline parallelism"
    elif tp_size > 1:
        obstacle = f"the model is tensor-parallel over {tp_size} ranks. Set that to 1"
    elif config.trace.enabled:
        obstacle = f'their routing cannot be recorded yet. Set "{SECTION}.trace.enabled" to false'
    if obstacle:
        raise ValueError(
            f'"{SECTION}" cannot balance the layers of deepspeed.moe.layer.MoE: {obstacle}, or set '
            f'"{SECTION}.enabled" to false.'
        )


def check_layers(layers: dict[str, deepspeed.moe.layer.MoE]) -> None:
    """Refuse layers that cannot be balanced; the same on every rank.

    Raises:
        ValueError: which layer, why not, and what to do.
    """
    sizes = {layer.ep_size for layer in layers.values()}
    if len(sizes) > 1:
        raise ValueError(
            f'"{SECTION}" needs one ep_size in all MoE layers of a model, got {sorted(sizes)}. '
            f'Give them the same, or set "{SECTION}.enabled" to false.'
        )
    for name, layer in layers.items():
        problem = _problem(layer)
        if problem:
            raise ValueError(
                f"\"{SECTION}\" cannot balance MoE layer '{name}': {problem}, or set "
                f'"{SECTION}.enabled" to false.'
            )


def _problem(layer: deepspeed.moe.layer.MoE) -> str | None:
    inner = layer.deepspeed_moe
    parts = (inner, MOELayer), (inner.gate, TopKGate), (inner.experts, Experts)
    for module, expected in parts:
        if type(module) is not expected:
            return (
                f"it has a {type(module).__name__} in the place of DeepSpeed's "
                f"{expected.__name__}. Use DeepSpeed's"
            )
    if inner.use_tutel:
        return "it dispatches with Tutel. Set use_tutel=False"
    if layer.enable_expert_tensor_parallelism:
        return "its experts are tensor-parallel. Set enable_expert_tensor_parallelism=False"
    first, *others = inner.experts.deepspeed_experts
    for name, module in first.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            return (
                f"dropout '{name}' (p={module.p}) in its experts, whose result would depend on the "
                "rank that computes it. Set its p to 0"
            )
    for other in others:
        same = ModuleLayout.of(other) == ModuleLayout.of(first)
        if not same or trained(other).keys() != trained(first).keys():
            return "its experts differ in their parameters or buffers. Make them alike"
    return None


def adopt(
    layers: dict[str, deepspeed.moe.layer.MoE],
    config: LLEPConfig,
    exchange: Exchange,
    engine: Any = None,
    recorder: Recorder | None = None,
    rates: Rates = H200,
) -> Statistics:
    """Change the class of DeepSpeed's MoE layers in place; what they will record."""
    statistics = Statistics(config.monitor, len(layers), engine, recorder)
    for index, (name, layer) in enumerate(layers.items()):
        if type(layer) is deepspeed.moe.layer.MoE:
            layer.__class__ = MoE
        inner = layer.deepspeed_moe
        inner.__class__ = BalancedMOELayer
        experts, gate = inner.experts.deepspeed_experts, inner.gate.wg.weight
        kernels = select_kernels(config.kernels, gate.device)
        grouped = can_group(experts, gate.shape[1], kernels)
        context = config, name, index, statistics, exchange, rates
        inner.llep = MoEContext(*context, grouped=grouped)
    return statistics

"""Adapters of routed experts in AutoEP's layers: each expert's factors, and PEFT's tensors of all.

An expert's factors are parameters beside its w1, w2 and w3. DeepSpeed's checkpoints know only these
three, and would save rank 0's factors for everybody's. So the adapters are saved whole, under
PEFT's names, beside what the caller saves. The price: they pass through rank 0's memory.

Shapes: ``E`` experts, ``M`` of them at home, ``r`` rank, ``I`` input size, ``O`` output size.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

from ds_llep.mlp import Scales
from ds_llep.whole import experts_to_rank_0

FACTORS = {
    "gate_up_proj": ("gate_up_lora_A", "gate_lora_B", "up_lora_B"),
    "down_proj": ("down_lora_A", "down_lora_B"),
}
"""Names of an adapter's factors among the experts' parameters, by the parameter that it adapts."""

_KEY = "llep_expert_adapters"
"""Of a checkpoint."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of one layer, as PEFT saves it."""

    parameter: str
    """What it adapts, a key of :data:`FACTORS`."""
    names: tuple[str, str]
    """PEFT's, of A ``[r * E, I]`` and B ``[O, r * E]``."""
    scale: float
    interleaved: bool
    """Gate and up alternate in B's rows instead of following each other."""

    def split(self, a: torch.Tensor, b: torch.Tensor, layer: AutoEPMoELayer) -> list[torch.Tensor]:
        """The factors of the experts at home on this rank, from PEFT's A and B.

        Returns:
            ``[M, r, I]`` and ``[M, O, r]``, of gate and up each with half of the rows.
        """
        first = layer.ep_rank * layer.num_local_experts
        home = slice(first, first + layer.num_local_experts)
        rank = len(a) // layer.num_experts
        a_MrI = a.reshape(layer.num_experts, rank, -1)[home]
        b_MOr = b.reshape(len(b), rank, layer.num_experts).permute(2, 0, 1)[home]
        b_parts = [b_MOr]
        if self.parameter == "gate_up_proj":
            parts = b_MOr.unflatten(1, (-1, 2) if self.interleaved else (2, -1))
            b_parts = parts.unbind(2 if self.interleaved else 1)
        return [part.clone(memory_format=torch.contiguous_format) for part in (a_MrI, *b_parts)]

    def join(self, a_ErI: torch.Tensor, *b_parts: torch.Tensor) -> dict[str, torch.Tensor]:
        """PEFT's tensors by name, from the factors of all experts."""
        b_EOr = b_parts[0]
        if len(b_parts) > 1:
            b_EOr = torch.stack(b_parts, dim=2 if self.interleaved else 1).flatten(1, 2)
        a, b = a_ErI.flatten(0, 1), b_EOr.permute(1, 2, 0).flatten(1)
        return dict(zip(self.names, (a, b.contiguous()), strict=True))


def hold(layer: AutoEPMoELayer, adapters: Sequence[Adapter]) -> None:
    """Tell a layer's experts what their factors belong to."""
    found = {adapter.parameter: adapter for adapter in adapters}
    experts = layer.experts
    experts.adapters = tuple(found[parameter] for parameter in FACTORS if parameter in found)
    experts.factor_names = tuple(
        name for adapter in experts.adapters for name in FACTORS[adapter.parameter]
    )
    enable(layer, True)


def enable(layer: AutoEPMoELayer, enabled: bool) -> None:
    """Let a layer's adapters count, or count for nothing."""
    scales = {adapter.parameter: adapter.scale * enabled for adapter in layer.experts.adapters}
    layer.experts.scales = Scales(*map(scales.get, FACTORS))


def adapted_layers(model: torch.nn.Module) -> Iterator[tuple[str, AutoEPMoELayer]]:
    """The layers whose experts have adapters, by name; the same on every rank."""
    for name, layer in model.named_modules():
        if isinstance(layer, AutoEPMoELayer) and getattr(layer.experts, "adapters", ()):
            yield name, layer


def factor_names(model: torch.nn.Module) -> set[str]:
    """The names of all factors among ``model``'s parameters."""
    return {
        f"{name}.experts.{factor}"
        for name, layer in adapted_layers(model)
        for factor in layer.experts.factor_names
    }


def whole_adapters(
    model: torch.nn.Module, trained_only: bool = False
) -> dict[str, torch.Tensor] | None:
    """All experts' adapters as PEFT has them. Every rank calls this.

    Args:
        model: an engine's module.
        trained_only: leave out adapters of which nothing is trained.

    Returns:
        By PEFT's names, on the CPU, on rank 0; None on the other ranks.
    """
    found = {}
    for _, layer in adapted_layers(model):
        for adapter in layer.experts.adapters:
            factors = [getattr(layer.experts, name) for name in FACTORS[adapter.parameter]]
            if trained_only and not any(factor.requires_grad for factor in factors):
                continue
            parts = []
            for factor in factors:
                with deepspeed.zero.GatheredParameters([factor]):
                    parts.append(experts_to_rank_0(factor.detach(), layer))
            if dist.get_rank() == 0:
                found |= adapter.join(*parts)
    return found if dist.get_rank() == 0 else None


def wrap_checkpoints(engine_class: type, active: Container) -> None:
    """Teach DeepSpeed's checkpoints the adapters, of which they would save rank 0's experts alone.

    They travel whole beside what the caller saves, in the file that every rank reads.

    Args:
        engine_class: ``DeepSpeedEngine``.
        active: the engines with llep; others do as before.
    """
    save, load = engine_class._save_moe_checkpoint, engine_class.load_module_state_dict

    @functools.wraps(save)
    def save_with_adapters(self, save_dir, tag, client_state={}, **kwargs):  # noqa: B006
        if any(adapted_layers(self.module)):
            adapters = whole_adapters(self.module)
            ep_size = next(adapted_layers(self.module))[1].ep_size
            client_state = {**client_state, _KEY: {"ep_size": ep_size, "adapters": adapters}}
        return save(self, save_dir, tag, client_state=client_state, **kwargs)

    @functools.wraps(load)
    def load_with_adapters(self, checkpoint, *args, **kwargs):
        saved = checkpoint.pop(_KEY, None)
        if self in active:
            module = checkpoint["module"]
            module.update(_own_factors(self.module, saved))
            # Of frozen parameters ZeRO-2 saves rank 0's beside all others, those of experts too.
            frozen = checkpoint.get(FROZEN_PARAM_FRAGMENTS) or {}
            for name in frozen.keys() & _expert_parameters(self.module) & module.keys():
                frozen[name] = module[name]
        return load(self, checkpoint, *args, **kwargs)

    engine_class._save_moe_checkpoint = save_with_adapters
    engine_class.load_module_state_dict = load_with_adapters


def _expert_parameters(model: torch.nn.Module) -> set[str]:
    return {
        f"{name}.experts.{parameter}"
        for name, layer in model.named_modules()
        if isinstance(layer, AutoEPMoELayer)
        for parameter, _ in layer.experts.named_parameters()
    }


def _own_factors(model: torch.nn.Module, saved: Any) -> dict[str, torch.Tensor]:
    """This rank's factors by their names in ``model``, from what a checkpoint holds."""
    found = {}
    for name, layer in adapted_layers(model):
        if saved is None or saved["ep_size"] != layer.ep_size:
            other = "none" if saved is None else f"those of EP size {saved['ep_size']}"
            raise ValueError(
                f"the model has adapters on routed experts at EP size {layer.ep_size}, the "
                f"checkpoint has {other}. Load it at its own EP size, or save the adapters with "
                "adapter_state_dict and model.save_pretrained and start from "
                "PeftModel.from_pretrained(model, directory, is_trainable=True)."
            )
        for adapter in layer.experts.adapters:
            missing = [key for key in adapter.names if key not in saved["adapters"]]
            if missing:
                raise ValueError(
                    f"the model has an adapter '{missing[0]}', the checkpoint has not. Make the "
                    "adapters by the LoraConfig of the run that saved it."
                )
            factors = adapter.split(*(saved["adapters"][key] for key in adapter.names), layer)
            names = (f"{name}.experts.{factor}" for factor in FACTORS[adapter.parameter])
            found |= dict(zip(names, factors, strict=True))
    return found

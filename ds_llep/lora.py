"""LoRA adapters by PEFT on models whose experts AutoEP shards: found, kept, trained and saved.

PEFT wraps a model before ``deepspeed.initialize`` and AutoEP then replaces whole MoE blocks. So
AutoEP is handed the model inside PEFT's wrapper, where layers have the names that it knows; what
the replacement would drop is refused before it starts; what it moves is saved under the old name.
DeepSpeed itself expects trained experts under ZeRO 1 and 2: without any, it is told so.

Adapters on the routed experts' own parameters are moved into the layers that AutoEP makes
(`ds_llep.expert_lora`). The trade-off: what PEFT wraps in any other way around experts is refused.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Container, Iterator
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.sharded_moe import MOELayer

from ds_llep.adapters import adapted_layers, factor_names, whole_adapters, wrap_checkpoints
from ds_llep.expert_lora import ExpertAdapters, is_expert_adapter

_INSTEAD = (
    "Adapt routed experts instead by their parameters, with "
    'target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]'
)


@contextlib.contextmanager
def adapters_kept(
    model: torch.nn.Module, expert_parallel: Any
) -> Iterator[tuple[torch.nn.Module, ExpertAdapters]]:
    """Around AutoEP's replacement of ``model``'s MoE blocks: no adapter is lost in it.

    Args:
        model: what the engine is to train, wrapped by PEFT or not.
        expert_parallel: the engine's ``"expert_parallel"`` section. A ``moe_layer_pattern`` there
            is about the names in ``model``; AutoEP's own patterns are about those without PEFT.

    Yields:
        The model to hand to AutoEP, and the routed experts' adapters, to be attached to what AutoEP
        has made of it.

    Raises:
        ValueError: before, if adapters or quantised weights are where AutoEP cannot keep them;
            after, if one has gone all the same.
    """
    inner = _without_wrapper(model)
    _check(inner)
    experts = ExpertAdapters(model, inner)
    before = {  # parameters, not their ids: that of one that is gone may be given to another
        parameter: f"{name}.{rest}"
        for name, wrapper in _wrappers(model)
        if not is_expert_adapter(name, wrapper)
        for rest, parameter in wrapper.named_parameters()
    }
    with experts.taken_off():
        yield inner if expert_parallel.moe_layer_pattern is None else model, experts
    after = {parameter: name for name, parameter in model.named_parameters()}
    lost = sorted(name for parameter, name in before.items() if parameter not in after)
    if lost:
        raise ValueError(
            f"AutoEP has replaced the modules of {len(lost)} parameter(s) of PEFT adapters, first "
            f"'{lost[0]}': they would not be trained. {_INSTEAD}."
        )
    names = {after[parameter]: name for parameter, name in before.items()}
    renamed = {new: old for new, old in names.items() if new != old}
    if not renamed and not experts.shells:
        return
    if inner is model:
        raise ValueError(
            f"AutoEP renames adapters (first: '{next(iter(renamed.values()))}'), and "
            "model.save_pretrained would save them under names that PEFT does not find again. "
            "Make them with peft.get_peft_model(model, config) instead of model.add_adapter."
        )
    save = functools.partial(_save_pretrained, renamed=renamed, shells=experts.shells)
    model.save_pretrained = types.MethodType(save, model)


def _without_wrapper(model: torch.nn.Module) -> torch.nn.Module:
    peft = sys.modules.get("peft")  # whoever wrapped the model has imported it
    return model.get_base_model() if peft and isinstance(model, peft.PeftModel) else model


def _save_pretrained(
    model: Any,
    *args: Any,
    renamed: dict[str, str],
    shells: dict[str, torch.nn.Module],
    **kwargs: Any,
) -> None:
    """PEFT's, with the names that parameters and modules had before AutoEP."""
    state = kwargs.pop("state_dict", None)
    state = model.state_dict() if state is None else state
    spread = {
        name
        for _, layer in adapted_layers(model)
        for adapter in layer.experts.adapters
        for name in adapter.names
    }
    if not spread <= state.keys():
        raise ValueError(
            "adapters on routed experts are spread over ranks, and the state to be saved lacks "
            f"'{min(spread - state.keys())}'. Call state = ds_llep.lora.adapter_state_dict(engine) "
            "on every rank, then model.save_pretrained(directory, state_dict=state) on rank 0."
        )
    state = {renamed.get(name, name): value for name, value in state.items()}
    with contextlib.ExitStack() as undo:  # PEFT saves what it finds in modules of the same name
        for parent, new, old in {_difference(*names) for names in renamed.items()}:
            children = model.get_submodule(parent)._modules
            undo.callback(children.update, dict(children))  # in the same order as before
            undo.callback(children.clear)
            children[old] = children.pop(new)
        for block, shell in shells.items():
            children = model.get_submodule(block)._modules
            undo.callback(children.update, experts=children["experts"])
            children["experts"] = shell
        type(model).save_pretrained(model, *args, state_dict=state, **kwargs)


def _difference(new: str, old: str) -> tuple[str, str, str]:
    """The module that two names have in common, and its child in each."""
    parts = new.split("."), old.split(".")
    common = os.path.commonprefix(parts)
    return ".".join(common), parts[0][len(common)], parts[1][len(common)]


def _wrappers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _check(model: torch.nn.Module) -> None:
    beside_experts = []
    for name, wrapper in _wrappers(model):
        if is_expert_adapter(name, wrapper):
            continue
        what = f"PEFT's {type(wrapper).__name__} at '{name}'"
        inside = {part for inner, _ in wrapper.named_modules() for part in inner.split(".")}
        if "experts" in inside.union(name.split(".")):
            raise ValueError(
                f"{what} adapts routed experts in a way that AutoEP cannot shard over the ranks of "
                f"an EP group. {_INSTEAD}."
            )
        parent, _, leaf = name.rpartition(".")
        # Shared experts and their gate are siblings that AutoEP takes over as they are.
        if hasattr(model.get_submodule(parent), "experts") and "shared" not in leaf:
            beside_experts.append((what, leaf))
    for what, leaf in beside_experts:
        raise ValueError(
            f"{what} adapts a router, which AutoEP replaces by its own. Leave '{leaf}' out of "
            "target_modules, target_parameters and modules_to_save."
        )
    for name, parameter in model.named_parameters():
        if "experts" in name.split(".") and parameter.dtype.itemsize == 1:
            raise ValueError(
                f"'{name}' is quantised ({parameter.dtype}); AutoEP computes with experts in "
                "fp32, bf16 or fp16. Load the model without quantising its routed experts."
            )


def trains_experts(model: torch.nn.Module, adapters: bool = False) -> bool:
    """Whether any routed expert is trained; the same on every rank.

    Args:
        model: an engine's module.
        adapters: whether it counts if adapters of an expert are trained.
    """
    return any(
        parameter.requires_grad
        and (adapters or name not in getattr(layer.experts, "factor_names", ()))
        for layer in model.modules()
        if isinstance(layer, AutoEPMoELayer | MOELayer)
        for name, parameter in layer.experts.named_parameters()
    )


def wrap_engine(engine_class: type, active: Container) -> None:
    """Teach DeepSpeed's engine what it needs to train adapters beside frozen experts.

    Args:
        engine_class: ``DeepSpeedEngine``.
        active: the engines with llep; others do as before.
    """
    for name in ("_configure_zero_optimizer", "_configure_bf16_optimizer"):
        setattr(engine_class, name, _without_frozen_groups(getattr(engine_class, name), active))
    consolidate = engine_class._zero3_consolidated_16bit_state_dict

    @functools.wraps(consolidate)
    def consolidate_adapters(self, exclude_frozen_parameters=False):
        # HF Trainer saves PEFT's adapters this way; DeepSpeed refuses it for any AutoEP model.
        if exclude_frozen_parameters and self in active and not trains_experts(self.module):
            return adapter_state_dict(self)
        return consolidate(self, exclude_frozen_parameters)

    engine_class._zero3_consolidated_16bit_state_dict = consolidate_adapters
    wrap_checkpoints(engine_class, active)


def _without_frozen_groups(configure: Callable, active: Container) -> Callable:
    """ZeRO 1 and 2 want something trained in each group of parameters, and for every MoE model a
    group of experts.
    """

    @functools.wraps(configure)
    def wrapper(self, optimizer):
        if self not in active or self.zero_optimization_stage() == 3 or optimizer is None:
            return configure(self, optimizer)
        groups = optimizer.param_groups
        groups[:] = [group for group in groups if any(p.requires_grad for p in group["params"])]
        self.has_moe_layers = trains_experts(self.module, adapters=True)
        try:
            return configure(self, optimizer)
        finally:
            self.has_moe_layers = True

    return wrapper


def adapter_state_dict(engine: Any) -> dict[str, torch.Tensor] | None:
    """All trained parameters, whole, and all buffers, for ``model.save_pretrained``.

    Every rank calls this.

    Args:
        engine: what ``deepspeed.initialize`` returned.

    Returns:
        By name, on the CPU, on rank 0; None on the other ranks.

    Raises:
        ValueError: routed experts are trained, so no rank may hold all of them.
    """
    model = engine.module
    if trains_experts(model):
        raise ValueError(
            "adapter_state_dict is for adapters beside frozen experts, and this engine trains "
            "routed experts. Use engine.save_checkpoint."
        )
    experts = factor_names(model)
    state = whole_adapters(model, trained_only=True) or {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in experts:
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    state[name] = parameter.detach().cpu().clone()
    if dist.get_rank() != 0:
        return None
    return state | {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}

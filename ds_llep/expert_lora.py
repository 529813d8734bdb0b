"""PEFT's adapters on routed experts: off their wrappers, and into the layers that AutoEP makes.

PEFT wraps the experts' parameters and keeps the adapters of all experts of a layer in two tensors.
AutoEP knows neither. So the wrappers come off before AutoEP replaces the MoE blocks, and then each
rank's experts get the factors of their own as parameters beside w1, w2 and w3: ZeRO partitions and
reduces them and helpers borrow them like those. What is saved is PEFT's again (`adapters.py`).

The trade-off: PEFT no longer finds its layers there, so what it does with them, such as merging, is
refused.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, ReplacementSourceMap
from deepspeed.moe.fused_expert_layout import classify_fused_gate_up_layout

from ds_llep.adapters import FACTORS, Adapter, adapted_layers, enable, hold
from ds_llep.shards import whole_shape

_INSIDE = ".base_layer"
"""How a name goes on from a wrapper of PEFT's to what it wraps, another one maybe."""

_MARKS = "allreduce", "group_name", "ds_zero_placement_family", "ds_zero_partition_group_name"
"""How AutoEP tells DeepSpeed which parameters are experts'."""

_UNSUPPORTED = "merge_adapter", "merge_and_unload", "unload", "delete_adapter"
"""What PEFT would do to its own layers alone."""


def is_expert_adapter(name: str, module: torch.nn.Module) -> bool:
    """Whether a module is what PEFT wraps around routed experts' own parameters."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.lora.layer import ParamWrapper

    while name.endswith(_INSIDE):
        name = name.removesuffix(_INSIDE)
    return isinstance(module, ParamWrapper) and name.split(".")[-1] == "experts"


class ExpertAdapters:
    """The adapters on a model's routed experts, from PEFT's wrappers into AutoEP's layers.

    Args:
        model: what the engine is to train.
        inner: the model inside PEFT's wrapper, ``model`` itself where there is none.

    Raises:
        ValueError: adapters that cannot be computed expert by expert.
    """

    def __init__(self, model: torch.nn.Module, inner: torch.nn.Module) -> None:
        self._model, self._inner = model, inner
        self.shells: dict[str, torch.nn.Module] = {}
        """By the names of MoE blocks in the whole model: their experts' wrappers, emptied. PEFT
        saves what belongs to wrappers that it finds."""
        self._wrapped: dict[str, torch.nn.Module] = {}
        self._adapters: dict[str, list[tuple[Adapter, list[torch.nn.Parameter]]]] = {}
        self._names: dict[str, str] = {}
        names = {module: name for name, module in model.named_modules()}
        for name, module in inner.named_modules():
            if not is_expert_adapter(name, module) or name.endswith(_INSIDE):
                continue
            if inner is model:
                raise ValueError(
                    f"PEFT's adapters at '{name}' were made by model.add_adapter. On routed "
                    "experts make them with peft.get_peft_model(model, config)."
                )
            block = name.rpartition(".")[0]
            self._names[block] = names[module].rpartition(".")[0]
            self._wrapped[block] = module
            self._adapters[block] = [
                _read(wrapper, names[wrapper], model) for wrapper in _chain(module)
            ]

    def check(self, ds_config: Any) -> None:
        """Refuse what would lose adapters.

        Args:
            ds_config: the engine's parsed ``DeepSpeedConfig``.

        Raises:
            ValueError: universal checkpoints, which do not know that each rank has its own.
        """
        if self._wrapped and ds_config.load_universal_checkpoint:
            raise ValueError(
                '"checkpoint.load_universal" is not possible with adapters on routed experts. '
                "Remove it and start from the saved adapters: "
                "PeftModel.from_pretrained(model, directory, is_trainable=True)."
            )

    @contextlib.contextmanager
    def taken_off(self) -> Iterator[None]:
        """Around AutoEP's replacement; after an error the wrappers are back."""
        for block, wrapper in self._wrapped.items():
            self._inner.get_submodule(block).experts = wrapper.get_base_layer()
        try:
            yield
        except BaseException:
            for block, wrapper in self._wrapped.items():
                self._inner.get_submodule(block).experts = wrapper
            raise

    def attach(self, replaced: ReplacementSourceMap, ds_config: Any) -> None:
        """Give the layers that AutoEP has made their experts' factors.

        Args:
            replaced: what AutoEP replaced; if it says so, for an optimizer or a list of parameters
                that exists already, it will say what the factors replace.
            ds_config: the engine's parsed ``DeepSpeedConfig``.
        """
        for block, adapters in self._adapters.items():
            layer = self._inner.get_submodule(block)
            if not isinstance(layer, AutoEPMoELayer):  # AutoEP was told to leave it alone
                layer.experts = self._wrapped[block]
                continue
            sources = {}
            for adapter, (a, b) in adapters:
                with deepspeed.zero.GatheredParameters([a, b]):
                    factors = adapter.split(a.detach(), b.detach(), layer)
                origins = a, *[b] * (len(factors) - 1)
                named = zip(FACTORS[adapter.parameter], factors, origins, strict=True)
                for name, factor, origin in named:
                    parameter = torch.nn.Parameter(factor, requires_grad=origin.requires_grad)
                    for mark in _MARKS:
                        setattr(parameter, mark, getattr(layer.experts.w1, mark))
                    layer.experts.register_parameter(name, parameter)
                    sources[id(parameter)] = [origin]
            hold(layer, [adapter for adapter, _ in adapters])
            self.shells[self._names[block]] = _emptied(self._wrapped[block])
            if replaced:
                replaced.sources.update(sources)
                replaced.discarded.update(id(p) for _, pair in adapters for p in pair)
        self._adapters.clear()  # and with them PEFT's whole tensors
        self._wrapped.clear()
        if self.shells:
            deepspeed.set_optimizer_flags(ds_config, self._model)  # as AutoEP does for its own
            _tell_peft(self._model)


def _chain(wrapper: Any) -> Iterator[Any]:
    """The wrappers around one module's parameters, outermost first."""
    while hasattr(wrapper, "base_layer"):
        yield wrapper
        wrapper = wrapper.base_layer


def _emptied(wrapper: Any) -> torch.nn.Module:
    """The wrapper and those inside it, without what they hold."""
    for link in [*_chain(wrapper)]:
        for part in (link.lora_A, link.lora_B):
            for name in part:
                part[name] = torch.nn.Linear(1, 1, bias=False, device="meta")
    link.base_layer = torch.nn.Identity()
    return wrapper


def _read(wrapper: Any, name: str, model: Any) -> tuple[Adapter, list[torch.nn.Parameter]]:
    """An adapter, and PEFT's A and B."""
    what = f"PEFT's adapter on '{wrapper.parameter_name}' at '{name}'"
    if wrapper.parameter_name not in FACTORS:
        raise ValueError(
            f"{what} cannot be trained under expert parallelism; of routed experts "
            f"{' and '.join(FACTORS)} can. Leave it out of target_parameters."
        )
    if len(wrapper.lora_A) > 1:
        raise ValueError(
            f"{what}: the model has {len(wrapper.lora_A)} adapters "
            f"({', '.join(wrapper.lora_A)}), routed experts can have one. Make or load one only."
        )
    (adapter_name,) = wrapper.lora_A
    if wrapper.merged or wrapper.disable_adapters or adapter_name not in wrapper.active_adapters:
        raise ValueError(
            f"{what} is merged, disabled or not active. Unmerge and enable it before "
            "deepspeed.initialize, or start from the model without adapters."
        )
    bias = model.peft_config[adapter_name].bias
    if bias != "none":
        raise ValueError(f"{what}: LoraConfig has bias={bias!r}. On routed experts set 'none'.")
    experts = wrapper.get_base_layer()
    shapes = [tuple(whole_shape(getattr(experts, parameter))) for parameter in FACTORS]
    layout = classify_fused_gate_up_layout(*shapes)
    if layout is None or layout.needs_transpose != getattr(experts, "is_transposed", False):
        raise ValueError(
            f"{what}: {type(experts).__name__} keeps its experts in a layout that PEFT takes for "
            "another. Leave routed experts out of the adapters."
        )
    names = tuple(f"{name}.lora_{letter}.{adapter_name}.weight" for letter in "AB")
    scale = float(wrapper.scaling[adapter_name])
    interleaved = not getattr(experts, "is_concatenated", True)
    adapter = Adapter(wrapper.parameter_name, names, scale, interleaved)
    return adapter, [wrapper.lora_A[adapter_name].weight, wrapper.lora_B[adapter_name].weight]


def _tell_peft(model: Any) -> None:
    """Make PEFT's methods mean these adapters too, or say that they cannot."""
    base, enabled = model.base_model, True

    def switch(on, original):
        nonlocal enabled
        original()
        enabled = on
        for _, layer in adapted_layers(model):
            enable(layer, on)

    @contextlib.contextmanager
    def disable_adapter():
        # PEFT's own wants to find layers, and finds none where only experts are adapted.
        were_enabled = enabled
        base.disable_adapter_layers()
        try:
            yield
        finally:
            if were_enabled:
                base.enable_adapter_layers()

    def refuse(name, *args, **kwargs):
        raise ValueError(
            f"{name} is not supported once adapters on routed experts are spread over ranks. Do "
            "that before deepspeed.initialize, or save the adapters and load them into the plain "
            "Hugging Face model."
        )

    model.disable_adapter = disable_adapter
    for on, name in ((True, "enable_adapter_layers"), (False, "disable_adapter_layers")):
        setattr(base, name, functools.partial(switch, on, getattr(base, name)))
    for owner, names in ((model, ("add_adapter", "load_adapter")), (base, _UNSUPPORTED)):
        for name in names:
            setattr(owner, name, functools.partial(refuse, name))

"""Switching it on: the only room that touches DeepSpeed's engine internals.

``register`` wraps ``DeepSpeedEngine._configure_expert_parallel``, a class attribute, so import
order does not matter and everything that calls ``deepspeed.initialize`` (Trainer, Accelerate, TRL)
is covered. After AutoEP has replaced a model's MoE blocks, ``activate`` changes the class of its
layers in place. Each engine keeps its own settings, so a trained and a frozen model can share a
process.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger
from packaging.version import Version

from ds_llep.config import SECTION, LLEPConfig
from ds_llep.experts import LLEPGroupedExperts
from ds_llep.kernels.select import select_kernels
from ds_llep.layer import LayerContext, LLEPMoELayer
from ds_llep.monitor import Statistics

SUPPORTED = {"deepspeed": ("0.19.8", "0.19.8"), "transformers": ("5.17.0", "5.22.2")}
"""First and last version of each package that this plugin was run with."""

SEAMS = (
    (DeepSpeedEngine, "_configure_expert_parallel", ("self", "model")),
    (AutoEPMoELayer, "forward", ("self", "hidden_states")),
    (AutoEPMoELayer, "_finalize_output", ("self", "output", "x", "hidden_states", "hdim")),
    (AutoEPMoELayer, "set_deepspeed_parallelism", ("self",)),
    (GroupedExperts, "forward", ("self", "x", "num_tokens_per_expert")),
)
"""What the plugin relies on in DeepSpeed: class, method, its first arguments."""

OVERRIDDEN = {
    "combine_impl": "auto",
    "async_split_plan": False,
    "gate_up_impl": "separate",
    "use_grouped_mm": True,
    "disable_triton_grouped_mm": False,
}
"""AutoEP's options about work that llep does itself, and their defaults."""

_MARK = "_ds_llep_wrapped"


@dataclass(frozen=True)
class Activation:
    """What is active on one engine."""

    config: LLEPConfig
    layers: tuple[str, ...]
    ep_size: int
    edp_size: int
    weight_source: str
    weight_source_reason: str
    statistics: Statistics


_ACTIVE: weakref.WeakKeyDictionary[DeepSpeedEngine, Activation] = weakref.WeakKeyDictionary()


def register() -> None:
    """Make DeepSpeed engines read the ``"llep"`` section. Called by ``import ds_llep``; idempotent.

    Raises:
        ValueError: an unsupported DeepSpeed.
    """
    problems = version_problems("deepspeed") + seam_problems()
    if problems:
        raise ValueError(
            f"ds_llep does not work with deepspeed {deepspeed.__version__}: {'; '.join(problems)}. "
            f"{install_hint('deepspeed')}"
        )
    original = DeepSpeedEngine._configure_expert_parallel
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def configure_expert_parallel(self, model, *args, **kwargs):
        config = LLEPConfig.from_ds_config(self._config._param_dict)
        if not config.enabled:
            return original(self, model, *args, **kwargs)
        # What can be known now is refused before AutoEP shards the model.
        check_compatible(self._config)
        resolve_weight_source(config)
        select_kernels(config.kernels, torch.device(deepspeed.get_accelerator().device_name()))
        result = original(self, model, *args, **kwargs)
        _ACTIVE[self] = activate(self, model, config)
        return result

    setattr(configure_expert_parallel, _MARK, True)
    DeepSpeedEngine._configure_expert_parallel = configure_expert_parallel


def seam_problems() -> list[str]:
    """Which of the ``SEAMS`` are missing or different; each names its ``Class.method`` first."""
    problems = []
    for owner, name, expected in SEAMS:
        method = getattr(owner, name, None)
        if method is None:
            problems.append(f"{owner.__name__}.{name} is missing")
            continue
        found = tuple(inspect.signature(method).parameters)[: len(expected)]
        if found != expected:
            problems.append(f"{owner.__name__}.{name} takes {found}, expected {expected}")
    return problems


def check_compatible(ds_config: Any) -> None:
    """Refuse what cannot be combined with ``llep``, before any group or layer is made.

    Args:
        ds_config: the engine's parsed ``DeepSpeedConfig``.

    Raises:
        ValueError: what, and the change to the JSON that resolves it.
    """
    expert_parallel = ds_config.expert_parallel_config
    if expert_parallel is None or not expert_parallel.enabled:
        raise ValueError(
            f'"{SECTION}.enabled" is true but expert parallelism is off. llep balances the layers '
            'that DeepSpeed AutoEP shards; add "expert_parallel": {"enabled": true, '
            '"autoep_size": N} to the DeepSpeed JSON, N being the ranks that share the experts, '
            f'or set "{SECTION}.enabled" to false.'
        )
    if expert_parallel.comm_backend != "comm":
        raise ValueError(
            f'"{SECTION}" cannot be combined with "expert_parallel.comm_backend": '
            f'"{expert_parallel.comm_backend}", which fixes each token\'s rank by its expert. Set '
            'it to "comm" or remove it.'
        )
    tp_size = getattr(ds_config.tensor_parallel_config, "autotp_size", 0) or 0
    if tp_size > 1 or expert_parallel.expert_tensor_parallel_size > 1:
        raise ValueError(
            f'"{SECTION}" cannot be combined with AutoTP folding (tensor_parallel.autotp_size='
            f"{tp_size}, expert_parallel.expert_tensor_parallel_size="
            f"{expert_parallel.expert_tensor_parallel_size}). Set both to 1."
        )
    problems = version_problems("transformers")
    if problems:
        raise ValueError(
            f'"{SECTION}" cannot be enabled: {problems[0]}. {install_hint("transformers")}'
        )


def activate(engine: DeepSpeedEngine, model: torch.nn.Module, config: LLEPConfig) -> Activation:
    """Change the class of every AutoEP layer of ``model`` in place.

    Raises:
        ValueError: no AutoEP layer in the model.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, AutoEPMoELayer)
    }
    if not layers:
        raise ValueError(
            f'"{SECTION}.enabled" is true but AutoEP found no MoE layer in {type(model).__name__}. '
            f'For a dense model set "{SECTION}.enabled" to false; for an MoE model that AutoEP '
            'does not know, describe its layers with "expert_parallel.moe_layer_pattern".'
        )
    weight_source, reason = resolve_weight_source(config)
    statistics = adopt(layers, config, engine)
    ep_size = next(iter(layers.values())).ep_size
    activation = Activation(
        config=config,
        layers=tuple(layers),
        ep_size=ep_size,
        edp_size=dist.get_world_size() // ep_size,
        weight_source=weight_source,
        weight_source_reason=reason,
        statistics=statistics,
    )
    if dist.get_rank() == 0:
        _say(
            f"llep: active on {len(layers)} MoE layer(s), ep_size={ep_size}, "
            f"edp_size={activation.edp_size}, planner={config.planner}, "
            f"weight_source={weight_source} ({reason})"
        )
        overridden = overridden_options(engine._config.expert_parallel_config)
        if overridden:
            _say(
                f"llep: without effect on balanced layers: {', '.join(overridden)} of "
                '"expert_parallel"; llep dispatches, computes and combines by itself'
            )
    return activation


def overridden_options(expert_parallel: Any) -> list[str]:
    """Options of the ``"expert_parallel"`` section that were set and that llep makes moot."""
    return [
        name for name, default in OVERRIDDEN.items() if getattr(expert_parallel, name) != default
    ]


def adopt(
    layers: dict[str, AutoEPMoELayer], config: LLEPConfig, engine: DeepSpeedEngine | None = None
) -> Statistics:
    """Change the class of AutoEP layers, and of their experts, in place; what they will record."""
    statistics = Statistics(config.monitor, len(layers), engine)
    for index, (name, layer) in enumerate(layers.items()):
        layer.__class__ = LLEPMoELayer
        layer.experts.__class__ = LLEPGroupedExperts
        layer.llep = LayerContext(config, name, index, statistics)
    return statistics


def resolve_weight_source(config: LLEPConfig) -> tuple[str, str]:
    """Which weight source is used, and why.

    Raises:
        ValueError: the source that the config asks for does not exist yet.
    """
    if config.weight_source == "shards":
        raise ValueError(
            f'"{SECTION}.weight_source": "shards" is not available yet: spilled weights are sent '
            'by their home rank. Set it to "owner" or "auto".'
        )
    if config.weight_source == "owner":
        return "owner", "as configured"
    return "owner", "auto: the home rank sends"


def status(engine: Any) -> dict[str, Any]:
    """What is active on an engine.

    Args:
        engine: what ``deepspeed.initialize`` returned, or ``Trainer.deepspeed``.

    Returns:
        ``{"active": False}`` where llep is off; else ``active``, ``layers``, ``layer_names``,
        ``ep_size``, ``edp_size``, ``planner``, ``weight_source``, ``weight_source_reason``,
        ``kernels``, and one list entry a layer, from this rank's EP group and last micro-batch, of
        ``load_ratio_before``, ``load_ratio_after``, ``bypassed``, ``spilled_tokens``,
        ``foreign_experts`` (of all ranks of the group together), ``capped_tokens``.

    Raises:
        ValueError: not a DeepSpeed engine.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise ValueError(
            "ds_llep.status takes the engine that deepspeed.initialize returned "
            f"(with HF Trainer: trainer.deepspeed), got {type(engine).__name__}"
        )
    activation = _ACTIVE.get(engine)
    if activation is None:
        return {"active": False}
    return {
        "active": True,
        "layers": len(activation.layers),
        "layer_names": list(activation.layers),
        "ep_size": activation.ep_size,
        "edp_size": activation.edp_size,
        "planner": activation.config.planner,
        "weight_source": activation.weight_source,
        "weight_source_reason": activation.weight_source_reason,
        "kernels": select_kernels(activation.config.kernels, torch.device(engine.device)).name,
        **activation.statistics.last(),
    }


def version_problems(package: str) -> list[str]:
    """What is wrong with the installed version of a package; empty if nothing, or if absent."""
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return []
    first, last = SUPPORTED[package]
    if Version(first) <= Version(Version(installed).base_version) <= Version(last):
        return []
    return [f"{package} {installed} is not one of the versions known to work ({first} to {last})"]


def install_hint(package: str) -> str:
    """The pip command that gets a supported version."""
    return f'Install one that is: pip install "{package}>={SUPPORTED[package][0]},' + (
        f'<={SUPPORTED[package][1]}"'
    )


def _say(line: str) -> None:
    # DeepSpeed's logger may be set to warnings only (HF Trainer does so); this line always shows.
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    else:
        print(line, flush=True)

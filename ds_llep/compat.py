"""What DeepSpeed must offer, and what cannot be combined with llep: errors at start-up."""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.runtime.engine import DeepSpeedEngine
from packaging.version import Version

from ds_llep.config import SECTION, LLEPConfig

__version__ = "0.1.0"

SUPPORTED = {"deepspeed": ("0.19.8", "0.19.8"), "transformers": ("5.17.0", "5.22.2")}
"""First and last version of each package that this plugin was run with."""

SEAMS = (
    (DeepSpeedEngine, "_configure_expert_parallel", ("self", "model")),
    (DeepSpeedEngine, "_configure_distributed_model", ("self", "model")),
    (DeepSpeedEngine, "_configure_zero_optimizer", ("self", "optimizer")),
    (DeepSpeedEngine, "_configure_bf16_optimizer", ("self", "optimizer")),
    (
        DeepSpeedEngine,
        "_zero3_consolidated_16bit_state_dict",
        ("self", "exclude_frozen_parameters"),
    ),
    (DeepSpeedEngine, "_take_model_step", ("self",)),
    (DeepSpeedEngine, "load_checkpoint", ("self", "load_dir")),
    (DeepSpeedEngine, "_save_moe_checkpoint", ("self", "save_dir", "tag", "client_state")),
    (DeepSpeedEngine, "load_module_state_dict", ("self", "checkpoint")),
    (DeepSpeedEngine, "destroy", ("self",)),
    (AutoEPMoELayer, "forward", ("self", "hidden_states")),
    (AutoEPMoELayer, "_finalize_output", ("self", "output", "x", "hidden_states", "hdim")),
    (AutoEPMoELayer, "set_deepspeed_parallelism", ("self",)),
    (GroupedExperts, "forward", ("self", "x", "num_tokens_per_expert")),
    (MOELayer, "forward", ("self", "input", "kwargs")),
    (TopKGate, "forward", ("self", "input", "used_token", "sparse_routes")),
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
            "that DeepSpeed AutoEP shards, and those of deepspeed.moe.layer.MoE (here: none); "
            'add "expert_parallel": {"enabled": true, '
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


def check_imported_in_time(config: LLEPConfig) -> None:
    """Refuse the section of an engine on which nothing is active.

    Raises:
        ValueError: it enables llep.
    """
    if config.enabled:
        raise ValueError(
            f'"{SECTION}.enabled" is true, but ds_llep was not imported yet when '
            "deepspeed.initialize made this engine, so it runs without. Import ds_llep before "
            "that, or use the module runner: deepspeed --module ds_llep.run train.py ..."
        )


def overridden_options(expert_parallel: Any) -> list[str]:
    """Options of the ``"expert_parallel"`` section that were set and that llep makes moot."""
    if expert_parallel is None:
        return []
    return [
        name for name, default in OVERRIDDEN.items() if getattr(expert_parallel, name) != default
    ]


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

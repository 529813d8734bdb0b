"""What is active on an engine, and how it is said at start-up."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from deepspeed.utils import logger

from ds_llep.compat import overridden_options
from ds_llep.config import LLEPConfig
from ds_llep.monitor import Statistics
from ds_llep.ranks import RankTable
from ds_llep.rates import Rates
from ds_llep.recorder import Recorder


@dataclass(frozen=True)
class Activation:
    """What is active on one engine."""

    config: LLEPConfig
    layers: tuple[str, ...]
    ep_size: int
    edp_size: int
    weight_source: str
    weight_source_reason: str
    nodes: tuple[int, ...]
    """By global rank."""
    rates: Rates | None
    """None where nothing is planned by prices."""
    rates_from: str | None
    statistics: Statistics


def announce(
    activation: Activation, table: RankTable, ds_config: Any, recorder: Recorder | None
) -> None:
    """Say what is active, and which settings have no effect.

    Args:
        activation: of the engine.
        table: its EP groups.
        ds_config: its parsed ``DeepSpeedConfig``.
        recorder: where a trace is recorded.
    """
    config = activation.config
    _say(
        f"llep: active on {len(activation.layers)} MoE layer(s), ep_size={activation.ep_size}, "
        f"edp_size={activation.edp_size}, planner={config.planner}, "
        f"weight_source={activation.weight_source} ({activation.weight_source_reason})"
    )
    if activation.rates is not None:
        _say(
            f"llep: rates {activation.rates} ({activation.rates_from}); "
            f"{max(activation.nodes) + 1} node(s) {table.nodes_from}"
        )
    overridden = overridden_options(ds_config.expert_parallel_config)
    if overridden:
        _say(
            f"llep: without effect on balanced layers: {', '.join(overridden)} of "
            '"expert_parallel"; llep dispatches, computes and combines by itself'
        )
    if config.monitor.enabled and not ds_config.monitor_config.enabled:
        _say(
            'llep: "llep.monitor" is enabled, but none of DeepSpeed\'s monitors is, so nothing '
            'is written; enable "tensorboard", "wandb", "csv_monitor" or "comet"'
        )
    if recorder is not None:
        _say(
            f"llep: records what the router chooses to {recorder.path}, every "
            f"{config.trace.interval} micro-batch(es), ranks 0 to {activation.ep_size - 1}"
        )


def _say(line: str) -> None:
    # DeepSpeed's logger may be set to warnings only (HF Trainer does so); this line always shows.
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    else:
        print(line, flush=True)

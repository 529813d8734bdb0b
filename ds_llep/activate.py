"""Switching it on: the only room that touches DeepSpeed's engine internals.

``register`` wraps ``DeepSpeedEngine._configure_expert_parallel``, a class attribute, so import
order does not matter and everything that calls ``deepspeed.initialize`` (Trainer, Accelerate, TRL)
is covered. After AutoEP has replaced a model's MoE blocks, ``activate`` changes the class of its
layers in place; that of DeepSpeed's own MoE layers once ``_configure_distributed_model`` has made
their groups. Each engine keeps its own settings, so a trained and a frozen model can share a
process.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch.optim.optimizer import register_optimizer_step_post_hook

from ds_llep import convert, export, gpt_oss, load
from ds_llep.active import Activation, announce
from ds_llep.biased import has_bias
from ds_llep.compat import (
    check_compatible,
    check_imported_in_time,
    install_hint,
    seam_problems,
    version_problems,
)
from ds_llep.config import SECTION, LLEPConfig
from ds_llep.experts import LLEPBiasedExperts, LLEPGroupedExperts
from ds_llep.families import check_family
from ds_llep.fetch import Exchange
from ds_llep.kernels.select import select_kernels
from ds_llep.layer import LayerContext, LLEPMoELayer
from ds_llep.lora import adapters_kept, wrap_engine
from ds_llep.monitor import Statistics
from ds_llep.probe import measure_rates
from ds_llep.ranks import RankTable, on_every_rank
from ds_llep.rates import H200, Rates, find_rates
from ds_llep.recorder import Recorder, open_recorder
from ds_llep.shards import check_weight_source, choose_weight_source, weights_changed

_MARK = "_ds_llep_wrapped"


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
    gpt_oss.register()
    original = DeepSpeedEngine._configure_expert_parallel
    if hasattr(original, _MARK):
        return
    load.register()

    @functools.wraps(original)
    def configure_expert_parallel(self, model, *args, **kwargs):
        config = LLEPConfig.from_ds_config(self._config._param_dict)
        if not config.enabled:
            return original(self, model, *args, **kwargs)
        native = convert.find_layers(model)
        # What can be known now is refused before AutoEP shards the model.
        if native:
            tp_size = max(self.autotp_size(), bwc_tensor_model_parallel_world_size(self.mpu))
            in_pipeline = isinstance(model, PipelineModule)
            convert.check_native(self._config, config, in_pipeline, tp_size)
            convert.check_layers(native)
        else:
            check_compatible(self._config)
        check_weight_source(config.weight_source, self._config.zero_config)
        device = torch.device(deepspeed.get_accelerator().device_name())
        on_every_rank(lambda: select_kernels(config.kernels, device))  # nodes may lack a compiler
        if native:  # balanced once DeepSpeed has made their groups
            return original(self, model, *args, **kwargs)
        expert_parallel = self._config.expert_parallel_config
        with adapters_kept(model, expert_parallel) as (inner, adapters):
            adapters.check(self._config)
            check_family(inner, expert_parallel)
            result = original(self, inner, *args, **kwargs)
            adapters.attach(result, self._config)
        _ACTIVE[self] = activate(self, autoep_layers(model), config)
        export.register()
        return result

    setattr(configure_expert_parallel, _MARK, True)
    DeepSpeedEngine._configure_expert_parallel = configure_expert_parallel
    make_groups = DeepSpeedEngine._configure_distributed_model

    @functools.wraps(make_groups)
    def configure_distributed_model(self, model):
        make_groups(self, model)
        config = LLEPConfig.from_ds_config(self._config._param_dict)
        if config.enabled and (native := convert.find_layers(model)):
            _ACTIVE[self] = activate(self, native, config)

    DeepSpeedEngine._configure_distributed_model = configure_distributed_model
    # What writes weights in ways that their version counters do not show. Not every optimizer of
    # DeepSpeed's steps in this process, and not every step is an engine's.
    register_optimizer_step_post_hook(weights_changed)
    for name in ("_take_model_step", "load_checkpoint"):
        setattr(DeepSpeedEngine, name, _then(getattr(DeepSpeedEngine, name), weights_changed))
    wrap_engine(DeepSpeedEngine, _ACTIVE)
    reports = (("_take_model_step", Statistics.after_step), ("destroy", Statistics.flush))
    for name, report in reports:
        setattr(DeepSpeedEngine, name, _reporting(getattr(DeepSpeedEngine, name), report))


def _then(method, follow_up):
    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        finally:
            follow_up()

    return wrapper


def _reporting(method, report):
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        activation = _ACTIVE.get(self)
        if activation is not None:
            report(activation.statistics)
        return result

    return wrapper


def autoep_layers(model: torch.nn.Module) -> dict[str, AutoEPMoELayer]:
    """The layers that AutoEP has made, by name.

    Raises:
        ValueError: there is none.
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
    return layers


def activate(
    engine: DeepSpeedEngine, layers: dict[str, torch.nn.Module], config: LLEPConfig
) -> Activation:
    """Change the class of MoE layers in place: AutoEP's, or else DeepSpeed's own."""
    first = next(iter(layers.values()))
    is_autoep = isinstance(first, AutoEPMoELayer)
    # The groups are there, but AutoEP's layers do not have theirs yet.
    group_name = first.ep_group_name if is_autoep else first.expert_group_name
    ep_group = groups._get_expert_parallel_group(group_name)
    edp_group = groups._get_expert_data_parallel_group(group_name)
    table = RankTable.gather(ep_group, edp_group, config.cost.ranks_per_node)
    zero_config = engine._config.zero_config
    weight_source, reason = choose_weight_source(config.weight_source, zero_config, table)
    if weight_source == "shards" and table.ep_size > 1:
        exchange = Exchange(
            table, ep_group, sharded=True, always_ready=True, cache=config.weight_cache
        )
    else:
        exchange = Exchange(
            table.alone(),
            ep_group,
            sharded=False,
            always_ready=zero_config.stage < 3,
            cache=config.weight_cache,
        )
    ep_size = table.ep_size
    rates = rates_from = None
    if config.planner == "cost" and ep_size > 1:  # alone, a rank has nothing to choose
        deepspeed.get_accelerator().set_device(engine.local_rank)  # as the engine does after this
        settings = config.kernels, engine.get_data_types()[0]
        measure = functools.partial(measure_rates, table, ep_group, *settings)
        rates, rates_from = find_rates(config.cost, measure)
    recorder = open_recorder(config, layers, ep_size)
    convert_in_place = adopt if is_autoep else convert.adopt
    statistics = convert_in_place(layers, config, exchange, engine, recorder, rates or H200)
    activation = Activation(
        config=config,
        layers=tuple(layers),
        ep_size=ep_size,
        edp_size=table.edp_size,
        weight_source=weight_source,
        weight_source_reason=reason,
        nodes=tuple(table.node_of[rank] for rank in range(len(table.node_of))),
        rates=rates,
        rates_from=rates_from,
        statistics=statistics,
    )
    if dist.get_rank() == 0:
        announce(activation, table, engine._config, recorder)
    return activation


def adopt(
    layers: dict[str, AutoEPMoELayer],
    config: LLEPConfig,
    exchange: Exchange,
    engine: DeepSpeedEngine | None = None,
    recorder: Recorder | None = None,
    rates: Rates = H200,
) -> Statistics:
    """Change the class of AutoEP layers, and of their experts, in place; what they will record."""
    statistics = Statistics(config.monitor, len(layers), engine, recorder)
    for index, (name, layer) in enumerate(layers.items()):
        layer.__class__ = LLEPMoELayer
        balanced = LLEPBiasedExperts if has_bias(layer.experts) else LLEPGroupedExperts
        layer.experts.__class__ = balanced
        layer.router_logits_capture_mode = "raw"  # the model's loss takes their softmax itself
        layer.llep = LayerContext(config, name, index, statistics, exchange, rates)
    return statistics


def active_on(model: torch.nn.Module) -> Activation | None:
    """What is active on the engine that trains this module, the latest one if there are several."""
    found = None
    for engine, activation in _ACTIVE.items():
        if model is engine or model is getattr(engine, "module", None):
            found = activation
    return found


def status(engine: Any) -> dict[str, Any]:
    """What is active on an engine.

    Args:
        engine: what ``deepspeed.initialize`` returned, or ``Trainer.deepspeed``.

    Returns:
        ``{"active": False}`` where llep is off; else ``active``, ``layers``, ``layer_names``,
        ``ep_size``, ``edp_size``, ``nodes`` (of each global rank), ``planner``, ``rates`` (None, or
        what planner ``"cost"`` has its prices from, and ``source``), ``weight_source``,
        ``weight_source_reason``, ``kernels``, and one list entry a layer, from this rank's EP group
        and last micro-batch, of ``load_ratio_before``, ``load_ratio_after``, ``bypassed``,
        ``spilled_tokens``, ``foreign_experts`` and ``fetched_experts`` (of all ranks of the group
        together; the latter since the layer last planned, in forward and backward, without those
        that the cache had), ``capped_tokens``; for DeepSpeed's own layers also
        ``grouped_experts``: whether a layer's experts are computed together.

    Raises:
        ValueError: not a DeepSpeed engine, or one made before ds_llep was imported to balance it.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise ValueError(
            "ds_llep.status takes the engine that deepspeed.initialize returned "
            f"(with HF Trainer: trainer.deepspeed), got {type(engine).__name__}"
        )
    activation = _ACTIVE.get(engine)
    if activation is None:
        check_imported_in_time(LLEPConfig.from_ds_config(engine._config._param_dict))
        return {"active": False}
    rates = activation.rates
    return {
        "active": True,
        "layers": len(activation.layers),
        "layer_names": list(activation.layers),
        "ep_size": activation.ep_size,
        "edp_size": activation.edp_size,
        "nodes": list(activation.nodes),
        "planner": activation.config.planner,
        "rates": rates and {**rates.in_units(), "source": activation.rates_from},
        "weight_source": activation.weight_source,
        "weight_source_reason": activation.weight_source_reason,
        "kernels": select_kernels(activation.config.kernels, torch.device(engine.device)).name,
        **activation.statistics.last(),
        **convert.status(engine.module),
    }

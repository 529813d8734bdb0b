"""A sharded engine's whole model, one decoder layer after the other, in rank 0's host memory.

What belongs where is not written down here: the model's class, built on the meta device, tells
names and shapes, and DeepSpeed's parser tells which of them AutoEP took. So all is checked before
the first tensor moves, on every rank alike. The price is that rank 0 alone receives.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

from ds_llep.layouts import Tensors, layer_to_hf
from ds_llep.load import blocks
from ds_llep.shards import whole_shape


class WholeModel:
    """An engine's model as it was before AutoEP cut it."""

    def __init__(self, engine: Any) -> None:
        self.model = getattr(engine, "module", None)
        if not isinstance(engine, deepspeed.DeepSpeedEngine) or not is_of_transformers(self.model):
            raise ValueError(
                "ds_llep.save_pretrained takes the engine that deepspeed.initialize returned (with "
                "HF Trainer: trainer.deepspeed) for a model of transformers, got "
                f"{type(engine).__name__} of {type(self.model).__name__}. Of a model that is "
                "wrapped, as by PEFT, save what the wrapper adds with the wrapper's own "
                "save_pretrained."
            )
        self._engine = engine
        self._layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, AutoEPMoELayer)
        }
        with torch.device("meta"):
            before = type(self.model)(copy.deepcopy(self.model.config))
        self._hf_shapes = {name: tensor.shape for name, tensor in _saved_tensors(before).items()}
        self._specs = {}
        if self._layers:
            config = copy.copy(engine._config.expert_parallel_config)  # which the parser fills in
            self._specs = {s.moe_module_name: s for s in AutoEP(before, config).ep_parser()}
        self._tensors = _saved_tensors(self.model)
        self._blocks = blocks(self._tensors)
        found = {k: v.shape for block in self.blocks_on_meta() for k, v in block.items()}
        if found != self._hf_shapes:
            differing = sorted(k for k, _ in found.items() ^ self._hf_shapes.items())
            raise ValueError(
                f"the engine's model is not what {type(self.model).__name__} makes of its config: "
                f"{', '.join(dict.fromkeys(differing))} differ in shape, or are only in one of the "
                "two. Bring model.config in line with the model."
            )
        _forget_quantization(self.model)

    def blocks_on_meta(self) -> Iterator[Tensors]:
        """:meth:`blocks` without values, on every rank, and without communication."""
        for names in self._blocks:
            block = {}
            for name in names:
                shape = list(whole_shape(self._tensors[name]))
                if layer := self._owner_of_expert(name):
                    shape[0] = layer.num_experts
                block[name] = torch.empty(shape, dtype=self._tensors[name].dtype, device="meta")
            yield self._to_hf(block)

    def blocks(self) -> Iterator[Tensors]:
        """One decoder layer after the other under Hugging Face's names; empty but on rank 0."""
        with _partitioned(self._engine):
            for names in self._blocks:
                experts = {name: layer for name in names if (layer := self._owner_of_expert(name))}
                block = self._replicated([name for name in names if name not in experts])
                for name, layer in experts.items():
                    # One by one: in training as much is gathered at once, and more.
                    with _gathered([self._tensors[name]]):
                        tensor = experts_to_rank_0(self._tensors[name].detach(), layer)
                    if dist.get_rank() == 0:
                        block[name] = tensor
                yield self._to_hf(block)

    def _replicated(self, names: list[str]) -> Tensors:
        tensors = {name: self._tensors[name] for name in names}
        with _gathered(tensors.values()):
            if dist.get_rank() != 0:
                return {}
            return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

    def _owner_of_expert(self, name: str) -> AutoEPMoELayer | None:
        layer, found, _ = name.rpartition(".experts.")
        return self._layers.get(layer) if found else None

    def _to_hf(self, block: Tensors) -> Tensors:
        found, by_layer = {}, {}
        for name, tensor in block.items():
            layer = next((layer for layer in self._layers if name.startswith(f"{layer}.")), None)
            if layer is None:
                found[name] = tensor
            else:
                by_layer.setdefault(layer, {})[name.removeprefix(f"{layer}.")] = tensor
        for layer, tensors in by_layer.items():
            start = f"{layer}."
            shapes = {
                name.removeprefix(start): shape
                for name, shape in self._hf_shapes.items()
                if name.startswith(start)
            }
            for name, tensor in layer_to_hf(self._specs[layer], tensors, shapes).items():
                found[f"{layer}.{name}"] = tensor
        return found


def is_of_transformers(model: Any) -> bool:
    """Whether it is a model of transformers itself, and not a wrapper around one such as PEFT's."""
    modeling = sys.modules.get("transformers.modeling_utils")  # importing it takes seconds
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _forget_quantization(model: Any) -> None:
    """Let transformers save a model that was loaded dequantized as one that never was quantized.

    It would give the weights the names that packed ones had in the checkpoint.
    """
    conversions = getattr(model, "_weight_conversions", None) or ()
    operations = [each for found in conversions for each in getattr(found, "operations", ())]
    if any(hasattr(each, "hf_quantizer") for each in operations):
        model._weight_conversions = None  # those of the model's class are found by that


def _saved_tensors(model: torch.nn.Module) -> Tensors:
    """Parameters and persistent buffers, each under the first of its names."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: own[name] for name in model.state_dict() if name in own}


def _gathered(tensors: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager:
    """Whole under ZeRO-3, as they are otherwise; all of one partition group."""
    return deepspeed.zero.GatheredParameters(list(tensors))


@contextlib.contextmanager
def _partitioned(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """What ZeRO-3 has prefetched is given up first, as when a checkpoint is saved."""
    if engine._optimizer_has_ckpt_event_prologue():
        engine.optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        if engine._optimizer_has_ckpt_event_epilogue():
            engine.optimizer.checkpoint_event_epilogue()


def experts_to_rank_0(part: torch.Tensor, layer: AutoEPMoELayer) -> torch.Tensor | None:
    """``[E, ...]`` in rank 0's host memory from ``[M, ...]`` of each rank of its EP group.

    Other EP groups hold the same and have nothing to do; None there and on all but rank 0.
    """
    group = layer.ep_group
    ranks = dist.get_all_ranks_from_group(group)
    if ranks[0] != 0:
        return None
    if dist.get_rank() != 0:
        dist.send(part.contiguous(), 0, group=group)
        return None
    whole = torch.empty((layer.num_experts, *part.shape[1:]), dtype=part.dtype)
    parts = whole.split(len(part))
    parts[0].copy_(part)
    arrived = torch.empty_like(part)
    for source, home in zip(ranks[1:], parts[1:], strict=True):
        dist.recv(arrived, source, group=group)
        home.copy_(arrived)
    return whole

"""Weights out: a sharded engine's model as a directory that plain ``from_pretrained`` reads.

Rank 0 gets one decoder layer after the other, gives the tensors the names and layouts that
transformers' own ``save_pretrained`` writes, and writes a file as soon as it is full, so the whole
model is nowhere in memory. DeepSpeed's and Accelerate's ways to a whole state dict, which leave out
experts or refuse, are mended for engines with llep; these take the whole model's size on rank 0.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.utils import logger

from ds_llep.adapters import adapted_layers
from ds_llep.layer import LLEPMoELayer
from ds_llep.layouts import Tensors
from ds_llep.lora import adapter_state_dict, trains_experts
from ds_llep.ranks import on_rank_0
from ds_llep.whole import WholeModel, is_of_transformers

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_MARK = "_ds_llep_wrapped"


def save_pretrained(
    engine: Any, directory: str | Path, max_shard_size: int | str = "5GB", tokenizer: Any = None
) -> None:
    """Write an engine's model as transformers' ``save_pretrained`` writes the unsharded one.

    Every rank calls this, between two steps. Weights have the dtype that the model computes in. For
    any ZeRO stage, with llep on or off.

    Args:
        engine: what ``deepspeed.initialize`` returned, or ``Trainer.deepspeed``.
        directory: made if it is not there; weights of an earlier model in it are replaced.
        max_shard_size: of one safetensors file, in bytes or as text such as ``"5GB"``. Rank 0 holds
            about one file and one decoder layer in host memory.
        tokenizer: saved beside the model, if given.

    Raises:
        ValueError: on every rank, if the engine's model is not one of transformers', or is not what
            its config describes, or if rank 0 cannot write.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    whole = WholeModel(engine)
    planned: Tensors = {}
    for block in whole.blocks_on_meta():
        planned |= _as_saved(whole.model, block)
    split = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    writer = _Writer(Path(directory), whole.model, split)
    _on_rank_0(writer.clear, directory)
    # Closed here and not by the garbage collector, since closing takes an exchange.
    with contextlib.closing(whole.blocks()) as gathered:
        for block in gathered:
            _on_rank_0(functools.partial(writer.add, block), directory)
    _on_rank_0(functools.partial(writer.finish, tokenizer), directory)


def whole_state_dict(engine: Any) -> Tensors | None:
    """The whole model under Hugging Face's names, in rank 0's host memory; None on other ranks.

    Every rank calls this. It takes the whole model's size; :func:`save_pretrained` does not.

    Raises:
        ValueError: as :func:`save_pretrained`.
    """
    found: Tensors = {}
    with contextlib.closing(WholeModel(engine).blocks()) as gathered:
        for block in gathered:
            found |= block
    return found if dist.get_rank() == 0 else None


def register() -> None:
    """Mend ``engine.save_16bit_model`` and what Trainer saves, for engines with llep.

    Called whenever llep becomes active on an engine, by when Accelerate has been imported if it is
    used; idempotent.
    """
    _wrap(deepspeed.DeepSpeedEngine, "save_16bit_model", _save_16bit_model)
    _wrap(deepspeed.DeepSpeedEngine, "_zero3_consolidated_16bit_state_dict", _consolidate)
    if "accelerate.accelerator" in sys.modules:
        _wrap(sys.modules["accelerate.accelerator"].Accelerator, "get_state_dict", _get_state_dict)


def _wrap(owner: type, name: str, ours: Callable) -> None:
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapper(self, *args, **kwargs):
        return ours(original, self, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    setattr(owner, name, wrapper)


def _is_ours(engine: Any) -> bool:
    model = getattr(engine, "module", None)
    return is_of_transformers(model) and any(
        isinstance(layer, LLEPMoELayer) for layer in model.modules()
    )


def _save_16bit_model(
    original, engine, save_dir, save_filename="pytorch_model.bin", exclude_frozen_parameters=False
) -> bool:
    zero3 = engine.zero_optimization_partition_weights()
    if any(adapted_layers(engine.module)):
        raise ValueError(
            "save_16bit_model would save rank 0's part of the adapters on routed experts. Use "
            "ds_llep.lora.adapter_state_dict(engine) and model.save_pretrained."
        )
    if not _is_ours(engine):
        return original(engine, save_dir, save_filename, exclude_frozen_parameters)
    if zero3 and not engine.zero_gather_16bit_weights_on_model_save():
        logger.warning(
            f"did not save {save_filename}: set zero_optimization."
            "stage3_gather_16bit_weights_on_model_save to true, or use ds_llep.save_pretrained"
        )
        return False
    state_dict = _consolidate(None, engine, exclude_frozen_parameters)
    directory = Path(save_dir)

    def write():
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(state_dict, directory / save_filename)

    _on_rank_0(write, save_dir)
    return True


def _consolidate(original, engine, exclude_frozen_parameters=False) -> Tensors | None:
    if not _is_ours(engine):
        return original(engine, exclude_frozen_parameters)
    if exclude_frozen_parameters:
        if not trains_experts(engine.module):
            return adapter_state_dict(engine)
        raise ValueError(
            "exclude_frozen_parameters=True is not supported where routed experts are trained. "
            "Leave it out: the whole model is saved."
        )
    return whole_state_dict(engine)


def _get_state_dict(original, accelerator, model, unwrap=True) -> Tensors | None:
    # Under ZeRO-3 Accelerate asks the engine; otherwise it takes each rank's own experts for all.
    if not getattr(model, "zero_optimization_partition_weights", lambda: True)():
        if _is_ours(model):
            return whole_state_dict(model)
        if any(adapted_layers(model)):
            return adapter_state_dict(model)
    return original(accelerator, model, unwrap)


class _Writer:
    """Rank 0's files: each is written when all of its tensors are there."""

    def __init__(self, directory: Path, model: Any, split: Any) -> None:
        self._directory = directory
        self._model = model
        self._split = split
        self._files = dict(split.filename_to_tensors)
        self._waiting: Tensors = {}

    def clear(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        stale = [*self._directory.glob("model-?????-of-?????.safetensors")]
        for path in [*stale, self._directory / WEIGHTS, self._directory / INDEX]:
            path.unlink(missing_ok=True)

    def add(self, block: Tensors) -> None:
        from safetensors.torch import save_file

        self._waiting |= _as_saved(self._model, block)
        full = [file for file, names in self._files.items() if self._waiting.keys() >= set(names)]
        for file in full:
            ready = {name: self._waiting.pop(name) for name in self._files.pop(file)}
            ready = {name: tensor.contiguous() for name, tensor in ready.items()}
            save_file(ready, self._directory / file, metadata={"format": "pt"})

    def finish(self, tokenizer: Any) -> None:
        assert not self._waiting and not self._files, "not every tensor was written"
        if self._split.is_sharded:
            index = {
                "metadata": self._split.metadata,
                "weight_map": self._split.tensor_to_filename,
            }
            (self._directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        model = self._model
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = str(model.dtype).removeprefix("torch.")
        config.save_pretrained(self._directory)
        if model.can_generate():
            model.generation_config.save_pretrained(self._directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(self._directory)


def _as_saved(model: Any, block: Tensors) -> Tensors:
    """In the checkpoint's names and layouts, where those are not the model's."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, block)


def _on_rank_0(work: Callable[[], None], directory: str | Path) -> None:
    """Rank 0's error becomes an error on every rank."""
    _, failure = on_rank_0(work)
    if failure is not None:
        raise ValueError(
            f"rank 0 cannot save the model to {str(directory)!r} ({': '.join(failure)}). Name a "
            "directory that rank 0 may write to and that has room for the whole model. What is "
            "there now is not complete."
        )

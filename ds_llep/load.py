"""Weights in: ``from_pretrained`` under ZeRO-3 reads a checkpoint one decoder layer at a time.

Under a ZeRO-3 config transformers builds a model partitioned, but before it copies the first weight
into it, every rank fuses the experts of the whole checkpoint in its own host memory. Here the same
code of transformers gets the checkpoint in blocks, so that no rank holds more than one of them. The
price is a hook on a private function of transformers, whose versions ``compat`` bounds; without
``"llep": {"enabled": true}`` in the config nothing changes.
"""

from __future__ import annotations

import collections
import functools
import re
import sys
from collections.abc import Callable, Iterable

from deepspeed.runtime.zero.partition_parameters import Init

from ds_llep.config import LLEPConfig

_MARK = "_ds_llep_wrapped"
_LOADER = "_load_state_dict_into_zero3_model"


def register() -> None:
    """Make ``from_pretrained`` stream under ZeRO-3. Called by ``import ds_llep``; idempotent."""
    if hasattr(Init.__init__, _MARK):
        return
    original = Init.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        # from_pretrained comes by here before it loads. Nothing imports transformers earlier, which
        # takes seconds, for those who do not use it.
        modeling = sys.modules.get("transformers.modeling_utils")
        load = getattr(modeling, _LOADER, None)
        if load is not None and not hasattr(load, _MARK):
            setattr(modeling, _LOADER, _in_blocks(load))
        original(self, *args, **kwargs)

    setattr(init, _MARK, True)
    Init.__init__ = init


def blocks(names: Iterable[str]) -> list[list[str]]:
    """Names of weights by decoder layer, in the order in which they first occur.

    A layer is all that comes before the first number in a name, and the number. Names without one,
    such as embeddings, are one block together.
    """
    found = collections.defaultdict(list)
    for name in names:
        layer = re.match(r"(.*?\.)?\d+\.", name)
        found[layer and layer.group()].append(name)
    return list(found.values())


def _in_blocks(load: Callable) -> Callable:
    """transformers' loader for ZeRO-3, called once for each block of the checkpoint."""

    @functools.wraps(load)
    def wrapper(model, state_dict, load_config=None):
        from transformers.integrations import deepspeed_config

        if not LLEPConfig.from_ds_config(deepspeed_config() or {}).enabled:
            return load(model, state_dict, load_config)
        errors, missing = [], set(model.state_dict())
        for names in blocks(state_dict):
            block = collections.OrderedDict((name, state_dict[name]) for name in names)
            block._metadata = getattr(state_dict, "_metadata", None)
            messages, still_missing = load(model, block, load_config)
            errors += messages
            missing &= still_missing
        # Saving reverts these. Of all that might apply, keep what did, as without ZeRO-3: a prefix
        # that the files did not have is else added to them.
        used = [each for each in model._weight_conversions or () if each.was_used()]
        model._weight_conversions = used
        return errors, missing

    setattr(wrapper, _MARK, True)
    return wrapper

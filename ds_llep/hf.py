"""The statistics in HF Trainer's logs.

``Trainer(callbacks=[LLEPCallback()])`` puts them into ``trainer.state.log_history`` and what is
printed. Reporters (TensorBoard, W&B, ...) have then seen the entry already, since the Trainer calls
its callbacks in turn and its own come first; ``LLEPCallback.attach(trainer)`` goes before them.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from ds_llep.activate import active_on
from ds_llep.monitor import Window

_TRAINING = {"loss", "train_loss"}
"""Keys that tell the Trainer's training entries, the last of which has only the second."""


class LLEPCallback(TrainerCallback):
    """Adds ``llep/...`` to each training entry: values since the entry before, this EP group's."""

    def __init__(self) -> None:
        self._window: Window | None = None

    @classmethod
    def attach(cls, trainer: Trainer) -> LLEPCallback:
        """Put the callback before all others, so that the Trainer's reporters see its values.

        Args:
            trainer: one that may have such a callback already; it is moved, then.

        Returns:
            The callback.
        """
        callback = trainer.pop_callback(cls) or cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to collect.

        Raises:
            ValueError: llep is not active on the Trainer's engine.
        """
        activation = active_on(kwargs["model"])
        if activation is None:
            raise ValueError(
                "LLEPCallback: llep is not active on this Trainer's model. Give TrainingArguments "
                'a DeepSpeed JSON with "expert_parallel" and "llep": {"enabled": true}, and import '
                "ds_llep before trainer.train(), or remove the callback."
            )
        self._window = activation.statistics.open_window()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Add the values to the entry that is being logged; not where it is one of evaluation."""
        if self._window is None or not _TRAINING & logs.keys():
            return
        values = {f"llep/{name}": value for name, value in self._window.take().items()}
        logs.update(values)
        state.log_history[-1].update(values)  # it holds a copy of the entry

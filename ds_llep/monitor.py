"""What the plans did: for ``ds_llep.status``, DeepSpeed's monitor, HF Trainer's logs and the trace.

Everything here is already on the host, brought there by the plan, so nothing synchronises. Values
are those of this rank's EP group. A forward pass that activation checkpointing runs again, during
the backward pass, is no new micro-batch: of what it does, only what it fetches counts.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch

from ds_llep.config import MonitorConfig
from ds_llep.plan import Plan
from ds_llep.recorder import Recorder


class Window:
    """The training micro-batches since one reader last took their values."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: Counter[str] = Counter()
        self._max_before = self._max_after = 0.0

    def begin(self) -> None:
        """A training micro-batch begins."""
        self._sums["micro_batches"] += 1

    def add(self, plan: Plan) -> None:
        """A layer's plan in that micro-batch."""
        before, after = plan.load_ratio_before, plan.load_ratio_after
        self._max_before = max(self._max_before, before)
        self._max_after = max(self._max_after, after)
        self._sums.update(
            plans=1,
            before=before,
            after=after,
            tokens=int(plan.rank_load_P.sum()),
            spilled=sum(spill.tokens for spill in plan.spills),
            capped=plan.capped_tokens,
            foreign_experts=len(plan.spills),
            capped_layers=plan.capped_tokens > 0,
            bypassed_layers=plan.bypassed,
        )

    def add_fetched(self, experts: int, nbytes: int) -> None:
        """Experts that were sent, in forward or backward, and their bytes together."""
        self._sums.update(fetched_experts=experts, fetched_bytes=nbytes)

    def take(self) -> dict[str, float]:
        """The values since the last call, see docs/monitoring.md; empty if nothing was trained."""
        sums, plans = self._sums, self._sums["plans"]
        if not plans:
            return {}
        tokens = max(sums["tokens"], 1)
        values = {
            "load_ratio_before_max": self._max_before,
            "load_ratio_before_mean": sums["before"] / plans,
            "load_ratio_after_max": self._max_after,
            "load_ratio_after_mean": sums["after"] / plans,
            "spilled_token_share": sums["spilled"] / tokens,
            "capped_token_share": sums["capped"] / tokens,
        }
        per_micro_batch = (
            *("foreign_experts", "fetched_experts", "fetched_bytes"),
            *("capped_layers", "bypassed_layers"),
        )
        values |= {name: sums[name] / sums["micro_batches"] for name in per_micro_batch}
        self._clear()
        return values


class Statistics:
    """What one engine's layers report, and who reads it; without an engine, nothing is written.

    Args:
        config: the ``"monitor"`` section.
        num_layers: MoE layers of the engine.
        engine: a DeepSpeed engine; not kept alive from here.
        recorder: of the trace; None on all ranks but global rank 0, and where none was asked for.
    """

    def __init__(
        self,
        config: MonitorConfig,
        num_layers: int,
        engine: Any = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._engine = (lambda: None) if engine is None else weakref.ref(engine)
        self._interval = config.interval
        self._plans: list[Plan | None] = [None] * num_layers
        self._fetched = [0] * num_layers
        self._recorder = recorder
        if recorder is not None and engine is not None:
            weakref.finalize(engine, recorder.flush)  # also at the interpreter's exit
        self._windows: weakref.WeakSet[Window] = weakref.WeakSet()
        self._monitored = self.open_window() if config.enabled else None
        self._ran: set[int] = set()  # layers of the micro-batch at hand
        self._mode: tuple[int, bool] | None = None  # its step, and whether it trains

    def open_window(self) -> Window:
        """A window for a reader of its own; it is filled as long as the reader holds it."""
        window = Window()
        self._windows.add(window)
        return window

    def record(self, index: int, plan: Plan, training: bool, dtype: torch.dtype) -> None:
        """A layer has planned. A layer that ran before in a micro-batch begins the next one.

        Args:
            index: of the layer in its engine.
            plan: of this rank's EP group.
            training: whether the layer is in training mode.
            dtype: what the experts compute in.
        """
        # Autograd's graph task is the backward pass that this thread is in, -1 outside of one.
        if torch._C._current_graph_task_id() != -1:
            return
        engine = self._engine()
        mode = (0 if engine is None else engine.global_steps), training
        windows = list(self._windows) if training else ()
        if index in self._ran or mode != self._mode:
            self._ran, self._mode = set(), mode
            for window in windows:
                window.begin()
            if self._recorder is not None:
                self._recorder.begin(*mode, str(dtype).removeprefix("torch."))
        self._ran.add(index)
        for window in windows:
            window.add(plan)
        if self._recorder is not None:
            self._recorder.add(index, plan.counts_PE)
        self._plans[index] = plan
        self._fetched[index] = 0

    def count_fetched(self, index: int, training: bool, experts: int, nbytes: int) -> None:
        """Add experts that were sent for a layer, in forward or backward, and their bytes."""
        self._fetched[index] += experts
        if training:
            for window in list(self._windows):
                window.add_fetched(experts, nbytes)

    def last(self) -> dict[str, list]:
        """One list entry for each layer that has run, from its last micro-batch."""
        ran = [index for index, plan in enumerate(self._plans) if plan is not None]
        plans = [self._plans[index] for index in ran]
        return {
            "load_ratio_before": [plan.load_ratio_before for plan in plans],
            "load_ratio_after": [plan.load_ratio_after for plan in plans],
            "bypassed": [plan.bypassed for plan in plans],
            "spilled_tokens": [sum(spill.tokens for spill in plan.spills) for plan in plans],
            "foreign_experts": [len(plan.spills) for plan in plans],
            "fetched_experts": [self._fetched[index] for index in ran],
            "capped_tokens": [plan.capped_tokens for plan in plans],
        }

    def after_step(self) -> None:
        """After an optimizer step: write to DeepSpeed's monitor if it is time to."""
        engine = self._engine()
        if self._monitored is None or engine.global_steps % self._interval:
            return
        values = self._monitored.take()
        if engine.monitor.enabled:
            engine.monitor.write_events(
                [
                    (f"Train/llep/{name}", value, engine.global_samples)
                    for name, value in values.items()
                ]
            )

    def flush(self) -> None:
        """Write what of the trace is not in its file yet."""
        if self._recorder is not None:
            self._recorder.flush()

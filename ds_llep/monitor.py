"""What the plans did, for ``ds_llep.status`` and for DeepSpeed's monitor.

Everything here is already on the host, brought there by the plan, so nothing synchronises. Values
are those of this rank's EP group in the last micro-batch.
"""

from __future__ import annotations

import weakref
from typing import Any

from ds_llep.config import MonitorConfig
from ds_llep.plan import Plan


class Statistics:
    """The last plan of every layer of one engine; without an engine, nothing is written."""

    def __init__(self, config: MonitorConfig, num_layers: int, engine: Any = None) -> None:
        self._engine = (lambda: None) if engine is None else weakref.ref(engine)
        self._config = config
        self._plans: list[Plan | None] = [None] * num_layers
        self._fetched = [0] * num_layers
        self._written_step = 0

    def record(self, index: int, plan: Plan) -> None:
        """Remember a layer's plan; on the first one after an interval, write the step before."""
        self._write_if_due()
        self._plans[index] = plan
        self._fetched[index] = 0

    def count_fetched(self, index: int, experts: int) -> None:
        """Add experts that were sent for a layer since its plan was recorded."""
        self._fetched[index] += experts

    def last(self) -> dict[str, list]:
        """One list entry for each layer that has run."""
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

    def _write_if_due(self) -> None:
        engine = self._engine()
        if engine is None or not self._config.enabled or not engine.monitor.enabled:
            return
        step = engine.global_steps
        if step - self._written_step < self._config.interval or None in self._plans:
            return
        self._written_step = step
        last = self.last()
        tokens = sum(int(plan.rank_load_P.sum()) for plan in self._plans)
        scalars = {
            "load_ratio_before_max": max(last["load_ratio_before"]),
            "load_ratio_after_max": max(last["load_ratio_after"]),
            "spilled_token_share": sum(last["spilled_tokens"]) / max(tokens, 1),
            "foreign_experts": sum(last["foreign_experts"]),
            "fetched_experts": sum(last["fetched_experts"]),
            "capped_token_share": sum(last["capped_tokens"]) / max(tokens, 1),
            "bypassed_layers": sum(last["bypassed"]),
        }
        engine.monitor.write_events(
            [
                (f"Train/llep/{name}", value, engine.global_samples)
                for name, value in scalars.items()
            ]
        )

"""A whole model's first steps, trained as AutoEP's and as llep's from the same weights.

Rounding differs between the two, and every step builds on the last one's: losses agree as far as
two runs of one mode on other kernels would. So no bound is set here, and the largest difference is
shown instead; that single steps are right is what the other command checks before it takes times.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from unittest import mock

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from ds_llep import fetch
from ds_llep.bench import output
from ds_llep.bench.fine_tuning import FineTuning, ModelSettings
from ds_llep.bench.measure import WARM_UPS, allocator_peaks, milliseconds, reset_allocator
from ds_llep.bench.stack import switch
from ds_llep.workspace import Workspace

LEARNING_RATE = 1e-4


def train(settings: ModelSettings, device: torch.device, steps: int) -> Iterator[list[dict]]:
    """Each workload's records as soon as there are, of ``"ep"`` and of ``"llep"``.

    All ranks call. Every step trains on the same tokens, and is routed anew.
    """
    for workload in settings.workloads:
        yield [_train(settings, device, steps, workload, mode) for mode in ("ep", "llep")]


def _train(
    settings: ModelSettings, device: torch.device, steps: int, workload: str, mode: str
) -> dict:
    gc.collect()  # what an engine before held is in cycles, and there may be no room for two
    get_accelerator().empty_cache()
    fine_tuning = FineTuning(settings, device, LEARNING_RATE)
    batch, losses = fine_tuning.batch(workload), []
    switch(fine_tuning.layers, mode)
    reset_allocator()
    with mock.patch.object(fetch, "WORKSPACE", Workspace()):
        warm_ups = min(WARM_UPS, steps - 1)
        step_ms = milliseconds(
            lambda: losses.append(fine_tuning.step()),
            *(steps - warm_ups, partial(fine_tuning.prepare, batch), warm_ups),
        )
        peaks = allocator_peaks()
    fine_tuning.engine.destroy()
    mean_losses = torch.stack(losses).double()
    dist.all_reduce(mean_losses)
    tokens = dist.get_world_size() * settings.shape.tokens
    return {
        "kind": "losses",
        **fine_tuning.describe(workload, mode),
        "learning_rate": LEARNING_RATE,
        "losses": (mean_losses / dist.get_world_size()).tolist(),
        "step_ms": step_ms,
        "tokens_per_second": 1e3 * tokens / step_ms,
        **peaks,
    }


def show(title: str, records: list[dict]) -> None:
    """The losses of some steps, side by side, and the largest difference of all; speed, peaks."""
    columns = ["workload", "loss at step", "AutoEP", "llep", "difference"]
    rows = []
    for ep, llep in zip(records[::2], records[1::2], strict=True):
        pairs = list(zip(ep["losses"], llep["losses"], strict=True))
        shown = {0, len(pairs) // 4, len(pairs) // 2, 3 * len(pairs) // 4, len(pairs) - 1}
        lines = [(str(step + 1), *pairs[step]) for step in sorted(shown)]
        worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        for step, first, second in (*lines, ("largest difference", *worst)):
            numbers = f"{first:.5f}", f"{second:.5f}", f"{second - first:+.1e}"
            rows.append([ep["workload"], step, *numbers])
        speeds = ep["tokens_per_second"], llep["tokens_per_second"]
        change = f"{speeds[1] / speeds[0] - 1:+.1%}"
        rows.append(["", "tokens/s", *(output.number(speed, 0) for speed in speeds), change])
        peaks = ep["peak_allocated_bytes"], llep["peak_allocated_bytes"]
        rows.append(["", "allocated GB", *map(output.gigabytes, peaks), ""])
    output.table(title, columns, rows)

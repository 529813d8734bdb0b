"""Predictions beside what ``ds-llep bench`` has measured."""

from __future__ import annotations

import dataclasses
import statistics

from ds_llep.bench import output
from ds_llep.bench.machine import DTYPES
from ds_llep.bench.micro_batches import from_workload
from ds_llep.bench.results import read
from ds_llep.bench.shapes import Shape
from ds_llep.bench.step import System, step_cost
from ds_llep.config import LLEPConfig

_SIZES = tuple(field.name for field in dataclasses.fields(Shape))


def against(path: str, system: System) -> int:
    """Print measured and predicted times, and how far off the predictions are.

    Raises:
        ValueError: a line that is no result of ds-llep bench.
        OSError: the file cannot be read.
    """
    rows, errors = [], []
    for result in read(path):
        if result.dtype not in DTYPES:
            raise ValueError(f"{path}: dtype {result.dtype!r} is not modelled")
        ranks = result.ep_size
        shape = Shape(**{name: getattr(result, name) for name in _SIZES})
        config = LLEPConfig(**(result.llep or {}))
        mode = "llep" if result.mode == "llep" else "ep"
        costs = [
            step_cost(
                mode,
                from_workload(result.workload, shape, ranks, result.layers, 0, result.seed, first),
                config,
                dataclasses.replace(system, dtype=result.dtype),
            )
            for first in range(0, result.ranks, ranks)
        ]
        predicted = {
            "forward_ms": max(cost.forward for cost in costs),
            "forward_backward_ms": max(cost.seconds for cost in costs),
        }
        row = [result.shape or "-", result.workload, result.mode, f"{ranks}"]
        for name, value in predicted.items():
            measured = getattr(result, name)
            if measured is None:
                row += ["-", f"{1e3 * value:.2f}", "-"]
                continue
            errors.append(1e3 * value / measured - 1)
            row += [f"{measured:.2f}", f"{1e3 * value:.2f}", f"{errors[-1]:+.1%}"]
        rows.append(row)
    if not errors:
        raise ValueError(f"{path} has no forward or forward+backward times")
    columns = ["shape", "workload", "mode", "EP"]
    for part in ("forward", "fwd+bwd"):
        columns += [f"{part} ms", "predicted", "error"]
    output.table(f"{path}: measured, and predicted by machine {system.machine.name}", columns, rows)
    off = [abs(error) for error in errors]
    print(f"absolute error: median {statistics.median(off):.1%}, worst {max(off):.1%}")
    return 0

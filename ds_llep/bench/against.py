"""Predictions beside what ``ds-llep bench`` has measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator

from ds_llep.bench import output
from ds_llep.bench.machine import DTYPES
from ds_llep.bench.micro_batches import from_workload
from ds_llep.bench.shapes import Shape
from ds_llep.bench.step import System, step_cost
from ds_llep.config import LLEPConfig

_SIZES = tuple(field.name for field in dataclasses.fields(Shape))
_NEEDED = (
    *_SIZES,
    *("layers", "ranks", "ep_size", "dtype", "workload", "mode", "seed"),
    *("forward_ms", "forward_backward_ms"),
)


def against(path: str, system: System) -> int:
    """Print measured and predicted times, and how far off the predictions are.

    Raises:
        ValueError: a line that is no result of ds-llep bench.
        OSError: the file cannot be read.
    """
    rows, errors = [], []
    for record in _results(path):
        ranks, layers = record["ep_size"], record["layers"]
        shape = Shape(**{name: record[name] for name in _SIZES})
        config = LLEPConfig(**(record.get("llep") or {}))
        mode = "llep" if record["mode"] == "llep" else "ep"
        costs = [
            step_cost(
                mode,
                from_workload(record["workload"], shape, ranks, layers, 0, record["seed"], first),
                config,
                dataclasses.replace(system, dtype=record["dtype"]),
            )
            for first in range(0, record["ranks"], ranks)
        ]
        predicted = {
            "forward_ms": max(cost.forward for cost in costs),
            "forward_backward_ms": max(cost.seconds for cost in costs),
        }
        row = [record.get("shape") or "-", record["workload"], record["mode"], f"{ranks}"]
        for name, value in predicted.items():
            if record[name] is None:
                row += ["-", f"{1e3 * value:.2f}", "-"]
                continue
            errors.append(1e3 * value / record[name] - 1)
            row += [f"{record[name]:.2f}", f"{1e3 * value:.2f}", f"{errors[-1]:+.1%}"]
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


def _results(path: str) -> Iterator[dict]:
    with open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: no JSON: {error}") from None
            if not isinstance(record, dict) or record.get("kind") != "bench":
                raise ValueError(f"{path}, line {number}: not a result of ds-llep bench")
            missing = [key for key in _NEEDED if key not in record]
            if missing:
                raise ValueError(f"{path}, line {number}: no {', '.join(missing)}")
            if record["dtype"] not in DTYPES:
                raise ValueError(
                    f"{path}, line {number}: dtype {record['dtype']!r} is not modelled"
                )
            yield record

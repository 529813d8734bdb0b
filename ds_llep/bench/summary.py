"""Summarise a recorded trace: how uneven, which experts, and which planner settings would be best.

    ds-llep trace llep_trace.npz
    ds-llep trace llep_trace.npz --machine machine.json --samples 16

Load ratios are of standard expert parallelism, exact and of all training micro-batches. Settings
are tried on a sample of micro-batches and layers, spread evenly over the trace; their step times
are a model's (docs/simulate.md), for the machine named. The fastest setting is recommended; among
those within 1 % of it, the one that moves the fewest bytes of weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass

import numpy as np

from ds_llep.bench import output
from ds_llep.bench.machine import BUILT_IN, DTYPES, find
from ds_llep.bench.micro_batches import Layers, evenly, from_trace, training_rows
from ds_llep.bench.step import StepCost, System, mean, step_cost
from ds_llep.config import LLEPConfig
from ds_llep.trace import Trace

GRID = {
    "imbalance_threshold": (1.0, 1.1, 1.3, 1.6, 2.0),
    "capacity_factor": (1.0, 1.1, 1.25, 1.5),
    "min_tokens_per_gemm": (0, 256, 1024, 4096),
}
TIE = 1.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help='what "llep": {"trace": {"enabled": true}} recorded')
    add("--machine", default="h200", help=f"{', '.join(BUILT_IN)} or a file of ds-llep calibrate")
    add("--ranks-per-node", type=int, metavar="N", help="default: the machine's")
    add("--samples", type=int, default=8, help="micro-batches to try settings on (default: 8)")
    add("--layers", type=int, default=8, help="layers to try settings on (default: 8)")
    add("--hottest", type=int, default=4, metavar="N", help="experts to name a layer (default: 4)")
    add("--settings", type=int, default=10, metavar="N", help="rows of the table (default: 10)")


def run(args: argparse.Namespace) -> int:
    """Print the tables and the recommendation.

    Raises:
        ValueError: no trace, no training micro-batch in it, an unknown machine.
        OSError: a file that cannot be read.
    """
    for name in ("samples", "layers", "hottest", "settings", "ranks_per_node"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}; valid is 1 or more")
    machine = find(args.machine)
    trace = Trace.load(args.file)
    try:
        rows = training_rows(trace, trace.num_micro_batches)
    except ValueError as error:
        raise ValueError(f"{args.file}: {error}") from None
    print(
        f"{args.file}: {len(rows)} training micro-batches at steps {trace.steps[rows[0]]} to "
        f"{trace.steps[rows[-1]]}, {trace.num_layers} layers, EP {trace.ep_size}, {trace.dtype}"
    )
    output.table("Load ratio without llep (max / mean rows of a rank)", *_load_ratios(trace, rows))
    output.table(
        "Hottest experts: id on home rank, share of the layer's rows",
        *_hottest(trace, rows, args.hottest),
    )

    system = System(
        machine,
        args.ranks_per_node or machine.ranks_per_node,
        trace.dtype if trace.dtype in DTYPES else machine.dtype,
    )
    sampled = training_rows(trace, args.samples)
    layers = evenly(trace.num_layers, args.layers).tolist()
    steps = [from_trace(trace, row, layers, trace.ep_size) for row in sampled]
    without = mean([step_cost("ep", step, LLEPConfig(), system) for step in steps])
    settings = [
        Setting(values, try_setting(values, trace.llep, steps, system))
        for values in itertools.product(*GRID.values())
    ]
    settings.sort(key=lambda setting: setting.cost.seconds)
    best = recommend(settings)
    output.table(
        f"The fastest of {len(settings)} settings by the model of machine {machine.name}, tried on "
        f"{len(sampled)} of the {len(rows)} micro-batches and {len(layers)} of the "
        f"{trace.num_layers} layers",
        *_settings(settings[: args.settings], best, without),
    )
    model = f"the model of machine {machine.name}"
    if args.machine == "h200":
        model += " (the default; --machine names another)"
    print(
        f"Recommended by {model}: {1e3 * best.cost.seconds:.2f} ms for these layers, AutoEP "
        f"{1e3 * without.seconds:.2f} ms"
    )
    if best.cost.seconds >= without.seconds:
        print("No setting pays for itself on this trace: leave llep off, or see docs/simulate.md")
    enabled = best.cost.seconds < without.seconds
    print(json.dumps({"llep": {"enabled": enabled, **dict(zip(GRID, best.values, strict=True))}}))
    return 0


@dataclass(frozen=True)
class Setting:
    """One point of the grid, and what it would have cost."""

    values: tuple[float, float, int]
    """By the keys of ``GRID``."""
    cost: StepCost


def try_setting(
    values: tuple[float, ...], section: dict, steps: list[Layers], system: System
) -> StepCost:
    """The mean step with these values and otherwise the run's own section."""
    config = LLEPConfig(**{**section, **dict(zip(GRID, values, strict=True))})
    return mean([step_cost("llep", step, config, system) for step in steps])


def recommend(settings: list[Setting]) -> Setting:
    """The fastest; among those within 1 % of it, the one that moves the fewest bytes of weights.

    Where that leaves several, the one that plans least often.
    """
    fastest = min(setting.cost.seconds for setting in settings)
    close = [setting for setting in settings if setting.cost.seconds <= TIE * fastest]
    return min(close, key=lambda setting: (sum(setting.cost.weight_bytes), -setting.values[0]))


def _load_ratios(trace: Trace, rows: list[int]) -> tuple[list[str], list[list[str]]]:
    columns = ["layer", "mean", "p95", "max", "first quarter", "last quarter", "trend"]
    table = []
    for index, name in enumerate(trace.layer_names):
        counts_SPE = trace.layers[index][rows].astype(np.int64)
        home_SP = counts_SPE.sum(1).reshape(len(rows), trace.ep_size, -1).sum(2)
        home_SP = home_SP[home_SP.any(axis=1)]
        if not len(home_SP):
            table.append([name, *"------"])
            continue
        ratio_S = home_SP.max(1) / home_SP.mean(1)
        quarter = max(1, len(ratio_S) // 4)
        first, last = ratio_S[:quarter].mean(), ratio_S[-quarter:].mean()
        values = [ratio_S.mean(), np.percentile(ratio_S, 95), ratio_S.max(), first, last]
        table.append([name, *(f"{value:.2f}" for value in values), f"{last - first:+.2f}"])
    return columns, table


def _hottest(trace: Trace, rows: list[int], most: int) -> tuple[list[str], list[list[str]]]:
    table = []
    for index, name in enumerate(trace.layer_names):
        counts_E = trace.layers[index][rows].sum(axis=(0, 1), dtype=np.int64)
        per_rank, total = len(counts_E) // trace.ep_size, max(1, int(counts_E.sum()))
        hottest = np.argsort(-counts_E, kind="stable")[:most].tolist()
        cells = [f"{e} on {e // per_rank}: {counts_E[e] / total:.1%}" for e in hottest]
        table.append([name, f"{1 / len(counts_E):.1%}", *cells, *[""] * (most - len(cells))])
    return ["layer", "even share", *(f"{n + 1}." for n in range(most))], table


def _settings(
    settings: list[Setting], best: Setting, without: StepCost
) -> tuple[list[str], list[list[str]]]:
    columns = [*GRID, "load ratio", "its max", "spilled", "foreign experts", "weights GB"]
    columns += ["step ms", "to ep", ""]
    table = []
    for setting in settings if best in settings else [*settings, best]:
        cost = setting.cost
        table.append(
            [
                *setting.values,
                f"{cost.load_ratio_mean:.2f}",
                f"{cost.load_ratio_max:.2f}",
                f"{cost.spilled_share:.1%}",
                f"{cost.foreign_experts:.1f}",
                f"{sum(cost.weight_bytes) / 1e9:.3f}",
                f"{1e3 * cost.seconds:.2f}",
                f"{cost.seconds / without.seconds:.2f}",
                "recommended" if setting is best else "",
            ]
        )
    return columns, table

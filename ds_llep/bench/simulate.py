"""Predict what MoE layers cost on a machine that is not at hand: AutoEP, llep and the ideal.

    ds-llep simulate --shape deepseek-v3 --workload real:gsm_english --ranks 64 --layers 48
    ds-llep simulate --trace llep_trace.npz --ranks 16 --machine machine.json
    ds-llep simulate --against results.jsonl

Times are of the MoE layers alone, in a training step of one micro-batch. "ideal" is a perfectly
even router: all ranks compute equally many rows and no weights move. Loads and bytes of weights are
exact for the counts, bytes of llep's rows an estimate from them. Seconds are a model's, compared
with measurements in docs/simulate.md. --against compares with results of ds-llep bench.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

from ds_llep.bench import output
from ds_llep.bench.against import against
from ds_llep.bench.machine import BUILT_IN, DTYPES, find
from ds_llep.bench.micro_batches import Layers, from_trace, from_workload, training_rows
from ds_llep.bench.records import read_section
from ds_llep.bench.shapes import PRESETS, Shape, preset
from ds_llep.bench.step import MODES, StepCost, System, mean, step_cost
from ds_llep.trace import Trace

SIZES = tuple(field.name for field in dataclasses.fields(Shape))
DEFAULT = "real:gsm_english"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", help=f"{', '.join(PRESETS)} (default: qwen3-30b-a3b)")
    for name in SIZES:
        add(f"--{name.replace('_', '-')}", type=int, metavar="N", help="in place of the shape's")
    add("--workload", help="what routes the tokens, such as zipf:1 (default: real:gsm_english)")
    add("--trace", metavar="FILE", help="counts that a run recorded, in place of a workload")
    add("--ranks", type=int, metavar="P", help="of the EP group (default: 8, or the trace's)")
    add("--ranks-per-node", type=int, metavar="N", help="default: the machine's")
    add("--layers", type=int, help="default: 1, or the trace's")
    add("--steps", type=int, help="micro-batches (default: 1, or up to 8 of the trace)")
    add("--machine", default="h200", help=f"{', '.join(BUILT_IN)} or a file of ds-llep calibrate")
    add("--dtype", choices=DTYPES, help="of rows and weights (default: the machine's)")
    add("--llep", default="{}", metavar="JSON", help='the "llep" section, as in a DeepSpeed JSON')
    add("--seed", type=int, default=0, help="of the workload (default: 0)")
    add("--json", metavar="FILE", help="append the prediction as a JSON line")
    add("--against", metavar="FILE", help="compare with results of ds-llep bench, nothing else")


def run(args: argparse.Namespace) -> int:
    """Predict and print.

    Raises:
        ValueError: options that make no sense.
        OSError: a file that cannot be read or written.
    """
    machine = find(args.machine)
    for name in ("ranks", "ranks_per_node", "layers", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}; valid is 1 or more")
    system = System(
        machine, args.ranks_per_node or machine.ranks_per_node, args.dtype or machine.dtype
    )
    if args.against:
        return against(args.against, system)
    output.check_writable(args.json)
    config = read_section(args.llep)
    if args.trace and args.workload:
        raise ValueError("--trace and --workload are two sources of counts; give one")
    steps = list(_trace_steps(args) if args.trace else _workload_steps(args))
    found = {
        mode: mean([step_cost(mode, step, config, system) for step in steps]) for mode in MODES
    }
    ranks, layers = len(steps[0][0][0]), len(steps[0])
    source = args.trace or args.workload or DEFAULT
    output.table(
        f"{source}: EP {ranks}, {system.ranks_per_node} ranks a node, {layers} layer(s), "
        f"{len(steps)} step(s), machine {machine.name}",
        *_table(found),
    )
    if args.json:
        record = {
            "kind": "simulate",
            "source": source,
            "shape": dataclasses.asdict(steps[0][0][1]),
            "ranks": ranks,
            "ranks_per_node": system.ranks_per_node,
            "layers": layers,
            "steps": len(steps),
            "dtype": system.dtype,
            "machine": machine.name,
            "llep": config.model_dump(mode="json"),
            "predicted": {mode: dataclasses.asdict(cost) for mode, cost in found.items()},
        }
        return output.append_json(args.json, [record])
    return 0


def _workload_steps(args: argparse.Namespace) -> Iterator[Layers]:
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    shape = dataclasses.replace(preset(args.shape or "qwen3-30b-a3b"), **given)
    for step in range(args.steps or 1):
        name, ranks, layers = args.workload or DEFAULT, args.ranks or 8, args.layers or 1
        yield from_workload(name, shape, ranks, layers, step, args.seed)


def _trace_steps(args: argparse.Namespace) -> Iterator[Layers]:
    given = [name for name in ("shape", *SIZES) if getattr(args, name) is not None]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{options}: the trace has its own sizes; leave it out")
    trace = Trace.load(args.trace)
    layers = range(min(args.layers or trace.num_layers, trace.num_layers))
    for row in training_rows(trace, args.steps or 8):
        yield from_trace(trace, row, layers, args.ranks or trace.ep_size)


def _table(found: dict[str, StepCost]) -> tuple[list[str], list[list[str]]]:
    columns = ["", "forward ms", "backward ms", "step ms", "to ep", "load ratio", "its max"]
    columns += ["rows GB in nodes", "between", "weights GB in nodes", "between", "kept rows GB"]
    rows = []
    for mode, cost in found.items():
        times = [f"{1e3 * value:.2f}" for value in (cost.forward, cost.backward, cost.seconds)]
        ratios = [cost.seconds / found["ep"].seconds, cost.load_ratio_mean, cost.load_ratio_max]
        sizes = [*cost.row_bytes, *cost.weight_bytes, cost.kept_bytes]
        cells = [f"{value:.2f}" for value in ratios] + [f"{value / 1e9:.2f}" for value in sizes]
        rows.append([mode, *times, *cells])
    return columns, rows

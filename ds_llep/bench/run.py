"""Time MoE layers: AutoEP at its fastest options against llep, on the same weights and routing.

    ds-llep bench --shape gpt-oss-120b --workloads balanced,50:4,95:1
    torchrun --nproc_per_node 8 -m ds_llep bench --shape qwen3-30b-a3b --json results.jsonl
    ds-llep bench --compare before.jsonl after.jsonl

The modes are "ep" (AutoEP), "llep", and "ep_balanced": AutoEP on balanced routing, which no
balancing of skewed routing beats. Times are medians of the slowest rank. Every repeat routes anew,
and weights count as changed before it, as after an optimizer step, so nothing comes out of llep's
cache that an optimizer step would have made stale. Before any time of a workload is taken, llep's
results are compared with AutoEP's: against a reference of higher precision, the error of the
output and of each gradient may be twice AutoEP's own. Where it is more, there is no time and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from ds_llep.bench import compare, machine, output, ranks, reserved
from ds_llep.bench.records import MODES, PARTS, Settings, read_section
from ds_llep.bench.session import Session, WrongResults
from ds_llep.bench.shapes import PRESETS, Shape, preset
from ds_llep.config import LLEPConfig

SIZES = {  # field of Shape: names of the option; the first with _ is the published test's
    "tokens": ("--tokens", "--num_tokens"),
    "hidden_size": ("--hidden-size", "--hidden_size"),
    "ffn_size": ("--ffn-size", "--intermediate_size"),
    "num_experts": ("--num-experts", "--num_experts"),
    "top_k": ("--top-k", "--top_k"),
}
DTYPES = ("auto", "bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", help=f"{', '.join(PRESETS)} (default: tiny)")
    for field, names in SIZES.items():
        add(*names, dest=field, type=int, help="in place of the shape's", metavar="N")
    add("--layers", type=int, default=1, help="layers one after the other (default: 1)")
    add(
        "--workloads",
        "--imbalance_configs",
        default="balanced,50:4,95:1",
        help="balanced, R:H, R:local, zipf:S, hot_rank[:H], spread[:H], ragged, empty, rotating, "
        "burst, real:SET, trace:FILE; several with commas (default: %(default)s)",
    )
    add("--modes", default=",".join(MODES), help="default: %(default)s")
    add("--parts", default="forward,backward", help=f"of {','.join(PARTS)} (default: %(default)s)")
    add("--ep-size", type=int, help="ranks of an EP group (default: all)")
    add("--zero-stage", type=int, default=1, choices=range(4), help="of the step (default: 1)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on GPUs, else float32")
    add("--repeats", "--num_runs", type=int, default=10, help="timed (default: 10)")
    add("--seed", type=int, default=0)
    add("--llep", default="{}", metavar="JSON", help='the "llep" section, as in a DeepSpeed JSON')
    add("--max_tokens_factor", type=float, help="the published name of llep.capacity_factor")
    add("--min_tokens_per_gemm", type=int, help="llep.min_tokens_per_gemm")
    add("--breakdown", action="store_true", help="where llep's time goes, part by part")
    add(
        "--reserved",
        action="store_true",
        help="in place of times: memory that the allocator has reserved as the repeats go by",
    )
    add("--machine", metavar="FILE", help="rates of ds-llep calibrate for the floors, not measured")
    add("--json", metavar="FILE", help="append a line for each result")
    add("--compare", nargs=2, metavar="FILE", help="compare two files of results, measure nothing")
    ranks.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked at once, then measure, on ranks of its own if there are none yet.

    Raises:
        ValueError: options that make no sense together.
    """
    if args.compare:
        return compare.show(*args.compare)
    settings = read_settings(args)
    output.check_rich()
    if not ranks.launched():
        settings.check(ranks.number_to_start(args))
        output.check_writable(args.json)
        if args.machine:
            machine.find(args.machine)
    return ranks.run(args, lambda device: measure(args, settings, device))


def measure(args: argparse.Namespace, settings: Settings, device: torch.device) -> int:
    """The whole bench on this rank; the exit code."""
    try:
        if args.reserved:
            records = reserved.measure(settings, device)
        else:
            records = Session(settings, device, args.machine).run()
    except WrongResults as error:
        if ranks.is_first():
            print(f"ds-llep bench: {error}", file=sys.stderr)
        return 1
    if not ranks.is_first():
        return 0
    origin = output.origin()
    records = [{**record, **origin} for record in records]
    failed = output.append_json(args.json, records)
    if args.reserved:
        reserved.show(title(settings, records[0]), records)
    else:
        show(settings, records)
    return failed


def read_settings(args: argparse.Namespace) -> Settings:
    """What the options ask for.

    Raises:
        ValueError: an option that is wrong whatever the ranks.
    """
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    shape = replace(preset(args.shape or "tiny"), **sizes)
    aliases = {
        "capacity_factor": args.max_tokens_factor,
        "min_tokens_per_gemm": args.min_tokens_per_gemm,
    }
    given = {name: value for name, value in aliases.items() if value is not None}
    section = read_section(args.llep).model_dump()
    config = LLEPConfig(**{**section, **given, "enabled": True})
    if config.weight_source == "shards":
        raise ValueError(
            '--llep: "weight_source": "shards" needs the shards of ZeRO-3, and the layers timed '
            "here are whole; python -m ds_llep.bench.memory measures a model with them"
        )
    if args.reserved and (args.breakdown or args.machine or args.parts != "forward,backward"):
        raise ValueError(
            "--reserved takes no times, and runs forward and backward: leave out --breakdown, "
            "--machine and --parts"
        )
    for name in ("layers", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}; valid is 1 or more")
    # The name of a shape that was given by its numbers, too.
    same = (name for name, known in PRESETS.items() if replace(known, tokens=shape.tokens) == shape)
    return Settings(
        shape=shape,
        shape_name=next(same, None),
        layers=args.layers,
        workloads=args.workloads.split(","),
        modes=some_of("--modes", args.modes, MODES),
        parts=some_of("--parts", args.parts, PARTS),
        ep_size=args.ep_size,
        zero_stage=args.zero_stage,
        dtype=args.dtype,
        repeats=args.repeats,
        seed=args.seed,
        llep=config,
        breakdown=args.breakdown,
    )


def some_of(option: str, text: str, valid: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in valid]
    if unknown:
        raise ValueError(f"{option}: unknown {', '.join(unknown)}; valid are {', '.join(valid)}")
    return [name for name in valid if name in names]


def title(settings: Settings, record: dict) -> str:
    """What all results have in common."""
    name = settings.shape_name or "a shape of its own"
    return (
        f"{name}: {describe(settings.shape)}; {record['layers']} layer(s), EP {record['ep_size']} "
        f"of {record['ranks']} ranks, {record['dtype']}, {record['device']}, torch "
        f"{record['versions']['torch']}"
    )


def show(settings: Settings, records: list[dict]) -> None:
    """The results as a table, and each breakdown as one of its own."""
    if not records:
        return
    heading = f"{title(settings, records[0])}; ms are medians of {settings.repeats}, slowest rank"
    columns = ["workload", "mode", "load ratio", "spilled"]
    columns += ["forward ms", "fwd+bwd ms", "step ms", "peak GB", "/ ep", "/ balanced", "/ floor"]
    rows = []
    for record in records:
        before, after = record["load_ratio_before"], record["load_ratio_after"]
        rows.append(
            [
                record["workload"],
                record["mode"],
                f"{before:.2f} -> {after:.2f}" if record["mode"] == "llep" else f"{before:.2f}",
                f"{record['spilled_experts']:.3g}, {record['spilled_bytes'] / 1e6:.3g} MB",
                output.number(record["forward_ms"]),
                output.number(record["forward_backward_ms"]),
                output.number(record["step_ms"]),
                f"{record['peak_bytes'] / 1e9:.3g}",
                output.number(record["ratio_to_ep"]),
                output.number(record["ratio_to_ep_balanced"]),
                output.number(record["ratio_to_floor"]),
            ]
        )
    output.table(heading, columns, rows)
    for record in records:
        if record["breakdown_ms"] is not None:
            show_breakdown(record)


def show_breakdown(record: dict) -> None:
    parts, slowest = dict(record["breakdown_ms"]), record["breakdown_slowest_ms"]
    whole = record["forward_backward_ms"] or record["forward_ms"]
    if whole is not None:
        known = sum(mean for name, mean in parts.items() if "/" not in name)
        parts["all the rest"] = whole - known
    rows = []
    for name, mean in parts.items():
        floor = record["breakdown_floor_ms"].get(name)
        gap = None if floor is None else slowest[name] - floor
        cells = [output.number(value, 3) for value in (mean, slowest.get(name), floor, gap)]
        *outer, last = name.split("/")
        rows.append(["  " * len(outer) + last, *cells])
    columns = ["part", "ms, mean of ranks", "slowest rank", "floor", "gap"]
    output.table(f"{record['workload']}: where llep's time goes, median", columns, rows)


def describe(shape: Shape) -> str:
    return (
        f"E {shape.num_experts}, D {shape.hidden_size}, F {shape.ffn_size}, K {shape.top_k}, "
        f"{shape.tokens} tokens a rank"
    )

"""Time DeepSpeed's own MoE layers against the same layers balanced by llep.

    ds-llep moe --workloads balanced,50:4,95:1
    torchrun --nproc_per_node 8 -m ds_llep moe --num-experts 16 --top-k 1 --json results.jsonl

deepspeed.moe.layer.MoE with drop_tokens=False, both modes in one process, on the same weights and
the same routing, which is that of the workload, another one at every repeat. Times are medians of
the slowest rank. Bytes are counted: those that leave a rank in a forward+backward, in all-to-alls
and as weights and their gradients. Before a workload is timed, llep's results are compared with
DeepSpeed's: against a reference of higher precision, the error of the output and of each gradient
may be twice DeepSpeed's own. Where it is more, there is no time and the exit code is 1.

Without dropping, DeepSpeed sends and computes blocks of E x capacity rows on every rank, where
capacity is the most tokens that any rank has for an expert: with one hot expert, about E times a
rank's tokens. A forward+backward of a layer then takes about E x capacity x (5 D + 2 F) elements,
5 F with --gated, and the reference as many of twice the size. The defaults on GPUs take 25 GB that
way at 95:1 in bfloat16 and 50 GB in the reference; with --gated 46 and 92 GB. Weights, their
gradients and both in higher precision take 10 GB more on each of two ranks, 14 GB with --gated.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch
from deepspeed.accelerator import get_accelerator

from ds_llep.bench import output, ranks
from ds_llep.bench.native_session import NativeSession, NativeSettings
from ds_llep.bench.records import read_section
from ds_llep.bench.run import DTYPES, describe
from ds_llep.bench.session import WrongResults
from ds_llep.bench.shapes import Shape
from ds_llep.config import LLEPConfig

SIZES = {  # field of Shape: names of the option
    "tokens": ("--tokens",),
    "hidden_size": ("--hidden-size",),
    "ffn_size": ("--intermediate-size", "--ffn-size"),
    "num_experts": ("--num-experts",),
    "top_k": ("--top-k",),
}
ON_GPU, ON_CPU = Shape(16, 4096, 14336, 2, 16384), Shape(16, 256, 512, 2, 512)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for field, names in SIZES.items():
        defaults = f"default: {getattr(ON_GPU, field)} on GPUs, {getattr(ON_CPU, field)} on the CPU"
        add(*names, dest=field, type=int, metavar="N", help=defaults)
    add("--gated", action="store_true", help="experts of three matrices; else two, with biases")
    add("--layers", type=int, default=1, help="layers one after the other (default: 1)")
    add(
        "--workloads",
        default="balanced,50:4,95:1",
        help="those of bench, a token's experts always distinct (default: %(default)s)",
    )
    add("--ep-size", type=int, help="ranks of an EP group (default: all)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on GPUs, else float32")
    add("--repeats", type=int, default=10, help="timed (default: 10)")
    add("--seed", type=int, default=0)
    add("--llep", default="{}", metavar="JSON", help='the "llep" section, as in a DeepSpeed JSON')
    add("--json", metavar="FILE", help="append a line for each result")
    ranks.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked at once, then measure, on ranks of its own if there are none yet.

    Raises:
        ValueError: options that make no sense together.
    """
    settings = read_settings(args)
    output.check_rich()
    if not ranks.launched():
        settings.check(ranks.number_to_start(args))
        output.check_writable(args.json)
    return ranks.run(args, lambda device: measure(args, settings, device))


def measure(args: argparse.Namespace, settings: NativeSettings, device: torch.device) -> int:
    """The whole bench on this rank; the exit code."""
    try:
        records = NativeSession(settings, device).run()
    except WrongResults as error:
        if ranks.is_first():
            print(f"ds-llep moe: {error}", file=sys.stderr)
        return 1
    if not ranks.is_first():
        return 0
    origin = output.origin()
    records = [{**record, **origin} for record in records]
    failed = output.append_json(args.json, records)
    show(settings, records)
    return failed


def read_settings(args: argparse.Namespace) -> NativeSettings:
    """What the options ask for.

    Raises:
        ValueError: an option that is wrong whatever the ranks.
    """
    on_gpu = args.device != "cpu" and get_accelerator().device_name() != "cpu"
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    config = LLEPConfig(**{**read_section(args.llep).model_dump(), "enabled": True})
    if config.weight_source == "shards" or config.trace.enabled:
        raise ValueError(
            "--llep: DeepSpeed's own MoE layers have no shards and record no trace; leave out "
            '"weight_source": "shards" and "trace"'
        )
    for name in ("layers", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}; valid is 1 or more")
    return NativeSettings(
        shape=replace(ON_GPU if on_gpu else ON_CPU, **sizes),
        shape_name=None,
        layers=args.layers,
        workloads=args.workloads.split(","),
        modes=[],
        parts=["forward", "backward"],
        ep_size=args.ep_size,
        zero_stage=0,
        dtype=args.dtype,
        repeats=args.repeats,
        seed=args.seed,
        llep=config,
        breakdown=False,
        gated=args.gated,
    )


def show(settings: NativeSettings, records: list[dict]) -> None:
    """The results as a table."""
    first = records[0]
    title = (
        f"{describe(settings.shape)}, {'gated' if settings.gated else 'two matrices'}; "
        f"{settings.layers} layer(s), EP {first['ep_size']} of {first['ranks']} ranks, "
        f"{first['dtype']}, {first['device']}, torch {first['versions']['torch']}; ms are medians "
        f"of {settings.repeats}, slowest rank; MB: all ranks, in brackets most of a rank"
    )
    columns = ["workload", "mode", "load ratio", "forward ms", "fwd+bwd ms", "speed-up"]
    columns += ["all-to-all MB", "weights MB", "peak GB"]
    rows = []
    for record in records:
        before, after = record["load_ratio_before"], record["load_ratio_after"]
        sent = (
            [record[f"{kind}_bytes{of}"] / 1e6 for of in ("", "_max")]
            for kind in ("all_to_all", "weight")
        )
        rows.append(
            [
                record["workload"],
                record["mode"],
                f"{before:.2f} -> {after:.2f}" if record["mode"] == "llep" else f"{before:.2f}",
                output.number(record["forward_ms"]),
                output.number(record["forward_backward_ms"]),
                output.number(record["speedup"]),
                *(f"{total:.1f} ({most:.1f})" for total, most in sent),
                output.gigabytes(record["peak_bytes"]),
            ]
        )
    output.table(title, columns, rows)

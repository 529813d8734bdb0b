"""Measure this machine's rates for simulate, trace and bench, and write them as JSON.

    ds-llep calibrate --out machine.json
    torchrun --nnodes 2 --nproc_per_node 8 ... -m ds_llep calibrate --out machine.json

All ranks measure at once, as they compute at once in training; each number is the median of the
slowest rank. Links between nodes are measured where the ranks are on several nodes; else they are
what --inter-gbps says, or as fast as those inside a node, and "given" in the file names them. The
overheads are what one balanced layer takes beyond what the other rates explain.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import deepspeed.comm as dist
import torch

from ds_llep.bench import output, ranks
from ds_llep.bench.machine import Machine
from ds_llep.bench.rates import LEAST, Rates, Sizes

SIZES = {  # option: (on a GPU, on the CPU, what it is)
    "matrix": (8192, 512, "side of the dense matrix product"),
    "rows": (65536, 2048, "rows of a rank"),
    "hidden-size": (2048, 128, "of the rows"),
    "ffn-size": (2048, 128, "of an expert"),
}
MEBIBYTES = ("16,64,256,1024", "1,4,16")
TILES = ((1, 1), (128, 256))  # on the CPU; on a GPU, torch._grouped_mm's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="where the machine is written")
    add("--name", help="of the machine (default: its device and ranks)")
    add(
        "--inter-gbps",
        type=float,
        metavar="N",
        help="Gbit/s of a rank between nodes, if not measured",
    )
    for name, (on_gpu, on_cpu, what) in SIZES.items():
        add(f"--{name}", type=int, metavar="N", help=f"{what} (default: {on_gpu}, CPU {on_cpu})")
    add("--mebibytes", help=f"sizes of transfers (default: {MEBIBYTES[0]}, CPU {MEBIBYTES[1]})")
    add("--repeats", type=int, default=10, help="timed, of each measurement (default: 10)")
    ranks.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, on ranks of its own if there are none yet, and write the machine.

    Raises:
        ValueError: options that make no sense.
    """
    _transfers(args.mebibytes or MEBIBYTES[0])
    for name in (*SIZES, "repeats", "inter-gbps"):
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value}; valid is above 0")
    if not ranks.launched():
        return ranks.start(args, sys.argv[1:])
    try:
        machine = calibrate(args, ranks.join(args))
        if not ranks.is_first():
            return 0
        return write(machine, args.out)
    except ValueError as error:  # the same on every rank: one of them speaks
        if ranks.is_first():
            print(f"ds-llep calibrate: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def write(machine: Machine, path: str) -> int:
    """Print the machine and keep it; the exit code, 2 where the file cannot be written."""
    values = dataclasses.asdict(machine)
    rows = [
        (name, _text(value), "given" if name in machine.given else "")
        for name, value in values.items()
        if name not in ("name", "given")
    ]
    output.table(f"machine {machine.name}", ["", "value", ""], rows)
    try:
        machine.save(path)
    except OSError as error:
        print(f"cannot write {path!r}: {error.strerror}. The machine:", file=sys.stderr)
        print(machine.to_json())
        return 2
    print(f"written to {path}")
    return 0


def _text(value: object) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return ", ".join(f"{rate:.3g} at {size:.4g}" for size, rate in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def calibrate(args: argparse.Namespace, device: torch.device) -> Machine:
    """The machine that these ranks are, the same on every rank.

    Raises:
        ValueError: on every rank, if nodes have different numbers of ranks.
    """
    on_gpu = device.type != "cpu"
    rates = Rates(sizes(device, args), device)
    memory_rate = rates.memory_rate()
    given = {"tile"} if on_gpu else {"tile", "processors"}
    # Without links, as with one rank, what no transfer beats stands in.
    inside = between = (((2**30, memory_rate / 2),),) * 2
    latency_inside = latency_between = rates.latency(rates.all)
    if rates.ranks_per_node > 1:
        inside = between = rates.links(rates.inside)
        latency_inside = rates.latency(rates.inside)
    else:
        given |= {"all_to_all_inside", "point_to_point_inside", "latency_inside"}
    if rates.nodes > 1:
        between = rates.links(rates.between)
        latency_between = rates.latency(rates.all)
    else:
        given |= {"all_to_all_between", "point_to_point_between", "latency_between"}
        if args.inter_gbps:
            between = (((2**30, args.inter_gbps * 1e9 / 8),),) * 2
    per_expert, per_choice = rates.plan_seconds()
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    machine = Machine(
        name=args.name or f"{rates.world} x {name}",
        measured=f"ds-llep calibrate on {rates.nodes} node(s) of {rates.ranks_per_node} rank(s), "
        f"{name}, torch {torch.__version__}, median of {args.repeats}",
        given=tuple(sorted(given)),
        dtype=str(rates.dtype).removeprefix("torch."),
        ranks_per_node=rates.ranks_per_node,
        dense_rate=rates.dense_rate(),
        grouped_rate=((1.0, 1.0),),  # until it is measured, with the help of the others
        tile=TILES[on_gpu],
        processors=torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1,
        memory_rate=memory_rate,
        local_rate=rates.local_rate(),
        all_to_all_inside=inside[0],
        all_to_all_between=between[0],
        point_to_point_inside=inside[1],
        point_to_point_between=between[1],
        latency_inside=latency_inside,
        latency_between=latency_between,
        plan_seconds_per_expert=per_expert,
        plan_seconds_per_choice=per_choice,
        overhead_forward=LEAST,
        overhead_backward=LEAST,
        autoep_overhead_forward=LEAST,
        autoep_overhead_backward=LEAST,
    )
    machine = dataclasses.replace(machine, grouped_rate=rates.grouped_rate(machine))
    return dataclasses.replace(machine, **rates.overheads(machine))


def sizes(device: torch.device, args: argparse.Namespace | None = None) -> Sizes:
    """What the options say, and for the rest what suits the device."""
    on_cpu, given = device.type == "cpu", vars(args) if args else {}
    found = {
        field: given.get(field) or of[on_cpu]
        for field, of in ((name.replace("-", "_"), of) for name, of in SIZES.items())
    }
    transfers = _transfers(given.get("mebibytes") or MEBIBYTES[on_cpu])
    return Sizes(**found, transfers=transfers, repeats=given.get("repeats", 10))


def _transfers(text: str) -> tuple[int, ...]:
    """Bytes, ascending, of mebibytes with commas.

    Raises:
        ValueError: no numbers above 0.
    """
    try:
        sizes = sorted({int(float(word) * 2**20) for word in text.split(",")})
    except (ValueError, OverflowError):
        sizes = [0]
    if sizes[0] < 1:
        raise ValueError(f"--mebibytes {text!r}; valid are numbers above 0 with commas")
    return tuple(sizes)

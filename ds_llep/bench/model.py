"""Time fine-tuning steps of a whole model: AutoEP at its fastest options against llep.

    ds-llep model --shape qwen3-30b-a3b --layers 8 --tokens 16384 --workloads 50:4,95:1
    torchrun --nproc_per_node 8 -m ds_llep model --shape qwen3-30b-a3b --json results.jsonl

A Hugging Face Qwen3-MoE or gpt-oss with random weights in a DeepSpeed engine (bf16 on GPUs, fp32 on
the CPU, AdamW): embedding, attention, MoE layers, loss, backward and optimizer step, tokens per
second of all ranks together. What every MoE layer's router chooses is the workload's, another
choice in every layer and step, the same for both modes; "balanced" is always measured first, as the
reference. Before a workload is timed, logits and the gradients of the first MoE layer's experts of
both modes are compared. Where they differ by more than rounding, there is no time and the exit code
is 1. With --train nothing is compared before: both modes train from the same weights, and their
losses, tokens per second and peaks are shown.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.util import find_spec

import torch

from ds_llep.bench import losses, output, ranks
from ds_llep.bench.fine_tuning import FineTuning, ModelSettings
from ds_llep.bench.random_model import MODELS
from ds_llep.bench.records import read_section
from ds_llep.bench.session import WrongResults
from ds_llep.bench.shapes import preset
from ds_llep.config import LLEPConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", choices=tuple(MODELS), default="tiny", help="of the model (default: tiny)")
    add("--layers", type=int, default=2, help="of the model (default: 2)")
    add("--tokens", type=int, help="of each rank in a step (default: the shape's)", metavar="N")
    add("--seq-len", type=int, help="tokens of a sequence (default: 4096 or all)", metavar="N")
    add(
        "--workloads",
        default="balanced,50:4,95:1",
        help="those of bench in which every rank has all its tokens (default: %(default)s)",
    )
    add("--ep-size", type=int, help="ranks of an EP group (default: all)")
    add("--zero-stage", type=int, default=1, choices=range(4), help="default: 1")
    add("--checkpointing", action="store_true", help="of activations, layer by layer")
    add("--repeats", type=int, default=10, help="timed steps (default: 10)")
    add("--train", type=int, metavar="N", help="in place of that: train N steps in each mode")
    add("--seed", type=int, default=0)
    add("--llep", default="{}", metavar="JSON", help='the "llep" section, as in a DeepSpeed JSON')
    add("--json", metavar="FILE", help="append a line for each result, workload by workload")
    ranks.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked at once, then measure, on ranks of its own if there are none yet.

    Raises:
        ValueError: options that make no sense together.
    """
    settings = read_settings(args)
    output.check_rich()
    if find_spec("transformers") is None:
        raise ValueError("the model needs transformers: pip install 'ds_llep[examples]'")
    if not ranks.launched():
        settings.check(ranks.number_to_start(args))
        output.check_writable(args.json)
    return ranks.run(args, lambda device: measure(args, settings, device))


def measure(args: argparse.Namespace, settings: ModelSettings, device: torch.device) -> int:
    """All workloads on this rank; the exit code."""
    if args.train:
        fine_tuning, measured = None, losses.train(settings, device, args.train)
    else:
        fine_tuning = FineTuning(settings, device)
        measured = fine_tuning.run()
    origin = output.origin()
    found, failed = [], 0
    try:
        for records in measured:
            found += records
            if ranks.is_first():  # at once: the next workload may need more memory than there is
                records = [{**record, **origin} for record in records]
                failed = output.append_json(args.json, records) or failed
    except WrongResults as error:
        if ranks.is_first():
            print(f"ds-llep model: {error}", file=sys.stderr)
        failed = 1
    finally:
        if fine_tuning is not None:
            fine_tuning.engine.destroy()
    if found and ranks.is_first():
        title = describe(settings, found[0])
        if args.train:
            losses.show(f"{title}; {args.train} steps at {losses.LEARNING_RATE:g}", found)
        else:
            show(f"{title}; median of {settings.repeats} steps, slowest rank", found)
    return failed


def read_settings(args: argparse.Namespace) -> ModelSettings:
    """What the options ask for.

    Raises:
        ValueError: an option that is wrong whatever the ranks.
    """
    shape = preset(args.shape)
    if args.tokens is not None:
        shape = replace(shape, tokens=args.tokens)
    seq_len = min(4096, shape.tokens) if args.seq_len is None else args.seq_len
    numbers = {"layers": args.layers, "repeats": args.repeats, "seq-len": seq_len}
    if args.train is not None:
        numbers["train"] = args.train
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"--{name} {value}; valid is 1 or more")
    if shape.tokens % seq_len:
        raise ValueError(
            f"--seq-len {seq_len} does not divide the {shape.tokens} tokens of a rank; a rank "
            "trains on whole sequences"
        )
    config = LLEPConfig(**{**read_section(args.llep).model_dump(), "enabled": True})
    if config.weight_source == "shards" and args.zero_stage < 3:
        raise ValueError(
            '--llep: "weight_source": "shards" needs the shards of ZeRO-3, and --zero-stage is '
            f"{args.zero_stage}; valid there are auto and owner"
        )
    workloads = args.workloads.split(",")
    if not args.train:  # times are compared with those of balanced routing
        workloads = ["balanced", *(name for name in workloads if name != "balanced")]
    return ModelSettings(
        shape=shape,
        shape_name=args.shape,
        layers=args.layers,
        seq_len=seq_len,
        workloads=workloads,
        ep_size=args.ep_size,
        zero_stage=args.zero_stage,
        checkpointing=args.checkpointing,
        repeats=args.repeats,
        seed=args.seed,
        llep=config,
    )


def describe(settings: ModelSettings, first: dict) -> str:
    """What all results have in common, of which one is ``first``."""
    return (
        f"{settings.shape_name}, {settings.layers} layer(s): {settings.shape.tokens} tokens a "
        f"rank, sequences of {settings.seq_len}; EP {first['ep_size']} of {first['ranks']} ranks, "
        f"ZeRO-{settings.zero_stage}, checkpointing {'on' if settings.checkpointing else 'off'}, "
        f"{first['dtype']}, {first['device']}"
    )


def show(title: str, records: list[dict]) -> None:
    """The results as a table."""
    columns = ["workload", "mode", "load ratio", "step ms", "tokens/s", "speed-up", "/ balanced"]
    columns += ["allocated GB", "reserved GB"]
    rows = []
    for record in records:
        before, after = record["load_ratio_before"], record["load_ratio_after"]
        rows.append(
            [
                record["workload"],
                record["mode"],
                f"{before:.2f} -> {after:.2f}" if record["mode"] == "llep" else f"{before:.2f}",
                output.number(record["step_ms"]),
                output.number(record["tokens_per_second"], 0),
                output.number(record["speedup"]),
                output.number(record["ratio_to_balanced"]),
                output.gigabytes(record["peak_allocated_bytes"]),
                output.gigabytes(record["peak_reserved_bytes"]),
            ]
        )
    output.table(title, columns, rows)

"""Memory of one GPU in full fine-tuning, AutoEP beside llep: what there is, and what fits.

    ds-llep memory --model qwen3-30b-a3b --gpus 8 --seq-len 4096
    ds-llep memory --model ./my-checkpoint --gpus 16 --ep-size 8 --zero-stage 3 --micro-batch 2

MODEL is a directory or config.json of Hugging Face's, or a built-in name: qwen3-30b-a3b,
qwen3-235b-a22b, gpt-oss-20b, gpt-oss-120b, mixtral-8x7b, deepseek-v3, deepseek-v2-lite. Without
--ep-size or --zero-stage, a table of the choices; with both, what the memory is made of. --skew is
the load ratio that the router asks for, on the rank where memory is highest: AutoEP computes it,
llep what its plan leaves of it. All numbers are estimates, in GB of 1e9 bytes; what they assume,
and how they compare with measurements, is in docs/fine-tuning.md.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np

from ds_llep.bench import output
from ds_llep.bench.footprint import Footprint, Routing, Setup, footprint
from ds_llep.bench.models import ModelSize, find_model
from ds_llep.config import LLEPConfig
from ds_llep.plan import make_plan

DTYPES = {"bf16": 2, "fp32": 4}
STAGES = (0, 1, 2, 3)
ROOM = 0.9
"""The share of a GPU that an estimate may fill: the rest is for what is not counted."""
PARTS = {
    "weights: experts": "expert_weights",
    "weights: all else": "other_weights",
    "gradients": "gradients",
    "optimizer states": "optimizer",
    "reduce buckets": "buckets",
    "gathered weights": "gathered",
    "llep's workspace": "workspace",
    "activations kept": "activations",
    "a) logits and loss": "loss",
    "b) one layer in backward": "layer",
    "peak of backward": "backward",
    "peak of the optimizer's step": "in_step",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="a built-in name, a directory or a config.json")
    add("--gpus", type=int, required=True, metavar="N", help="of the whole job")
    add("--ep-size", type=int, metavar="P", help="ranks of an EP group (default: all choices)")
    add("--zero-stage", type=int, choices=STAGES, help="default: 1, 2 and 3")
    add("--micro-batch", type=int, default=1, metavar="B", help="sequences on a GPU (default: 1)")
    add("--seq-len", type=int, default=4096, metavar="L", help="tokens of one (default: 4096)")
    add("--dtype", choices=tuple(DTYPES), default="bf16", help="default: bf16")
    add(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of activations, layer by layer (default: on)",
    )
    add("--offload-optimizer", action="store_true", help="to the host")
    add("--offload-param", action="store_true", help="to the host")
    add("--skew", type=float, default=2.0, metavar="R", help="load ratio (default: 2)")
    add(
        "--foreign-experts",
        type=int,
        metavar="N",
        help="that llep lends to a rank in a layer (default: as it plans for --skew)",
    )
    add("--gpu-gb", type=float, default=80, metavar="G", help="memory of a GPU (default: 80)")


def run(args: argparse.Namespace) -> int:
    """Estimate and print.

    Raises:
        ValueError: options that make no sense, together or for the model.
        OSError: a config that cannot be read.
    """
    at_least_one = ("gpus", "ep_size", "micro_batch", "seq_len", "skew")
    for name, least in (*((name, 1) for name in at_least_one), ("foreign_experts", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}; valid is {least} or more")
    output.check_rich()
    model = find_model(args.model)
    print(
        f"{args.model}: {model.numel / 1e9:.1f} billion parameters, "
        f"{model.experts_numel / 1e9:.1f} of them in {model.moe_layers} x {model.num_experts} "
        f"experts\n{args.gpus} GPUs, {args.micro_batch} x {args.seq_len} tokens a GPU, "
        f"{args.dtype}, checkpointing {'on' if args.checkpointing else 'off'}, load ratio "
        f"{args.skew:g}"
    )
    if args.ep_size is not None and args.zero_stage is not None:
        show_parts(args, model)
    else:
        show_choices(args, model)
    return 0


def show_parts(args: argparse.Namespace, model: ModelSize) -> None:
    """What the memory of one choice is made of."""
    setup = make_setup(args, model, args.ep_size, args.zero_stage)
    autoep, llep = routings(args, model, setup)
    found = [footprint(model, setup, routing) for routing in (llep, autoep)]
    rows = [[part, *(gigabytes(getattr(f, name)) for f in found)] for part, name in PARTS.items()]
    columns = ["GB on one GPU", "llep", "AutoEP"]
    output.table(f"EP {setup.ep_size}, ZeRO-{setup.zero_stage}", columns, rows)
    print(
        "Of a) and b) the larger one counts. llep plans a load ratio of "
        f"{llep.load_ratio:.2f} with {llep.foreign_experts} foreign expert(s) on a GPU."
    )


def show_choices(args: argparse.Namespace, model: ModelSize) -> None:
    """The peaks at all EP sizes and ZeRO stages that are possible, or at the one that is given."""
    both = range(1, min(args.gpus, model.num_experts) + 1)
    sizes = [P for P in both if args.gpus % P == model.num_experts % P == 0]
    stages = [3] if args.offload_param else [1, 2, 3]
    rows = []
    for ep_size, stage in itertools.product(
        sizes if args.ep_size is None else [args.ep_size],
        stages if args.zero_stage is None else [args.zero_stage],
    ):
        setup = make_setup(args, model, ep_size, stage)
        autoep, llep = (footprint(model, setup, r) for r in routings(args, model, setup))
        row = [ep_size, stage, gigabytes(llep.steady)]
        for found in (llep, autoep):
            row += [gigabytes(found.peak), verdict(found, args.gpu_gb)]
        rows.append(row)
    columns = ["EP", "ZeRO", "states", "llep: peak", "", "AutoEP: peak", ""]
    output.table("GB on one GPU", columns, rows)
    print(
        f"fits: at most {ROOM:.0%} of {args.gpu_gb:g} GB, as CUDA, NCCL and the allocator need "
        "some; tight: at most all of it."
    )


def make_setup(args: argparse.Namespace, model: ModelSize, ep_size: int, zero_stage: int) -> Setup:
    """The options with one EP size and ZeRO stage.

    Raises:
        ValueError: options that do not go together, or not with the model.
    """
    if model.num_experts % ep_size:
        raise ValueError(
            f"--ep-size {ep_size} does not divide {model.num_experts} experts; every rank has as "
            "many"
        )
    if args.gpus % ep_size:
        raise ValueError(
            f"--ep-size {ep_size} does not divide {args.gpus} GPUs; EP groups are equal"
        )
    if args.offload_param and zero_stage < 3:
        raise ValueError(f"--offload-param needs ZeRO-3, and --zero-stage is {zero_stage}")
    if args.offload_optimizer and zero_stage < 1:
        raise ValueError("--offload-optimizer needs --zero-stage 1, 2 or 3, and it is 0")
    return Setup(
        gpus=args.gpus,
        ep_size=ep_size,
        zero_stage=zero_stage,
        tokens=args.micro_batch * args.seq_len,
        element_bytes=DTYPES[args.dtype],
        checkpointing=args.checkpointing,
        offload_optimizer=args.offload_optimizer,
        offload_param=args.offload_param,
    )


def routings(args: argparse.Namespace, model: ModelSize, setup: Setup) -> tuple[Routing, Routing]:
    """What AutoEP and llep compute where the router sends a rank ``--skew`` times the mean.

    llep's is what its planner, with its defaults, makes of a rank whose experts are all equally
    hot. Fewer and hotter experts make fewer foreign ones.
    """
    P, M = setup.ep_size, model.num_experts // setup.ep_size
    skew = min(args.skew, P)  # there are no more rows than all
    copies = setup.tokens * model.top_k
    hot = round(copies * skew / P / M)
    counts_PE = np.zeros((P, P * M), dtype=np.int64)
    counts_PE[:, :M] = hot
    if P > 1:
        counts_PE[:, M:] = max(round((copies - hot * M) / (P * M - M)), 0)
    plan = make_plan(counts_PE, LLEPConfig(max_foreign_experts=args.foreign_experts or None))
    foreign = max(len(plan.foreign_experts(rank)) for rank in range(P))
    if args.foreign_experts is not None:
        foreign = args.foreign_experts if P > 1 else 0
    return (
        Routing(load_ratio=skew, foreign_experts=None),
        Routing(load_ratio=plan.load_ratio_after, foreign_experts=foreign),
    )


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f}"


def verdict(found: Footprint, gpu_gb: float) -> str:
    """Whether it fits a GPU."""
    share = found.peak / 1e9 / gpu_gb
    return "fits" if share <= ROOM else "tight" if share <= 1 else "no"

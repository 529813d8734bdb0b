"""What a forward keeps alive under ZeRO-3, and how high a step rises: AutoEP against llep.

    torchrun --nproc_per_node 4 -m ds_llep.bench.memory --layers 4,8,16 --modes autoep,owner

A Qwen3-MoE with random weights of which nearly all are experts, in bf16. 95 % of the choices fall
on the experts of each EP group's first rank, so that plans spill. All columns are of the second
training step (the first one warms up) and of the rank where they are largest:

    kept       bytes alive after the forward, its graph included, above those before it
    per layer  what each added layer adds to that, from the row with fewer layers
    peak       the most bytes alive in forward and backward, above those before, and llep's
               workspace, which stays from step to step
    experts    the gathered weights of a rank's home experts in all layers, for comparison: so much
               is kept where they outlive the layer that gathered them

With --offload on the CPU, what is offloaded is counted all the same: it lies in the same memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from unittest import mock

import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

import ds_llep
from ds_llep import fetch
from ds_llep.bench.live_bytes import memory_counter
from ds_llep.bench.measure import agreed_max
from ds_llep.bench.ranks import device_name, initialize, say
from ds_llep.bench.routing import force_routing

MODES = ("autoep", "owner", "shards")
CHECKPOINTING = ("none", "non_reentrant", "reentrant")
SKEW = 0.95
VOCABULARY = 64
COLUMNS = ("layers", "checkpointing", "mode", "kept MB", "per layer KB", "peak MB", "experts MB")


@dataclass(frozen=True)
class Shape:
    """A model, and the tokens that each rank feeds it."""

    layers: int
    hidden: int = 256
    ffn: int = 512
    experts: int = 16
    top_k: int = 2
    tokens: int = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=whole_numbers, default="4,8,16")
    parser.add_argument("--ep-size", type=int, default=2)
    parser.add_argument("--checkpointing", type=some_of(CHECKPOINTING), default="none")
    parser.add_argument("--modes", type=some_of(MODES), default=",".join(MODES))
    for field in fields(Shape)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--offload", action="store_true", help="parameters and optimizer to CPU")
    parser.add_argument("--json", metavar="FILE", help="append a line for each measurement")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args()
    initialize("WARNING")
    gc.freeze()  # collections then leave out what imports made, which is most of their work
    sizes = {field.name: getattr(args, field.name) for field in fields(Shape)[1:]}
    about = {"ranks": dist.get_world_size(), "ep_size": args.ep_size, "offload": args.offload}
    about |= {**sizes, "device": device_name(), "torch": torch.__version__}
    about |= {"deepspeed": deepspeed.__version__, "transformers": transformers.__version__}
    say("ZeRO-3, bf16, " + ", ".join(f"{name} {value}" for name, value in about.items()))
    say(row(COLUMNS, args.markdown))
    if args.markdown:
        say(row(["---"] * len(COLUMNS), True))

    failed = False
    fewer: dict[tuple[str, str], tuple[int, int]] = {}
    for point in itertools.product(args.layers, args.checkpointing, args.modes):
        layers, checkpointing, mode = point
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what engines say, not into the table
                shape = Shape(layers, **sizes)
                found = measure(shape, mode, args.ep_size, checkpointing, args.offload)
        except ValueError as error:  # what an engine refuses, it refuses on all ranks alike
            failed = True
            say(row([*point, f"failed: {error}"], args.markdown))
            continue
        except Exception as error:
            # The others may be waiting for this rank; the launcher ends them when it exits.
            rank = dist.get_rank()
            print(row([*point, f"failed on rank {rank}: {error!r}"], args.markdown), flush=True)
            raise
        kept, peak, experts = (f"{found[key] / 1e6:.2f}" for key in ("kept", "peak", "experts"))
        layers_before, kept_before = fewer.get((checkpointing, mode), (layers, 0))
        fewer[checkpointing, mode] = layers, found["kept"]
        added = layers - layers_before
        slope = f"{(found['kept'] - kept_before) / added / 1e3:.1f}" if added else "-"
        say(row([*point, kept, slope, peak, experts], args.markdown))
        if args.json and dist.get_rank() == 0:
            line = {"layers": layers, "checkpointing": checkpointing, "mode": mode, **about}
            line |= {f"{name}_bytes": value for name, value in found.items()}
            with open(args.json, "a") as file:
                file.write(json.dumps(line) + "\n")
    dist.destroy_process_group()
    raise SystemExit(failed)


def measure(
    shape: Shape, mode: str, ep_size: int, checkpointing: str = "none", offload: bool = False
) -> dict[str, int]:
    """``kept``, ``peak``, ``experts`` and ``workspace`` in bytes; see the top of the file.

    Raises:
        ValueError: the engine refuses the settings, or no plan spilled where one could.
    """
    engine = None
    # A workspace of this engine's own: one that is there already may be larger than it needs.
    workspace = type(fetch.WORKSPACE)()
    with mock.patch.object(fetch, "WORKSPACE", workspace), memory_counter() as memory:
        try:
            engine = make_engine(shape, mode, ep_size, checkpointing, offload)
            layers = [m for m in engine.module.modules() if isinstance(m, AutoEPMoELayer)]
            inputs = draw(shape, ep_size, layers)
            engine.backward(engine(**inputs).loss)
            engine.step()
            gc.collect()
            before = memory.live()
            memory.reset_peak()
            loss = engine(**inputs).loss
            gc.collect()
            kept = memory.live() - before
            engine.backward(loss)
            weights = [weight for layer in layers for weight in layer.experts.parameters()]
            found = {
                "kept": kept,
                "peak": memory.peak() - before + workspace.nbytes(),
                "experts": sum(weight.ds_numel * weight.element_size() for weight in weights),
                "workspace": workspace.nbytes(),
            }
            spilled = sum(ds_llep.status(engine).get("spilled_tokens", []))
        finally:
            if engine is not None:
                engine.destroy()
    if not agreed_max(spilled) and mode != "autoep" and ep_size > 1:
        raise ValueError("no plan spilled, so this would measure nothing")
    return {name: int(agreed_max(value)) for name, value in found.items()}


def draw(shape: Shape, ep_size: int, layers: list[AutoEPMoELayer]) -> dict[str, torch.Tensor]:
    """This rank's tokens; fixes the skewed routing of all layers."""
    device = get_accelerator().current_device_name()
    generator = torch.Generator().manual_seed(dist.get_rank())
    heat_E = torch.full((shape.experts,), (1 - SKEW) / max(ep_size - 1, 1))
    heat_E[: shape.experts // ep_size] = SKEW
    for layer in layers:
        ids_TK = heat_E.expand(shape.tokens, -1).multinomial(shape.top_k, generator=generator)
        force_routing(layer, ids_TK.to(device))
    tokens = torch.randint(VOCABULARY, (1, shape.tokens), generator=generator).to(device)
    return {"input_ids": tokens, "labels": tokens}


def make_engine(shape: Shape, mode: str, ep_size: int, checkpointing: str, offload: bool):
    """A Qwen3-MoE of this shape, with next to no vocabulary and attention, under ZeRO-3."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=shape.tokens,
        moe_intermediate_size=shape.ffn,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    model.train()
    zero = {
        "stage": 3,
        # DeepSpeed's defaults leave gathered weights alive that are used again within 1e9
        # elements, in a small model all of them: they would hide what is to be measured.
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 1_000_000,
    }
    if offload:
        zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "expert_parallel": {"enabled": True, "autoep_size": ep_size},
    }
    if mode != "autoep":
        llep = {"enabled": True, "imbalance_threshold": 1.0, "min_tokens_per_gemm": 1}
        settings["llep"] = {**llep, "weight_source": mode}
    parameters = model.parameters()
    return deepspeed.initialize(model=model, model_parameters=parameters, config=settings)[0]


def row(cells, markdown: bool) -> str:
    if markdown:
        return f"| {' | '.join(map(str, cells))} |"
    return "  ".join(f"{cell!s:>13}" for cell in cells)


def whole_numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def some_of(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    def names_in(text: str) -> list[str]:
        items = text.split(",")
        if not set(items) <= set(names):
            raise argparse.ArgumentTypeError(f"valid are {', '.join(names)}, got {text!r}")
        return items

    return names_in


if __name__ == "__main__":
    main()

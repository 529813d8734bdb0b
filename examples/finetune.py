"""Fine-tune a Mixture-of-Experts language model with DeepSpeed; the JSON decides the rest.

    deepspeed examples/finetune.py --deepspeed_config ds_configs/demo_gpu_zero3_ep2.json

A plain DeepSpeed loop: the only lines about ds_llep are the import, which registers the plugin, and
calls of `ds_llep.status`, which report what it does. A JSON without an "llep" section, or with
`"enabled": false`, trains the same model with standard expert parallelism, for comparison.
"""

import argparse
import json
import math
import sys
import time

import deepspeed
import deepspeed.comm as dist
import torch
from common import (
    BUILTIN_MODELS,
    builtin_model,
    dequantized,
    encode_bytes,
    read_documents,
    token_blocks,
)
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import ds_llep


def parse_args():
    parser = argparse.ArgumentParser(
        description="Fine-tune a Mixture-of-Experts language model with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--deepspeed_config", required=True, help="DeepSpeed JSON")
    add("--model", default="tiny-qwen3-moe", help=f"{', '.join(BUILTIN_MODELS)}, or a HF path")
    add("--data", default="builtin", help='"builtin", a .txt file, or .jsonl with a "text" field')
    add("--steps", type=int, default=60, help="optimizer steps, counted from the very first run")
    add("--seq-len", type=int, default=128, help="tokens per sequence")
    add("--micro-batch", type=int, help="sequences per rank, in place of the JSON's")
    add("--checkpointing", action="store_true", help="recompute activations in backward")
    add("--lr", type=float, help="learning rate, in place of the JSON's")
    add("--seed", type=int, default=0, help="of the weights of a built-in model and the data order")
    add(
        "--skew",
        type=float,
        default=0.0,
        help="demonstration only: bias every router, so that the popularity of experts "
        "starts as a Zipf law with this exponent",
    )
    add("--save", help="directory to write a DeepSpeed checkpoint to at the end")
    add("--resume", help="directory of a DeepSpeed checkpoint to go on from")
    add("--save-hf", help="directory to write the model to at the end, for from_pretrained")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args()


def read_ds_config(args) -> dict:
    with open(args.deepspeed_config) as file:
        ds_config = json.load(file)
    if args.micro_batch:
        ds_config.pop("train_batch_size", None)
        ds_config["train_micro_batch_size_per_gpu"] = args.micro_batch
    if args.lr:
        ds_config["optimizer"]["params"]["lr"] = args.lr
    return ds_config


def load_model(args, ds_config: dict):
    """The model, the function that turns text into tokens, and the tokenizer if there is one."""
    if args.model in BUILTIN_MODELS:
        return builtin_model(args.model, args.seed), encode_bytes, None
    # Under ZeRO-3 this object, while it lives, makes from_pretrained partition as it loads; with
    # llep on, one decoder layer at a time.
    hf_config = HfDeepSpeedConfig(ds_config)
    enabled = [name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled")]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[enabled[0]] if enabled else "float32"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, **dequantized(args.model))
    del hf_config
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return model, lambda text: tokenizer(text, verbose=False)["input_ids"], tokenizer


def bias_routers(model: torch.nn.Module, skew: float) -> None:
    """Add a constant to every router logit: -skew * log(1 + i) for the i-th expert of a layer.

    The count of i starts at another expert in each layer, so that the hot experts sit on different
    ranks. It is a hook and no state: parameters and checkpoints stay what they are without it.
    """
    layers = [module for module in model.modules() if isinstance(module, AutoEPMoELayer)]
    for index, layer in enumerate(layers):
        first = index * layer.num_experts // len(layers)
        place_E = (torch.arange(layer.num_experts) - first) % layer.num_experts
        bias_E = -skew * torch.log1p(place_E.float())

        def add_bias(gate, inputs, logits_TE, bias_E=bias_E):
            return logits_TE + bias_E.to(logits_TE)

        layer.router.gate.register_forward_hook(add_bias)


def main():
    args = parse_args()
    ds_config = read_ds_config(args)
    deepspeed.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()

    def say(*words):
        if rank == 0:
            tqdm.write(" ".join(words))

    model, encode, tokenizer = load_model(args, ds_config)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = token_blocks(read_documents(args.data), encode, args.seq_len, args.seed)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=ds_config
    )
    llep = ds_config.get("llep", {}).get("enabled", False)
    assert ds_llep.status(engine)["active"] == llep, "llep in the JSON, but not in the engine"
    if args.skew:
        bias_routers(engine.module, args.skew)
        say(
            f"NOTE: --skew {args.skew} BIASES EVERY ROUTER for this demonstration. The imbalance "
            "below is made, not learned."
        )

    first_step = 0
    if args.resume:
        path, client_state = engine.load_checkpoint(args.resume)
        if path is None:
            raise SystemExit(f"no checkpoint under {args.resume}")
        first_step = client_state["step"]
        say(f"resumed from {path} after {first_step} steps")

    def save_hf():
        ds_llep.save_pretrained(engine, args.save_hf, tokenizer=tokenizer)
        say(f"saved the model to {args.save_hf}")

    if first_step >= args.steps:
        if not args.save_hf:
            raise SystemExit(f"nothing to do: {first_step} steps are done, --steps is {args.steps}")
        save_hf()
        return

    micro_batch = engine.train_micro_batch_size_per_gpu()
    micro_steps = engine.gradient_accumulation_steps()
    tokens_per_step = world * micro_steps * micro_batch * args.seq_len
    say(
        f"{args.model}: {world} ranks, ZeRO-{engine.zero_optimization_stage()}, "
        f"{tokens_per_step} tokens a step, {len(blocks)} blocks of text, llep "
        f"{'on' if llep else 'off'}"
    )

    def next_loss(micro_step: int) -> torch.Tensor:
        # The place in the (endless) list of blocks depends on step and rank only: ranks never share
        # a block, and a resumed run goes on where the last one stopped.
        first = (micro_step * world + rank) * micro_batch
        batch = blocks[torch.arange(first, first + micro_batch) % len(blocks)].to(engine.device)
        return engine(input_ids=batch, labels=batch, use_cache=False).loss

    losses, before, after = [], [], []
    engine.train()
    bar = tqdm(
        range(first_step, args.steps),
        disable=rank != 0,
        unit="step",
        mininterval=1 if sys.stderr.isatty() else 10,  # a log file keeps every state of the bar
    )
    started = time.perf_counter()
    for step in bar:
        mean_loss = torch.zeros((), device=engine.device)
        for micro_step in range(step * micro_steps, (step + 1) * micro_steps):
            loss = next_loss(micro_step)
            engine.backward(loss)
            engine.step()
            mean_loss += loss.detach().float() / micro_steps
        dist.all_reduce(mean_loss)
        losses.append(mean_loss.item() / world)
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss is {losses[-1]} at step {step}")
        if step == first_step:
            started = time.perf_counter()  # the first step compiles and allocates: not timed
        note = {"loss": f"{losses[-1]:.3f}"}
        if step > first_step:
            tokens = tokens_per_step * (step - first_step)
            note["tokens/s"] = f"{tokens / (time.perf_counter() - started):.0f}"
        if llep:
            status = ds_llep.status(engine)
            before.append(status["load_ratio_before"])
            after.append(status["load_ratio_after"])
            note["load ratio"] = f"{max(before[-1]):.2f} -> {max(after[-1]):.2f}"
        bar.set_postfix(note, refresh=False)
    seconds = time.perf_counter() - started
    bar.close()

    if args.save:
        engine.save_checkpoint(args.save, client_state={"step": args.steps})
        say(f"saved a checkpoint to {args.save}")
    if args.save_hf:
        save_hf()
    if llep:
        report_layers(say, ds_llep.status(engine), before, after)
    if len(losses) > 1:
        say(f"tokens/s: {tokens_per_step * (len(losses) - 1) / seconds:.0f} on {world} ranks")
    result = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    if llep:
        result += f", mean load ratio {mean(before):.2f} -> {mean(after):.2f}"
    say(f"{len(losses)} steps on {world} {get_accelerator().device_name()} ranks: {result}")
    engine.destroy()
    dist.destroy_process_group()


def mean(ratios_by_step: list[list[float]]) -> float:
    return sum(map(sum, ratios_by_step)) / sum(map(len, ratios_by_step))


def report_layers(say, status: dict, before: list[list[float]], after: list[list[float]]) -> None:
    """A table of the layers as rank 0's EP group saw them: 1.00 is perfect balance."""
    say(f"load ratio (max / mean rows per rank), EP size {status['ep_size']}, by layer:")
    say("  layer   all steps       last micro-batch")
    say("          before  after   before  after  spilled tokens  foreign experts")
    for layer in range(status["layers"]):
        mean_before = mean([[step[layer]] for step in before])
        mean_after = mean([[step[layer]] for step in after])
        say(
            f"  {layer:5}   {mean_before:6.2f} {mean_after:6.2f}   "
            f"{before[-1][layer]:6.2f} {after[-1][layer]:6.2f}  "
            f"{status['spilled_tokens'][layer]:14}  {status['foreign_experts'][layer]:15}"
            f"{'  bypassed' if status['bypassed'][layer] else ''}"
        )


if __name__ == "__main__":
    main()

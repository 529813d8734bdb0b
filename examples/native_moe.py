"""Train a model of one's own with DeepSpeed's MoE layers; the JSON switches llep on.

    deepspeed --num_gpus 2 examples/native_moe.py \\
        --deepspeed_config ds_configs/native_moe_zero2.json

A small transformer with a `deepspeed.moe.layer.MoE` in every block, in a plain DeepSpeed loop. The
only lines about ds_llep are the import and calls of `ds_llep.status`, which report what it does.
With `"llep": {"enabled": false}` the same script trains the same model by DeepSpeed alone.
"""

import argparse
import json
import time

import deepspeed
import deepspeed.comm as dist
import torch
from common import VOCAB_SIZE, encode_bytes, read_documents, token_blocks
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn
from torch.nn import functional as F

import ds_llep

HIDDEN, HEADS, BLOCKS, EXPERTS = 128, 4, 4, 8


def parse_args():
    parser = argparse.ArgumentParser(
        description="Train a small transformer with DeepSpeed's own MoE layers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--deepspeed_config", required=True, help="DeepSpeed JSON")
    add("--ep-size", type=int, default=2, help="ranks that share the experts of a layer")
    add("--data", default="builtin", help='"builtin", a .txt file, or .jsonl with a "text" field')
    add("--steps", type=int, default=20)
    add("--seq-len", type=int, default=128)
    add("--micro-batch", type=int, help="sequences per rank, in place of the JSON's")
    add("--seed", type=int, default=0, help="of the weights and the data order")
    add(
        "--skew",
        type=float,
        default=0.0,
        help="demonstration only: shift what every gate sees, so that the popularity of experts "
        "starts as a Zipf law with about this exponent",
    )
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args()


class Block(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        expert = nn.Sequential(
            nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN)
        )
        self.moe = MoE(HIDDEN, expert, EXPERTS, ep_size, k=2, drop_tokens=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, sequence, head size]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y, aux_loss, _ = self.moe(self.moe_norm(x))
        return x + y, aux_loss


class Model(nn.Module):
    def __init__(self, seq_len: int, ep_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, HIDDEN)
        self.positions = nn.Parameter(0.1 * torch.randn(seq_len, HIDDEN))
        self.blocks = nn.ModuleList(Block(ep_size) for _ in range(BLOCKS))
        self.head = nn.Linear(HIDDEN, VOCAB_SIZE, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss, of the next token and 0.01 times that of the gates."""
        x, aux_loss = self.tokens(tokens) + self.positions, 0.0
        for block in self.blocks:
            x, aux = block(x)
            aux_loss = aux_loss + aux
        logits = self.head(x[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 0.01 * aux_loss


def bias_gates(model: nn.Module, skew: float) -> None:
    """Add about -skew * log(1 + i) to the logits of every layer's i-th expert.

    DeepSpeed's gate has no bias and no hook behind its product, so its input is shifted by what
    the initial weights turn into those logits. Parameters and checkpoints stay what they are.
    """
    for block in model.blocks:
        gate = block.moe.deepspeed_moe.gate
        bias_E = -skew * torch.log1p(torch.arange(EXPERTS, device=gate.wg.weight.device).float())
        shift_D = torch.linalg.pinv(gate.wg.weight.detach().float()) @ bias_E

        def add_shift(gate, inputs, shift_D=shift_D):
            x_TD, *others = inputs
            return x_TD + shift_D.to(x_TD), *others

        gate.register_forward_pre_hook(add_shift)


def main():
    args = parse_args()
    with open(args.deepspeed_config) as file:
        ds_config = json.load(file)
    if args.micro_batch:
        ds_config["train_micro_batch_size_per_gpu"] = args.micro_batch
    deepspeed.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    model = Model(args.seq_len, args.ep_size)
    # ZeRO must not average an expert over ranks that hold others: a group of its own.
    params = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    engine, *_ = deepspeed.initialize(model=model, model_parameters=params, config=ds_config)
    llep = ds_config.get("llep", {}).get("enabled", False)
    assert ds_llep.status(engine)["active"] == llep, "llep in the JSON, but not in the engine"
    if args.skew:
        bias_gates(engine.module, args.skew)
        if rank == 0:
            print(f"NOTE: --skew {args.skew} BIASES EVERY GATE. The imbalance is made, not learned")

    blocks = token_blocks(read_documents(args.data), encode_bytes, args.seq_len, args.seed)
    micro_batch = engine.train_micro_batch_size_per_gpu()
    micro_steps = engine.gradient_accumulation_steps()
    losses, before, after = [], [], []
    engine.train()
    for step in range(args.steps):
        if step == 1:
            started = time.perf_counter()  # the first step compiles and allocates: not timed
        mean_loss = torch.zeros((), device=engine.device)
        for micro_step in range(step * micro_steps, (step + 1) * micro_steps):
            first = (micro_step * world + rank) * micro_batch
            batch = blocks[torch.arange(first, first + micro_batch) % len(blocks)]
            loss = engine(batch.to(engine.device))
            engine.backward(loss)
            engine.step()
            mean_loss += loss.detach() / micro_steps
        dist.all_reduce(mean_loss)
        losses.append(mean_loss.item() / world)
        if llep:
            status = ds_llep.status(engine)
            before += status["load_ratio_before"]
            after += status["load_ratio_after"]

    if rank == 0:
        result = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        if args.steps > 1:
            tokens = world * micro_steps * micro_batch * args.seq_len * (args.steps - 1)
            result += f", {tokens / (time.perf_counter() - started):.0f} tokens/s"
        if llep:
            ratios = (sum(ratios) / len(ratios) for ratios in (before, after))
            result += ", mean load ratio {:.2f} -> {:.2f}".format(*ratios)
        print(f"{args.steps} steps on {world} ranks, llep {'on' if llep else 'off'}: {result}")
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Fine-tune with Accelerate: a training loop of one's own, the DeepSpeed JSON switches llep on.

    accelerate launch --config_file ds_configs/accelerate_zero3_ep2.yaml examples/accelerate_loop.py
    torchrun --nproc_per_node 2 examples/accelerate_loop.py \\
        --deepspeed_config ds_configs/accelerate_zero3_ep2.json

In the first form Accelerate's config file names the DeepSpeed JSON, in the second one the script
does. Either way `accelerator.prepare` calls `deepspeed.initialize`, and finds the "llep" section.
"""

import argparse
from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DummyOptim, set_seed
from common import BUILTIN_MODELS, load, on_gpu, read_documents, token_blocks

import ds_llep


def parse_args():
    parser = argparse.ArgumentParser(
        description="Fine-tune a Mixture-of-Experts model with Accelerate.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--deepspeed_config", help="DeepSpeed JSON, where Accelerate's config file names none")
    add("--model", default="tiny-qwen3-moe", help=f"{', '.join(BUILTIN_MODELS)}, or a HF path")
    add("--data", default="builtin", help='"builtin", a .txt file, or .jsonl with a "text" field')
    add("--steps", type=int, default=20)
    add("--seq-len", type=int, default=128)
    add("--micro-batch", type=int, default=4)
    add("--accumulate", type=int, default=1, help="micro-batches of a step")
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args()


def main():
    args = parse_args()
    if not on_gpu():
        PartialState(cpu=True)  # else Accelerate counts one process, whoever started the others
    plugin = None
    if args.deepspeed_config:
        plugin = DeepSpeedPlugin(hf_ds_config=args.deepspeed_config)
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=args.accumulate)
    set_seed(args.seed)
    # After the Accelerator: under ZeRO-3 it makes transformers partition as it loads.
    model, encode = load(args.model, args.seed)
    blocks = token_blocks(read_documents(args.data), encode, args.seq_len, args.seed)
    data = torch.utils.data.DataLoader(blocks, batch_size=args.micro_batch, shuffle=True)
    # The optimizer is in the JSON; DummyOptim fills its "auto" values.
    engine, _, data = accelerator.prepare(model, DummyOptim(model.parameters(), lr=args.lr), data)

    losses = []
    engine.train()
    epochs = chain.from_iterable(repeat(data))
    for batch in islice(epochs, args.steps * args.accumulate):
        with accelerator.accumulate(engine):
            loss = engine(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)  # with DeepSpeed this steps, too
        losses.append(accelerator.reduce(loss.detach(), "mean").item())

    status = ds_llep.status(engine)
    assert status["active"], "Accelerate's engine does not run ds_llep"
    before, after = (max(status[f"load_ratio_{when}"]) for when in ("before", "after"))
    accelerator.print(
        f"{args.steps} steps on {accelerator.num_processes} ranks through Accelerate: "
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, last load ratio {before:.2f} -> {after:.2f}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()

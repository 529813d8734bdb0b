"""Fine-tune with Hugging Face's Trainer: the DeepSpeed JSON switches everything on.

    deepspeed examples/hf_trainer.py --deepspeed_config ds_configs/hf_trainer_zero3_ep2.json

The Trainer knows nothing of ds_llep. `import ds_llep` registers the plugin, and the Trainer's own
call of `deepspeed.initialize` finds the "llep" section in the JSON. `LLEPCallback` adds load ratios
to what the Trainer logs; it could be left out.
"""

import argparse

import deepspeed
import deepspeed.comm as dist
from common import BUILTIN_MODELS, load, on_gpu, read_documents, token_blocks
from transformers import Trainer, TrainingArguments

import ds_llep
from ds_llep.hf import LLEPCallback


def parse_args():
    parser = argparse.ArgumentParser(
        description="Fine-tune a Mixture-of-Experts model with Hugging Face's Trainer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--deepspeed_config", required=True, help="DeepSpeed JSON")
    add("--model", default="tiny-qwen3-moe", help=f"{', '.join(BUILTIN_MODELS)}, or a HF path")
    add("--data", default="builtin", help='"builtin", a .txt file, or .jsonl with a "text" field')
    add("--steps", type=int, default=20)
    add("--seq-len", type=int, default=128)
    add("--micro-batch", type=int, default=4)
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--output-dir", default="checkpoints/hf_trainer")
    add("--save-steps", type=int, help="steps between two checkpoints in the output directory")
    add("--resume", help="directory of a checkpoint to go on from")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args()


def main():
    args = parse_args()
    deepspeed.init_distributed()  # on CPU, accelerate leaves this to the script
    # Before the model: under ZeRO-3 these make transformers partition parameters as it creates
    # them.
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        deepspeed=args.deepspeed_config,
        max_steps=args.steps,
        per_device_train_batch_size=args.micro_batch,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        bf16=on_gpu(),
        use_cpu=not on_gpu(),
        logging_steps=5,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 0,
        report_to="none",
        seed=args.seed,
    )
    model, encode = load(args.model, args.seed)
    blocks = token_blocks(read_documents(args.data), encode, args.seq_len, args.seed)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
    )
    LLEPCallback.attach(trainer)
    trainer.train(resume_from_checkpoint=args.resume)

    status = ds_llep.status(trainer.model_wrapped)
    assert status["active"], "the Trainer's engine does not run ds_llep"
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses = [entry["loss"] for entry in history]
        print("means of all layers and of the steps since the line before:")
        for entry in history:
            before, after = (entry[f"llep/load_ratio_{when}_mean"] for when in ("before", "after"))
            print(
                f"  step {entry['step']}: loss {entry['loss']:.3f}, "
                f"load ratio {before:.2f} -> {after:.2f} {'#' * round(40 * (before - 1))}"
            )
        print(
            f"{args.steps} steps on {dist.get_world_size()} ranks through HF Trainer: "
            f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

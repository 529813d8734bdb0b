"""Fine-tune with TRL's SFTTrainer: the DeepSpeed JSON switches everything on.

    torchrun --nproc_per_node 2 examples/trl_sft.py \\
        --deepspeed_config ds_configs/hf_trainer_zero3_ep2.json

SFTTrainer is a Trainer: it calls `deepspeed.initialize`, and all that it knows of ds_llep is the
"llep" section in the JSON. Documents are packed, or with `--prompts` cut into a prompt and a
completion of which only the completion is learned. `--lora` trains PEFT's adapters on attention and
routed experts, and saves them in the output directory.
"""

import argparse

import deepspeed
import deepspeed.comm as dist
from common import BUILTIN_MODELS, builtin_model, on_gpu, read_documents
from datasets import Dataset
from transformers import AutoTokenizer, ByT5Tokenizer
from trl import SFTConfig, SFTTrainer

import ds_llep


def parse_args():
    parser = argparse.ArgumentParser(
        description="Fine-tune a Mixture-of-Experts model with TRL's SFTTrainer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--deepspeed_config", required=True, help="DeepSpeed JSON")
    add("--model", default="tiny-qwen3-moe", help=f"{', '.join(BUILTIN_MODELS)}, or a HF path")
    add("--data", default="builtin", help='"builtin", a .txt file, or .jsonl with a "text" field')
    add("--prompts", action="store_true", help="learn the second half of each document only")
    add("--lora", type=int, default=0, help="train adapters of this rank, by PEFT")
    add("--checkpointing", choices=["reentrant", "no_reentrant"], help="of activations")
    add("--steps", type=int, default=20)
    add("--seq-len", type=int, default=128)
    add("--micro-batch", type=int, default=4)
    add("--accumulate", type=int, default=1, help="micro-batches of a step")
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--output-dir", default="checkpoints/trl_sft")
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args()


def main():
    args = parse_args()
    deepspeed.init_distributed()  # on CPU, accelerate leaves this to the script
    # Before the model: under ZeRO-3 these make transformers partition as it creates or loads one.
    training_args = SFTConfig(
        output_dir=args.output_dir,
        deepspeed=args.deepspeed_config,
        packing=not args.prompts,
        max_length=args.seq_len,
        max_steps=args.steps,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.accumulate,
        gradient_checkpointing=args.checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": args.checkpointing == "reentrant"},
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        bf16=on_gpu(),
        use_cpu=not on_gpu(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    if args.model in BUILTIN_MODELS:  # bytes are its tokens
        model, tokenizer = builtin_model(args.model, args.seed), ByT5Tokenizer(extra_ids=0)
    else:
        model, tokenizer = args.model, AutoTokenizer.from_pretrained(args.model)
    documents = read_documents(args.data)
    if args.prompts:
        columns = {
            "prompt": [text[: min(len(text), args.seq_len) // 2] for text in documents],
            "completion": [text[min(len(text), args.seq_len) // 2 :] for text in documents],
        }
    else:
        columns = {"text": documents}
    adapters = None
    if args.lora:
        from peft import LoraConfig

        adapters = LoraConfig(
            r=args.lora,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=adapters,
    )
    trainer.train()
    if args.lora:
        trainer.save_model()

    status = ds_llep.status(trainer.model_wrapped)
    assert status["active"], "SFTTrainer's engine does not run ds_llep"
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        before, after = (max(status[f"load_ratio_{when}"]) for when in ("before", "after"))
        print(
            f"{args.steps} steps on {dist.get_world_size()} ranks through SFTTrainer: loss "
            f"{losses[0]:.3f} -> {losses[-1]:.3f}, last load ratio {before:.2f} -> {after:.2f}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""The memory calculator: model sizes as published, and bytes as they are measured on CPU ranks."""

from __future__ import annotations

import gc
from unittest import mock

import deepspeed.comm as dist
import pytest
import torch
import transformers
from engines import ds_config, enable_checkpointing, initialize, moe_layers

import ds_llep
from ds_llep import fetch
from ds_llep.bench.footprint import Buffers, Routing, Setup, footprint
from ds_llep.bench.live_bytes import memory_counter
from ds_llep.bench.models import measure as measure_model
from ds_llep.bench.routing import force_routing

BUFFERS = Buffers(reduce_bucket=50_000, prefetch_bucket=0, max_live=0)
TOKENS = 384
HOT = 0.9


def config() -> transformers.PretrainedConfig:
    """A model in which experts, the rest, activations and the loss all matter."""
    return transformers.Qwen3MoeConfig(
        vocab_size=640,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=TOKENS,
        moe_intermediate_size=192,
        num_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
    )


def measured(stage: int, ep_size: int, dtype: str, checkpointing: bool, seed: int) -> dict:
    """Bytes on this rank: between two micro-batches, after a forward, at the highest point."""
    zero = {
        "reduce_bucket_size": BUFFERS.reduce_bucket,
        "stage3_prefetch_bucket_size": BUFFERS.prefetch_bucket,
        "stage3_max_live_parameters": BUFFERS.max_live,
        "stage3_max_reuse_distance": BUFFERS.max_live,
        "overlap_comm": False,
    }
    settings = ds_config(
        stage, ep_size, dtype, llep={}, zero=zero, gradient_accumulation_steps=2
    )
    import faulthandler; faulthandler.dump_traceback_later(25, repeat=True)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    ids = torch.randint(640, (1, TOKENS), generator=generator)
    heat_E = torch.full((8,), 1 - HOT)
    heat_E[: 8 // ep_size] = HOT
    workspace = type(fetch.WORKSPACE)()
    with mock.patch.object(fetch, "WORKSPACE", workspace), memory_counter() as memory:
        model = transformers.AutoModelForCausalLM.from_config(
            config(), dtype=torch.bfloat16 if dtype == "bf16" else torch.float32
        )
        enable_checkpointing(model, "non_reentrant" if checkpointing else "none")
        engine = initialize(model, settings)
        del model
        for layer in moe_layers(engine.module):
            force_routing(layer, heat_E.expand(TOKENS, -1).multinomial(2, generator=generator))
        for _ in range(3):  # the third is the first of its step
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        gc.collect()
        steady = memory.live()
        memory.reset_peak()
        loss = engine(input_ids=ids, labels=ids).loss
        gc.collect()
        kept = memory.live() - steady
        engine.backward(loss)
        peak = memory.peak()
        status = ds_llep.status(engine)
        engine.destroy()
    return {
        "steady": steady,
        "kept": kept,
        "peak": peak + workspace.nbytes(),
        "foreign": max(status["foreign_experts"]),
        "load_ratio": max(status["load_ratio_after"]),
        "workspace": workspace.nbytes(),
    }

"""Hugging Face models of the shapes that are measured, with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ds_llep.bench.fine_tuning import ModelSettings

MODELS = {  # by the name of the shape of its MoE layers: all the rest of it
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "tiny": {
        "model_type": "qwen3_moe",
        "vocab_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "tiny-gpt-oss": {
        "model_type": "gpt_oss",
        "vocab_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


def make_model(
    settings: ModelSettings, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """A model in training mode, its random weights the same on every rank, made on the device.

    Every rank holds all experts until AutoEP shards them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shape, model = settings.shape, MODELS[settings.shape_name]
    if model["model_type"] == "gpt_oss":
        experts = {"intermediate_size": shape.ffn_size, "num_local_experts": shape.num_experts}
    else:
        experts = {"moe_intermediate_size": shape.ffn_size, "num_experts": shape.num_experts}
        experts["norm_topk_prob"] = True
    config = AutoConfig.for_model(
        **model,
        **experts,
        hidden_size=shape.hidden_size,
        num_hidden_layers=settings.layers,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=settings.seq_len,
        use_cache=False,
    )
    torch.manual_seed(settings.seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()

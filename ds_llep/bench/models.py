"""The sizes of MoE models that people fine-tune, by name or from a Hugging Face config.

A model is built on the meta device, which costs no memory, and AutoEP's own detection says which of
its parameters are routed experts: what is counted here is what an engine would shard. What
attention keeps for backward is read from the config, in the two forms that AutoEP's families have.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.utils import logger

import ds_llep  # noqa: F401  registers AutoEP's preset for gpt-oss

_MLA = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_QWEN3 = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": False,
}
BUILT_IN: dict[str, dict[str, Any]] = {  # arguments of AutoConfig.for_model, as published
    "qwen3-30b-a3b": {
        **_QWEN3,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
    },
    "qwen3-235b-a22b": {
        **_QWEN3,
        "hidden_size": 4096,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
    "gpt-oss-20b": {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128},
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek-v3": {
        **_MLA,
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
    },
    "deepseek-v2-lite": {
        **_MLA,
        "q_lora_rank": None,
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
    },
}


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the memory of a model depends on; ``numel`` are parameters."""

    layers: int
    moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    ffn_size: int
    """F, the width of one routed expert."""
    expert_numel: int
    """Of one routed expert."""
    other_numel: int
    """Of all that is no routed expert."""
    other_layer_numel: int
    """The same in the largest decoder layer."""
    embedding_numel: int
    """Of the largest parameter outside of decoder layers."""
    vocabulary: int
    dense_width: int
    """Widths of shared experts and dense MLPs, summed over all layers."""
    attention: Attention

    @property
    def experts_numel(self) -> int:
        """Of all routed experts."""
        return self.moe_layers * self.num_experts * self.expert_numel

    @property
    def numel(self) -> int:
        """Of the whole model."""
        return self.experts_numel + self.other_numel


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Elements of a token that a layer's attention keeps for backward, by what keeps them."""

    normed: int
    """Go through an RMSNorm inside of attention."""
    latent: int
    """Come out of one and into a projection."""
    rotated: int
    """Turned by rotary embedding."""
    read: int
    """Queries, keys and values."""
    out: int
    """Attention's result."""


def find_model(name: str) -> ModelSize:
    """The model of a built-in name, of a Hugging Face directory or of its ``config.json``.

    Raises:
        ValueError: neither of them; an unknown architecture; no MoE layer that AutoEP knows.
    """
    from transformers import AutoConfig

    if name in BUILT_IN:
        return measure(AutoConfig.for_model(**BUILT_IN[name]))
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"--model {name!r} is no built-in name ({', '.join(BUILT_IN)}) and no file or "
            "directory; nothing is downloaded, so download the model's config.json first"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model {name!r}: the directory has no config.json")
    return measure(AutoConfig.from_pretrained(path, local_files_only=True))


def measure(config: Any) -> ModelSize:
    """Count what a model of a Hugging Face config has; of a multimodal one the text model.

    Raises:
        ValueError: no MoE layer that AutoEP knows.
    """
    from transformers import AutoModelForCausalLM

    config = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    level = logger.level
    logger.setLevel(logging.ERROR)  # detection repeats itself for every layer
    try:
        settings = parse_autoep_config({"enabled": True, "autoep_size": 1})
        specs = AutoEP(model, settings).ep_parser()
    finally:
        logger.setLevel(level)
    if not specs:
        raise ValueError(f"AutoEP finds no MoE layer in a model of type {config.model_type!r}")
    experts = tuple(f"{spec.moe_module_name}.{spec.experts_name}." for spec in specs)
    numel = {"experts": 0, "other": 0}
    by_layer: dict[str, int] = {}
    embedding = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith(experts):
            numel["experts"] += parameter.numel()
            continue
        numel["other"] += parameter.numel()
        layer = re.search(r"\blayers\.(\d+)\.", parameter_name)
        if layer is None:
            embedding = max(embedding, parameter.numel())
        else:
            by_layer[layer[1]] = by_layer.get(layer[1], 0) + parameter.numel()
    first = specs[0]
    return ModelSize(
        layers=config.num_hidden_layers,
        moe_layers=len(specs),
        num_experts=first.num_experts,
        top_k=first.top_k,
        hidden_size=first.hidden_size,
        ffn_size=first.ffn_hidden_size,
        expert_numel=numel["experts"] // (len(specs) * first.num_experts),
        other_numel=numel["other"],
        other_layer_numel=max(by_layer.values()),
        embedding_numel=embedding,
        vocabulary=config.vocab_size,
        dense_width=sum(
            module.in_features
            for module_name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module_name.endswith("down_proj")
        ),
        attention=_attention(config, model),
    )


def _attention(config: Any, model: torch.nn.Module) -> Attention:
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        latent = config.kv_lora_rank + (config.q_lora_rank or 0)
        query = config.qk_nope_head_dim + config.qk_rope_head_dim
        return Attention(
            normed=latent,
            latent=latent,
            rotated=(heads + 1) * config.qk_rope_head_dim,
            read=heads * (2 * query + config.v_head_dim),
            out=heads * config.v_head_dim,
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
    has_norm = any(name.endswith("self_attn.q_norm") for name, _ in model.named_modules())
    return Attention(
        normed=queries + keys if has_norm else 0,
        latent=0,
        rotated=queries + keys,
        read=queries + 2 * keys,
        out=queries,
    )

"""A tiny model of every family that AutoEP knows, with random weights and no download."""

from __future__ import annotations

import pytest
import torch
import transformers

SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


def _config(model_type: str, **settings):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return transformers.AutoConfig.for_model(model_type, **SMALL, **settings)


def _mixtral():
    return _config("mixtral", intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)


def _qwen3_moe():
    return _config(
        "qwen3_moe",
        intermediate_size=64,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        head_dim=16,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _qwen2_moe():
    return _config(
        "qwen2_moe",
        intermediate_size=64,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=3,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _deepseek(model_type: str, **settings):
    return _config(
        model_type,
        intermediate_size=64,
        moe_intermediate_size=48,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        **settings,
    )


def _deepseek_v2():
    return _deepseek("deepseek_v2", topk_method="group_limited_greedy")


def _deepseek_v3():
    return _deepseek("deepseek_v3", routed_scaling_factor=2.5)


def _qwen3_5_moe():
    return _config(
        "qwen3_5_moe_text",
        moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=3,
        head_dim=16,
        layer_types=["full_attention", "full_attention"],
    )


def _minimax_m3():
    return _config(
        "minimax_m3_vl_text",
        intermediate_size=48,
        dense_intermediate_size=64,
        shared_intermediate_size=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        head_dim=16,
        rotary_dim=8,
    )


def _gpt_oss():
    return _config(
        "gpt_oss",
        intermediate_size=48,
        num_local_experts=8,
        num_experts_per_tok=2,
        head_dim=16,
    )


FAMILIES = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "qwen3_5_moe": _qwen3_5_moe,
    "minimax_m3": _minimax_m3,
    "gpt_oss": _gpt_oss,
}


def _olmoe():
    return _config("olmoe", intermediate_size=48, num_experts=8, num_experts_per_tok=2)


def _glm4_moe():
    return _config(
        "glm4_moe",
        intermediate_size=64,
        moe_intermediate_size=48,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        head_dim=16,
    )


DESCRIBED = {"olmoe": _olmoe, "glm4_moe": _glm4_moe}
"""Families without a preset, which docs/families.md describes."""

ROUTERS = (".mlp.gate", ".mlp.router")
"""How the name of a router ends, in the families above."""


def build(
    family: str, seed: int, dtype: torch.dtype = torch.float32, **settings
) -> torch.nn.Module:
    """The family's causal LM with the same random weights on every rank.

    ``settings`` change its configuration.
    """
    torch.manual_seed(seed)
    config = {**FAMILIES, **DESCRIBED}[family]()
    config.update(settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the grouped one has no fp64
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # Hugging Face's small initial weights would hide errors
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def enliven(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw what a new model has at zero or one, and let its routers prefer experts 0 and 1.

    They add 5 to 8 to these experts' logits, by a direction that all tokens share.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * draw(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.1 * draw(buffer)
        embedding = model.get_input_embeddings().weight
        shared = torch.nn.functional.normalize(draw(embedding[0]), dim=0)
        embedding += shared
        routers = [m for name, m in model.named_modules() if name.endswith(ROUTERS)]
        assert routers, "no router of a known name"
        for router in routers:
            router.weight[:2] += 2 * shared
    return model

"""gpt-oss for AutoEP, which has no preset for it: its router, its experts, and its layout.

The router is AutoEP's own: a softmax over the chosen K is one over all, normalised over the chosen.
The experts are not: they have biases, and gate and up alternate in one transposed matrix. So they
are repacked when AutoEP makes its layers and become `ds_llep.biased.BiasedExperts`. That holds with
llep switched off as well. AutoEP's functions are wrapped, and do for other families what they did.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from deepspeed.module_inject import auto_ep_layer
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets import registry
from deepspeed.module_inject.auto_ep_presets.base import (
    ForwardContract,
    MoELayerSpec,
    MoEModelPreset,
    TransformersTopLevelRouterLogitsAdapter,
)
from deepspeed.moe.ep_repack import _gather_source_zero_params

from ds_llep.biased import BiasedExperts, join

NAME = "gpt_oss"

PRESET = MoEModelPreset(
    moe_layer_pattern=r"model\.layers\.\d+\.mlp",
    router_pattern="router",
    experts_pattern="experts",
    expert_storage="fused_3d",
    expert_w1="gate_up_proj",
    expert_w2="down_proj",
    expert_w3=None,
    num_experts_attr="num_local_experts",
    top_k_attr="num_experts_per_tok",
    score_func="softmax",
    score_apply="post",
    route_norm=True,
    gate_bias=True,
    expert_activation="swiglu_oai",
    preset_adapter=NAME,
    hf_model_types=(NAME,),
)

_PARAMETERS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


class _Adapter(TransformersTopLevelRouterLogitsAdapter):
    def adjust_forward_contract(self, contract: ForwardContract) -> ForwardContract:
        # Its MoE block returns a pair, of which the decoder layer uses the first.
        adjusted = super().adjust_forward_contract(contract)
        return replace(adjusted, return_router_logits=True, capture_target="none")


def register() -> None:
    """Make AutoEP know gpt-oss. Idempotent; nothing is done where DeepSpeed knows it itself."""
    if NAME in registry.PRESET_MODELS:
        return
    registry.PRESET_MODELS[NAME] = PRESET
    registry._PRESET_ADAPTERS[NAME] = _Adapter(
        display_name="gpt-oss", hf_model_types=(NAME,), class_name_fragments=("GptOss",)
    )
    original_repack = auto_ep_layer.repack_expert_weights
    original_init = AutoEPMoELayer.__init__

    @functools.wraps(original_repack)
    def repack_expert_weights(experts_source, spec, ep_rank, ep_size):
        if spec.model_family != NAME:
            return original_repack(experts_source, spec, ep_rank, ep_size)
        return repack(experts_source, spec, ep_rank, ep_size)

    @functools.wraps(original_init)
    def init(self, spec, *args, **kwargs):
        original_init(self, spec, *args, **kwargs)
        if spec.model_family == NAME:
            self.experts.__class__ = BiasedExperts

    auto_ep_layer.repack_expert_weights = repack_expert_weights
    AutoEPMoELayer.__init__ = init


def repack(
    experts: torch.nn.Module, spec: MoELayerSpec, ep_rank: int, ep_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w1, w2 and w3 of one EP rank's experts, each with its bias as `ds_llep.biased` has it.

    Args:
        experts: transformers' ``GptOssExperts``; under ``zero.Init`` one layer is gathered.
        spec: AutoEP's, of the layer.
        ep_rank: whose experts.
        ep_size: ranks that share the layer's experts.

    Raises:
        ValueError: experts in MXFP4; biases that are trained where their matrices are frozen, or
            the reverse.
    """
    where = f"gpt-oss layer '{spec.moe_module_name}'"
    missing = [name for name in _PARAMETERS if not hasattr(experts, name)]
    if missing or not experts.gate_up_proj.is_floating_point():
        raise ValueError(
            f"{where}: its experts ({type(experts).__name__}) are quantized or have an unknown "
            "layout and cannot be trained. Load the model dequantized: from_pretrained(..., "
            "quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16)."
        )
    for matrix, bias in (_PARAMETERS[:2], _PARAMETERS[2:]):
        if getattr(experts, matrix).requires_grad != getattr(experts, bias).requires_grad:
            raise ValueError(
                f"{where}: {matrix} and {bias} are one parameter under expert parallelism. Set "
                "requires_grad of both to the same value."
            )
    experts_per_rank = spec.num_experts // ep_size
    own = slice(ep_rank * experts_per_rank, (ep_rank + 1) * experts_per_rank)
    parameters = [getattr(experts, name) for name in _PARAMETERS]
    with _gather_source_zero_params(parameters), torch.no_grad():
        return to_autoep(*(parameter.data[own] for parameter in parameters))


def to_autoep(
    gate_up_proj: torch.Tensor,
    gate_up_proj_bias: torch.Tensor,
    down_proj: torch.Tensor,
    down_proj_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w1, w2 and w3 from Hugging Face's ``[E, D, 2F]``, ``[E, 2F]``, ``[E, F, D]``, ``[E, D]``."""
    w1, w3 = (
        join(gate_up_proj[..., first::2].transpose(1, 2), gate_up_proj_bias[..., first::2])
        for first in (0, 1)
    )
    return w1, join(down_proj.transpose(1, 2), down_proj_bias), w3

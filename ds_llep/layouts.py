"""One MoE layer's tensors under Hugging Face's names, in Hugging Face's layouts.

AutoEP keeps every family's experts alike; models do not. Pure functions of whole tensors: what they
cost is one copy of a layer's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from deepspeed.module_inject.auto_ep_config import MoELayerSpec
from deepspeed.moe.fused_expert_layout import classify_fused_gate_up_layout

from ds_llep.biased import split

Tensors = dict[str, torch.Tensor]


def layer_to_hf(
    spec: MoELayerSpec, tensors: Tensors, hf_shapes: Mapping[str, torch.Size]
) -> Tensors:
    """One MoE layer's tensors, or some of them, as the model had them before AutoEP.

    Args:
        spec: what DeepSpeed's parser found out about the layer.
        tensors: by AutoEP's names within the layer, all E experts in each of the experts'. These
            come all or none.
        hf_shapes: of the layer in the model, by Hugging Face's names within the layer.

    Returns:
        The tensors by Hugging Face's names within the layer.
    """
    found, experts = {}, {}
    for name, tensor in tensors.items():
        child, _, rest = name.partition(".")
        if child == "experts":
            experts[rest] = tensor
        else:
            found[_name_in_model(spec, child, rest)] = tensor
    if experts:
        layout = EXPERT_LAYOUTS.get(spec.model_family, fused_experts)
        shapes = {
            name.removeprefix(f"{spec.experts_name}."): shape for name, shape in hf_shapes.items()
        }
        for name, tensor in layout(spec, experts, shapes).items():
            found[f"{spec.experts_name}.{name}"] = tensor
    return found


def fused_experts(
    spec: MoELayerSpec, experts: Tensors, hf_shapes: Mapping[str, torch.Size]
) -> Tensors:
    """One layer's experts, as most families have them.

    Args:
        spec: the names in the model.
        experts: ``w1`` and ``w3`` ``[E, F, D]``, ``w2`` ``[E, D, F]``.
        hf_shapes: of the experts' parameters in the model.

    Returns:
        Gate and up one after the other in one tensor, ``[E, 2F, D]`` or ``[E, D, 2F]`` by the
        model's shapes, or apart where the model has them apart; one expert by one where the model
        has a list of modules.
    """
    w1, w2, w3 = experts["w1"], experts["w2"], experts["w3"]
    if spec.expert_w3_name is None:
        found = {spec.expert_w1_name: torch.cat((w1, w3), dim=1), spec.expert_w2_name: w2}
    else:
        found = {spec.expert_w1_name: w1, spec.expert_w2_name: w2, spec.expert_w3_name: w3}
    if spec.expert_storage == "module_list":
        return {
            f"{index}.{name}.weight": expert
            for name, tensor in found.items()
            for index, expert in enumerate(tensor)
        }
    if spec.expert_w3_name is None:
        shapes = (tuple(hf_shapes[name]) for name in (spec.expert_w1_name, spec.expert_w2_name))
        if classify_fused_gate_up_layout(*shapes).needs_transpose:
            return {name: tensor.transpose(1, 2).contiguous() for name, tensor in found.items()}
    return found


def interleaved_experts(
    spec: MoELayerSpec, experts: Tensors, hf_shapes: Mapping[str, torch.Size]
) -> Tensors:
    """One layer's experts as gpt-oss has them: a column of gate, a column of up, and so on.

    Args:
        spec: the sizes.
        experts: ``w1``, ``w2`` and ``w3``, each with its bias as `ds_llep.biased` has it.
        hf_shapes: not needed.

    Returns:
        ``gate_up_proj`` ``[E, D, 2F]``, ``gate_up_proj_bias`` ``[E, 2F]``, ``down_proj``
        ``[E, F, D]``, ``down_proj_bias`` ``[E, D]``.
    """
    gate, gate_bias = split(experts["w1"], spec.ffn_hidden_size)
    up, up_bias = split(experts["w3"], spec.ffn_hidden_size)
    down, down_bias = split(experts["w2"], spec.hidden_size)
    return {  # each in memory of its own: transformers takes views of one tensor for tied weights
        "gate_up_proj": _interleave(gate, up).transpose(1, 2).contiguous(),
        "gate_up_proj_bias": _interleave(gate_bias, up_bias),
        "down_proj": down.transpose(1, 2).contiguous(),
        "down_proj_bias": down_bias.clone(),
    }


EXPERT_LAYOUTS: dict[str, Callable[..., Tensors]] = {"gpt_oss": interleaved_experts}
"""By ``model_family``; :func:`fused_experts` for all others."""


def _interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def _name_in_model(spec: MoELayerSpec, child: str, rest: str) -> str:
    """The name that a tensor of AutoEP's layer, outside the experts, had in the model's."""
    if child == "router" and rest == "e_score_correction_bias":
        owner = spec.e_score_correction_bias_path
    elif child == "router":
        owner, rest = spec.router_name, rest.removeprefix("gate.")
    else:
        names = {
            "shared_experts": spec.shared_experts_name,
            "shared_experts_gate": spec.shared_experts_gate_name,
        }
        owner = names.get(child, child)
    return ".".join(filter(None, (owner, rest)))

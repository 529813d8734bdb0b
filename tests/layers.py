"""Single MoE layers on ranks: AutoEP's, ours with the same weights, and an fp64 reference."""

from __future__ import annotations

import copy

import deepspeed.comm as dist
import families
import torch
import workloads
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups

from ds_llep.activate import adopt
from ds_llep.bench.routing import force_routing
from ds_llep.config import LLEPConfig
from ds_llep.fetch import Exchange
from ds_llep.layer import LLEPMoELayer


def fit(ep_size: int) -> int:
    """The EP size in a world that may be smaller than the test asks for (see conftest.py)."""
    return min(ep_size, dist.get_world_size())


def autoep_layer(
    family: str, ep_size: int, seed: int, dtype: torch.dtype, wide: bool = False, **options
) -> AutoEPMoELayer:
    """The last MoE layer of a tiny model, sharded over ``ep_size`` ranks.

    Weights are drawn from ``seed`` and rounded to ``dtype``; ``wide`` then computes in fp64.
    """
    ep_size = fit(ep_size)
    model = families.build(family, seed, dtype)
    if wide:
        model = model.double()
    groups._create_expert_and_data_parallel(ep_size)
    ep_rank = dist.get_rank(group=groups._get_expert_parallel_group(f"ep_size_{ep_size}"))
    config = parse_autoep_config({"enabled": True, "autoep_size": ep_size, **options})
    auto_ep = AutoEP(model, config)
    auto_ep.replace_moe_layers(auto_ep.ep_parser(), ep_size, ep_rank)
    layer = [module for module in model.modules() if isinstance(module, AutoEPMoELayer)][-1]
    layer.set_deepspeed_parallelism()
    return layer.to(get_accelerator().current_device_name())


def llep_twin(layer: AutoEPMoELayer, **settings) -> LLEPMoELayer:
    """A copy of an AutoEP layer that balances; the plan is forced unless settings say otherwise."""
    group, layer.ep_group = layer.ep_group, None
    twin = copy.deepcopy(layer)
    layer.ep_group = twin.ep_group = group
    settings = {"imbalance_threshold": 1.0, "min_tokens_per_gemm": 1, **settings}
    config = LLEPConfig(enabled=True, **settings)
    adopt({"layer": twin}, config, Exchange.of_home_ranks(group, cache=config.weight_cache))
    return twin


def draw(layer, workload: str, num_tokens: int, dtype: torch.dtype, seed: int):
    """Input ``[1, T, D]``, output gradient and expert ids of this rank."""
    rank = dist.get_rank()
    tokens = workloads.tokens_on_rank(workload, num_tokens, layer.ep_rank)
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    x = torch.randn((1, tokens, layer.hidden_size), generator=generator).to(dtype)
    grad = torch.randn((1, tokens, layer.hidden_size), generator=generator).to(dtype)
    ids = workloads.expert_ids(
        workload, tokens, layer.top_k, layer.num_experts, layer.ep_size, 0, seed * 1000 + rank
    )
    device = get_accelerator().current_device_name()
    return x.to(device), grad.to(device), ids.to(device)


def run(layer, x, grad, ids, checkpointing: str = "none") -> dict[str, torch.Tensor]:
    """Output, input gradient and parameter gradients of one forward and backward."""
    force_routing(layer, ids)
    x = x.detach().clone().requires_grad_()
    if checkpointing == "none":
        y = layer(x)
    else:
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=checkpointing == "reentrant")
    y = y[0] if isinstance(y, tuple) else y
    y = y.reshape(grad.shape)
    y.backward(grad.to(y.dtype))
    found = {"output": y.detach(), "input": x.grad}
    for name, parameter in layer.named_parameters():
        found[name] = parameter.grad
    return found


def reference(family: str, ep_layer, x, grad, ids, seed: int, dtype, **options) -> dict:
    """The same in fp64 without sharding: all experts here, expert gradients summed over ranks."""
    whole = autoep_layer(family, 1, seed, dtype, wide=True, use_grouped_mm=False, **options)
    found = run(whole, x.double(), grad.double(), ids)
    first = ep_layer.ep_rank * ep_layer.num_local_experts
    for name, gradient in found.items():
        if name.startswith("experts."):
            dist.all_reduce(gradient, group=ep_layer.ep_group)
            found[name] = gradient[first : first + ep_layer.num_local_experts]
    return found


def over_budget(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Errors above twice AutoEP's plus 1e-6, NaN included, as ``{name: (ours, theirs)}``."""
    return {
        name: (error, theirs[name])
        for name, error in ours.items()
        if not error <= 2 * theirs[name] + 1e-6
    }


def unequal(ours: dict, theirs: dict) -> list[str]:
    """Names of what is not the same bit for bit, as NaN never is."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


SMALL = 512  # elements; the error of fewer is too much of a random draw to hold to a budget


def errors(found: dict, reference: dict) -> dict[str, float]:
    """Relative Frobenius error of each tensor; those of few elements are taken together.

    A tensor without gradient in the reference must have none, or zeros, which is what ZeRO gives
    to unused parameters.
    """
    pairs: dict[str, list] = {}
    for name, expected in reference.items():
        if expected is None:
            assert found[name] is None or not found[name].any(), f"{name} has a gradient"
            continue
        assert found[name] is not None, f"{name} has no gradient"
        assert found[name].shape == expected.shape, f"{name}: {found[name].shape}"
        key = name if expected.numel() >= SMALL or expected.numel() == 0 else "small tensors"
        pairs.setdefault(key, []).append((found[name].double(), expected.double()))
    result = {}
    for key, tensors in pairs.items():
        difference = torch.cat([(ours - wide).flatten() for ours, wide in tensors]).norm()
        size = torch.cat([wide.flatten() for _, wide in tensors]).norm()
        result[key] = (difference / size if size else difference).item()
    return result

"""One MoE layer, AutoEP against llep, side by side on the same weights and routing.

    torchrun --nproc_per_node 2 -m ds_llep.bench.layer --shape gpt-oss-120b

Prints forward and forward+backward in milliseconds (median over the repeats, slowest rank), the
peak memory above the start and the load ratio. A time is printed only after the results agreed: the
error of llep's outputs and gradients against AutoEP's stays within what bf16 rounds away.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import types

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_config import MoELayerSpec, parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_count import count_tokens_per_expert
from deepspeed.utils import groups

from ds_llep.activate import adopt
from ds_llep.config import LLEPConfig
from ds_llep.fetch import Exchange

SHAPES = {  # experts, hidden size, expert FFN size, experts per token, tokens per rank
    "gpt-oss-120b": (128, 2880, 2880, 4, 32768),
    "qwen3-30b-a3b": (128, 2048, 768, 8, 32768),
    "deepseek-v3": (256, 7168, 2048, 8, 16384),
    "tiny": (16, 256, 128, 4, 512),
}
TOLERANCE = 0.02  # relative, in bf16: each of the two errs by about 0.005 against fp32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--workloads", default="balanced,50:4,95:1", help="balanced or R:H, ...")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    deepspeed.init_distributed(verbose=False)
    deepspeed.utils.logger.setLevel("WARNING")
    device = torch.device(get_accelerator().current_device_name())
    autoep = make_layer(args.shape, device, args.seed)
    group, autoep.ep_group = autoep.ep_group, None
    llep = copy.deepcopy(autoep)
    autoep.ep_group = llep.ep_group = group
    # The same memory, so that the second one costs none.
    for name in ("w1", "w2", "w3"):
        getattr(llep.experts, name).data = getattr(autoep.experts, name).data
    record = adopt({"layer": llep}, LLEPConfig(enabled=True), Exchange.of_home_ranks(group))

    say(f"{args.shape}, {dist.get_world_size()} ranks, torch {torch.__version__}, {device_name()}")
    say(f"{'workload':>10} {'mode':>8} {'forward':>9} {'fwd+bwd':>9} {'peak GB':>8}  load ratio")
    for workload in args.workloads.split(","):
        inputs = draw(args.shape, workload, device, args.seed)
        theirs, ours = (run(layer, *inputs) for layer in (autoep, llep))
        errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
        # Counted and not compared by their maximum, in which a NaN may get lost.
        if agreed_max(sum(not error <= TOLERANCE for error in errors), device):
            raise SystemExit(f"{workload}: results differ by {errors}, no time is printed")
        del theirs, ours
        for mode, layer in (("AutoEP", autoep), ("llep", llep)):
            forward = milliseconds(args.repeats, device, forward_only, layer, *inputs)
            both = milliseconds(args.repeats, device, run, layer, *inputs)
            peak = peak_gigabytes(device, run, layer, *inputs)
            last = record.last()
            ratio = last["load_ratio_before" if mode == "AutoEP" else "load_ratio_after"][0]
            say(f"{workload:>10} {mode:>8} {forward:9.2f} {both:9.2f} {peak:8.2f}  {ratio:.2f}")
    dist.destroy_process_group()


def make_layer(shape: str, device: torch.device, seed: int) -> AutoEPMoELayer:
    """An AutoEP layer over all ranks, at its fastest options, with random bf16 weights."""
    num_experts, hidden, ffn, top_k, _ = SHAPES[shape]
    ep_size = dist.get_world_size()
    groups._create_expert_and_data_parallel(ep_size)
    torch.manual_seed(seed)
    source = torch.nn.Module()
    source.gate = torch.nn.Linear(hidden, num_experts, bias=False)
    source.experts = torch.nn.Module()
    for name, size in (("gate_up_proj", (2 * ffn, hidden)), ("down_proj", (hidden, ffn))):
        weight = torch.randn(num_experts, *size, device=device, dtype=torch.bfloat16)
        setattr(source.experts, name, torch.nn.Parameter(weight * size[1] ** -0.5))
    source.gate.to(device, torch.bfloat16)
    spec = MoELayerSpec(
        moe_module_name="layer",
        model_family="qwen3_moe",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    fused = "fused_weighted_sum" if device.type == "cuda" else "auto"
    config = parse_autoep_config({"enabled": True, "autoep_size": ep_size, "combine_impl": fused})
    layer = AutoEPMoELayer(spec, source, ep_size, dist.get_rank(), config)
    layer.set_deepspeed_parallelism()
    return layer.to(device)


def draw(shape: str, workload: str, device: torch.device, seed: int):
    """Input ``[1, T, D]``, output gradient and expert ids ``[T, K]`` of this rank."""
    num_experts, hidden, _, top_k, tokens = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(seed * 1000 + dist.get_rank())
    x = torch.randn(1, tokens, hidden, generator=generator, device=device, dtype=torch.bfloat16)
    grad = torch.randn(1, tokens, hidden, generator=generator, device=device, dtype=torch.bfloat16)
    if workload == "balanced":
        even = torch.ones(tokens, num_experts, device=device)
        return x, grad, torch.multinomial(even, top_k, generator=generator)
    percent, hot = map(int, workload.split(":"))
    ids = torch.randint(hot, num_experts, (tokens, top_k), generator=generator, device=device)
    to_hot = torch.rand(tokens, generator=generator, device=device) < percent / 100
    ids_hot = torch.randint(0, hot, (tokens, top_k), generator=generator, device=device)
    return x, grad, torch.where(to_hot[:, None], ids_hot, ids)


def force_routing(layer: AutoEPMoELayer, ids_TK: torch.Tensor) -> None:
    """Replace the router's choice; its scores remain differentiable."""
    counts_E = count_tokens_per_expert(ids_TK, layer.num_experts)

    def forward(router, x_TD, expert_bias=None):
        scores_TK = torch.softmax(router.gate(x_TD).float(), dim=-1).gather(1, ids_TK)
        return scores_TK / scores_TK.sum(dim=-1, keepdim=True), ids_TK, counts_E

    layer.router.forward = types.MethodType(forward, layer.router)


def forward_only(layer, x, grad, ids):
    force_routing(layer, ids)
    with torch.no_grad():
        return layer(x)


def run(layer, x, grad, ids) -> list[torch.Tensor]:
    """Output, input gradient and parameter gradients."""
    force_routing(layer, ids)
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def milliseconds(repeats: int, device: torch.device, work, *args) -> float:
    """Median of ``repeats`` after two warm-ups, of the slowest rank."""
    times = []
    for repeat in range(repeats + 2):
        get_accelerator().synchronize()
        start = time.perf_counter()
        work(*args)
        get_accelerator().synchronize()
        if repeat >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return agreed_max(statistics.median(times), device)


def peak_gigabytes(device: torch.device, work, *args) -> float:
    """Peak memory above the start, of the hungriest rank; 0 where the device does not count it."""
    get_accelerator().reset_peak_memory_stats()
    before = get_accelerator().memory_allocated()
    work(*args)
    return agreed_max((get_accelerator().max_memory_allocated() - before) / 1e9, device)


def agreed_max(value: float, device: torch.device) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()

"""DeepSpeed's own MoE layers on ranks: theirs, ours with equal weights, and an fp64 reference."""

from __future__ import annotations

import copy

import deepspeed.comm as dist
import deepspeed.moe.layer
import torch
from deepspeed.accelerator import get_accelerator
from layers import fit
from torch import nn

from ds_llep.config import LLEPConfig
from ds_llep.convert import adopt, check_layers
from ds_llep.fetch import Exchange

HIDDEN, EXPERTS = 32, 8


class Gated(nn.Module):
    """Three matrices, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, 24, bias=False) for _ in range(2))
        self.down = nn.Linear(24, HIDDEN, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Scaled(nn.Module):
    """Buffers, one of them of integers, one for each expert; a bias that is returned, not added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, 20), nn.Linear(20, HIDDEN, bias=False)
        self.register_buffer("scale", torch.ones(20), persistent=False)
        self.register_buffer("order", torch.arange(20))

    def forward(self, x):
        hidden = (self.first(x) * self.scale)[..., self.order]
        return self.second(torch.tanh(hidden)), self.second.weight


class Random(Gated):
    """Dropout that no module shows."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class Frozen(Gated):
    """One of three matrices is not trained, and another is used nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.up.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 40), nn.GELU(), nn.Linear(40, HIDDEN))


def linear() -> nn.Module:
    return nn.Linear(HIDDEN, HIDDEN, bias=False)


def all_frozen() -> nn.Module:
    return mlp().requires_grad_(False)


def with_dropout() -> nn.Module:
    return nn.Sequential(linear(), nn.Sequential(nn.GELU(), nn.Dropout(0.1)))


class Normalised(nn.Module):
    """Batch normalisation, whose buffers every forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = linear(), nn.BatchNorm1d(HIDDEN)

    def forward(self, x):
        flat = self.first(x).flatten(0, -2)
        return self.norm(flat).view(x.shape) if len(flat) > 1 else flat.view(x.shape)


KINDS = {
    "linear": linear,
    "mlp": mlp,
    "gated": Gated,
    "scaled": Scaled,
    "frozen": Frozen,
    "all frozen": all_frozen,
}


class Model(nn.Module):
    """Two MoE layers that read the same input, so that rounding in one cannot send a token of the
    other elsewhere; one of them with a residual branch and more experts."""

    def __init__(self, make, ep_size: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        options = dict(ep_size=ep_size, k=2, drop_tokens=False)
        self.residual = make(HIDDEN, mlp(), EXPERTS, use_residual=True, **options)
        self.plain = make(HIDDEN, Gated(), EXPERTS // 2, **options)
        self.head = nn.Linear(HIDDEN, 1)
        for moe in (self.residual, self.plain):
            inner = moe.deepspeed_moe.experts
            first = dist.get_rank() % ep_size * moe.num_local_experts
            for index, expert in enumerate(inner.deepspeed_experts, first):
                redraw(expert, seed * 100 + index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (y, aux, _), (z, more, _) = self.residual(x), self.plain(x)
        return self.head(torch.tanh(y + z)).square().mean() + aux + more


def layer(
    kind: str, ep_size: int, seed: int, dtype: torch.dtype = torch.float32, **options
) -> deepspeed.moe.layer.MoE:
    """DeepSpeed's layer in its groups. Every expert has weights of its own, those of the expert's
    number, drawn from ``seed`` and rounded to ``dtype``."""
    ep_size = fit(ep_size)
    torch.manual_seed(seed)
    found = deepspeed.moe.layer.MoE(
        HIDDEN, KINDS[kind](), EXPERTS, ep_size, **{"min_capacity": 0, **options}
    )
    found.set_deepspeed_parallelism()
    group = found.deepspeed_moe.ep_group
    first = dist.get_rank(group=group) * found.num_local_experts
    for index, expert in enumerate(found.deepspeed_moe.experts.deepspeed_experts, first):
        redraw(expert, seed * 100 + index)
    found.to(dtype).to(get_accelerator().current_device_name())
    return found


def redraw(expert: nn.Module, seed: int) -> None:
    """New values for all of an expert's parameters and buffers."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*expert.parameters(), *expert.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / HIDDEN**0.5)
        elif tensor.dim():
            tensor.data.copy_(torch.randperm(len(tensor), generator=generator))


def twin(theirs: deepspeed.moe.layer.MoE, **settings) -> deepspeed.moe.layer.MoE:
    """A copy that balances; the plan is forced unless settings say otherwise."""
    inner = theirs.deepspeed_moe
    group, inner.ep_group, inner.gate.ep_group = inner.ep_group, None, None
    ours = copy.deepcopy(theirs)
    for each in (inner, ours.deepspeed_moe):
        each._set_ep_group(group)
    check_layers({"layer": ours})
    settings = {"imbalance_threshold": 1.0, "min_tokens_per_gemm": 1, **settings}
    config = LLEPConfig(enabled=True, **settings)
    adopt({"layer": ours}, config, Exchange.of_home_ranks(group, cache=config.weight_cache))
    return ours


def wide_twin(kind: str, theirs, seed: int, dtype: torch.dtype, **options):
    """DeepSpeed's layer with all experts here, in fp64 and with weights rounded to ``dtype``."""
    torch.manual_seed(seed)
    whole = deepspeed.moe.layer.MoE(HIDDEN, KINDS[kind](), EXPERTS, 1, min_capacity=0, **options)
    whole.set_deepspeed_parallelism()
    for index, expert in enumerate(whole.deepspeed_moe.experts.deepspeed_experts):
        redraw(expert, seed * 100 + index)
    state = {k: v for k, v in theirs.state_dict().items() if "experts" not in k}
    whole.load_state_dict(state, strict=False)
    return whole.to(dtype).to(get_accelerator().current_device_name()).double()


def draw(moes, tokens: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ``[2, T / 2, D]`` that likes the first two experts of all layers, and a gradient."""
    generator = torch.Generator().manual_seed(seed * 1000 + dist.get_rank())
    x, grad = (torch.randn((2, tokens // 2, HIDDEN), generator=generator) for _ in range(2))
    for moe in moes:
        liked = moe.deepspeed_moe.gate.wg.weight.detach().float().cpu()[:2].sum(0)
        x += 4 * liked / liked.norm()
    device = get_accelerator().current_device_name()
    return x.to(dtype).to(device), grad.to(dtype).to(device)


def run(
    moe,
    x: torch.Tensor,
    grad: torch.Tensor,
    seed: int,
    checkpointing: str = "none",
    used_token: torch.Tensor | None = None,
) -> dict[str, torch.Tensor | None]:
    """What the layer returns, and all gradients, of one forward and backward.

    Every layer that is given the same seed draws the same noise on a rank.
    """
    torch.manual_seed(seed * 1000 + dist.get_rank())
    x = x.detach().clone().requires_grad_()
    moe.zero_grad()
    if checkpointing == "none":
        y, l_aux, exp_counts = moe(x, used_token)
    else:
        y, l_aux, exp_counts = torch.utils.checkpoint.checkpoint(
            moe, x, used_token, use_reentrant=checkpointing == "reentrant"
        )
    (y * grad.to(y.dtype)).sum().add(l_aux).backward()
    found = {"output": y.detach(), "l_aux": l_aux.detach(), "exp_counts": exp_counts}
    found["input"] = x.grad
    return found | {name: parameter.grad for name, parameter in moe.named_parameters()}


def reference(kind: str, theirs, x, grad, seed: int, dtype, used_token, **options) -> dict:
    """The same in fp64, with the names of this rank's experts and gradients summed over ranks."""
    whole = wide_twin(kind, theirs, seed, dtype, **options)
    whole.train(theirs.training)
    found = run(whole, x.double(), grad.double(), seed, used_token=used_token)
    group = theirs.deepspeed_moe.ep_group
    first = dist.get_rank(group=group) * theirs.num_local_experts
    renamed = {}
    for name, tensor in found.items():
        before, experts, after = name.partition("deepspeed_experts.")
        if not experts:
            renamed[name] = tensor
            continue
        if tensor is not None:
            dist.all_reduce(tensor, group=group)
        number, _, rest = after.partition(".")
        if 0 <= int(number) - first < theirs.num_local_experts:
            renamed[f"{before}{experts}{int(number) - first}.{rest}"] = tensor
    return renamed

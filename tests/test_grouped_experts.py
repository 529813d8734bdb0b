"""Experts of one kind in one call: the same as one by one, or no such call."""

from __future__ import annotations

import copy
import math
from functools import partial
from unittest import mock

import deepspeed.comm as dist
import layers
import natives
import pytest
import torch
from natives import HIDDEN
from test_moe import check, compare
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from ds_llep import convert, grouped_experts
from ds_llep.bundle import compute_all
from ds_llep.grouped_experts import can_group, compute_together, match_parameters
from ds_llep.kernels.select import select_kernels

KERNELS = select_kernels("torch", torch.device("cpu"))
# zero.Init leaves another one in its place, and earlier tests of this process may have used it.
OWN_LINEAR = partial(mock.patch.object, functional, "linear", torch._C._nn.linear)
COUNTS = [7, 0, 1, 30]


@pytest.fixture(autouse=True)
def own_linear():
    with OWN_LINEAR():
        yield


class Adapted(nn.Module):
    """A linear layer with low-rank factors beside it; dropout that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.scaling = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False), {"it": 0.5}
        self.a, self.b = nn.Linear(HIDDEN, 4, bias=False), nn.Linear(4, HIDDEN, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return self.base(x) + self.b(self.a(self.dropout(x))) * self.scaling["it"]


class Tied(nn.Module):
    """One layer used twice, by two names; a row's gate; a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1)
        self.again = self.first

    def forward(self, x):
        hidden = functional.mish(self.first(x), inplace=True)
        return 1 - self.again(hidden) / 2 * torch.sigmoid(self.gate(x)), self.first.bias


class Casting(nn.Module):
    """A second layer in another dtype than the first, which casts its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN).double()

    def forward(self, x):
        hidden = functional.softplus(self.first(x)) ** 2
        return self.second(hidden.to(self.second.weight.dtype)).type_as(x)


class Triple(torch.autograd.Function):
    """Elementwise forward; in backward it looks at all rows."""

    @staticmethod
    def forward(ctx, x):
        return torch.mul(x, 3)

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + grad.norm())


class Unchanged(Triple):
    @staticmethod
    def forward(ctx, x):
        return x


def changed(function, base=nn.Linear) -> type[nn.Module]:
    """A class of experts: ``function(module, x)`` with a linear layer ``inner`` and a vector."""

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.vector = base(HIDDEN, HIDDEN), nn.Parameter(torch.ones(HIDDEN))

        def forward(self, x):
            return function(self, x)

    return Changed


def swallow(module, x):
    hidden = module.inner(x)
    try:
        return torch.softmax(hidden, -2)
    except Exception:
        return hidden


def without_gradient(module, x):
    with torch.no_grad():
        hidden = torch.tanh(x)
    return module.inner(hidden)


class OwnKind(nn.Parameter):
    pass


def own_kind() -> nn.Module:
    layer = natives.linear()
    layer.weight = OwnKind(layer.weight.detach())
    return layer


class Own(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight * 2, self.bias)


# Smooth all of them: beside a kink, one rounding makes another gradient.
GROUPED = {
    **{name: natives.KINDS[name] for name in ("linear", "mlp", "gated", "frozen", "all frozen")},
    "adapted": Adapted,
    "tied": Tied,
    "casting": Casting,
    "activations": lambda: nn.Sequential(
        *(nn.Linear(HIDDEN, 24), nn.SiLU(inplace=True), nn.Identity(), nn.Linear(24, 20)),
        *(nn.Tanh(), nn.Linear(20, HIDDEN), nn.Mish(), nn.ELU()),
    ),
}
ONE_BY_ONE = {
    "buffers": natives.Scaled,
    "dropout": natives.Random,
    "normalised": lambda: nn.Sequential(natives.linear(), nn.LayerNorm(HIDDEN)),
    "parametrised": lambda: parametrizations.weight_norm(natives.linear()),
    "own product": lambda: Own(HIDDEN, HIDDEN),
    "number of rows": changed(lambda m, x: m.inner(x) * math.sqrt(x.shape[-2])),
    "length": changed(lambda m, x: m.inner(x) * len(x[0, 0])),
    "over rows": changed(lambda m, x: m.inner(x).softmax(-2)),
    "caught": changed(swallow),
    "checkpointed": changed(lambda m, x: checkpoint(m.inner, x, use_reentrant=False)),
    "scripted": lambda: torch.jit.script(natives.linear()),
    "own kind of parameter": own_kind,
    "own backward": changed(lambda m, x: Triple.apply(m.inner(x))),
    "own backward only": changed(lambda m, x: Unchanged.apply(m.inner(x))),
    "without gradient": changed(without_gradient),
    "vector": changed(lambda m, x: m.inner(x) * m.vector),
    "matrix": changed(lambda m, x: x @ m.inner.weight),
    "weight as input": changed(lambda m, x: functional.linear(m.inner.weight, m.inner.weight)),
    "changes its input": changed(lambda m, x: m.inner(functional.silu(x, inplace=True) + x.mean())),
    "writes": changed(lambda m, x: m.inner(torch.add(x, 1, out=x)) + x.mean()),
}


def make(kind, seed: int, number: int = len(COUNTS)) -> list[nn.Module]:
    experts = [kind() for _ in range(number)]
    for index, expert in enumerate(experts):
        natives.redraw(expert, seed * 100 + index)
    return experts


def run(experts, rows, grad, kernels, autocast=None) -> dict[str, torch.Tensor | None]:
    """Output and gradients; with ``kernels``, in one call."""
    rows = rows.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        if kernels is None:
            out = compute_all(experts, rows, COUNTS, None)
        else:
            parameters = match_parameters(experts)
            out = compute_together(experts[0], parameters, rows, COUNTS, kernels)
    modules = nn.ModuleList(experts)
    modules.zero_grad()
    out.backward(grad.to(out.dtype))
    named = {name: parameter.grad for name, parameter in modules.named_parameters()}
    return {"output": out.detach(), "rows": rows.grad, **named}


def by_place(found: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The gradients of all experts' parameters in one place as one tensor: of an expert with one
    row alone, rounding is a matter of luck."""
    places: dict[str, list[torch.Tensor]] = {}
    for name, tensor in found.items():
        if tensor is not None:
            places.setdefault(name.partition(".")[2] or name, []).append(tensor.flatten())
    return {place: torch.cat(tensors) for place, tensors in places.items()}


def draw(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((sum(COUNTS), HIDDEN), generator=generator).to(dtype) for _ in range(2)]


def flatten(experts: list[nn.Module]) -> None:
    """As DeepSpeed does: parameters of one dtype as views of one buffer."""
    parameters = [param for expert in experts for param in expert.parameters()]
    for dtype in {param.dtype for param in parameters}:
        of_dtype = [param for param in parameters if param.dtype == dtype]
        whole = torch.cat([param.detach().flatten() for param in of_dtype])
        pieces = whole.split([param.numel() for param in of_dtype])
        for param, piece in zip(of_dtype, pieces, strict=True):
            param.data = piece.view(param.shape)


@pytest.mark.parametrize("one_kernel", [False, True], ids=["loop", "one kernel"])
@pytest.mark.parametrize("kind", GROUPED)
def test_same_as_one_by_one(kind, one_kernel, seed):
    """In every dtype and under autocast; weights apart and in one buffer."""
    experts = make(GROUPED[kind], seed)
    assert can_group(experts, HIDDEN, KERNELS)
    with mock.patch.object(grouped_experts, "is_one_kernel", lambda *_: one_kernel):
        for dtype, autocast in (
            (torch.float32, None),
            (torch.bfloat16, None),
            (torch.float16, None),
            (torch.float32, torch.bfloat16),
        ):
            if kind == "casting" and (dtype, autocast) != (torch.float32, None):
                continue  # it has two of its own
            for lay in (list, flatten):
                ours = copy.deepcopy(experts)
                if kind != "casting":
                    ours = [expert.to(dtype) for expert in ours]
                wide = [copy.deepcopy(expert).double() for expert in ours]
                lay(ours)
                rows, grad = draw(seed, dtype)
                theirs = run(ours, rows, grad, None, autocast)
                found = run(ours, rows, grad, KERNELS, autocast)
                assert found["output"].dtype == theirs["output"].dtype
                expected = run(wide, rows.double(), grad.double(), None)
                ours, theirs = (
                    layers.errors(by_place(each), by_place(expected)) for each in (found, theirs)
                )
                if one_kernel:  # it rounds otherwise, and a tensor may have a few numbers only
                    theirs = dict.fromkeys(theirs, max(theirs.values()))
                assert not layers.over_budget(ours, theirs), (dtype, autocast, lay)


@pytest.mark.parametrize("kind", ONE_BY_ONE)
@pytest.mark.parametrize("training", [True, False])
def test_not_in_one_call(kind, training, seed):
    """Then nothing of the attempt is left: results are the same bits."""
    experts = [expert.train(training) for expert in make(ONE_BY_ONE[kind], seed)]
    if kind == "dropout" and not training:
        assert can_group(experts, HIDDEN, KERNELS)
        return
    assert not can_group(experts, HIDDEN, KERNELS)
    rows, _ = draw(seed, torch.float32)
    found = []
    for kernels in (KERNELS, None):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(compute_all(experts, rows.clone(), COUNTS, kernels))
    assert torch.equal(*found)
    if kind not in ("changes its input", "writes"):  # autograd does not let them
        torch.manual_seed(seed)
        expected = compute_all(experts, rows, COUNTS, None)
        torch.manual_seed(seed)
        assert torch.equal(compute_all(experts, rows, COUNTS, KERNELS), expected)


def hooked(experts) -> None:
    experts[2][0].register_forward_hook(lambda module, args, out: out * 2)


def hooked_before(experts) -> None:
    experts[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hooked_backward(experts) -> None:
    experts[3][2].register_full_backward_hook(lambda module, grad, _: (grad[0] / len(grad[0][0]),))


def other_activation(experts) -> None:
    experts[3][1].approximate = "tanh"


def other_layer(experts) -> None:
    experts[1][1] = nn.ReLU()


def other_mode(experts) -> None:
    experts[2].eval()


def own_forward(experts) -> None:
    first, _, last = experts[0]

    def forward(x):
        return last(torch.tanh(first(x)))

    for expert in experts:
        expert.forward = forward


def compiled(experts) -> None:
    call = experts[0]._call_impl
    for expert in experts:
        expert._compiled_call_impl = call  # where torch.nn.Module.compile puts it


def buffer(experts) -> None:
    experts[3].register_buffer("more", torch.ones(1))


def attribute(experts) -> None:
    for expert in experts:
        expert.more = torch.ones(3)  # tensors cannot be compared


CHANGES = [hooked, hooked_before, hooked_backward, other_activation, other_layer, other_mode]
CHANGES += [own_forward, compiled, buffer, attribute]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_the_start(change, seed):
    """What a user does to one expert later is honoured from then on."""
    experts = make(natives.mlp, seed)
    assert match_parameters(experts) is not None
    change(experts)
    assert match_parameters(experts) is None
    rows, grad = draw(seed, torch.float32)
    ours, theirs = [], []
    for kernels, found in ((KERNELS, ours), (None, theirs)):
        modules = nn.ModuleList(experts)
        modules.zero_grad()
        out = compute_all(experts, rows, COUNTS, kernels)
        out.backward(grad)
        found += [out, *(param.grad for param in modules.parameters() if param.grad is not None)]
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_global_hooks(seed):
    experts = make(natives.mlp, seed)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out)
    try:
        assert match_parameters(experts) is None
    finally:
        handle.remove()
    assert match_parameters(experts) is not None


def test_frozen_later(seed):
    """Gradients for whom they are asked for when the experts run."""
    experts = make(natives.mlp, seed)
    rows, grad = draw(seed, torch.float32)
    for trained in ([0, 2], [3], []):
        for index, expert in enumerate(experts):
            expert.requires_grad_(index in trained)
        experts[2][0].weight.requires_grad_(False)
        ours, theirs = (run(experts, rows, grad, kernels) for kernels in (KERNELS, None))
        assert all((ours[name] is None) == (theirs[name] is None) for name in theirs)
        assert max(layers.errors(ours, theirs).values()) < 1e-5


def test_no_rows(seed):
    experts = make(natives.mlp, seed)
    rows = torch.empty((0, HIDDEN), requires_grad=True)
    parameters = match_parameters(experts)
    for one_kernel in (False, True):
        with mock.patch.object(grouped_experts, "is_one_kernel", lambda *_, it=one_kernel: it):
            nn.ModuleList(experts).zero_grad()
            out = compute_together(experts[0], parameters, rows, [0] * len(experts), KERNELS)
            out.sum().backward()
        assert out.shape == rows.shape == rows.grad.shape
        assert all(param.grad is not None and not param.grad.any() for param in parameters)


def test_one_tensor_of_all():
    """Without a copy where matrices lie at equal distances in one buffer, and only there."""
    joined, buffer = grouped_experts._joined, torch.randn(100)
    even, uneven, backward = (
        [buffer[at : at + 6].view(2, 3) for at in starts]
        for starts in ((4, 24, 44), (4, 24, 45), (44, 24, 4))
    )
    transposed = [each.t() for each in even]
    apart = [each.clone() for each in even]
    same = [even[0]] * 3
    two = sorted(apart[:2], key=torch.Tensor.data_ptr)
    for matrices in (even, uneven, backward, transposed, apart, two, same, even[:1]):
        found = joined(matrices)
        assert torch.equal(found, torch.stack(matrices))
        shares = found.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert shares == (matrices is even or len(matrices) == 1)


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("backward_weights", ["refetch", "keep"])
def test_layers(pools, checkpointing, backward_weights, seed):
    """Home and foreign experts, whose weights lie in bundles."""
    options = dict(k=2, drop_tokens=False, settings={"backward_weights": backward_weights})
    for kind in ("mlp", "gated"):
        arguments = kind, 4, torch.float32, seed
        check(pools(4).run(on_each_rank, *arguments, checkpointing=checkpointing, **options), seed)


def on_each_rank(*args, **kwargs) -> dict:
    """As test_moe's ``compare``; that experts were computed in one call is seen."""
    together, calls = compute_together, []

    def seen(*arguments):
        calls.append(together(*arguments))
        return calls[-1]

    with (
        OWN_LINEAR(),
        mock.patch("ds_llep.bundle.compute_together", seen),
        mock.patch.object(grouped_experts, "is_one_kernel", lambda *_: True),
    ):
        found = compare(*args, **kwargs)
    assert calls and all(out is not None for out in calls)
    return found


@OWN_LINEAR()
def hook_on_one_rank(seed: int) -> dict:
    """Differences from DeepSpeed's layer, with a hook on the first rank's last expert alone."""
    theirs = natives.layer("mlp", 4, seed, k=2, drop_tokens=False)
    ours = natives.twin(theirs)
    assert convert.status(ours) == {"grouped_experts": [True]}
    seen = []
    for moe in (theirs, ours):
        if dist.get_rank() == 0:
            last = moe.deepspeed_moe.experts.deepspeed_experts[-1]
            last.register_forward_hook(lambda module, args, out: seen.append(len(args)))
    x, grad = natives.draw([theirs], 48, torch.float32, seed)
    found = [natives.run(moe, x, grad, seed) for moe in (ours, theirs)]
    assert len(seen) == (2 if dist.get_rank() == 0 else 0)
    return layers.errors(*found)


def test_hook_on_one_rank(pools, seed):
    """How a rank calls its experts is its own matter: no other waits for it."""
    for off in pools(4).run(hook_on_one_rank, seed):
        assert max(off.values()) < 1e-4, off

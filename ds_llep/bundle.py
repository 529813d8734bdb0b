"""Experts that are modules of any kind: as bytes that travel, and computed away from home.

An expert travels as it is: the bytes of its parameters and buffers, one after the other, whatever
their dtypes. Its helper lends it a module of the same structure and puts views of those bytes in
the place of the module's own tensors. Only experts that spill are copied into such a bundle.

At home, experts are modules like any others, part of the graph that the model builds. All foreign
experts of a rank are one autograd function, which is there on every rank, also where nothing is
borrowed. It keeps their rows alone and computes them once more in backward, since their weights may
be gone by then. The price is one more forward pass over the rows that spill, and that an expert
must do the same twice: dropout is refused.

Their gradients return in a function of its own, which autograd runs when the home experts' backward
is done: a home rank has work of its own while its helpers compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, cycle, islice, repeat
from math import prod

import torch
from torch.func import functional_call

from ds_llep.dispatch import offsets
from ds_llep.fetch import Exchange, ForeignWeights
from ds_llep.grouped_experts import compute_together, match_parameters
from ds_llep.kernels.select import KernelSet
from ds_llep.plan import Plan
from ds_llep.returns import GradientReturn
from ds_llep.timeline import part
from ds_llep.workspace import BundleLayout


@dataclass(frozen=True)
class ModuleLayout:
    """Where the tensors of a module lie in its bundle of bytes."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, module: torch.nn.Module) -> ModuleLayout:
        """Parameters, then buffers, persistent or not; a tensor with several names once."""
        tensors = dict(_tensors(module))
        shapes = (tensor.shape for tensor in tensors.values())
        dtypes = (tensor.dtype for tensor in tensors.values())
        return cls(tuple(tensors), tuple(shapes), tuple(dtypes))

    @cached_property
    def _offsets(self) -> list[int]:
        return offsets(tuple(zip(map(prod, self.shapes), self.dtypes, strict=True)))

    @property
    def nbytes(self) -> int:
        """Bytes of a bundle, each tensor aligned."""
        return self._offsets[-1]

    def views(self, bundle: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors by name, in a bundle, uint8 ``[nbytes]``."""
        fields = zip(self.names, self.shapes, self.dtypes, self._offsets, strict=False)
        return {
            name: bundle[at : at + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, shape, dtype, at in fields
        }

    def pack(self, module: torch.nn.Module, bundle: torch.Tensor) -> None:
        """Put the module's tensors, as they are now, into a bundle."""
        views = self.views(bundle)
        for name, tensor in _tensors(module):
            views[name].copy_(tensor.detach())


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that get gradients, by name."""
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def compute(
    expert: torch.nn.Module, rows_ND: torch.Tensor, tensors: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """An expert's output for its rows, ``[N, D]``; its own tensors unless others are given.

    It sees ``[1, 1, N, D]``, four dimensions as with DeepSpeed, and may return a tuple, of which
    the first counts, as there.
    """
    rows = rows_ND.view(1, 1, *rows_ND.shape)
    out = expert(rows) if tensors is None else functional_call(expert, tensors, (rows,))
    return (out[0] if isinstance(out, tuple) else out).flatten(0, -2)


def compute_all(
    experts: Sequence[torch.nn.Module],
    rows_ND: torch.Tensor,
    counts: Sequence[int],
    kernels: KernelSet | None,
    lent: Sequence[dict[str, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """The experts' output for their rows, ``[N, D]``, each also where it has no rows.

    Args:
        experts: at home here.
        rows_ND: expert after expert.
        counts: rows of each expert.
        kernels: what products for all experts at once run as; None: one expert after the other.
        lent: of foreign experts, tensors for the first home expert, in the order of its layout.
    """
    experts = experts if lent is None else experts[:1]
    if kernels is not None and (parameters := match_parameters(experts)):
        if lent is not None:
            tensors = zip(*(each.values() for each in lent), strict=True)
            parameters = dict(zip(parameters, tensors, strict=True))
        out_ND = compute_together(experts[0], parameters, rows_ND, counts, kernels)
        if out_ND is not None:
            return out_ND
    groups = zip(cycle(experts), rows_ND.split(counts), lent or repeat(None), strict=False)
    return torch.cat([compute(*group) for group in groups])


class ForeignModules(ForeignWeights):
    """Foreign experts that are modules; the bundles of :meth:`wait` are uint8 ``[n, nbytes]``.

    Args:
        experts: those at home here.
        layout: of each of them.
        like: a tensor on the device.
        exchange, layer, plans, size, count: as for :class:`ForeignWeights`.
    """

    def __init__(
        self,
        exchange: Exchange,
        layer: int,
        experts: Sequence[torch.nn.Module],
        layout: ModuleLayout,
        plans: Sequence[Plan],
        like: torch.Tensor,
        size: int | None,
        count: Callable[[int, int], None],
    ) -> None:
        like = like.new_empty(0, dtype=torch.uint8)
        # What the workspace has to hold for each expert; there is no such tensor at home.
        whole = torch.empty((len(experts), layout.nbytes), dtype=torch.uint8, device="meta")
        super().__init__(exchange, layer, [whole], plans, like, size, count)
        self.experts, self.module_layout = experts, layout

    def _pack(self, experts: Sequence[int]) -> torch.Tensor:
        bundles = self._like.new_empty((len(experts), self.module_layout.nbytes))
        for expert, bundle in zip(experts, bundles, strict=True):
            self.module_layout.pack(self.experts[expert], bundle)
        return bundles


@dataclass(frozen=True, kw_only=True)
class ForeignJob:
    """What the foreign experts need beside their rows."""

    plan: Plan
    counts: Sequence[int]
    """Rows of each of this rank's foreign experts."""
    foreign: ForeignModules
    keep: bool
    """Keep their weights between forward and backward instead of fetching them again."""
    exchange: Exchange
    kernels: KernelSet | None
    """As for :func:`compute_all`."""
    gradients: list[list[torch.Tensor]] = field(default_factory=list)
    """Of each foreign expert's trained parameters, until they return."""


def expect_gradients(rows_ND: torch.Tensor, job: ForeignJob) -> torch.Tensor:
    """The promise that :func:`compute_foreign` takes, to be made before the home experts compute.

    Autograd runs first what was made last. So in backward, when they are done, every rank sends
    foreign gradients home, where autograd adds them to those of the same parameters' home rows.
    """
    home = [param for expert in job.foreign.experts for param in trained(expert).values()]
    return _Homecoming.apply(rows_ND.detach(), job, *home)


class _Homecoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, job, *home):
        ctx.job = job
        return rows_ND.new_zeros(())  # on the device, as autograd has a queue for each

    @staticmethod
    def backward(ctx, _):
        with part("gradient return"):
            return None, None, *_return(ctx.job)


def compute_foreign(
    rows_ND: torch.Tensor, promise: torch.Tensor, job: ForeignJob, dtype: torch.dtype
) -> torch.Tensor:
    """The foreign experts' output for their rows, ``[N, D]`` in ``dtype``; all ranks call this."""
    return _ForeignExperts.apply(rows_ND, promise, job, dtype)


class _ForeignExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, promise, job, out_dtype):
        with part("fetch"):
            job.foreign.start()
        with part("wait for foreign"):
            bundles = job.foreign.wait()
        ctx.save_for_backward(rows_ND, bundles.clone() if job.keep else None)
        device = rows_ND.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.job = job
        with part("foreign experts"):
            tensors = [job.foreign.module_layout.views(bundle) for bundle in bundles]
            if not tensors:
                return rows_ND.new_empty(rows_ND.shape, dtype=out_dtype)
            arguments = job.foreign.experts, rows_ND, job.counts, job.kernels, tensors
            return compute_all(*arguments).to(out_dtype)

    @staticmethod
    def backward(ctx, grad_ND):
        job, (rows_ND, bundles) = ctx.job, ctx.saved_tensors
        if bundles is None:
            with part("fetch backward"):
                job.foreign.start()
            with part("wait for foreign backward"):
                bundles = job.foreign.wait()
        enabled, dtype = ctx.autocast
        with (
            part("foreign experts backward"),
            torch.enable_grad(),
            torch.autocast(rows_ND.device.type, enabled=enabled, dtype=dtype),
        ):
            grad_rows, job.gradients[:] = _gradients(job, rows_ND, bundles, grad_ND)
        return grad_rows, rows_ND.new_zeros(()), None, None


def _gradients(
    job: ForeignJob, rows_ND: torch.Tensor, bundles: torch.Tensor, grad_ND: torch.Tensor
) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Gradients of the rows, and of each foreign expert's trained parameters."""
    layout, names = job.foreign.module_layout, list(trained(job.foreign.experts[0]))
    # One after the other where they are computed so: one expert's graph at a time.
    together = [[count] for count in job.counts]
    if job.kernels is not None and together:
        together = [job.counts]
    sizes = [sum(counts) for counts in together]
    grad_rows, gradients = torch.empty_like(rows_ND), []
    parts = zip(*(t.split(sizes) for t in (rows_ND, grad_ND, grad_rows)), strict=True)
    bundles = bundles.split([len(counts) for counts in together])
    for counts, some, (rows, grad, target) in zip(together, bundles, parts, strict=True):
        tensors, rows = [layout.views(bundle) for bundle in some], rows.detach().requires_grad_()
        weights = [[each[name].detach().requires_grad_() for name in names] for each in tensors]
        for each, trainable in zip(tensors, weights, strict=True):
            each.update(zip(names, trainable, strict=True))
        out = compute_all(job.foreign.experts, rows, counts, job.kernels, tensors)
        grad_input, *grads = torch.autograd.grad(
            *(out, [rows, *chain(*weights)], grad.to(out.dtype)),
            materialize_grads=True,
            allow_unused=True,
        )
        target.copy_(grad_input)
        grads = iter(grads)
        gradients += [list(islice(grads, len(names))) for _ in counts]
    return grad_rows, gradients


def _return(job: ForeignJob) -> list[torch.Tensor | None]:
    """Send foreign gradients home; what has come here, for the trained parameters at home."""
    experts = job.foreign.experts
    like = list(trained(experts[0]).values())
    wide = like[0].dtype
    for param in like:
        wide = torch.promote_types(wide, param.dtype)
    numels = [param.numel() for param in like]
    homecoming = GradientReturn(job.exchange, job.plan, BundleLayout((torch.Size([sum(numels)]),)))
    (sent,) = homecoming.memory(like[0].new_empty(0, dtype=wide))
    for target, grads in zip(sent, job.gradients, strict=True):
        torch.cat([grad.reshape(-1).to(wide) for grad in grads], out=target)
    job.gradients.clear()
    ep_rank = job.exchange.table.ep_rank
    lent = {spill.expert % len(experts) for spill in job.plan.lent_experts(ep_rank)}
    received = {expert: like[0].new_zeros(sum(numels), dtype=wide) for expert in lent}
    homecoming.start()
    homecoming.finish([received])
    found: list[torch.Tensor | None] = []
    for index in range(len(experts)):
        if index not in received:
            found += [None] * len(like)
            continue
        parts = received[index].split(numels)
        found += [p.view(t.shape).to(t.dtype) for p, t in zip(parts, like, strict=True)]
    return found

"""The experts of a rank: a gated MLP for each home and each foreign expert, differentiable as one.

One autograd function covers both kinds, so that the graph has the same nodes on every rank whatever
the plan says. It keeps the *parameters* for backward, not views of their gathered weights: under
ZeRO-3 the gathered weights are then free between forward and backward, and ZeRO's own pre-backward
hook gathers them again. Foreign weights are likewise fetched again unless the config keeps them.

Order of work, chosen so that transfers hide behind home GEMMs:

    forward:   start fetch | home experts | wait | foreign experts
    backward:  start fetch | home experts but for w1, w3 | wait | foreign experts but for w1, w3
               | start dispatch's backward | foreign gradients of w1, w3 | start return
               | home gradients of w1, w3 | wait | add

A large fetch has been started before; starting it here again makes sure of it, also where
checkpointing has run other layers in between.

A row's score multiplies its activation: the down projection is linear, so this weighs the output,
and the score's gradient needs no output to be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from deepspeed.moe.ep_experts import GroupedExperts

from ds_llep.activation import Activation
from ds_llep.dispatch import DispatchBackward, give_way
from ds_llep.fetch import Exchange, ForeignWeights
from ds_llep.kernels.select import KernelSet
from ds_llep.mlp import GatedMLPs, Scales
from ds_llep.plan import Plan
from ds_llep.returns import GradientReturn
from ds_llep.timeline import part


class LLEPGroupedExperts(GroupedExperts):
    """AutoEP's grouped experts, same parameters, that also compute foreign experts.

    Adapters (`ds_llep.expert_lora`) add parameters of their own.
    """

    has_bias = False
    factor_names: tuple[str, ...] = ()
    """Parameters with the adapters' factors, in the order of :meth:`GatedMLPs.of`."""
    scales = Scales()
    """The adapters'."""

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """All that is an expert's own, each ``[M, ., .]``."""
        return self.w1, self.w2, self.w3, *(getattr(self, name) for name in self.factor_names)

    def forward(
        self,
        home_rows: torch.Tensor,
        foreign_rows: torch.Tensor,
        scores_N: torch.Tensor,
        arrived_UK: torch.Tensor,
        *,
        job: ExpertJob,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply each slot's expert to its rows.

        Args:
            home_rows: ``[N_home, D]``, grouped by slot.
            foreign_rows: ``[N_foreign, D]``, likewise; empty where nothing is borrowed.
            scores_N: the score of each row, home rows first.
            arrived_UK: which rows came in which parcel.
            job: the rest of what the layer knows. By keyword, since ZeRO-3's hooks look for
                tensors in positional arguments.

        Returns:
            Weighted results for both, in the same shapes.
        """
        activation = Activation(
            self.activation, self.activation_alpha, self.activation_limit, job.kernels
        )
        if job.weigh_inputs:
            home_rows, foreign_rows = _weighed(home_rows, foreign_rows, scores_N)
            scores_N = None
        inputs = home_rows, foreign_rows, scores_N, arrived_UK
        mlps = partial(
            GatedMLPs.of,
            activation=activation,
            hidden_size=home_rows.shape[1],
            has_bias=self.has_bias,
            scales=self.scales,
        )
        return _ExpertMLP.apply(*inputs, job, mlps, *self.weights)


class LLEPBiasedExperts(LLEPGroupedExperts):
    """The same for experts whose matrices have biases (`ds_llep.biased`)."""

    has_bias = True


@dataclass(frozen=True, kw_only=True)
class ExpertJob:
    """What the experts need beside rows and weights."""

    plan: Plan
    rows_per_slot: list[int]
    """Home experts, then foreign ones."""
    exchange: Exchange
    foreign: ForeignWeights
    keep_foreign: bool
    """Keep foreign weights between forward and backward instead of fetching them again."""
    weigh_inputs: bool
    """Scores multiply the experts' inputs instead of their outputs."""
    dispatch_backward: DispatchBackward
    kernels: KernelSet

    @property
    def home_counts(self) -> list[int]:
        return self.rows_per_slot[: self.plan.experts_per_rank]

    @property
    def foreign_counts(self) -> list[int]:
        return self.rows_per_slot[self.plan.experts_per_rank :]


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, home_rows, foreign_rows, scores_N, arrived_UK, job, mlps, *weights):
        scores_home, scores_foreign = _split(scores_N, len(home_rows))
        with _no_autocast(home_rows):
            home = mlps(_in_dtype_of(home_rows, *weights), job.home_counts)
            with part("fetch"):
                job.foreign.start()
            with part("home experts"):
                out_home, *hidden_home = home.forward(home_rows, scores_home)
            with part("wait for foreign"):
                bundles = job.foreign.wait()
            foreign = mlps(job.foreign.layout.views(bundles), job.foreign_counts)
            with part("foreign experts"):
                out_foreign, *hidden_foreign = foreign.forward(foreign_rows, scores_foreign)
        # The same number of tensors on every rank: activation checkpointing counts them.
        ctx.save_for_backward(
            *(home_rows, foreign_rows, scores_N, arrived_UK),
            *hidden_home,
            *hidden_foreign,
            bundles.clone() if job.keep_foreign else None,
            *weights,
        )
        ctx.settings = job, mlps
        return out_home, out_foreign

    @staticmethod
    def backward(ctx, home_grad, foreign_grad):
        home_rows, foreign_rows, scores_N, arrived_UK, *saved = ctx.saved_tensors
        *hidden, bundles = saved[:5]
        weights = saved[5:]
        ctx.maybe_clear_saved_tensors()  # so that gate and up are freed once they are used
        hidden_home, hidden_foreign = hidden[:2], hidden[2:]
        del saved, hidden
        scores_home, scores_foreign = _split(scores_N, len(home_rows))
        job, mlps = ctx.settings
        need_rows, need_each = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[6:]
        wanted = any(need_each[:3]), any(need_each[3:])
        need = need_rows, wanted
        computed = [index for index in range(len(weights)) if wanted[index >= 3]]
        with _no_autocast(home_rows):
            home = mlps(_in_dtype_of(home_rows, *weights), job.home_counts)
            if bundles is None:
                with part("fetch backward"):
                    job.foreign.start()
            with part("home experts backward"):
                home_step = home.backward(home_grad, hidden_home, scores_home, *need)
            if bundles is None:
                with part("wait for foreign backward"):
                    bundles = job.foreign.wait()
            foreign = mlps(job.foreign.layout.views(bundles), job.foreign_counts)
            layout = job.foreign.layout.of(computed)
            homecoming = GradientReturn(job.exchange, job.plan, layout)
            with part("foreign experts backward"):
                foreign_step = foreign.backward(
                    *(foreign_grad, hidden_foreign, scores_foreign, *need), homecoming.memory
                )
            grads = home_step.grad_rows, foreign_step.grad_rows, None
            if scores_N is not None:
                grad_scores = torch.cat((home_step.grad_scores, foreign_step.grad_scores))
                grads = *grads[:2], grad_scores
                if need_rows:  # they travel while the gradients of the weights are computed
                    with part("dispatch backward"):
                        job.dispatch_backward.start(*grads, arrived_UK)
            if not computed:
                return *grads, *[None] * (3 + len(weights))
            with part("foreign experts backward"):
                foreign.weight_gradients(foreign_step, foreign_rows, wanted)
                del foreign_step  # its gate and up gradients are used up

            def start_return() -> bool:
                # Not earlier: the home rank would wait for it from now on, on multiprocessors that
                # its products need, while the helper computes what is to return.
                travels = homecoming.start()
                if travels:
                    give_way(home_rows)
                return travels

            with part("home experts backward"):
                gradients = home.weight_gradients(home_step, home_rows, wanted, start_return)
            with part("gradient return"):
                homecoming.finish(gradients)
        grad_weights = [None] * len(weights)
        for index, gradient in zip(computed, gradients, strict=True):
            if need_each[index]:
                grad_weights[index] = gradient.to(weights[index].dtype)
        return *grads, None, None, None, *grad_weights


def _in_dtype_of(rows: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
    # AutoEP computes in the dtype of the rows; a no-op unless autocast keeps wider parameters.
    return [weight.detach().to(rows.dtype) for weight in weights]


def _no_autocast(rows: torch.Tensor) -> torch.autocast:
    # Dtypes are settled before the experts; autocast would recast inside the GEMMs.
    return torch.autocast(rows.device.type, enabled=False)


def _weighed(
    home_rows: torch.Tensor, foreign_rows: torch.Tensor, scores_N: torch.Tensor
) -> list[torch.Tensor]:
    """Rows times their scores, rounded once."""
    return [
        (rows.to(scores.dtype) * scores.unsqueeze(1)).to(rows.dtype)
        for rows, scores in zip(
            (home_rows, foreign_rows), _split(scores_N, len(home_rows)), strict=True
        )
    ]


def _split(scores_N: torch.Tensor | None, num_home: int) -> tuple[torch.Tensor | None, ...]:
    return (None, None) if scores_N is None else (scores_N[:num_home], scores_N[num_home:])

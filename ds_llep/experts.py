"""The experts of a rank: a gated MLP for each home and each foreign expert, differentiable as one.

One autograd function covers both kinds, so that the graph has the same nodes on every rank whatever
the plan says. It keeps the *parameters* for backward, not views of their gathered weights: under
ZeRO-3 the gathered weights are then free between forward and backward, and ZeRO's own pre-backward
hook gathers them again. Foreign weights are likewise fetched again unless the config keeps them.

Order of work, chosen so that transfers hide behind GEMMs (own: of this rank's own tokens):

    forward:   start fetch | home gate and up, own | wait for others' tokens | home gate and up,
               others | wait | foreign experts | home down, others | start combine | home down, own
    backward:  start fetch | home down, own | wait for others' gradients | home down, others
               | home rows and w2 | wait | the same of foreign experts | start dispatch's backward
               | foreign w1, w3 | start return | home w1, w3 | wait | add

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
from ds_llep.crossings import Crossings
from ds_llep.fetch import Exchange, ForeignWeights
from ds_llep.kernels.tables import Part
from ds_llep.mlp import GatedMLPs, Scales
from ds_llep.returns import GradientReturn
from ds_llep.route import Route
from ds_llep.timeline import part

_MEMORY_PER_LINK = 14
"""How many times as fast as a link memory is; on two H200, 4800 and 340 GB/s."""


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
            self.activation, self.activation_alpha, self.activation_limit, job.route.kernels
        )
        if job.weigh_inputs:
            job.crossings.tokens.finish()
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

    route: Route
    crossings: Crossings
    exchange: Exchange
    foreign: ForeignWeights
    keep_foreign: bool
    """Keep foreign weights between forward and backward instead of fetching them again."""
    weigh_inputs: bool
    """Scores multiply the experts' inputs instead of their outputs."""

    @property
    def home_counts(self) -> list[int]:
        return self.route.rows_per_slot[: self.route.plan.experts_per_rank]

    @property
    def foreign_counts(self) -> list[int]:
        return self.route.rows_per_slot[self.route.plan.experts_per_rank :]

    def parts(
        self, home: GatedMLPs, rows_ND: torch.Tensor, *weights: torch.Tensor
    ) -> tuple[Part | None, Part | None]:
        """Own rows and others, where a product in two parts is worth it; else None, and None: all.

        The second part reads the weights once more, which may take longer than the transfer. A
        rank decides for itself: it begins and ends its transfers in the same order either way.
        """
        crossing = sum(self.route.recv_splits) * rows_ND.shape[1]
        again = sum(weight.numel() for weight in weights)
        if again > _MEMORY_PER_LINK * crossing or not home.in_parts(rows_ND):
            return None, None
        start_M, stop_M = self.route.own_rows
        return Part(start_M, stop_M, inside=True), Part(start_M, stop_M, inside=False)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, home_rows, foreign_rows, scores_N, arrived_UK, job, mlps, *weights):
        scores_home, scores_foreign = _split(scores_N, len(home_rows))
        with _no_autocast(home_rows):
            home = mlps(_in_dtype_of(home_rows, *weights), job.home_counts)
            with part("fetch"):
                job.foreign.start()
            own, others = job.parts(home, home_rows, home.w1, home.w3)
            hidden_home = None, None
            with part("home experts"):
                if own:
                    hidden_home = home.gate_up(home_rows, own)
            with part("dispatch"):
                job.crossings.tokens.finish()
            with part("home experts"):
                hidden_home = home.gate_up(home_rows, others, hidden_home)
                act_home = home.activate(*hidden_home, scores_home)
            with part("wait for foreign"):
                bundles = job.foreign.wait()
            foreign = mlps(job.foreign.layout.views(bundles), job.foreign_counts)
            with part("foreign experts"):
                hidden_foreign = foreign.gate_up(foreign_rows)
                act_foreign = foreign.activate(*hidden_foreign, scores_foreign)
                out_foreign = foreign.down(act_foreign, scores_foreign)
                del act_foreign
            own, others = None, None
            if home.out_bias_GD is None and home.down_factors is None:
                own, others = job.parts(home, home_rows, home.w2)
            with part("home experts"):
                out_home = home.down(act_home, scores_home, others)
            with part("combine"):
                job.crossings.results.start(out_home, out_foreign, arrived_UK)
            with part("home experts"):
                if own:
                    home.down(act_home, scores_home, own, out_home)
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
            own, others = job.parts(home, home_rows, home.w2)
            grad_act = None
            with part("home experts backward"):
                if own:
                    grad_act = home.down_backward(home_grad, own)
            with part("combine backward"):
                job.crossings.gradients.finish()
            with part("home experts backward"):
                grad_act = home.down_backward(home_grad, others, grad_act)
                home_step = home.backward(home_grad, grad_act, hidden_home, scores_home, *need)
                del grad_act
            if bundles is None:
                with part("wait for foreign backward"):
                    bundles = job.foreign.wait()
            foreign = mlps(job.foreign.layout.views(bundles), job.foreign_counts)
            layout = job.foreign.layout.of(computed)
            homecoming = GradientReturn(job.exchange, job.route.plan, layout)
            with part("foreign experts backward"):
                grad_act = foreign.down_backward(foreign_grad)
                foreign_step = foreign.backward(
                    *(foreign_grad, grad_act, hidden_foreign, scores_foreign, *need),
                    homecoming.memory,
                )
                del grad_act
            grads = home_step.grad_rows, foreign_step.grad_rows, None
            if scores_N is not None:
                grad_scores = torch.cat((home_step.grad_scores, foreign_step.grad_scores))
                grads = *grads[:2], grad_scores
                if need_rows:  # they travel while the gradients of the weights are computed
                    with part("dispatch backward"):
                        job.crossings.token_gradients.start(*grads, arrived_UK)
            if not computed:
                return *grads, *[None] * (3 + len(weights))
            with part("foreign experts backward"):
                foreign.weight_gradients(foreign_step, foreign_rows, wanted)
                del foreign_step  # its gate and up gradients are used up
            with part("gradient return"):
                homecoming.start()
            with part("home experts backward"):
                gradients = home.weight_gradients(home_step, home_rows, wanted)
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

"""One MoE layer under Least-Loaded Expert Parallelism: the algorithm on one page.

``LLEPMoELayer`` takes the place of AutoEP's layer by a change of class: parameters, buffers, names
and hooks stay what they were, so optimizers, ZeRO and checkpoints do not notice. Router, shared
experts and the shape of the output remain AutoEP's code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

from ds_llep.config import LLEPConfig
from ds_llep.counts import gather_counts
from ds_llep.dispatch import combine, dispatch, make_route
from ds_llep.experts import ExpertJob
from ds_llep.fetch import Traffic
from ds_llep.kernels.select import KernelSet, select_kernels
from ds_llep.monitor import Statistics
from ds_llep.plan import make_plan


@dataclass
class LayerContext:
    """What a layer needs beside its parameters; one for each layer of an engine."""

    config: LLEPConfig
    name: str
    index: int
    statistics: Statistics
    kernels: KernelSet | None = None
    """Chosen at the first forward, when the layer is on its device."""


class LLEPMoELayer(AutoEPMoELayer):
    """AutoEP's MoE layer with dispatch, expert compute and combine planned by LLEP.

    Never constructed: :func:`ds_llep.activate.activate` changes the class of AutoEP's layers and
    sets ``llep``.
    """

    llep: LayerContext

    @torch.compiler.disable
    def forward(
        self, hidden_states: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The routed and shared experts' output, ``[B, S, D]`` like ``hidden_states``.

        Raises:
            ValueError: on every rank, if the router of any rank gives unusable output.
        """
        batch, seq_len, hidden = hidden_states.shape
        x_TD = hidden_states.reshape(-1, hidden)
        context = self.llep
        if context.kernels is None:
            context.kernels = select_kernels(context.config.kernels, x_TD.device)

        scores_TK, selected_TK, counts_PE = self._route(x_TD)
        plan = make_plan(counts_PE, context.config)
        context.statistics.record(context.index, plan)
        before, after = (scores_TK, None) if self.score_apply == "pre" else (None, scores_TK)

        route = make_route(selected_TK, plan, self.ep_rank, self.ep_group, context.kernels)
        rows_ND = dispatch(x_TD, before, route)
        job = ExpertJob(
            traffic=Traffic.of(plan, self.ep_rank),
            group=self.ep_group,
            keep_foreign=context.config.backward_weights == "keep" and torch.is_grad_enabled(),
            kernels=context.kernels,
        )
        out_ND = self.experts(rows_ND, job=job, rows_per_slot=route.rows_per_slot)
        y_TD = combine(out_ND, after, route)
        return self._finalize_output(
            y_TD.reshape(batch, seq_len, hidden), x_TD, hidden_states, hidden
        )

    def _route(self, x_TD: torch.Tensor):
        """Run the router and agree on the counts; a failure on one rank becomes an error on all."""
        failure = scores_TK = selected_TK = None
        try:
            scores_TK, selected_TK, counts_E = self.router(x_TD, self.expert_bias)
        except Exception as error:  # whatever it is, the others wait in gather_counts
            failure = error
        try:
            counts_PE = gather_counts(
                selected_TK,
                scores_TK,
                self.num_experts,
                self.ep_group,
                x_TD.device,
                self.llep.name,
            )
        except ValueError as error:
            raise error from failure
        with torch.no_grad():  # AutoEP's own utilisation counter
            self.tokens_per_expert.add_(counts_E)
        return scores_TK, selected_TK, counts_PE

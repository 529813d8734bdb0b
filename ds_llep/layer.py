"""One MoE layer under Least-Loaded Expert Parallelism: the algorithm on one page.

``LLEPMoELayer`` takes the place of AutoEP's layer by a change of class: parameters, buffers, names
and hooks stay what they were, so optimizers, ZeRO and checkpoints do not notice. Router, shared
experts and the shape of the output remain AutoEP's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

from ds_llep.config import LLEPConfig
from ds_llep.counts import gather_counts
from ds_llep.dispatch import combine, dispatch, make_route
from ds_llep.experts import ExpertJob
from ds_llep.fetch import Exchange, ForeignWeights, start_in_backward
from ds_llep.kernels.select import KernelSet, select_kernels
from ds_llep.monitor import Statistics
from ds_llep.plan import Plan, make_plan
from ds_llep.shards import whole_shape
from ds_llep.timeline import part


@dataclass
class LayerContext:
    """What a layer needs beside its parameters; one for each layer of an engine."""

    config: LLEPConfig
    name: str
    index: int
    statistics: Statistics
    exchange: Exchange
    kernels: KernelSet | None = None
    workspace_size: int | None = None
    """Foreign experts that ``max_foreign_bytes`` makes room for; None: any number."""
    planning: LLEPConfig | None = None
    """The config with the limits on foreign experts made one."""
    _prepared_for: tuple[torch.dtype, torch.device] | None = None

    def prepare(self, weights: Sequence[torch.Tensor], like: torch.Tensor) -> None:
        """Settle what depends on the dtype and the device that the layer runs in.

        Raises:
            ValueError: on every rank, if ``max_foreign_bytes`` is less than one expert.
        """
        if self._prepared_for == (like.dtype, like.device):
            return
        self.kernels = select_kernels(self.config.kernels, like.device)
        expert_bytes = sum(whole_shape(w)[1:].numel() for w in weights) * like.element_size()
        self.planning, self.workspace_size = self.config.with_room(
            expert_bytes, f" of MoE layer '{self.name}'", f" in {like.dtype}"
        )
        self._prepared_for = like.dtype, like.device


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
        context, exchange = self.llep, self.llep.exchange
        weights = self.experts.w1, self.experts.w2, self.experts.w3
        context.prepare(weights, x_TD)
        keep_foreign = context.config.backward_weights == "keep" and torch.is_grad_enabled()

        scores_TK, selected_TK, plans = self._route_and_plan(x_TD, weights)
        plan = plans[exchange.table.group_index]
        foreign = ForeignWeights(
            exchange,
            context.index,
            weights,
            plans,
            like=x_TD,
            size=context.workspace_size,
            count=partial(context.statistics.count_fetched, context.index, self.training),
        )
        if exchange.always_ready:
            with part("fetch"):
                foreign.start()

        before, after = (scores_TK, None) if self.score_apply == "pre" else (None, scores_TK)
        with part("route"):
            route = make_route(selected_TK, plan, self.ep_rank, self.ep_group, context.kernels)
        home_rows, foreign_rows = dispatch(x_TD, before, route)
        job = ExpertJob(plan, exchange, foreign, keep_foreign, context.kernels)

        out_home, out_foreign = self.experts(
            home_rows, foreign_rows, job=job, rows_per_slot=route.rows_per_slot
        )
        y_TD = combine(out_home, out_foreign, after, route)
        if exchange.always_ready and not keep_foreign:
            y_TD = start_in_backward(y_TD, foreign)
        return self._finalize_output(
            y_TD.reshape(batch, seq_len, hidden), x_TD, hidden_states, hidden
        )

    def _route_and_plan(
        self, x_TD: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, list[Plan]]:
        """Scores, choices and, from the counts of all, one plan for each EP group.

        A router's failure on one rank becomes an error on all.
        """
        context, exchange = self.llep, self.llep.exchange
        failure = scores_TK = selected_TK = None
        try:
            with part("router"):
                scores_TK, selected_TK, counts_E = self.router(x_TD, self.expert_bias)
        except Exception as error:  # whatever it is, the others wait in gather_counts
            failure = error
        try:
            with part("counts"):
                counts_RE, versions_R = gather_counts(
                    selected_TK,
                    scores_TK,
                    self.num_experts,
                    exchange.group,
                    x_TD.device,
                    context.name,
                    exchange.version(context.index, weights),
                )
        except ValueError as error:
            raise error from failure
        with torch.no_grad():  # AutoEP's own utilisation counter
            self.tokens_per_expert.add_(counts_E)
        exchange.renew(context.index, versions_R)
        counts_by_group = exchange.counts_by_group(counts_RE)
        with part("plan"):
            plans = [make_plan(counts_PE, context.planning) for counts_PE in counts_by_group]
        own_plan = plans[exchange.table.group_index]
        context.statistics.record(context.index, own_plan, self.training, x_TD.dtype)
        return scores_TK, selected_TK, plans

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
from deepspeed.runtime.compiler import lazy_disable

from ds_llep.config import LLEPConfig
from ds_llep.costs import Costs
from ds_llep.counts import Counting
from ds_llep.dispatch import DispatchBackward, combine, dispatch
from ds_llep.experts import ExpertJob
from ds_llep.fetch import Exchange, ForeignWeights, start_in_backward
from ds_llep.kernels.select import KernelSet, select_kernels
from ds_llep.kernels.tables import all_to_device
from ds_llep.monitor import Statistics
from ds_llep.plan import Plan, make_plan, plan_from_tokens
from ds_llep.rates import H200, Rates
from ds_llep.route import Addresses, Route, RouteMaps, find_runs, make_route
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
    rates: Rates = H200
    kernels: KernelSet | None = None
    workspace_size: int | None = None
    """Foreign experts that ``max_foreign_bytes`` makes room for; None: any number."""
    planning: LLEPConfig | None = None
    """The config with the limits on foreign experts made one."""
    costs: Costs | None = None
    """Prices, for planner "cost"."""
    _prepared_for: tuple[torch.dtype, torch.device] | None = None

    def prepare(
        self, weights: Sequence[torch.Tensor], like: torch.Tensor, top_k: int, ep_size: int
    ) -> None:
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
        # Each one's columns: below its rows there may be those of a bias.
        hidden_size, ffn_size = (whole_shape(weight)[2] for weight in weights[:2])
        fetches = 1 if self.config.backward_weights == "keep" else 2
        self.costs = self.rates.costs(
            hidden_size, ffn_size, top_k, ep_size, like.element_size(), fetches
        )
        self._prepared_for = like.dtype, like.device

    def make_plans(self, counts_by_group: Sequence) -> list[Plan]:
        """The plan of each EP group that the exchange knows, from its counts, arrays ``[P, E]``."""
        nodes = self.exchange.table.nodes
        return [
            make_plan(counts_PE, self.planning, self.costs, nodes_P)
            for counts_PE, nodes_P in zip(counts_by_group, nodes, strict=True)
        ]


class LLEPMoELayer(AutoEPMoELayer):
    """AutoEP's MoE layer with dispatch, expert compute and combine planned by LLEP.

    Never constructed: :func:`ds_llep.activate.activate` changes the class of AutoEP's layers and
    sets ``llep``.
    """

    llep: LayerContext

    @lazy_disable  # PyTorch's own imports torch._dynamo at once, which takes a second
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
        weights = self.experts.weights
        context.prepare(weights, x_TD, self.top_k, self.ep_size)
        keep_foreign = context.config.backward_weights == "keep" and torch.is_grad_enabled()

        scores_TK, plan, foreign, route, maps = self._plan_and_route(x_TD, weights)
        backward = DispatchBackward(route)
        dispatched = dispatch(x_TD, scores_TK, route, maps, backward)
        job = ExpertJob(
            plan=plan,
            rows_per_slot=route.rows_per_slot,
            exchange=exchange,
            foreign=foreign,
            keep_foreign=keep_foreign,
            weigh_inputs=self.score_apply == "pre",
            dispatch_backward=backward,
            kernels=context.kernels,
        )
        out_home, out_foreign = self.experts(*dispatched, job=job)
        y_TD = combine(out_home, out_foreign, dispatched.arrived_UK, route, maps)
        if not keep_foreign:
            y_TD = start_in_backward(y_TD, foreign)
        return self._finalize_output(
            y_TD.reshape(batch, seq_len, hidden), x_TD, hidden_states, hidden
        )

    def _plan_and_route(
        self, x_TD: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, Plan, ForeignWeights, Route, RouteMaps]:
        """Scores; from the counts of all, the plan; its foreign experts, which are on their way
        where they need no gather; and this rank's route.

        A router's failure on one rank becomes an error on all.
        """
        context, exchange = self.llep, self.llep.exchange
        failure = scores_TK = selected_TK = None
        try:
            with part("router"):
                scores_TK, selected_TK, counts_E = self.router(x_TD, self.expert_bias)
        except Exception as error:  # whatever it is, the others wait for this rank's counts
            failure = error
        with part("counts"):
            counting = Counting(
                selected_TK,
                scores_TK,
                self.num_experts,
                self.ep_size,
                exchange.group,
                x_TD.device,
                context.kernels,
                exchange.version(context.index, weights),
            )
        with part("route"), torch.no_grad():
            # Work for the device while the host waits for the counts.
            planned = self._plan_on_device(counting)
            counting.send_to_host(*planned)
            if failure is None:
                if planned:
                    runs = context.kernels.find_runs(counting.tokens_RE, planned[0], self.ep_rank)
                    addresses = self._address(selected_TK, counting, runs)
                self.tokens_per_expert.add_(counts_E)  # AutoEP's own utilisation counter
        try:
            with part("wait for counts"):
                counts, planned = counting.wait(context.name)
        except ValueError as error:
            raise error from failure
        exchange.renew(context.index, counts.versions)
        own = exchange.table.group_index
        with part("plan"):
            if planned:
                plans = [plan_from_tokens(counts.tokens_RE, *planned, context.planning)]
            else:
                plans = context.make_plans(exchange.by_group(counts.tokens_RE))
        foreign = self._fetch(plans, weights, x_TD)
        with part("route"):
            reached_PP, alone_PE = (
                exchange.by_group(values_RX)[own]
                for values_RX in (counts.reached_RP, counts.alone_RE)
            )
            route = make_route(
                *(reached_PP, alone_PE, plans[own], self.ep_rank),
                *(self.ep_group, context.kernels, self.top_k),
            )
            tables = [route.first_P]
            if not planned:
                tables.append(find_runs(plans[own], self.ep_rank))
            first_P, *runs = all_to_device(tables, x_TD.device)
            if not planned:
                addresses = self._address(selected_TK, counting, *runs)
            maps = addresses.place(first_P, context.kernels)
        return scores_TK, plans[own], foreign, route, maps

    def _fetch(
        self, plans: list[Plan], weights: Sequence[torch.Tensor], x_TD: torch.Tensor
    ) -> ForeignWeights:
        """The plans' foreign experts, which travel while the host works out the route."""
        context, exchange = self.llep, self.llep.exchange
        own = plans[exchange.table.group_index]
        context.statistics.record(context.index, own, self.training, x_TD.dtype)
        foreign = ForeignWeights(
            exchange,
            context.index,
            weights,
            plans,
            like=x_TD,
            size=context.workspace_size,
            count=partial(context.statistics.count_fetched, context.index, self.training),
        )
        if foreign.starts_early:
            with part("fetch"):
                foreign.start()
        return foreign

    def _plan_on_device(self, counting: Counting) -> tuple[torch.Tensor, ...]:
        """The plan's tokens and capped tokens; nothing where it is for the host to plan.

        With shards, weights go to all EP groups, so the host needs the plans of all.
        """
        context, config = self.llep, self.llep.planning
        if context.kernels.plan_lla is None or context.exchange.sharded or config.planner != "lla":
            return ()
        return context.kernels.plan_lla(
            counting.tokens_RE,
            config.capacity_factor,
            config.imbalance_threshold,
            config.min_tokens_per_gemm,
            config.max_foreign_experts,
        )

    def _address(self, selected_TK, counting: Counting, runs_2EP) -> Addresses:
        address = self.llep.kernels.address_copies
        return Addresses(*address(selected_TK, counting.blocks, runs_2EP, self.ep_rank))

"""DeepSpeed's own MoE layer, balanced: its gate and its experts, with a ragged dispatch between.

``deepspeed.moe.layer.MoE`` sends every expert a block of ``capacity`` rows, which without dropping
is the load of the most loaded expert. Here only rows that the gate kept travel, to the ranks of a
plan. Gate, residual branch and what the layer returns remain DeepSpeed's code, and so do
parameters, names and checkpoints: layers are converted by a change of class.

A token's copies travel one by one, as they do with DeepSpeed, and are weighed and summed on their
own rank, by DeepSpeed's code and with its rounding. The price: copies of a token that go to the
same rank travel each by itself, and to find the kept ones is a second device-to-host
synchronisation beside that of the counts.

Shapes: ``T`` tokens of a rank, ``K`` experts per token, ``D`` hidden size, ``E`` experts, ``M`` of
them on a rank, ``V`` copies that the gate kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import deepspeed.moe.layer
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.sharded_moe import MOE_TIMER, MOELayer, _sparse_decode
from deepspeed.runtime.compiler import lazy_disable

from ds_llep.bundle import (
    ForeignJob,
    ForeignModules,
    ModuleLayout,
    compute,
    compute_all,
    compute_foreign,
    expect_gradients,
)
from ds_llep.config import SECTION
from ds_llep.counts import Counting
from ds_llep.dispatch import DispatchBackward, combine, dispatch
from ds_llep.fetch import start_in_backward
from ds_llep.kernels.select import select_kernels
from ds_llep.kernels.tables import all_to_device
from ds_llep.layer import LayerContext
from ds_llep.plan import Plan
from ds_llep.route import Addresses, Route, RouteMaps, find_runs, make_route
from ds_llep.timeline import part


class MoE(deepspeed.moe.layer.MoE):
    """DeepSpeed's MoE layer, which balances in an engine whose ``"llep"`` section is enabled.

    Same constructor, same ``(output, l_aux, exp_counts)``. Without that section it is DeepSpeed's
    layer and nothing else; with it, DeepSpeed's layers in the model become ones of this class.
    """


@dataclass
class MoEContext(LayerContext):
    """What a layer whose experts are modules needs beside its parameters."""

    tried: bool = False
    """Whether an expert was found, in training, to do the same on every rank."""
    grouped: bool = False
    """Whether experts are computed together; each call that this cannot serve does without."""

    def prepare_modules(self, layout: ModuleLayout, x_TD: torch.Tensor, ep_size: int) -> None:
        """Settle what depends on the dtype and the device that the layer runs in.

        Raises:
            ValueError: on every rank, if ``max_foreign_bytes`` is less than one expert.
        """
        if self._prepared_for == (layout, x_TD.dtype, x_TD.device):
            return
        self.kernels = select_kernels(self.config.kernels, x_TD.device)
        self.planning, self.workspace_size = self.config.with_room(
            layout.nbytes, f" of MoE layer '{self.name}'"
        )
        # Priced as a gated MLP of as many weights. Copies travel one by one, as with one choice.
        hidden_size, element_size = x_TD.shape[1], x_TD.element_size()
        ffn_size = max(1, layout.nbytes // (3 * hidden_size * element_size))
        fetches = 1 if self.config.backward_weights == "keep" else 2
        self.costs = self.rates.costs(hidden_size, ffn_size, 1, ep_size, element_size, fetches)
        self._prepared_for = layout, x_TD.dtype, x_TD.device


class BalancedMOELayer(MOELayer):
    """What is between the input and the output of DeepSpeed's layer, planned by LLEP.

    Never constructed: :func:`ds_llep.convert.adopt` changes the class of DeepSpeed's layer and sets
    ``llep``.
    """

    llep: MoEContext

    @lazy_disable
    def forward(
        self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The experts' weighted output, shaped like ``hidden_states``, ``[..., D]``.

        Raises:
            ValueError: on every rank, if the gate of any rank gives unusable output, or if the
                experts do what cannot be done on another rank.
        """
        if self.wall_clock_breakdown:
            self.timers(MOE_TIMER).start()
        context, exchange = self.llep, self.llep.exchange
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        experts = self.experts.deepspeed_experts
        layout = ModuleLayout.of(experts[0])
        context.prepare_modules(layout, x_TD, self.ep_size)
        if self.training and not context.tried:
            self._check_experts(x_TD)
        keep_foreign = context.config.backward_weights == "keep" and torch.is_grad_enabled()

        gates_KT, slots_KT, x_VD, plan, foreign, route, maps = self._plan_and_route(
            x_TD, used_token, layout
        )
        unweighed = x_VD.new_zeros((len(x_VD), 1))
        kernels = context.kernels if context.grouped else None
        rows = dispatch(x_VD, unweighed, route, maps, DispatchBackward(route))
        job = ForeignJob(
            plan=plan,
            counts=route.rows_per_slot[len(experts) :],
            foreign=foreign,
            keep=keep_foreign,
            exchange=exchange,
            kernels=kernels,
        )
        promise = expect_gradients(rows.foreign_rows, job)
        with part("home experts"):  # each also where it has no rows
            counts = route.rows_per_slot[: len(experts)]
            out_home = compute_all(experts, rows.home_rows, counts, kernels)
        out_foreign = compute_foreign(rows.foreign_rows, promise, job, out_home.dtype)
        y_VD = combine(out_home, out_foreign, rows.arrived_UK, route, maps)
        if not keep_foreign:
            y_VD = start_in_backward(y_VD, foreign)
        y_TD = _sparse_decode(y_VD, slots_KT, gates_KT, len(x_TD))
        if self.wall_clock_breakdown:
            self.timers(MOE_TIMER).stop()
            self.time_moe = self.timers(MOE_TIMER).elapsed(reset=False)
        return y_TD.reshape(hidden_states.shape)

    def _plan_and_route(
        self, x_TD: torch.Tensor, used_token: torch.Tensor | None, layout: ModuleLayout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Plan, ForeignModules, Route, RouteMaps]:
        """Gate values and slots ``[K, T]``, kept copies ``[V, D]``, the plan, its foreign experts,
        which are on their way, and this rank's route.

        A gate's failure on one rank becomes an error on all.
        """
        context, exchange = self.llep, self.llep.exchange
        failure = ids_V1 = gates_V1 = None
        try:
            with part("router"):
                # Sparse routes: expert ids, places in an expert's block, gate values, each [K, T].
                self.l_aux, _, _, ids_KT, _, gates_KT, self.exp_counts = self.gate(
                    x_TD, used_token, True
                )
                kept_KT = ids_KT >= 0
                choice_V, token_V = kept_KT.nonzero(as_tuple=True)
                ids_V1 = ids_KT[choice_V, token_V].long().unsqueeze(1)
                gates_V1 = gates_KT[choice_V, token_V].unsqueeze(1)
        except Exception as error:  # whatever it is, the others wait for this rank's counts
            failure = error
        home = [tensor for expert in self.experts.deepspeed_experts for tensor in _state(expert)]
        counting = Counting(
            ids_V1,
            gates_V1,
            self.ep_size * self.num_local_experts,
            self.ep_size,
            exchange.group,
            x_TD.device,
            context.kernels,
            exchange.version(context.index, home),
        )
        counting.send_to_host()
        try:
            with part("wait for counts"):
                counts, _ = counting.wait(context.name)
        except ValueError as error:
            raise error from failure
        exchange.renew(context.index, counts.versions)
        with part("plan"):
            (plan,) = context.make_plans([counts.tokens_RE])
        foreign = self._fetch(plan, layout, x_TD)
        with part("route"), torch.no_grad():
            rank, kernels = exchange.table.ep_rank, context.kernels
            planned = counts.reached_RP, counts.alone_RE, plan
            route = make_route(*planned, rank, self.ep_group, kernels, top_k=1)
            tables = route.first_P, find_runs(plan, rank)
            first_P, runs_2EP = all_to_device(tables, x_TD.device)
            found = kernels.address_copies(ids_V1, counting.blocks, runs_2EP, rank)
            maps = Addresses(*found).place(first_P, kernels)
            # A copy that was dropped reads the row of zeros behind the last one.
            place_KT = kept_KT.reshape(-1).cumsum(0).view(kept_KT.shape) - 1
            slots_KT = torch.where(kept_KT, place_KT, len(token_V))
        return gates_KT, slots_KT, x_TD.index_select(0, token_V), plan, foreign, route, maps

    def _fetch(self, plan: Plan, layout: ModuleLayout, x_TD: torch.Tensor) -> ForeignModules:
        """The plan's foreign experts, which travel while the host works out the route."""
        context = self.llep
        context.statistics.record(context.index, plan, self.training, x_TD.dtype)
        foreign = ForeignModules(
            context.exchange,
            context.index,
            self.experts.deepspeed_experts,
            layout,
            [plan],
            like=x_TD,
            size=context.workspace_size,
            count=partial(context.statistics.count_fetched, context.index, self.training),
        )
        with part("fetch"):
            foreign.start()
        return foreign

    def _check_experts(self, x_TD: torch.Tensor) -> None:
        """Try a copy of an expert on the same few rows on every rank, once.

        What an expert does with its own rows must not decide about an error: another rank may have
        none, and would wait for this one.

        Raises:
            ValueError: on every rank, if an expert changes its buffers or draws random numbers.
        """
        expert = copy.deepcopy(self.experts.deepspeed_experts[0])
        before, states = [buffer.clone() for buffer in expert.buffers()], _random_states()
        with torch.no_grad():
            compute(expert, x_TD.new_ones((4, x_TD.shape[1])))
        random = not all(map(torch.equal, states, _random_states()))
        torch.set_rng_state(states[0])
        get_accelerator().set_rng_state(states[1])
        name, off = self.llep.name, f'or set "{SECTION}.enabled" to false'
        if random:
            raise ValueError(
                f"llep: the experts of MoE layer '{name}' draw random numbers in forward, so that "
                f"their result would depend on the rank that computes them. Set their dropout to "
                f"0, {off}."
            )
        if not all(map(torch.equal, before, expert.buffers())):
            raise ValueError(
                f"llep: the experts of MoE layer '{name}' change their buffers in forward, as "
                "batch normalisation does, and a helper would change copies that are lost. Use "
                f"experts without such buffers, {off}."
            )
        self.llep.tried = True


def _state(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), get_accelerator().get_rng_state()]

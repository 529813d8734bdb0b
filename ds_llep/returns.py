"""Foreign experts' weight gradients, from their helpers to their home rank and added there.

The gradients return within the EP group, before ZeRO reduces them over the EDP group. A popular
expert has many helpers, so they return in rounds: a home rank never holds more than a few at once.
Which spill belongs to which round follows from the plan, so both ends agree on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import deepspeed.comm as dist
import torch

from ds_llep.fetch import Exchange
from ds_llep.plan import Plan, Spill
from ds_llep.workspace import BundleLayout

BUNDLES_PER_ROUND = 4
"""Returned gradients, in experts, that a home rank holds at once."""


class GradientReturn:
    """The return of one layer's and micro-batch's gradients.

    Every rank of the EP group calls :meth:`start`, then :meth:`finish`.
    """

    def __init__(self, exchange: Exchange, plan: Plan) -> None:
        self._exchange, self._plan = exchange, plan
        self._ranks = exchange.table.own_group
        ep_rank = exchange.table.ep_rank
        slots = {expert: slot for slot, expert in enumerate(plan.foreign_experts(ep_rank))}
        by_home = [0] * plan.num_ranks
        self._sent: list[list[tuple[Spill, int]]] = []
        self._received: list[list[Spill]] = []
        for spill in plan.spills:  # by expert: a round boundary cuts one expert at most
            index = by_home[spill.home] // BUNDLES_PER_ROUND
            by_home[spill.home] += 1
            while len(self._sent) <= index:
                self._sent.append([])
                self._received.append([])
            if spill.helper == ep_rank:
                self._sent[index].append((spill, slots[spill.expert]))
            elif spill.home == ep_rank:
                self._received[index].append(spill)

    def start(self, gradients: Sequence[torch.Tensor]) -> None:
        """Start to return the foreign experts' gradients, each ``[n, ., .]``, by expert id."""
        self._gradients = gradients
        self._layout = BundleLayout(tuple(gradient.shape[1:] for gradient in gradients))
        bundles = max(map(len, self._received), default=0)
        self._buffer = gradients[0].new_empty((bundles, self._layout.numel))
        if self._sent:
            self._post(0)

    def finish(self, gradients: Sequence[torch.Tensor]) -> None:
        """Receive, and add to the home experts' gradients, each ``[M, ., .]``, in place.

        The sum over an expert's helpers runs in fp32 and is rounded once, so that its error does
        not grow with their number.
        """
        helpers = Counter(spill.expert for spills in self._received for spill in spills)
        total = Sum(gradients)
        for index, spills in enumerate(self._received):
            if index:
                self._post(index)
            self._exchange.finish()
            for place, spill in enumerate(spills):
                returned = self._layout.views(self._buffer[place : place + 1])
                expert = spill.expert % self._plan.experts_per_rank
                if helpers[spill.expert] > 1:
                    total.add(expert, returned)
                    continue
                for gradient, part in zip(gradients, returned, strict=True):
                    gradient[expert] += part[0]  # one addition: rounded once in any dtype
        total.flush()
        del self._gradients, self._buffer

    def _post(self, index: int) -> None:
        operations = []
        targets = self._buffer.split(self._layout.numels, dim=1)
        for place, spill in enumerate(self._received[index]):
            for target in targets:
                operations.append(self._operation(dist.irecv, target[place], spill.helper))
        for spill, slot in self._sent[index]:
            for gradient in self._gradients:
                source = gradient[slot].view(-1)
                operations.append(self._operation(dist.isend, source, spill.home))
        self._exchange.post(operations)

    def _operation(self, direction: Callable, tensor: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(direction, tensor, self._ranks[peer], self._exchange.ep_group)


class Sum:
    """Adds returned gradients to the home's, one expert after the other, in fp32."""

    def __init__(self, gradients: Sequence[torch.Tensor]) -> None:
        self._gradients = gradients
        self._expert: int | None = None

    def add(self, expert: int, returned: Sequence[torch.Tensor]) -> None:
        """``returned``: one ``[1, ., .]`` for each matrix."""
        if expert != self._expert:
            self.flush()
            self._expert = expert
            wide = torch.promote_types(returned[0].dtype, torch.float32)
            self._totals = [gradient[expert].to(wide) for gradient in self._gradients]
        for index, part in enumerate(returned):
            self._totals[index] = self._totals[index] + part[0]

    def flush(self) -> None:
        """Round the expert's sum into its gradient."""
        if self._expert is not None:
            for gradient, total in zip(self._gradients, self._totals, strict=True):
                gradient[self._expert].copy_(total)
        self._expert = None

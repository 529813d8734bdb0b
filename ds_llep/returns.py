"""Foreign experts' weight gradients, from their helpers to their home rank and added there.

The gradients return within the EP group, before ZeRO reduces them over the EDP group. A popular
expert has many helpers, so they return in rounds: a home rank never holds more than a few at once.
Which spill belongs to which round follows from the plan, so both ends agree on it.

Like its weights, an expert's gradients are a bundle, and the products write them there. What a
helper has for a home rank in one round then lies in a row and is one message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import deepspeed.comm as dist
import torch

from ds_llep.fetch import Exchange
from ds_llep.plan import Plan
from ds_llep.workspace import BundleLayout

BUNDLES_PER_ROUND = 4
"""Returned gradients, in experts, that a home rank holds at once."""


class GradientReturn:
    """The return of one layer's and micro-batch's gradients.

    Every rank of the EP group calls :meth:`memory`, :meth:`start` and :meth:`finish`.

    Args:
        exchange: the engine's.
        plan: of this EP group.
        layout: of the bundles.
    """

    def __init__(self, exchange: Exchange, plan: Plan, layout: BundleLayout) -> None:
        self._exchange, self._layout = exchange, layout
        ep_rank = exchange.table.ep_rank
        by_home = [0] * plan.num_ranks
        self._count = 0
        # By round and peer: which of this rank's bundles are sent, which home experts' received.
        self._sent: list[dict[int, list[int]]] = []
        self._received: list[dict[int, list[int]]] = []
        for spill in plan.spills:  # by expert: a round boundary cuts one expert at most
            index = by_home[spill.home] // BUNDLES_PER_ROUND
            by_home[spill.home] += 1
            while len(self._sent) <= index:
                self._sent.append({})
                self._received.append({})
            if spill.helper == ep_rank:
                self._sent[index].setdefault(spill.home, []).append(self._count)
                self._count += 1
            elif spill.home == ep_rank:
                local = spill.expert % plan.experts_per_rank
                self._received[index].setdefault(spill.helper, []).append(local)

    def memory(self, like: torch.Tensor) -> list[torch.Tensor]:
        """New memory for this rank's foreign experts' gradients, each ``[n, ., .]``, by expert id.

        In ``like``'s dtype and on its device; to be filled before :meth:`start`.
        """
        self._bundles = like.new_empty((self._count, self._layout.numel))
        return self._layout.views(self._bundles)

    def start(self) -> bool:
        """Start to return what :meth:`memory` holds; whether this rank sends or receives some."""
        if not self._sent:
            return False
        places = max(sum(map(len, experts.values())) for experts in self._received)
        self._buffer = self._bundles.new_empty((places, self._layout.numel))
        self._post(0)
        return bool(self._sent[0] or self._received[0])

    def finish(self, gradients: Sequence[torch.Tensor]) -> None:
        """Receive, and add to the home experts' gradients, each ``[M, ., .]``, in place.

        The sum over an expert's helpers runs in fp32 and is rounded once, so that its error does
        not grow with their number.
        """
        if not self._sent:
            return
        helpers = Counter(
            expert for by_helper in self._received for part in by_helper.values() for expert in part
        )
        total = Sum(gradients, self._layout)
        matrices = [view.unbind() for view in self._layout.views(self._buffer)]
        for index, by_helper in enumerate(self._received):
            if index:
                self._post(index)
            self._exchange.finish()
            sums, returned = [], []
            arrived = [(expert, helper) for helper in by_helper for expert in by_helper[helper]]
            for place in sorted(range(len(arrived)), key=arrived.__getitem__):
                expert, _ = arrived[place]
                if helpers[expert] > 1:
                    total.add(expert, self._buffer[place])
                    continue
                sums += [gradient[expert] for gradient in gradients]
                returned += [matrix[place] for matrix in matrices]
            if sums:  # one addition for each element: rounded once in any dtype
                torch._foreach_add_(sums, returned)
        total.flush()
        del self._bundles, self._buffer

    def _post(self, index: int) -> None:
        ranks, group = self._exchange.table.own_group, self._exchange.ep_group
        operations, place = [], 0
        for helper, experts in self._received[index].items():
            target = self._buffer[place : place + len(experts)]
            operations.append(dist.P2POp(dist.irecv, target, ranks[helper], group))
            place += len(experts)
        for home, slots in self._sent[index].items():  # in a row: all between are that home's too
            source = self._bundles[slots[0] : slots[-1] + 1]
            operations.append(dist.P2POp(dist.isend, source, ranks[home], group))
        self._exchange.post(operations)


class Sum:
    """Adds returned gradients to the home's, one expert after the other, in fp32."""

    def __init__(self, gradients: Sequence[torch.Tensor], layout: BundleLayout) -> None:
        self._gradients, self._layout = gradients, layout
        self._expert: int | None = None

    def add(self, expert: int, bundle: torch.Tensor) -> None:
        """``bundle``: ``[numel]``."""
        if expert != self._expert:
            self.flush()
            self._expert = expert
            wide = torch.promote_types(bundle.dtype, torch.float32)
            self._total = torch.cat([gradient[expert].view(-1) for gradient in self._gradients])
            self._total = self._total.to(wide)
        self._total += bundle

    def flush(self) -> None:
        """Round the expert's sum into its gradient."""
        if self._expert is not None:
            sums = self._layout.views(self._total.unsqueeze(0))
            for gradient, total in zip(self._gradients, sums, strict=True):
                gradient[self._expert].copy_(total[0])
        self._expert = None

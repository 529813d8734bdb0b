"""From the router's output to the counts that every rank plans from.

One collective per layer and micro-batch carries, beside the token counts, what may have gone wrong
on a rank: a router that raised, an expert id that does not exist, a score that is no number. All
ranks of the group then raise together, because a rank that raises alone leaves the others
waiting in the next collective.
"""

from __future__ import annotations

from dataclasses import dataclass

import deepspeed.comm as dist
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from ds_llep.kernels.select import KernelSet

_EXTRA_FIELDS = 3  # unknown expert ids, non-finite scores, version of the weights
_ROUTER_RAISED = -1  # in place of a version


@dataclass(frozen=True)
class Counts:
    """What the ranks of a group told each other, the same on every rank; int64 on the host."""

    tokens_RE: np.ndarray
    """``[R, E]``: a rank's tokens of each expert."""
    alone_RE: np.ndarray
    """``[R, E]``: those of them that have no other choice at the expert's home."""
    reached_RP: np.ndarray
    """``[R, P]``: a rank's tokens that have an expert at home on each rank of its EP group."""
    versions: list[int]
    """Of each rank's weights."""


class Counting:
    """The collective on its way, so that the device has other work while the host waits for it.

    Args:
        selected_TK: expert ids, integer ``[T, K]``; None where this rank's router raised.
        scores_TK: routing weights ``[T, K]``; None where this rank's router raised.
        num_experts: E, over a whole EP group.
        num_ranks: P, of an EP group.
        group: the EP group, or several together; all of its R ranks must call.
        device: where the collective runs.
        kernels: launchers that count.
        version: a number >= 0 that the others want to know, of this rank's weights.

    Attributes:
        blocks: what ``address_copies`` needs; None where the router raised.
    """

    def __init__(
        self,
        selected_TK: torch.Tensor | None,
        scores_TK: torch.Tensor | None,
        num_experts: int,
        num_ranks: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        kernels: KernelSet,
        version: int = 0,
    ) -> None:
        self._num_experts, self._group = num_experts, group
        if selected_TK is None:
            fields = [0] * (2 * num_experts + num_ranks + _EXTRA_FIELDS)
            fields[-1] = _ROUTER_RAISED
            report, self.blocks = torch.tensor(fields, device=device), None
        else:
            report, self.blocks = kernels.count_copies(
                selected_TK, scores_TK.detach(), num_experts, num_ranks, version
            )
        size = 1 if group is None else dist.get_world_size(group=group)
        gathered = report
        if size > 1:
            gathered = report.new_empty(size * report.numel())
            dist.all_gather_into_tensor(gathered, report, group=group)
        self._reports = gathered.view(size, -1)

    @property
    def tokens_RE(self) -> torch.Tensor:
        """int64 ``[R, E]`` on the device: each rank's tokens of each expert, checked by nobody."""
        return self._reports[:, : self._num_experts]

    def send_to_host(self, *others: torch.Tensor) -> None:
        """Start to copy the counts, and other tensors that the host wants with them."""
        self._host = [x.to("cpu", non_blocking=True) for x in (self._reports, *others)]
        self._event = None
        if self._reports.device.type != "cpu":
            self._event = get_accelerator().Event()
            self._event.record()

    def wait(self, layer_name: str) -> tuple[Counts, list[np.ndarray]]:
        """The counts of all ranks: the layer's one device-to-host synchronisation.

        Args:
            layer_name: for the error message.

        Returns:
            The counts, and the other tensors that were sent with them.

        Raises:
            ValueError: on every rank, if any rank's routing is unusable.
        """
        if self._event is not None:
            self._event.synchronize()
        reports, *others = (x.numpy() for x in self._host)
        E = self._num_experts
        extra = reports[:, -_EXTRA_FIELDS:].tolist()
        if any(unknown or odd or version == _ROUTER_RAISED for unknown, odd, version in extra):
            raise ValueError(self._what_is_wrong(layer_name, np.array(extra)))
        tokens, alone, reached, _ = np.split(reports, [E, 2 * E, -_EXTRA_FIELDS], axis=1)
        return Counts(tokens, alone, reached, [version for *_, version in extra]), others

    def _what_is_wrong(self, layer_name: str, extra: np.ndarray) -> str:
        unknown, non_finite, versions = extra.T
        problems = (
            (versions == _ROUTER_RAISED, "the router raised (see the error on that rank)"),
            (unknown, f"the router chose expert ids outside [0, {self._num_experts})"),
            (non_finite, "the router gave scores that are NaN or infinite"),
        )
        messages = [
            f"{what} on rank(s) {_global_ranks(bad, self._group)}"
            for bad, what in problems
            if bad.any()
        ]
        return (
            f"llep: MoE layer '{layer_name}': {'; '.join(messages)}. Every rank stops here, since "
            "tokens without an expert cannot be dispatched. NaN scores usually mean that the model "
            "has diverged (lower the learning rate, check the loss scale and the data)."
        )


def _global_ranks(flagged_R: np.ndarray, group: dist.ProcessGroup | None) -> list[int]:
    # DeepSpeed's get_all_ranks_from_group never returns for the group of all ranks.
    ranks = [0] if group is None else torch.distributed.get_process_group_ranks(group)
    return [ranks[index] for index in np.flatnonzero(flagged_R)]

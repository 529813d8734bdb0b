"""From the router's output to the counts that every rank plans from.

One collective per layer and micro-batch carries, beside the token counts, what may have gone wrong
on a rank: a router that raised, an expert id that does not exist, a score that is no number. All
ranks of the group then raise together, because a rank that raises alone leaves the others
waiting in the next collective.
"""

from __future__ import annotations

import deepspeed.comm as dist
import numpy as np
import torch

_EXTRA_FIELDS = 4  # unknown expert ids, non-finite scores, router raised, version of the weights


def gather_counts(
    selected_TK: torch.Tensor | None,
    scores_TK: torch.Tensor | None,
    num_experts: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
    layer_name: str,
    version: int = 0,
) -> tuple[np.ndarray, list[int]]:
    """Gather how many tokens each rank of the group routes to each expert.

    Args:
        selected_TK: expert ids, integer ``[T, K]``; None where this rank's router raised.
        scores_TK: routing weights ``[T, K]``; None where this rank's router raised.
        num_experts: E, over a whole EP group.
        group: the EP group, or several together; all of its R ranks must call.
        device: where the collective runs.
        layer_name: for the error message.
        version: a number that the others want to know, of this rank's weights.

    Returns:
        int64 ``[R, E]`` on the host, the same on every rank, and every rank's version. Reading
        them is the layer's one device-to-host synchronisation.

    Raises:
        ValueError: on every rank, if any rank's routing is unusable.
    """
    report = torch.zeros(num_experts + _EXTRA_FIELDS, dtype=torch.int64, device=device)
    report[-1:].fill_(version)  # assigned to an element, it would wait for the device
    if selected_TK is None:
        report[-2] = 1
    else:
        ids = selected_TK.reshape(-1)
        known = (ids >= 0) & (ids < num_experts)
        # Unknown ids are counted in the field behind the last expert.
        bins = torch.where(known, ids, num_experts).long()
        report.scatter_add_(0, bins, torch.ones_like(bins))
        report[-3] = scores_TK.numel() - scores_TK.detach().isfinite().sum()

    num_ranks = 1 if group is None else dist.get_world_size(group=group)
    if num_ranks > 1:
        gathered = report.new_empty(num_ranks * report.numel())
        dist.all_gather_into_tensor(gathered, report, group=group)
    else:
        gathered = report
    reports = gathered.view(num_ranks, -1).cpu().numpy()

    unknown, non_finite, raised, versions = reports[:, num_experts:].T
    problems = (
        (raised, "the router raised (see the error on that rank)"),
        (unknown, f"the router chose expert ids outside [0, {num_experts})"),
        (non_finite, "the router gave scores that are NaN or infinite"),
    )
    messages = [
        f"{what} on rank(s) {_global_ranks(bad, group)}" for bad, what in problems if bad.any()
    ]
    if messages:
        raise ValueError(
            f"llep: MoE layer '{layer_name}': {'; '.join(messages)}. Every rank stops here, since "
            "tokens without an expert cannot be dispatched. NaN scores usually mean that the model "
            "has diverged (lower the learning rate, check the loss scale and the data)."
        )
    return reports[:, :num_experts], versions.tolist()


def _global_ranks(flagged_R: np.ndarray, group: dist.ProcessGroup | None) -> list[int]:
    # DeepSpeed's get_all_ranks_from_group never returns for the group of all ranks.
    ranks = [0] if group is None else torch.distributed.get_process_group_ranks(group)
    return [ranks[index] for index in np.flatnonzero(flagged_R)]

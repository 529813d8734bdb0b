"""Which of an expert's tokens each rank computes, once it is known how many.

A segment is what one rank computes of one expert. Two rules cut an expert's tokens into segments:

- by source, the paper's: the tokens, concatenated over source ranks in rank order, are cut into
  runs, one for each computing rank in rank order;
- local: a rank first computes tokens that are its own, then tokens of its node, and what is left
  is cut by source. No other cut leaves fewer tokens between nodes, or fewer between ranks. Where a
  node's ranks send more of an expert's tokens than others of them want, or want more, the plan says
  whose stay. It is planner "cost"'s, and in C as that is.

Either way the tokens that a source sends to a segment are consecutive among its tokens of the
expert, segments in rank order.

Shape letters: `E` experts, `P` ranks of the group, `X` spilled experts, `J` segments.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from ds_llep.kernels import planner_cost


class Segments(NamedTuple):
    """What each rank computes of each spilled expert, ordered by expert, then rank; int64 [J]."""

    expert_J: np.ndarray
    rank_J: np.ndarray
    tokens_J: np.ndarray


class Cut(NamedTuple):
    """How an assignment's spilled experts are cut."""

    spilled: np.ndarray
    """int64 [X]: the experts that are not computed at home alone, ascending."""
    segments: Segments
    """One segment per (spilled expert, rank) that computes tokens, home ranks included."""
    sent_JP: np.ndarray
    """int64 [J, P]: how many tokens of each segment are source rank p's."""


def cut(
    counts_PE: np.ndarray,
    tokens_EP: np.ndarray,
    nodes_P: np.ndarray | None,
    near_EP: np.ndarray | None = None,
) -> Cut:
    """Cut the spilled experts' tokens.

    Args:
        counts_PE: int64, each rank's own tokens per expert.
        tokens_EP: int64, tokens of each expert that each rank computes.
        nodes_P: the node of each rank, for the local rule; None: by source.
        near_EP: int64, for the local rule: of the tokens of a spilled expert that a rank sends
            away, or gets from others, those that stay in its node; None: as many as can of the
            first ranks.
    """
    if nodes_P is not None:
        spilled, *segments, sent_JP = planner_cost.cut(counts_PE, tokens_EP, nodes_P, near_EP)
        return Cut(spilled, Segments(*segments), sent_JP)
    E, P = tokens_EP.shape
    at_home_E = tokens_EP.reshape(-1)[home_places(E, P)]
    spilled = np.flatnonzero(at_home_E != tokens_EP.sum(1))
    if not len(spilled):  # balanced routing is common, and every layer waits for this
        return nothing_spills(P)
    index_J, rank_J = np.nonzero(tokens_EP[spilled])
    expert_J = spilled[index_J]
    tokens_J = tokens_EP[expert_J, rank_J]
    # What runs of `tokens_J`, one after the other for each expert, get of its tokens by source.
    supply_JP = counts_PE.T[expert_J]
    source_JP = supply_JP.cumsum(1)
    ends_J = tokens_J.cumsum()
    first_J = np.searchsorted(expert_J, expert_J)  # the expert's first segment
    ends_J -= (ends_J - tokens_J)[first_J]
    last_JP = np.minimum(source_JP, ends_J[:, None])
    first_JP = np.maximum(source_JP - supply_JP, (ends_J - tokens_J)[:, None])
    sent_JP = np.maximum(last_JP - first_JP, 0)
    sent_JP.setflags(write=False)
    return Cut(spilled, Segments(expert_J, rank_J, tokens_J), sent_JP)


@cache
def nothing_spills(num_ranks: int) -> Cut:
    """The cut where every expert is at home."""
    nothing = np.empty(0, dtype=np.int64)
    return Cut(nothing, Segments(*[nothing] * 3), np.empty((0, num_ranks), dtype=np.int64))


@cache
def home_places(num_experts: int, num_ranks: int) -> np.ndarray:
    """int64 [E]: where in a flattened [E, P] each expert's entry for its home is."""
    experts = np.arange(num_experts)
    places = experts * num_ranks + experts * num_ranks // num_experts
    places.setflags(write=False)  # shared
    return places

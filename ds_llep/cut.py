"""Which of an expert's tokens each rank computes, once it is known how many.

A segment is what one rank computes of one expert. Two rules cut an expert's tokens into segments:

- by source, the paper's: the tokens, concatenated over source ranks in rank order, are cut into
  runs, one for each computing rank in rank order;
- local: a rank first computes tokens that are its own, then tokens of its node, and what is left
  is cut by source. No other cut leaves fewer tokens between nodes, or fewer between ranks.

Either way the tokens that a source sends to a segment are consecutive among its tokens of the
expert, segments in rank order.

Shape letters: `P` ranks of the group, `X` experts, `J` segments, those of one expert side by side.
"""

import numpy as np


def cut(
    counts_XP: np.ndarray,
    expert_J: np.ndarray,
    rank_J: np.ndarray,
    tokens_J: np.ndarray,
    nodes_P: np.ndarray | None,
) -> np.ndarray:
    """How many tokens each segment gets from each source.

    Args:
        counts_XP: int64, tokens of each expert by source rank.
        expert_J, rank_J: the segments' experts, as indices into `counts_XP`, and computing ranks;
            ascending by expert, then rank.
        tokens_J: int64; those of an expert add up to its tokens.
        nodes_P: the node of each rank, for the local rule; None: by source.

    Returns:
        int64 [J, P].
    """
    if nodes_P is None:
        return _overlap(counts_XP[expert_J], tokens_J, expert_J)
    segments = np.arange(len(rank_J))
    left_XP = counts_XP.copy()
    own_J = np.minimum(left_XP[expert_J, rank_J], tokens_J)
    left_XP[expert_J, rank_J] -= own_J
    left_J = tokens_J - own_J
    sent_JP = np.zeros((len(rank_J), counts_XP.shape[1]), dtype=np.int64)
    if nodes_P.min() != nodes_P.max():
        node_J = nodes_P[rank_J]
        # The segments of an expert on one node side by side.
        key_J = expert_J * (nodes_P.max() + 1) + node_J
        order = np.argsort(key_J, kind="stable")
        near_JP = np.where(node_J[:, None] == nodes_P, left_XP[expert_J], 0)
        sent_JP[order] = _overlap(near_JP[order], left_J[order], key_J[order])
        np.subtract.at(left_XP, expert_J, sent_JP)
        left_J = left_J - sent_JP.sum(1)
    sent_JP += _overlap(left_XP[expert_J], left_J, expert_J)
    sent_JP[segments, rank_J] += own_J
    return sent_JP


def _overlap(supply_JP: np.ndarray, demand_J: np.ndarray, key_J: np.ndarray) -> np.ndarray:
    """Cut by source: what runs of `demand_J`, one after the other among equal keys, get of a supply
    that is the same for equal keys."""
    source_JP = supply_JP.cumsum(1)
    ends_J = demand_J.cumsum()
    first_J = np.searchsorted(key_J, key_J)  # of the segments with the same key
    ends_J -= (ends_J - demand_J)[first_J]
    last_JP = np.minimum(source_JP, ends_J[:, None])
    first_JP = np.maximum(source_JP - supply_JP, (ends_J - demand_J)[:, None])
    return np.maximum(last_JP - first_JP, 0)

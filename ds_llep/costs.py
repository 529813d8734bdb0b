"""What a plan costs: the slowest rank's time in one layer, forward and backward together.

A model in integers, so that every rank finds the same. A rank's time is the sum of

- its rows, at a price each, and a price for each foreign expert beside that of its rows;
- the copies that it receives from other ranks or sends to them, whichever are more (links carry
  both at once), priced apart inside a node and between nodes;
- the experts that it borrows or lends, whichever are more, likewise.

Ranks wait for each other in every all-to-all, so the plan costs what its slowest rank takes. A plan
with any spill costs a fixed amount more: what the host has to do for it, on every rank.

Shape letters: `E` experts, `P` ranks of the group, `M = E / P` experts at home on a rank, `J`
segments (see cut.py).
"""

from dataclasses import dataclass

import numpy as np

from ds_llep.cut import cut


@dataclass(frozen=True)
class Costs:
    """Prices of one layer's work, integer picoseconds, forward and backward together."""

    row: int
    """Computing one copy."""
    expert: int
    """A foreign expert on a rank, whatever its rows: launches, reading its weights, latencies."""
    copy_inside: int
    """Carrying a copy to another rank of the node, its result back, and the same in backward."""
    copy_between: int
    """The same to another node."""
    weights_inside: int
    """Bringing an expert's weights to another rank of the node and its gradients home, as far as
    other work does not hide it."""
    weights_between: int
    """The same to another node."""
    spill: int = 0
    """Any spill in the layer, whatever it moves: what the host does for a second set of experts."""

    @property
    def prices(self) -> tuple[int, ...]:
        """In the order of the fields."""
        return tuple(vars(self).values())


# A layer of Qwen3-30B-A3B in bf16 on nodes of eight H200s, where nothing better is known.
DEFAULT = Costs(
    row=47_000,
    expert=10_000_000,
    copy_inside=26_000,
    copy_between=143_000,
    weights_inside=57_000_000,
    weights_between=315_000_000,
)


def rank_costs(
    counts_PE: np.ndarray,
    tokens_EP: np.ndarray,
    costs: Costs,
    nodes_P: np.ndarray | None,
    local: bool = True,
    near_EP: np.ndarray | None = None,
) -> np.ndarray:
    """What a plan costs each rank.

    Args:
        counts_PE: int64, each rank's own tokens per expert.
        tokens_EP: int64, the plan: tokens of each expert that each rank computes.
        costs: the prices.
        nodes_P: the node of each rank; None: one node, and the paper's cut.
        local: whether tokens are cut locally, where nodes are given, or as in the paper.
        near_EP: of a local cut (cut.py).

    Returns:
        int64 [P], picoseconds.
    """
    P, E = counts_PE.shape
    M = E // P
    home_E = np.arange(E) // M
    assignment = counts_PE, tokens_EP, nodes_P if local else None, near_EP
    spilled, (expert_J, rank_J, _), sent_JP = cut(*assignment)
    home_J = home_E[expert_J]

    # Copies by source and computing rank.
    copies_PP = counts_PE.reshape(P, P, M).sum(2)
    np.subtract.at(copies_PP.T, home_E[spilled], counts_PE.T[spilled])
    np.add.at(copies_PP.T, rank_J, sent_JP)
    np.fill_diagonal(copies_PP, 0)
    foreign = rank_J != home_J
    lent_PP = np.zeros((P, P), dtype=np.int64)
    np.add.at(lent_PP, (home_J[foreign], rank_J[foreign]), 1)

    cost_P = costs.row * tokens_EP.sum(0) + costs.expert * lent_PP.sum(0)
    cost_P += costs.spill * lent_PP.any()
    near_PP = np.ones((P, P), dtype=bool)
    if nodes_P is not None:
        near_PP = nodes_P[:, None] == nodes_P
    prices = (costs.copy_inside, costs.weights_inside), (costs.copy_between, costs.weights_between)
    for which_PP, (copy, weights) in zip((near_PP, ~near_PP), prices, strict=True):
        for moved_PP, price in ((copies_PP, copy), (lent_PP, weights)):
            moved_PP = np.where(which_PP, moved_PP, 0)
            cost_P += price * np.maximum(moved_PP.sum(0), moved_PP.sum(1))
    return cost_P

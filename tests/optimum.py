"""The time that no plan beats, as a mixed-integer program for HiGHS.

Any token of an expert may go to any rank that has its weights, and in fractions: a plan by either
rule of ds_llep/cut.py is one such choice. So what HiGHS proves for the program holds for plans too.

Shape letters: `P` ranks, `E` experts, `L` the two kinds of links, inside a node and between nodes.
"""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ds_llep.costs import Costs

MICROSECOND = 1_000_000  # HiGHS has absolute tolerances: no numbers as large as picoseconds


def optimum(
    counts_PE: np.ndarray, costs: Costs, nodes_P: np.ndarray, tolerance: float
) -> tuple[float, float]:
    """The slowest rank's least time by the model of ds_llep/costs.py, without any limits.

    Args:
        counts_PE: int64, each rank's own tokens per expert.
        costs: the prices.
        nodes_P: the node of each rank.
        tolerance: stop where the two answers are as near to each other as this share.

    Returns:
        (what no plan beats, the best found for the program), picoseconds.
    """
    P, E = counts_PE.shape
    home_E = np.arange(E) // (E // P)
    program = _Program()
    copies_PEP = program.variables(P, E, P)  # from each source, to each computing rank
    borrows_EP = program.variables(E, P)
    carried_LP, moved_LP = program.variables(2, P), program.variables(2, P)
    (slowest,) = program.variables(1)

    for s, e in np.ndindex(P, E):
        tokens = int(counts_PE[s, e])
        program.constrain([(1, copies_PEP[s, e])], low=tokens, high=tokens)
        for p in np.flatnonzero(np.arange(P) != home_E[e]):
            program.constrain([(tokens, borrows_EP[e, p]), (-1, copies_PEP[s, e, p])])
    for r in range(P):
        time = [(costs.row, copies_PEP[:, :, r]), (costs.expert, borrows_EP[home_E != r, r])]
        near_P = nodes_P == nodes_P[r]
        prices = (
            (costs.copy_inside, costs.weights_inside),
            (
                costs.copy_between,
                costs.weights_between,
            ),
        )
        for link, (copy, weights) in enumerate(prices):
            others_P = near_P if link == 0 else ~near_P
            others_P[r] = False
            carried, moved = carried_LP[link, r], moved_LP[link, r]
            program.constrain([(1, carried), (-1, copies_PEP[others_P, :, r])])
            program.constrain([(1, carried), (-1, copies_PEP[r][:, others_P])])
            program.constrain([(1, moved), (-1, borrows_EP[others_P[home_E], r])])
            program.constrain([(1, moved), (-1, borrows_EP[home_E == r][:, others_P])])
            time += [(copy, carried), (weights, moved)]
        scaled = [(-price / MICROSECOND, variables) for price, variables in time]
        program.constrain([(1, slowest), *scaled])
    found = program.least(slowest, borrows_EP, tolerance)
    return found.mip_dual_bound * MICROSECOND, found.fun * MICROSECOND


class _Program:
    """Variables >= 0, and constraints on sums of them."""

    def __init__(self):
        self.size = 0
        self.rows = []

    def variables(self, *shape):
        """Numbers of new variables, in an array of this shape."""
        first, self.size = self.size, self.size + int(np.prod(shape))
        return np.arange(first, self.size).reshape(shape)

    def constrain(self, terms, low=0.0, high=np.inf):
        """low <= sum of (factor * each of these variables) <= high."""
        columns = np.concatenate([np.ravel(variables) for _, variables in terms])
        factors = np.concatenate([np.full(np.size(ids), factor) for factor, ids in terms])
        self.rows.append((columns, factors.astype(float), low, high))

    def least(self, variable, choices, tolerance):
        """Solve for the least value of a variable, where `choices` are 0 or 1."""
        columns, factors, low, high = zip(*self.rows, strict=True)
        starts = np.cumsum([0, *map(len, columns)])
        matrix = (np.concatenate(factors), np.concatenate(columns), starts)
        aim, highest, integral = (
            np.zeros(self.size),
            np.full(self.size, np.inf),
            np.zeros(self.size),
        )
        aim[variable], highest[choices], integral[choices] = 1, 1, 1
        return milp(
            aim,
            constraints=LinearConstraint(csr_array(matrix, (len(low), self.size)), low, high),
            bounds=Bounds(0, highest),
            integrality=integral,
            options={"mip_rel_gap": tolerance},
        )

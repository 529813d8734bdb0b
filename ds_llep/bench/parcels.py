"""How many tokens travel from rank to rank, each once, however many of its copies go there.

Counts say how many copies of a rank's tokens go where, not how many tokens: that depends on which
experts are chosen together. Where nobody has the tokens at hand, as with a trace, it is estimated
as if choices were independent of each other, which costs some accuracy (docs/simulate.md says how
much) and needs nothing but counts.

With spills a rank sends as many parcels as the bound that ``ds_llep/route.py`` takes for their
number, some of them empty.

Shapes: ``P`` ranks of the EP group; the first index is that of the source rank.
"""

from __future__ import annotations

import numpy as np

from ds_llep.plan import Plan


def traffic(plan: Plan) -> np.ndarray:
    """int64 ``[P, P]``: copies from each source rank that each rank computes, of all experts.

    Row s is ``plan.send_EP(s).sum(0)``.
    """
    lent_PP, foreign_PP = _moved(plan)
    return at_home(plan) - lent_PP + foreign_PP


def at_home(plan: Plan) -> np.ndarray:
    """int64 ``[P, P]``: copies from each source rank of the experts at home on each rank."""
    P, M = plan.num_ranks, plan.experts_per_rank
    return plan.counts_PE.reshape(P, P, M).sum(2)


def distinct(copies_PP: np.ndarray, top_k: int) -> np.ndarray:
    """``[P, P]``: how many tokens so many copies are of, on average.

    A source with T tokens of K choices each, n of which T K copies go to a rank, is taken to have
    each choice go there with the same probability n / (T K), whatever a token's other choices do.
    Then ``T (1 - (1 - n / (T K))^K)`` of the tokens have at least one choice there.
    """
    all_P1 = copies_PP.sum(1, keepdims=True)
    share_PP = copies_PP / np.maximum(all_P1, 1)
    return all_P1 / top_k * (1 - (1 - share_PP) ** top_k)


def most_parcels(plan: Plan, reached_PP: np.ndarray, top_k: int) -> np.ndarray:
    """``[P, P]``: parcels that travel, some of them perhaps empty; none within a rank.

    Args:
        plan: of the EP group.
        reached_PP: a rank's tokens that have an expert at home on each rank: counted, or
            ``distinct(at_home(plan), top_k)``.
        top_k: K.
    """
    tokens_P1 = plan.counts_PE.sum(1, keepdims=True) / top_k
    _, foreign_PP = _moved(plan)
    return _between(np.minimum(np.minimum(tokens_P1, traffic(plan)), reached_PP + foreign_PP))


def fewest_parcels(plan: Plan, reached_PP: np.ndarray, top_k: int) -> np.ndarray:
    """``[P, P]``: parcels that are not empty are at least so many; arguments as above."""
    lent_PP, _ = _moved(plan)
    return _between(np.maximum(traffic(plan) / top_k, reached_PP - lent_PP))


def _between(parcels_PP: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(parcels_PP), dtype=bool), 0, parcels_PP)


def _moved(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """int64 ``[P, P]``: copies by source rank and the home that they leave, or their helper."""
    lent_PP, foreign_PP = np.zeros((2, plan.num_ranks, plan.num_ranks), dtype=np.int64)
    expert_J, rank_J, _ = plan.segments
    home_J = expert_J // plan.experts_per_rank
    away_J = rank_J != home_J
    np.add.at(lent_PP.T, home_J[away_J], plan.sent_JP[away_J])
    np.add.at(foreign_PP.T, rank_J[away_J], plan.sent_JP[away_J])
    return lent_PP, foreign_PP

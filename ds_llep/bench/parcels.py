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
    lent_PE, foreign_PP = _moved(plan)
    return at_home(plan) - _by_home(lent_PE) + foreign_PP


def at_home(plan: Plan) -> np.ndarray:
    """int64 ``[P, P]``: copies from each source rank of the experts at home on each rank."""
    return _by_home(plan.counts_PE)


def distinct(copies_PP: np.ndarray, top_k: int) -> np.ndarray:
    """``[P, P]``: how many tokens so many copies are of, on average.

    A source with T tokens of K choices each, n of which T K copies go to a rank, is taken to have
    each choice go there with the same probability n / (T K), whatever a token's other choices do.
    Then ``T (1 - (1 - n / (T K))^K)`` of the tokens have at least one choice there.
    """
    all_P1 = copies_PP.sum(1, keepdims=True)
    share_PP = copies_PP / np.maximum(all_P1, 1)
    return all_P1 / top_k * (1 - (1 - share_PP) ** top_k)


def alone(plan: Plan, top_k: int) -> np.ndarray:
    """``[P, E]``: how many copies are their token's only one at the expert's home, on average.

    With choices as in :func:`distinct`, a token's K - 1 others must all go to other homes.
    """
    all_P1 = np.maximum(plan.counts_PE.sum(1, keepdims=True), 1)
    elsewhere_PP = (1 - at_home(plan) / all_P1) ** (top_k - 1)
    return plan.counts_PE * np.repeat(elsewhere_PP, plan.experts_per_rank, axis=1)


def most_parcels(
    plan: Plan, reached_PP: np.ndarray, alone_PE: np.ndarray, top_k: int
) -> np.ndarray:
    """``[P, P]``: parcels that travel, some of them perhaps empty; none within a rank.

    Args:
        plan: of the EP group.
        reached_PP: a rank's tokens that have an expert at home on each rank: counted, or
            ``distinct(at_home(plan), top_k)``.
        alone_PE: a rank's copies of each expert that are their token's only one at the expert's
            home: counted, or ``alone(plan, top_k)``.
        top_k: K.
    """
    tokens_P1 = plan.counts_PE.sum(1, keepdims=True) / top_k
    lent_PE, foreign_PP = _moved(plan)
    kept_PE = plan.counts_PE - lent_PE
    stay_PP = reached_PP - _by_home(np.maximum(alone_PE - kept_PE, 0))
    return _between(np.minimum(np.minimum(tokens_P1, traffic(plan)), stay_PP + foreign_PP))


def expected_parcels(plan: Plan, top_k: int) -> np.ndarray:
    """:func:`most_parcels` where only counts are known."""
    return most_parcels(plan, distinct(at_home(plan), top_k), alone(plan, top_k), top_k)


def fewest_parcels(plan: Plan, reached_PP: np.ndarray, top_k: int) -> np.ndarray:
    """``[P, P]``: parcels that are not empty are at least so many; arguments as above."""
    lent_PE, _ = _moved(plan)
    return _between(np.maximum(traffic(plan) / top_k, reached_PP - _by_home(lent_PE)))


def _between(parcels_PP: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(parcels_PP), dtype=bool), 0, parcels_PP)


def _by_home(values_PE: np.ndarray) -> np.ndarray:
    return values_PE.reshape(len(values_PE), len(values_PE), -1).sum(2)


def _moved(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """int64 ``[P, E]`` and ``[P, P]``: copies that leave home, by source rank and by their expert,
    or their helper."""
    lent_PE = np.zeros_like(plan.counts_PE)
    foreign_PP = np.zeros((plan.num_ranks, plan.num_ranks), dtype=np.int64)
    expert_J, rank_J, _ = plan.segments
    away_J = rank_J != expert_J // plan.experts_per_rank
    np.add.at(lent_PE.T, expert_J[away_J], plan.sent_JP[away_J])
    np.add.at(foreign_PP.T, rank_J[away_J], plan.sent_JP[away_J])
    return lent_PE, foreign_PP

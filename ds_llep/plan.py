"""Which rank computes which tokens of which expert: the plan of one layer and one micro-batch.

Every rank of the expert-parallel group calls `make_plan` with the same counts and derives the same
plan from them, so no plan is ever sent. That works because nothing but those integers and the
config enters it. The price is that every rank repeats the work.

Shape letters: `E` experts, `P` ranks of the group, `M = E / P` experts at home on a rank, `J`
segments (see cut.py). The home rank of expert e is `e // M`; a helper is a rank that computes some
of e's tokens away from home.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ds_llep.costs import DEFAULT, Costs
from ds_llep.cut import Cut, Segments, cut, home_places, nothing_spills
from ds_llep.planners import PLANNERS, plan_cost, plan_lla


@dataclass(frozen=True, slots=True)
class Spill:
    """`tokens` (> 0) tokens of `expert`, computed on rank `helper` instead of rank `home`."""

    expert: int
    home: int
    helper: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The assignment of every token copy to a computing rank. Arrays are read-only copies.

    Which tokens of an expert a rank computes follows from `tokens_EP` by one of the two rules of
    cut.py: by source, or, with `nodes_P`, locally. A source's tokens of an expert, in token order,
    go to ascending ranks, as many to each as `send_EP` says.
    """

    counts_PE: np.ndarray
    """int64 [P, E]: row p is rank p's own tokens per expert, before dispatch."""
    tokens_EP: np.ndarray
    """int64 [E, P]: tokens of expert e computed on rank p."""
    bypassed: bool
    """True where nothing was planned, as the load ratio is under the threshold (or no tokens)."""
    capped_tokens: int = 0
    """Tokens above capacity, at home only because `max_foreign_experts` left no rank to help."""
    nodes_P: np.ndarray | None = None
    """int64 [P]: the node of each rank, and tokens are cut locally; None: by source (cut.py)."""
    near_EP: np.ndarray | None = None
    """int64 [E, P]: for the local cut, of the tokens of a spilled expert that a rank sends away, or
    gets from others, those that stay in its node; None: as many as can of the first ranks."""

    def __post_init__(self):
        for name in ("counts_PE", "tokens_EP", "nodes_P", "near_EP"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, _read_only(np.array(values, dtype=np.int64)))

    @cached_property
    def spills(self) -> tuple[Spill, ...]:
        """One entry per (expert, helper) that computes tokens, ordered by expert, then helper."""
        columns = (column.tolist() for column in self.segments)
        M = self.experts_per_rank
        return tuple(
            Spill(expert, expert // M, rank, tokens)
            for expert, rank, tokens in zip(*columns, strict=True)
            if rank != expert // M
        )

    @cached_property
    def cut(self) -> Cut:
        """Which tokens of the spilled experts each rank computes."""
        if self.bypassed:
            return nothing_spills(self.num_ranks)
        return cut(self.counts_PE, self.tokens_EP, self.nodes_P, self.near_EP)

    @property
    def spilled_experts(self) -> np.ndarray:
        """Ids of the experts that are not computed at home alone, ascending; int64."""
        return self.cut.spilled

    @property
    def segments(self) -> Segments:
        """One segment per (spilled expert, rank) that computes tokens, home ranks included."""
        return self.cut.segments

    @property
    def sent_JP(self) -> np.ndarray:
        """int64 [J, P]: how many tokens of each of the `segments` are source rank p's."""
        return self.cut.sent_JP

    @cached_property
    def rank_load_P(self) -> np.ndarray:
        """int64 [P]: tokens computed on rank p."""
        return _read_only(self.tokens_EP.sum(0))

    @property
    def num_ranks(self) -> int:
        return self.counts_PE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.counts_PE.shape[1]

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    @cached_property
    def home_load_P(self) -> np.ndarray:
        """int64 [P]: tokens per rank under standard EP, every expert at home."""
        return _read_only(self.counts_PE.sum(0).reshape(self.num_ranks, -1).sum(1))

    @property
    def load_ratio_before(self) -> float:
        """Max / mean of `home_load_P`; 1.0 is perfect, and the value where there is no token."""
        return _load_ratio(self.home_load_P.tolist())

    @property
    def load_ratio_after(self) -> float:
        """Max / mean of `rank_load_P`; 1.0 is perfect, and the value where there is no token."""
        return _load_ratio(self.rank_load_P.tolist())

    def lent_experts(self, rank: int) -> tuple[Spill, ...]:
        """The spills that leave home `rank`, ordered by helper, then expert."""
        lent = (spill for spill in self.spills if spill.home == rank)
        return tuple(sorted(lent, key=lambda spill: (spill.helper, spill.expert)))

    def borrowed_experts(self, rank: int) -> tuple[Spill, ...]:
        """The spills that helper `rank` computes, ordered by expert (so also by home)."""
        return tuple(spill for spill in self.spills if spill.helper == rank)

    def foreign_experts(self, rank: int) -> tuple[int, ...]:
        """Ids of the experts that `rank` computes as a helper, ascending."""
        return tuple(spill.expert for spill in self.borrowed_experts(rank))

    def slots(self, rank: int) -> tuple[int, ...]:
        """Expert ids that `rank` computes, in order: home (even without tokens), then foreign."""
        M = self.experts_per_rank
        return (*range(rank * M, (rank + 1) * M), *self.foreign_experts(rank))

    def send_EP(self, source: int) -> np.ndarray:
        """int64 [E, P]: how many of rank `source`'s tokens of expert e go to rank p."""
        assert 0 <= source < self.num_ranks, f"source rank {source} of {self.num_ranks}"
        return self._by_rank(self.counts_PE[source], self.sent_JP[:, source])

    def earlier_EP(self, source: int) -> np.ndarray:
        """int64 [E, P]: how many tokens of expert e rank p computes for the ranks before `source`.

        In rank p's rows of expert e, those of `source` follow them.
        """
        assert 0 <= source < self.num_ranks, f"source rank {source} of {self.num_ranks}"
        return self._by_rank(self.counts_PE[:source].sum(0), self.sent_JP[:, :source].sum(1))

    def _by_rank(self, counts_E: np.ndarray, sent_J: np.ndarray) -> np.ndarray:
        """int64 [E, P]: `counts_E` at home, but for spilled experts, which are as in `sent_J`."""
        found_EP = _all_at_home(counts_E, self.num_ranks)
        if len(sent_J):  # few experts spill
            expert_J, rank_J, _ = self.segments
            found_EP[self.spilled_experts] = 0
            found_EP[expert_J, rank_J] = sent_J
        return found_EP

    def recv_PE(self, rank: int) -> np.ndarray:
        """int64 [P, E]: how many tokens of expert e `rank` receives from source rank p.

        `recv_PE(p)[s, e] == send_EP(s)[e, p]`.
        """
        assert 0 <= rank < self.num_ranks, f"rank {rank} of {self.num_ranks}"
        M = self.experts_per_rank
        at_home = slice(rank * M, (rank + 1) * M)
        recv_PE = np.zeros_like(self.counts_PE)
        recv_PE[:, at_home] = self.counts_PE[:, at_home]
        if len(self.sent_JP):
            here_J = self.segments.rank_J == rank
            recv_PE[:, self.spilled_experts] = 0
            recv_PE[:, self.segments.expert_J[here_J]] = self.sent_JP[here_J].T
        return recv_PE


def make_plan(counts_PE, config, costs: Costs | None = None, nodes_P=None) -> Plan:
    """Plans one layer's micro-batch. Pure: the same arguments give the same plan on every rank.

    Args:
        counts_PE: int array-like [P, E], row p is rank p's tokens per expert. The assignment of
            planner "lla" depends on its column sums alone; its rows decide which tokens those are.
        config: has the attributes `planner`, `imbalance_threshold`, `capacity_factor`,
            `min_tokens_per_gemm` and `max_foreign_experts` (None: no limit), as `LLEPConfig` has.
        costs: what the layer's work costs, for planner "cost"; None: `ds_llep.costs.DEFAULT`.
        nodes_P: the node of each rank, integers >= 0, for planner "cost"; None: one node.

    Raises:
        ValueError: counts that are not [P, E] non-negative integers with E a multiple of P, nodes
            that are not [P] non-negative integers, or a planner that does not exist.
    """
    if config.planner not in PLANNERS:
        valid = ", ".join(repr(name) for name in PLANNERS)
        raise ValueError(f"make_plan: unknown planner {config.planner!r}; valid planners: {valid}")
    counts_PE = _checked_counts(counts_PE)
    P, E = counts_PE.shape
    nodes_P = np.zeros(P, dtype=np.int64) if nodes_P is None else _checked_nodes(nodes_P, P)
    if config.planner == "cost":
        tokens_EP, near_EP, spills = plan_cost(counts_PE, config, costs or DEFAULT, nodes_P)
        return Plan(counts_PE, tokens_EP, not spills, nodes_P=nodes_P, near_EP=near_EP)

    load_E = counts_PE.sum(0)
    home_load = load_E.reshape(P, -1).sum(1).tolist()
    tokens_EP, capped_tokens = _all_at_home(load_E, P), 0
    bypassed = _bypasses(home_load, config)
    if not bypassed:
        moved, capped_tokens = plan_lla(load_E, home_load, config)
        for (expert, helper), tokens in moved.items():
            tokens_EP[expert, expert * P // E] -= tokens
            tokens_EP[expert, helper] = tokens
    return Plan(counts_PE, tokens_EP, bypassed, capped_tokens)


def plan_from_tokens(counts_PE, tokens_EP, capped_tokens: int, config) -> Plan:
    """The plan that :func:`make_plan` makes, where its integers are known already.

    Args:
        counts_PE, config: as for :func:`make_plan`.
        tokens_EP: int64 array [E, P], its `Plan.tokens_EP`.
        capped_tokens: its `Plan.capped_tokens`.
    """
    home_load = counts_PE.sum(0).reshape(len(counts_PE), -1).sum(1).tolist()
    return Plan(counts_PE, tokens_EP, _bypasses(home_load, config), int(capped_tokens))


def _bypasses(home_load_P: list[int], config) -> bool:
    # IEEE double arithmetic on equal integers is the same on every rank, so no rank can disagree.
    return not any(home_load_P) or _load_ratio(home_load_P) < config.imbalance_threshold


def _checked_counts(counts_PE) -> np.ndarray:
    expected = "valid is an int array [P, E], row p = rank p's tokens per expert"
    counts_PE = np.asarray(counts_PE)
    if counts_PE.ndim != 2 or counts_PE.size == 0:
        raise ValueError(f"make_plan: counts_PE has shape {counts_PE.shape}; {expected}")
    if counts_PE.dtype.kind not in "iu":
        raise ValueError(f"make_plan: counts_PE has dtype {counts_PE.dtype}; {expected}")
    counts_PE = counts_PE.astype(np.int64, copy=False)
    P, E = counts_PE.shape
    if counts_PE.min() < 0:
        p, e = np.argwhere(counts_PE < 0)[0].tolist()
        raise ValueError(f"make_plan: counts_PE[{p}, {e}] is {counts_PE[p, e]}; valid is >= 0")
    if E % P:
        raise ValueError(f"make_plan: {E} experts on {P} ranks; valid is E a multiple of P")
    return counts_PE


def _checked_nodes(nodes_P, P: int) -> np.ndarray:
    nodes_P = np.asarray(nodes_P)
    if nodes_P.shape != (P,) or nodes_P.dtype.kind not in "iu" or nodes_P.min() < 0:
        raise ValueError(
            f"make_plan: nodes_P is {nodes_P.tolist()} ({nodes_P.dtype}); valid is an int array "
            f"[P] of node numbers >= 0, one for each of the {P} ranks, or None for one node"
        )
    return nodes_P.astype(np.int64, copy=False)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def _load_ratio(load_P: list[int]) -> float:
    # One correctly rounded division of exact integers: a ratio of exactly 1.3 is the double 1.3.
    return max(load_P) * len(load_P) / sum(load_P) if any(load_P) else 1.0


def _all_at_home(load_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [E, P] with the load of each expert in its home's column."""
    tokens_EP = np.zeros((len(load_E), num_ranks), dtype=np.int64)
    tokens_EP.reshape(-1)[home_places(len(load_E), num_ranks)] = load_E
    return tokens_EP

"""Workloads: how many tokens each source rank routes to each expert, and which tokens those are.

A workload is a function of its name, seed, step, layer and source rank alone. The EP size is not
among them: the same ranks route the same tokens to the same experts however the experts are spread.
All of it is integer or fp64 NumPy on the host, so a CPU, a GPU and the simulator see the same.

    balanced           every expert as popular as any other
    R:H                R % of the tokens on the first H experts, all K choices among them (an expert
                       may stand twice among a token's), the rest on the others: the paper's grid
    zipf:S             popularity ~ rank^-S, experts in an order that the seed draws
    hot_rank[:H]       H hot experts (8, at most half of all), neighbours, so at home on as few
                       ranks as hold them
    spread[:H]         the same heat, the H hot experts equally far apart: hot experts, and even
                       ranks at every EP size that divides H
    ragged             source ranks of odd number have a quarter of the tokens
    empty              source rank 1 has no token, three quarters of the experts get none
    rotating, burst    hot_rank whose hot experts move on at every step, every 16 steps
    real:SET           popularity by layer in Qwen3-30B-A3B on a data set (see docs/benchmarks.md)
    trace:FILE         what a run recorded (``"llep": {"trace": ...}``), its training micro-batches
                       one after the other

In all but ``R:H`` a token's K experts are distinct.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_llep.trace import Trace

REAL = Path(__file__).with_name("qwen3_30b_a3b_expert_share.npz")
BURST_STEPS = 16
NAMES = (
    "balanced",
    "R:H (such as 95:1)",
    "zipf:S",
    "hot_rank[:H]",
    "spread[:H]",
    "ragged",
    "empty",
    "rotating",
    "burst",
    "real:SET",
    "trace:FILE",
)


@dataclass(frozen=True)
class Draw:
    """What a workload may depend on, beside its own parameters."""

    num_experts: int
    top_k: int
    tokens: int
    source: int
    """The source rank."""
    layer: int
    step: int
    seed: int


Block = tuple[int, np.ndarray]
"""Some tokens, and how many of their copies each expert gets: ``(n, int64 [E])``, sum ``n * K``."""


@dataclass(frozen=True)
class Workload:
    """A workload by name; :func:`parse` makes it."""

    name: str
    _blocks: Callable[[np.random.Generator, Draw], list[Block]]

    def counts(self, draw: Draw) -> np.ndarray:
        """int64 ``[E]``: how many of the source rank's token copies each expert gets."""
        return sum(counts_E for _, counts_E in self._drawn(self._rng(draw), draw))

    def counts_PE(self, ranks: int, draw: Draw) -> np.ndarray:
        """int64 ``[P, E]``: :meth:`counts` of the source ranks from ``draw.source`` on."""
        sources = range(draw.source, draw.source + ranks)
        return np.stack([self.counts(Draw(**{**vars(draw), "source": s})) for s in sources])

    def expert_ids(self, draw: Draw) -> np.ndarray:
        """int64 ``[T, K]``: the experts of each token, in random order."""
        rng = self._rng(draw)
        blocks = self._drawn(rng, draw)
        ids_TK = np.concatenate([_arrange(rng, n, draw.top_k, counts) for n, counts in blocks])
        return rng.permuted(rng.permutation(ids_TK), axis=1)

    def _drawn(self, rng: np.random.Generator, draw: Draw) -> list[Block]:
        try:
            return self._blocks(rng, draw)
        except ValueError as error:
            raise ValueError(f"workload {self.name!r}: {error}") from error

    def _rng(self, draw: Draw) -> np.random.Generator:
        name = zlib.crc32(self.name.split(":")[0].encode())
        return np.random.default_rng([name, draw.seed, draw.step, draw.layer, draw.source])


def parse(name: str, experts_per_rank: int | None = None) -> Workload:
    """The workload of that name; ``R:local`` has as many hot experts as a rank has at home.

    Raises:
        ValueError: an unknown name, parameters that make no sense, a data set or a file that is
            not there, each with what is valid.
    """
    kind, _, parameter = name.partition(":")
    try:
        if kind == "balanced" and not parameter:
            return Workload(name, _popular(lambda draw: np.ones(draw.num_experts)))
        if kind in ("ragged", "empty") and not parameter:
            return Workload(name, {"ragged": _ragged, "empty": _empty}[kind])
        if kind == "zipf":
            return Workload(name, _popular(functools.partial(_zipf, _number(parameter, float))))
        if kind in ("hot_rank", "spread") or (kind in ("rotating", "burst") and not parameter):
            hot = _number(parameter, int) if parameter else None
            return Workload(name, _popular(functools.partial(_hot, kind, hot)))
        if kind == "real":
            return Workload(name, _popular(functools.partial(_real, _real_shares(parameter))))
        if kind == "trace":
            return Workload(name, functools.partial(_replay, Trace.load(parameter)))
        if kind.replace(".", "", 1).isdigit():
            local = parameter == "local" and experts_per_rank
            percent, hot = float(kind), local or _number(parameter, int)
            if percent > 100:
                raise ValueError(f"{kind} % is more than all tokens")
            return Workload(name, functools.partial(_share_on_hot, percent / 100, hot))
    except (OSError, TypeError) as error:
        raise ValueError(f"workload {name!r}: {error}") from None
    except ValueError as error:
        raise ValueError(f"workload {name!r}: {error}; known are {', '.join(NAMES)}") from None
    raise ValueError(f"unknown workload {name!r}; known are {', '.join(NAMES)}")


def _number(text: str, kind: type):
    value = kind(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is not above 0")
    return value


def _popular(popularity: Callable[[Draw], np.ndarray]):
    """All tokens draw K distinct experts by a popularity ``[E]``."""

    def blocks(rng: np.random.Generator, draw: Draw) -> list[Block]:
        return [(draw.tokens, _draw_counts(rng, draw.tokens, draw.top_k, popularity(draw)))]

    return blocks


def _zipf(exponent: float, draw: Draw) -> np.ndarray:
    # The order is one for all ranks and steps, and another in each layer.
    order = np.random.default_rng([draw.seed, draw.layer]).permutation(draw.num_experts)
    return (1.0 + order) ** -exponent


def _hot(kind: str, hot: int | None, draw: Draw) -> np.ndarray:
    """A Zipf law (S = 1) flattened to two levels, so that the hot experts are equally hot."""
    E = draw.num_experts
    hot = min(8, max(E // 2, 1)) if hot is None else _fewer_than_all(hot, E)
    zipf = 1.0 / np.arange(1, E + 1)
    heat_E = np.full(E, zipf[hot:].mean() if hot < E else 1.0)
    places = np.arange(hot) * E // hot if kind == "spread" else np.arange(hot)
    moves = {"rotating": draw.step, "burst": draw.step // BURST_STEPS}.get(kind, 0)
    heat_E[(places + moves * hot) % E] = zipf[:hot].mean()
    return heat_E


def _ragged(rng: np.random.Generator, draw: Draw) -> list[Block]:
    tokens = draw.tokens // 4 if draw.source % 2 else draw.tokens
    return [(tokens, _draw_counts(rng, tokens, draw.top_k, np.ones(draw.num_experts)))]


def _empty(rng: np.random.Generator, draw: Draw) -> list[Block]:
    tokens = 0 if draw.source == 1 else draw.tokens
    used = max(draw.num_experts // 4, draw.top_k)
    popularity_E = (np.arange(draw.num_experts) < used).astype(float)
    return [(tokens, _draw_counts(rng, tokens, draw.top_k, popularity_E))]


def _share_on_hot(share: float, hot: int, rng: np.random.Generator, draw: Draw) -> list[Block]:
    E, K = draw.num_experts, draw.top_k
    hot = _fewer_than_all(hot, E)
    on_hot = rng.binomial(draw.tokens, share)
    blocks = []
    for tokens, first, last in ((on_hot, 0, hot), (draw.tokens - on_hot, hot, E)):
        counts_E = np.zeros(E, dtype=np.int64)
        width = last - first
        counts_E[first:last] = rng.multinomial(tokens * K, np.full(width, 1 / width))
        blocks.append((tokens, counts_E))
    return blocks


def _fewer_than_all(hot: int, num_experts: int) -> int:
    if hot >= num_experts:
        raise ValueError(f"{hot} hot experts of {num_experts}; valid is 1 to {num_experts - 1}")
    return hot


def _real_shares(name: str) -> np.ndarray:
    with np.load(REAL) as sets:
        if name not in sets:
            raise ValueError(f"no data set {name!r}; there are {', '.join(sets)}")
        return sets[name].astype(np.float64)


def _real(shares_LE: np.ndarray, draw: Draw) -> np.ndarray:
    if shares_LE.shape[1] != draw.num_experts:
        raise ValueError(
            f"real popularity is of {shares_LE.shape[1]} experts, the layer has {draw.num_experts}"
        )
    return shares_LE[draw.layer % len(shares_LE)]


def _replay(trace: Trace, rng: np.random.Generator, draw: Draw) -> list[Block]:
    # Training micro-batches; all where a run recorded nothing but evaluation.
    rows = np.flatnonzero(trace.training == trace.training.max())
    row = int(rows[draw.step % len(rows)])
    counts_PE = trace.counts(row, draw.layer % trace.num_layers)
    counts_E = counts_PE[draw.source % len(counts_PE)]
    if len(counts_E) != draw.num_experts:
        raise ValueError(f"the trace has {len(counts_E)} experts, the layer {draw.num_experts}")
    if counts_E.sum() % draw.top_k:
        raise ValueError(f"the trace's tokens do not have top_k {draw.top_k} experts each")
    return [(int(counts_E.sum()) // draw.top_k, counts_E)]


def _draw_counts(
    rng: np.random.Generator, tokens: int, top_k: int, popularity_E: np.ndarray
) -> np.ndarray:
    """int64 ``[E]``, sum ``tokens * top_k``, none above ``tokens``: K distinct experts a token.

    An expert that every token would choose more than once is chosen by every token; what is too
    much goes to the others by their popularity.
    """
    counts_E = np.zeros(len(popularity_E), dtype=np.int64)
    if np.count_nonzero(popularity_E) < top_k:
        raise ValueError(f"fewer than top_k {top_k} experts have any popularity")
    while rest := tokens * top_k - int(counts_E.sum()):
        open_E = np.where(counts_E < tokens, popularity_E, 0.0)
        counts_E += rng.multinomial(rest, open_E / open_E.sum())
        counts_E = np.minimum(counts_E, tokens)
    return counts_E


def _arrange(rng: np.random.Generator, tokens: int, top_k: int, counts_E: np.ndarray) -> np.ndarray:
    """int64 ``[tokens, K]`` in which each expert stands as often as counted.

    The copies, sorted by expert in a random order of experts, are dealt out to the tokens in turn:
    an expert with no more copies than there are tokens then stands at most once in each.
    """
    order = rng.permutation(len(counts_E))
    return np.repeat(order, counts_E[order]).reshape(top_k, tokens).T

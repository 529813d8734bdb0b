"""The planner "cost" in C: its search takes thousands of steps of a few integer operations."""

import ctypes
import functools
import math
from collections.abc import Sequence

import numpy as np

from .compiled import compiled

_SOURCES = [f"planner_{name}.c" for name in ("cost", "cut", "route")]
_NO_LIMIT = 1 << 60
_NO_MEMORY, _TOO_MANY = -1, -2


class _Plan(ctypes.Structure):
    """As in planner_route.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "PEJ"),
        *((f"array {number}", ctypes.c_void_p) for number in range(5)),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled planner.

    Raises:
        ValueError: there is no C compiler, or it failed.
    """
    instead = 'set "llep.planner" to "lla"'
    loaded = compiled('planner "cost"', _SOURCES, instead)
    size, array, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    loaded.plan_cost.argtypes = (size, size, *[array] * 4, number, number, *[array] * 3)
    loaded.plan_cost.restype = size
    loaded.cut.argtypes = (size, size, *[array] * 4, size, array)
    loaded.cut.restype = None
    plan = ctypes.POINTER(_Plan)
    loaded.splits.argtypes = (plan, array, array, size, size, array, array)
    loaded.splits.restype = None
    loaded.runs.argtypes = (plan, size, array, array)
    loaded.runs.restype = None
    return loaded


def plan_cost(
    counts_PE: np.ndarray,
    nodes_P: np.ndarray,
    prices: tuple[int, ...],
    min_tokens: int,
    max_foreign_experts: int | None,
    capacity_factor: float | None,
    threshold: float,
) -> tuple[np.ndarray, np.ndarray, int, tuple[int, int]]:
    """Search for the plan whose slowest rank is the fastest.

    Args:
        counts_PE: int64 [P, E], each rank's own tokens per expert; E is a multiple of P.
        nodes_P: int64 [P], the node of each rank, any integers.
        prices: of a row, of a foreign expert, of a copy inside a node and between nodes, of an
            expert's weights inside and between, of any spill; integers >= 0, of a row >= 1.
        min_tokens: fewest tokens of a spill.
        max_foreign_experts: most of a rank; None: any number.
        capacity_factor: most rows of a rank that helps, relative to the mean; None: any number.
        threshold: nothing spills where the most loaded rank has fewer rows than the mean times it.

    Returns:
        int64 [E, P], tokens of each expert that each rank computes; int64 [E, P], `near_EP` for
        `cut`; the number of spills; and the time of the slowest rank without them and with them.

    Raises:
        ValueError: no C compiler; prices out of range, or so high that a sum of them overflows.
        MemoryError: no memory.
    """
    P, E = counts_PE.shape
    counts_PE, nodes_P = _plain(counts_PE), _plain(nodes_P)
    costs, limits = _as_arrays(prices, min_tokens, max_foreign_experts, P, E)
    (tokens_EP, near_EP), times = np.zeros((2, E, P), dtype=np.int64), (ctypes.c_int64 * 2)()
    spills = library().plan_cost(
        *(P, E, counts_PE.ctypes.data, nodes_P.ctypes.data, costs, limits),
        math.inf if capacity_factor is None else capacity_factor,
        *(threshold, tokens_EP.ctypes.data, near_EP.ctypes.data, times),
    )
    if spills == _NO_MEMORY:
        raise MemoryError(f"planner cost: no memory for {E} experts on {P} ranks")
    if spills == _TOO_MANY:
        raise ValueError(f"planner cost: prices {prices} are too high to be added up as 64-bit")
    return tokens_EP, near_EP, spills, tuple(times)


def _plain(array: np.ndarray) -> np.ndarray:
    """As C reads it."""
    return np.ascontiguousarray(array, dtype=np.int64)


@functools.lru_cache
def _as_arrays(
    prices: tuple[int, ...], min_tokens: int, max_foreign_experts: int | None, P: int, E: int
) -> tuple[ctypes.Array, ctypes.Array]:
    """What is the same for every micro-batch of a layer: prices and limits, for C."""
    if min(prices) < 0 or prices[0] < 1:
        raise ValueError(
            f"planner cost: prices {prices}; valid is 1 or more for a row, 0 or more for the rest"
        )
    row, expert, *copies, weights_inside, weights_between, spill = prices
    # No rank's time is above the tokens at `token` each and `fixed`, and the search multiplies
    # times by P and by percentages.
    token = row + sum(copies)
    fixed = spill + 2 * E * (expert + weights_inside + weights_between)
    max_total = ((1 << 62) // max(P, 100) - fixed) // token - 1
    if max_total < 0:
        raise ValueError(f"planner cost: prices {prices} are too high to be added up as 64-bit")
    limits = [
        _NO_LIMIT if limit is None else min(limit, _NO_LIMIT)
        for limit in (min_tokens, max_foreign_experts)
    ]
    return (ctypes.c_int64 * 7)(*prices), (ctypes.c_int64 * 3)(*limits, max_total)


def cut(
    counts_PE: np.ndarray,
    tokens_EP: np.ndarray,
    nodes_P: np.ndarray,
    near_EP: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which tokens each rank computes, by the local rule of ds_llep/cut.py.

    Args:
        counts_PE: int64, each rank's own tokens per expert.
        tokens_EP: int64, tokens of each expert that each rank computes.
        nodes_P: int64, the node of each rank, any integers.
        near_EP: int64, of the tokens of a spilled expert that a rank sends away, or gets from
            others, those that stay in its node; None: as many as can of the first ranks.

    Returns:
        int64: [X] the experts that are not computed at home alone, ascending; [J] the expert, the
        computing rank and the tokens of each of their segments, by expert, then rank; [J, P] how
        many of these are each source's.

    Raises:
        ValueError: no C compiler.
    """
    P, E = counts_PE.shape
    room = np.count_nonzero(tokens_EP)
    found = np.empty(2 + 2 * P + room * (4 + P), dtype=np.int64)
    arrays = _plain(counts_PE), _plain(tokens_EP), _plain(nodes_P)
    near_EP = None if near_EP is None else _plain(near_EP)
    library().cut(
        *(P, E, *(array.ctypes.data for array in arrays)),
        *(None if near_EP is None else near_EP.ctypes.data, room, found.ctypes.data),
    )
    found.setflags(write=False)
    X, J = found[:2].tolist()
    found = found[2 + 2 * P :]
    expert_X, *segments = found[: 4 * room].reshape(4, room)
    sent_JP = found[4 * room :].reshape(room, P)
    return expert_X[:X], *(column[:J] for column in segments), sent_JP[:J]


def splits(
    plan: Sequence[np.ndarray],
    reached_PP: np.ndarray,
    alone_PE: np.ndarray,
    rank: int,
    top_k: int,
) -> np.ndarray:
    """The most parcels that a rank may send to each rank, and receive from each.

    Args:
        plan: counts_PE, tokens_EP, expert_J, rank_J and sent_JP, as `cut` takes and returns them.
        reached_PP, alone_PE, rank, top_k: as for `ds_llep.route.make_route`.

    Returns:
        int64 [2, P].
    """
    P = len(reached_PP)
    found, work = np.empty((2, 2, P), dtype=np.int64)
    reached_PP, alone_PE = _plain(reached_PP), _plain(alone_PE)
    library().splits(
        *(_as_struct(plan), reached_PP.ctypes.data, alone_PE.ctypes.data),
        *(rank, top_k, found.ctypes.data, work.ctypes.data),
    )
    return found


def runs(plan: Sequence[np.ndarray], rank: int) -> np.ndarray:
    """What `ds_llep.route.find_runs` returns, int32 [2, E, P]; `plan` is that of `splits`."""
    E, P = plan[1].shape
    found, work = np.empty((2, E, P), dtype=np.int32), np.empty(2 * P, dtype=np.int64)
    library().runs(_as_struct(plan), rank, found.ctypes.data, work.ctypes.data)
    return found


def _as_struct(plan: Sequence[np.ndarray]) -> _Plan:
    """The plan as C reads it, for as long as its arrays live."""
    assert all(array.flags.c_contiguous and array.dtype == np.int64 for array in plan)
    E, P = plan[1].shape
    return _Plan(P, E, len(plan[2]), *(array.ctypes.data for array in plan))

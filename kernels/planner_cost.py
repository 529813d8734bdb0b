"""The planner "cost" in C: compiled by the machine's compiler when first used.

Its search takes thousands of steps of a few integer operations, a hundred times slower in Python,
while every layer waits for it. DeepSpeed and Triton compile with the same compiler, so it asks for
nothing new. It takes a third of a second, once in each process, and leaves nothing behind.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

_SOURCE = Path(__file__).with_suffix(".c")
_NO_LIMIT = 1 << 60
_COMPILERS = ("cc", "gcc", "clang")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled planner.

    Raises:
        ValueError: there is no C compiler, or it failed.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    instead = 'or set "llep.planner" to "lla"'
    if compiler is None:
        raise ValueError(
            f'planner "cost" is compiled when it is first used, and none of '
            f"{', '.join(_COMPILERS)} is in PATH. Install a C compiler (Debian: apt install gcc), "
            f"{instead}."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "planner_cost.so")
        command = [compiler, "-O3", "-std=c11", "-shared", "-fPIC", "-o", path, _SOURCE]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            loaded = ctypes.CDLL(str(path))
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f'{compiler} cannot compile planner "cost": {error.stderr.strip()}. Install '
                f"another C compiler, {instead}."
            ) from None
        except OSError as error:  # such as a folder for temporary files that may hold no program
            raise ValueError(
                f'planner "cost" was compiled into {folder} but cannot be loaded: {error}. Let the '
                f"environment variable TMPDIR name a folder that programs may run from, {instead}."
            ) from None
    integers, nodes = (np.ctypeslib.ndpointer(dtype, flags="C") for dtype in (np.int64, np.int32))
    size = ctypes.c_int64
    loaded.plan_cost.argtypes = (
        *(size, size, integers, nodes, integers, integers, integers, size),
        *(integers, integers),
    )
    return loaded


def plan_cost(
    counts_PE: np.ndarray,
    nodes_P: np.ndarray,
    prices: tuple[int, ...],
    min_tokens: int,
    max_foreign_experts: int | None,
    max_rows: int | None,
    start: list[tuple[int, int, int]],
) -> tuple[np.ndarray, tuple[int, int]]:
    """Search for the plan whose slowest rank is the fastest.

    Args:
        counts_PE: int64 [P, E], each rank's own tokens per expert; E is a multiple of P.
        nodes_P: int64 [P], the node of each rank, any integers.
        prices: of a row, of a foreign expert, of a copy inside a node and between nodes, of an
            expert's weights inside and between; integers >= 0, of a row >= 1.
        min_tokens: fewest tokens of a spill.
        max_foreign_experts: most of a rank; None: any number.
        max_rows: most of a rank that helps; None: any number.
        start: (expert, helper, tokens) of each spill of another plan within these limits, which the
            plan found will not be slower than; it may be empty.

    Returns:
        int64 [E, P], tokens of each expert that each rank computes, and the time of the slowest
        rank without spills and with these.

    Raises:
        ValueError: no C compiler; prices out of range, or so high that a sum of them overflows.
        MemoryError: no memory.
    """
    P, E = counts_PE.shape
    if min(prices) < 0 or prices[0] < 1:
        raise ValueError(
            f"planner cost: prices {prices}; valid is 1 or more for a row, 0 or more for the rest"
        )
    row, expert, *copies, weights_inside, weights_between = prices
    # No rank's time is above this; the search multiplies times by P and by percentages.
    most = int(counts_PE.sum()) * (row + sum(copies))
    most += 2 * E * (expert + weights_inside + weights_between)
    if most * max(P, 100) >= 1 << 62:
        raise ValueError(f"planner cost: prices {prices} are too high to be added up as 64-bit")
    limits = [
        _NO_LIMIT if limit is None else min(limit, _NO_LIMIT)
        for limit in (min_tokens, max_foreign_experts, max_rows)
    ]
    tokens_EP, times = np.empty((E, P), dtype=np.int64), np.empty(2, dtype=np.int64)
    failed = library().plan_cost(
        *(P, E, np.ascontiguousarray(counts_PE)),
        np.unique(nodes_P, return_inverse=True)[1].astype(np.int32),
        np.array(prices, dtype=np.int64),
        np.array(limits, dtype=np.int64),
        *(np.array(start, dtype=np.int64), len(start), tokens_EP, times),
    )
    if failed:
        raise MemoryError(f"planner cost: no memory for {E} experts on {P} ranks")
    return tokens_EP, tuple(times.tolist())

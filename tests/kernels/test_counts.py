"""What is counted of a rank's routing, against NumPy."""

import numpy as np
import pytest
import torch

# T, K, E, P. Blocks are of 128 tokens; ranks and experts are powers of two, or not.
SIZES = [
    (1, 1, 1, 1),
    (128, 2, 8, 2),
    (129, 3, 12, 3),
    (300, 5, 10, 1),
    (40, 8, 256, 64),
    (7, 6, 3, 3),
    (0, 2, 4, 2),
]
UNKNOWN = [-1, -7, -(2**40), -(2**63), 2**31 - 1, 2**32, 2**63 - 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def expected_counts(selected_TK, scores_TK, E: int, P: int) -> list[int]:
    ids, finite = selected_TK.cpu().numpy(), scores_TK.double().isfinite()
    known = (ids >= 0) & (ids < E)
    home = np.where(known, ids // (E // P), -1)
    alone = known & ((home[:, :, None] == home[:, None, :]).sum(2) == 1)
    return [
        *np.bincount(ids[known], minlength=E).tolist(),
        *np.bincount(ids[alone], minlength=E).tolist(),
        *((home == p).any(1).sum().item() for p in range(P)),
        (~known).sum().item(),
        (~finite).sum().item(),
    ]


def check(kernels, draw, selected_TK, scores_TK, E: int, P: int) -> list[int]:
    """Asserts that the report is right; returns it, without the version."""
    version = int(draw.index(1, high=2**40))
    report, _ = kernels.count_copies(selected_TK, scores_TK, E, P, version)
    assert report.dtype == torch.int64
    *found, carried = report.tolist()
    assert carried == version
    assert found == expected_counts(selected_TK, scores_TK, E, P), draw.seed
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_counts(size, dtype, draw, kernels):
    T, K, E, P = size
    counts = check(kernels, draw, draw.index(T, K, high=E), draw.normal(T, K, dtype=dtype), E, P)
    assert sum(counts[:E]) == T * K and counts[2 * E + P :] == [0, 0]
    assert sum(counts[E : 2 * E]) <= sum(counts[2 * E : -2])  # one alone at most for each home


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_no_router_may_give(size, dtype, draw, kernels):
    """Unknown experts, in all choices of a token or one; scores that are no number."""
    T, K, E, P = size
    unknown = torch.tensor([*UNKNOWN, E, E + 1, E + P], device=draw.device)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")], device=draw.device, dtype=dtype)
    largest = torch.finfo(dtype).max * torch.ones_like(odd[0])
    bad_TK = (draw.index(T, K, high=5) == 0) | (draw.index(T, 1, high=9) == 0)
    selected_TK, scores_TK = draw.index(T, K, high=E), draw.normal(T, K, dtype=dtype)
    selected_TK = torch.where(bad_TK, unknown[draw.index(T, K, high=len(unknown))], selected_TK)
    scores_TK = torch.where(draw.index(T, K, high=4) == 0, largest, scores_TK)
    scores_TK = torch.where(draw.index(T, K, high=4) == 0, odd[draw.index(T, K, high=3)], scores_TK)
    check(kernels, draw, selected_TK, scores_TK, E, P)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(dtype, draw, kernels):
    selected, scores = draw.index(50, 8, high=6), draw.normal(50, 8, dtype=dtype)
    scores[draw.index(50, 8, high=3) == 0] = float("nan")
    check(kernels, draw, selected.t(), scores.t(), 6, 2)
    check(kernels, draw, selected[:, 1:4], scores[:, 5:8], 6, 2)


def test_tokens_choose_an_expert_twice(draw, kernels):
    selected_TK = draw.index(130, 1, high=4).expand(130, 3)
    counts = check(kernels, draw, selected_TK, draw.normal(130, 3), 4, 2)
    assert sum(counts[:4]) == 3 * 130 and sum(counts[8:10]) == 130
    assert not any(counts[4:8])  # no copy is its token's only one

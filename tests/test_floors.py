"""Floors of a layer's parts: bytes and FLOP counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_llep import LLEPConfig, make_plan
from ds_llep.bench import batch
from ds_llep.bench.cost import ep_plan
from ds_llep.bench.floors import BestRates, of_parts
from ds_llep.bench.shapes import Shape
from ds_llep.kernels.reference import count_copies

SHAPE = Shape(num_experts=4, hidden_size=16, ffn_size=8, top_k=2, tokens=6)
ROW, PARCEL = 32, 32 + 16  # bytes in bf16; a score and a target of each choice

# Rank 0: six tokens, of which four stay, three of these with one copy; rank 1: two tokens.
IDS = [
    np.array([[0, 1], [0, 2], [1, 3], [0, 3], [2, 3], [2, 3]]),
    np.array([[0, 1], [2, 0]]),
]
COUNTS_PE = np.stack([np.bincount(ids.ravel(), minlength=4) for ids in IDS])
REACHED = np.array([[4, 5], [2, 1]]), np.array([[2, 1, 1, 2], [1, 0, 1, 0]])
SENT, ARRIVED, OWN, ROWS, TOKENS = 5, 2, 5, 8, 6  # of rank 0; its own rows and all of them


def best(dense=1e30, memory=1e30, link=1e30) -> BestRates:
    return BestRates(dense, memory, ((1.0, link),), 0.25)


def floors(rates: BestRates, plan=None, layers=1, rank=0) -> dict[str, float]:
    plan = plan or ep_plan(COUNTS_PE)
    args = [plan] * layers, [REACHED] * layers, SHAPE, rank, torch.bfloat16
    return of_parts(rates, *args)


def test_passes_over_rows():
    found = floors(best(memory=1e3))  # milliseconds are bytes
    there = (TOKENS + SENT) + (TOKENS + OWN) + (ARRIVED + ROWS - OWN)
    back = (ROWS - OWN + ARRIVED) + (OWN + SENT + TOKENS)
    for name, rows in {"dispatch": there, "combine": back}.items():
        assert found[f"{name}/rows"] == found[name] == pytest.approx(1e3 * rows * ROW / 1e3)
    assert found["combine backward/rows"] == found["dispatch/rows"]
    assert found["dispatch backward/rows"] == found["combine/rows"]
    assert found["counts"] == 250


def test_transfers():
    """The busier direction's; scores and targets travel with the tokens, gradients with scores."""
    found = floors(best(link=1e3))
    expected = {"dispatch": PARCEL, "combine": ROW, "combine backward": ROW}
    expected["dispatch backward"] = ROW + 8
    for name, nbytes in expected.items():
        assert found[f"{name}/all-to-all"] == found[name] == pytest.approx(SENT * nbytes)
    assert floors(best(link=1e3), rank=1)["combine"] == found["combine"]


def test_waits_are_what_other_work_leaves():
    """Dispatch: the pass over own rows. Dispatch's backward: the gradients of w1 and w3."""
    passes = 1e3 * (TOKENS + OWN) * ROW / 4e3
    found = floors(best(link=1e3, memory=4e3))
    assert found["dispatch/all-to-all"] == pytest.approx(SENT * PARCEL - passes)
    assert found["combine backward/all-to-all"] == pytest.approx(SENT * ROW - passes)
    assert found["combine/all-to-all"] == pytest.approx(SENT * ROW)
    behind = 1e3 * 4 * ROWS * SHAPE.hidden_size * SHAPE.ffn_size / 40e3
    found = floors(best(link=1e3, dense=40e3))
    assert found["dispatch backward/all-to-all"] == pytest.approx(SENT * (ROW + 8) - behind)
    slow = floors(best(link=1e3, dense=1, memory=1))
    hidden = ("dispatch", "combine backward", "dispatch backward")
    assert [slow[f"{name}/all-to-all"] for name in hidden] == [0, 0, 0]


def test_foreign_experts():
    counts_PE = np.stack([np.bincount(np.ravel(ids), minlength=4) for ids in (IDS[0] % 2, IDS[1])])
    plan = make_plan(counts_PE, LLEPConfig(imbalance_threshold=1.0, min_tokens_per_gemm=1))
    found = floors(best(dense=1e3), plan, rank=1)
    home, foreign = plan.tokens_EP[2:, 1].sum(), plan.tokens_EP[:2, 1].sum()
    assert foreign > 0
    for name, rows in (("home experts", home), ("foreign experts", foreign)):
        assert found[name] == SHAPE.gemm_flop(int(rows))
        assert found[f"{name} backward"] == 2 * found[name]


def test_layers_add_up():
    rates = best(dense=1e6, memory=1e6, link=1e5)
    one, three = floors(rates), floors(rates, layers=3)
    assert three == pytest.approx({name: 3 * value for name, value in one.items()})


def test_tokens_that_reach_a_rank(monkeypatch, seed):
    """Of all ranks of the EP group, as their own batches have them."""
    shape, reached = Shape(8, 4, 4, 3, 50), []
    for rank in (4, 5):
        monkeypatch.setattr(batch.dist, "get_rank", lambda rank=rank: rank)
        own = batch.Batch("zipf:1", shape, 2, seed, torch.empty(0))
        reached.append(own.reached(step=1, layer=2))
        report, _ = count_copies(own.ids(1, 2), torch.zeros(50, 3), 8, 2, 0)
        reached_PP, alone_PE = reached[-1]
        assert [*alone_PE[rank - 4], *reached_PP[rank - 4]] == report[8:-3].tolist()
        assert alone_PE.any()
    for one, other in zip(*reached, strict=True):
        np.testing.assert_array_equal(one, other)

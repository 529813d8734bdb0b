"""Where copies and parcels go, against the plan played through by hand for all ranks of a group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CHEAP_SPILLS, draw_near, draw_nodes, shares_of

from ds_llep import LLEPConfig, make_plan
from ds_llep import dispatch as dispatch_room
from ds_llep.dispatch import DispatchBackward, combine, dispatch
from ds_llep.kernels import counts
from ds_llep.kernels.select import select_kernels
from ds_llep.plan import Plan
from ds_llep.route import Addresses, find_runs, make_route

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TWIN, TRITON = (select_kernels(name, DEVICE) for name in ("torch", "triton"))
# P, M, K: each is compiled anew. Fewer experts than choices: some are chosen twice by a token.
SIZES = [(1, 4, 2), (2, 3, 2), (2, 1, 3), (3, 2, 3), (4, 2, 1), (5, 1, 3), (8, 2, 4)]


def draw_ids(P: int, E: int, K: int, tokens: list[int], heat: float, twice: bool, seed: int):
    """Expert ids int64 `[T, K]` of every rank; `heat` is how likely expert `seed % E` is."""
    rng = np.random.default_rng(seed)
    share_E = np.ones(E)
    share_E[seed % E] = heat
    share_E /= share_E.sum()
    twice = twice or K > E
    ids = [[rng.choice(E, K, replace=twice, p=share_E) for _ in range(T)] for T in tokens]
    return [np.array(rows, dtype=np.int64).reshape(-1, K) for rows in ids]


def counts_of(ids, E: int) -> np.ndarray:
    return np.stack([np.bincount(i.reshape(-1), minlength=E) for i in ids])


def lla(ids, E: int) -> Plan:
    config = LLEPConfig(imbalance_threshold=1.0, min_tokens_per_gemm=1)
    return make_plan(counts_of(ids, E), config)


def home(ids, E: int) -> Plan:
    return make_plan(counts_of(ids, E), LLEPConfig(imbalance_threshold=1e9))


def cost(ids, E: int) -> Plan:
    counts_PE = counts_of(ids, E)
    rng = np.random.default_rng(counts_PE.reshape(-1))
    config = LLEPConfig(planner="cost", imbalance_threshold=1.0, min_tokens_per_gemm=1)
    return make_plan(counts_PE, config, CHEAP_SPILLS, draw_nodes(len(ids), rng))


def arbitrary(ids, E: int) -> Plan:
    """Some experts cut anywhere, over any ranks, whether that makes sense or not."""
    counts_PE, P = counts_of(ids, E), len(ids)
    rng = np.random.default_rng(counts_PE.reshape(-1))
    tokens_EP = np.zeros((E, P), dtype=np.int64)
    for e, load in enumerate(counts_PE.sum(0)):
        share_P = rng.dirichlet(np.full(P, 0.4)) * (rng.random(P) < 0.6)
        if share_P.sum() == 0 or rng.random() < 0.3:
            share_P = np.arange(P) == e // (E // P)
        tokens_EP[e] = rng.multinomial(load, share_P / share_P.sum())
    return Plan(counts_PE, tokens_EP, bypassed=False)


def arbitrary_local(ids, E: int) -> Plan:
    plan = arbitrary(ids, E)
    rng = np.random.default_rng(plan.counts_PE.reshape(-1))
    nodes_P = draw_nodes(len(ids), rng)
    near_EP = draw_near(plan.counts_PE, plan.tokens_EP, nodes_P, rng)
    return replace(plan, nodes_P=nodes_P, near_EP=near_EP if rng.random() < 0.5 else None)


PLANNERS = [lla, lla, cost, arbitrary, arbitrary_local, arbitrary_local, home]


@st.composite
def routings(draw):
    """Expert ids of every rank, ragged, with hot experts and ranks without tokens; and a plan."""
    P, M, K = draw(st.sampled_from(SIZES))
    ids = draw_ids(
        *(P, P * M, K),
        tokens=draw(st.lists(st.integers(0, 20), min_size=P, max_size=P)),
        heat=draw(st.sampled_from([1.0, 5.0, 1000.0])),
        twice=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return ids, draw(st.sampled_from(PLANNERS))(ids, P * M)


def play(ids, plan: Plan) -> list[np.ndarray]:
    """For each rank `[T, K, 2]`: the rank that computes a copy, and its row there."""
    runs, P = {}, plan.num_ranks
    for e in range(plan.num_experts):
        share_PP = shares_of(plan, e)
        for s, i in enumerate(ids):
            copies = [(s, t, k) for t, k in np.argwhere(i == e)]
            for p in range(P):
                here, copies = copies[: share_PP[s, p]], copies[share_PP[s, p] :]
                runs.setdefault((e, p), []).extend(here)
            assert not copies
    found = [np.full((*i.shape, 2), -1) for i in ids]
    for p in range(plan.num_ranks):
        rows = [copy for e in plan.slots(p) for copy in runs[e, p]]
        for row, (s, t, k) in enumerate(rows):
            found[s][t, k] = p, row
    assert all((goes >= 0).all() for goes in found)
    return found


def expected_maps(goes_TK2: np.ndarray, rank: int, first_P: np.ndarray):
    """own, sent, target, and how many tokens go to each rank."""
    to_TK, target_TK = goes_TK2[..., 0], goes_TK2[..., 1]
    own_TK = np.where(to_TK == rank, target_TK, -1)
    sent_TK, reached_P = np.full_like(to_TK, -1), np.zeros_like(first_P)
    for t, to_K in enumerate(to_TK.tolist()):
        for p in sorted(set(to_K) - {rank}):
            first, *others = [k for k, to in enumerate(to_K) if to == p]
            place = first_P[p] + reached_P[p]
            sent_TK[t, first], sent_TK[t, others] = place, -(place + 2)
            reached_P[p] += 1
    return (own_TK, sent_TK, target_TK), reached_P


def reached_of(ids, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """`[P, P]`: tokens of a rank that have an expert at home on a rank; `[P, E]`: those of an
    expert that have no other choice at its home."""
    M, P, E = plan.experts_per_rank, plan.num_ranks, plan.num_experts
    reached_PP = np.array([[(i // M == p).any(1).sum() for p in range(P)] for i in ids])
    alone_PE = np.zeros((P, E), dtype=int)
    for s, i in enumerate(ids):
        for chosen in i.tolist():
            homes = [e // M for e in chosen]
            for e in chosen:
                alone_PE[s, e] += homes.count(e // M) == 1
    return reached_PP, alone_PE


def address(ids, plan: Plan, rank: int, kernels) -> Addresses:
    selected_TK = torch.from_numpy(ids[rank]).to(DEVICE)
    if kernels.find_runs is None or plan.nodes_P is not None:
        runs_2EP = torch.from_numpy(find_runs(plan, rank)).to(DEVICE)
    else:
        # As gathered, with other fields behind the counts.
        counts_PE = torch.from_numpy(np.pad(plan.counts_PE, ((0, 0), (0, 3)))).to(DEVICE)[:, :-3]
        tokens_EP = torch.tensor(plan.tokens_EP, device=DEVICE)
        runs_2EP = kernels.find_runs(counts_PE, tokens_EP, rank)
    scores_TK = torch.zeros(selected_TK.shape, device=DEVICE)
    _, blocks = kernels.count_copies(selected_TK, scores_TK, plan.num_experts, plan.num_ranks, 0)
    return Addresses(*kernels.address_copies(selected_TK, blocks, runs_2EP, rank))


def route_of(ids, plan: Plan, rank: int, kernels, group=None):
    """A rank's route and maps."""
    top_k = ids[rank].shape[1]
    route = make_route(*reached_of(ids, plan), plan, rank, group, kernels, top_k)
    first_P = torch.from_numpy(route.first_P).to(DEVICE)
    return route, address(ids, plan, rank, kernels).place(first_P, kernels)


def check_splits(ids, plan: Plan, made, goes) -> None:
    """They meet, they suffice, and they are what route.py says of them."""
    M, (reached_PP, alone_PE) = plan.experts_per_rank, reached_of(ids, plan)
    for s, (route, _) in enumerate(made):
        assert route.send_splits[s] == route.recv_splits[s] == 0
        assert route.send_splits == [other.recv_splits[s] for other, _ in made]
        for p in range(plan.num_ranks):
            if p == s:
                continue
            here_TK = goes[s][..., 0] == p
            parcels, copies = here_TK.any(1).sum(), here_TK.sum()
            foreign = (here_TK & (ids[s] // M != p)).sum()
            stay = reached_PP[s, p]
            for e in range(p * M, (p + 1) * M):
                kept = (here_TK & (ids[s] == e)).sum()
                stay -= max(alone_PE[s, e] - kept, 0)
            bound = min(copies, len(ids[s]), stay + foreign)
            assert route.send_splits[p] == (bound if plan.spills else parcels)
            assert parcels <= route.send_splits[p]
        rows_per_slot = [plan.tokens_EP[e, s] for e in plan.slots(s)]
        assert route.rows_per_slot == rows_per_slot
        assert route.num_home_rows == sum(rows_per_slot[:M])
        assert route.num_rows == plan.rank_load_P[s] == sum(rows_per_slot)


@pytest.fixture(scope="module")
def small_blocks():
    """So that a few tokens are several blocks."""
    with mock.patch.object(counts, "TOKENS", 8):
        yield


def check_maps(maps, route, goes, rank: int) -> None:
    first_P = np.cumsum(route.send_splits) - route.send_splits
    expected, reached_P = expected_maps(goes[rank], rank, first_P)
    assert (reached_P <= route.send_splits).all()
    for found, one in zip(maps, expected, strict=True):
        assert found.dtype == torch.int32 and found.tolist() == one.tolist()


@given(routings())
def test_routes_meet(routing):
    ids, plan = routing
    goes, made = play(ids, plan), [route_of(ids, plan, rank, TWIN) for rank in range(len(ids))]
    check_splits(ids, plan, made, goes)
    for rank, (route, maps) in enumerate(made):
        check_maps(maps, route, goes, rank)


@settings(max_examples=40)
@given(routings(), st.integers(0, 9))
def test_triton_makes_the_same_maps(small_blocks, routing, rank):
    ids, plan = routing
    rank %= len(ids)
    route, maps = route_of(ids, plan, rank, TRITON)
    check_maps(maps, route, play(ids, plan), rank)
    same_route, twin = route_of(ids, plan, rank, TWIN)
    assert all(map(torch.equal, maps, twin))
    assert route == replace(same_route, kernels=TRITON)


# P, M, K, T, tokens of a block: the real block, partly filled; more blocks than are added up at
# once; more experts than fit into few registers.
@pytest.mark.parametrize(
    "size", [(2, 2, 2, 300, 128), (3, 1, 1, 540, 8), (2, 150, 3, 200, 128)], ids=str
)
def test_several_blocks(size, kernels, monkeypatch, seed):
    P, M, K, T, block = size
    monkeypatch.setattr(counts, "TOKENS", block)
    ids = draw_ids(P, P * M, K, [T, 40, T], P * M, False, seed)[:P]
    plan = lla(ids, P * M)
    assert plan.spills
    route, maps = route_of(ids, plan, 0, kernels)
    check_maps(maps, route, play(ids, plan), 0)


@pytest.mark.parametrize("make", [lla, cost])
def test_256_experts_on_64_ranks(make, kernels, seed):
    ids = draw_ids(64, 256, 8, [10] * 64, 400.0, False, seed)
    plan = make(ids, 256)
    assert plan.spills
    route, maps = route_of(ids, plan, 41, kernels)
    check_maps(maps, route, play(ids, plan), 41)


@pytest.mark.parametrize("P", [1, 2, 3, 5])
def test_unknown_experts_get_some_address(P, kernels, seed):
    """On a rank that exists: the host does not know of the error yet."""
    ids = draw_ids(P, 2 * P, 3, [20] * P, 3.0, False, seed)
    plan = arbitrary(ids, 2 * P)
    rng = np.random.default_rng(seed)
    unknown = rng.choice([-1, -(2**63), 2 * P, 2**40 + 1, 2**63 - 1], size=(20, 3))
    for rank in range(P):
        ids[rank] = np.where(rng.random((20, 3)) < 0.5, unknown, ids[rank])
        sent_TK = address(ids, plan, rank, kernels).sent_TK
        to_TK = torch.where(sent_TK < -1, -sent_TK - 2, sent_TK)
        assert to_TK.min() >= -1 and to_TK.max() < P and (to_TK != rank).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("K", [1, 3, 8])
def test_labels(K, dtype, kernels, draw):
    """Every parcel names the rows of all its copies and their scores, and no other has a row."""
    ids = draw_ids(3, 9, K, [171, 60, 5], 20.0, True, draw.seed)  # copies: more than one block
    route, (_, sent_TK, target_TK) = route_of(ids, arbitrary(ids, 9), 0, TWIN)
    scores_TK, wide = draw.normal(171, K, dtype=dtype), torch.promote_types(dtype, torch.float32)
    U = sum(route.send_splits) + 3  # parcels that nobody uses, beside what the plan leaves empty
    # As in dispatch, two fields of a buffer of bytes.
    ends = np.cumsum([32, 4 * K, -4 * K % 8, K * wide.itemsize])
    parcels = torch.full((U + 1, ends[-1] + 8), 77, dtype=torch.uint8, device=DEVICE)
    targets_UK = parcels[:, ends[0] : ends[1]].view(torch.int32)
    values_UK = parcels[:, ends[2] : ends[3]].view(wide)
    kernels.label_parcels(sent_TK, target_TK, scores_TK, targets_UK, values_UK)
    expected_UK = np.full((U, K), -1)
    scores, values = scores_TK.tolist(), values_UK.tolist()
    for t, sent_K in enumerate(sent_TK.tolist()):
        for k, code in enumerate(sent_K):
            if code != -1:
                u = code if code >= 0 else -code - 2
                assert expected_UK[u, k] == -1
                expected_UK[u, k] = target_TK[t, k]
                assert values[u][k] == scores[t][k], draw.seed
    assert targets_UK[:-1].tolist() == expected_UK.tolist()
    assert (expected_UK[-3:] == -1).all() and (expected_UK != -1).any()
    for start, end in ((0, ends[0]), (ends[1], ends[2]), (ends[3], None)):
        assert (parcels[:, start:end] == 77).all()


def test_labels_of_no_copies(kernels, draw):
    sent_TK = torch.empty((0, 2), dtype=torch.int32, device=DEVICE)
    targets_UK = torch.full((4, 2), 5, dtype=torch.int32, device=DEVICE)
    values_UK = draw.normal(4, 2)
    kernels.label_parcels(sent_TK, sent_TK, values_UK[:0], targets_UK, values_UK)
    assert (targets_UK[:-1] == -1).all()


class Group:
    """A group's ranks as threads. One at a time runs, until it waits for the others."""

    def __init__(self, size: int):
        self.size = size
        self.turn = threading.Lock()
        self.everyone = threading.Barrier(size, timeout=120)
        self.sent = [[] for _ in range(size)]

    def run(self, of_rank: Callable[[Member], object]) -> list:
        """What every rank returns; the error of one of them ends all."""

        def turn(member: Member):
            with self.turn, torch.autograd.set_multithreading_enabled(False):
                try:
                    return of_rank(member)
                except BaseException:
                    self.everyone.abort()
                    raise

        with ThreadPoolExecutor(self.size) as threads:
            members = [Member(self, rank) for rank in range(self.size)]
            futures = [threads.submit(turn, member) for member in members]
        errors = [future.exception() for future in futures if future.exception()]
        errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
        if errors:
            raise errors[0]
        return [future.result() for future in futures]


@dataclass(frozen=True)
class Member:
    """Where a rank's process group is expected."""

    group: Group
    rank: int

    def all_to_all(self, output, input, recv_splits, send_splits):
        """What is returned waits for the rows of all ranks."""
        assert len(input) == sum(send_splits) and len(output) == sum(recv_splits)
        mine = self.group.sent[self.rank]
        mine.append(input.clone().split(send_splits))
        return SimpleNamespace(wait=partial(self._wait, output, recv_splits, len(mine) - 1))

    def _wait(self, output, recv_splits, number: int) -> None:
        self.group.turn.release()
        try:
            self.group.everyone.wait()
        finally:
            self.group.turn.acquire()
        pieces = [sent[number][self.rank] for sent in self.group.sent]
        assert [len(piece) for piece in pieces] == recv_splits
        output.copy_(torch.cat(pieces))


class Experts(torch.autograd.Function):
    """Rows times their expert's number and their score; may start dispatch's backward early."""

    @staticmethod
    def forward(ctx, home_ND, foreign_ND, scores_N, arrived_UK, number_N, backward):
        ctx.save_for_backward(home_ND, foreign_ND, scores_N, arrived_UK, number_N)
        ctx.backward = backward
        factor_N = (number_N * scores_N).to(home_ND.dtype).unsqueeze(1)
        split = len(home_ND)
        return home_ND * factor_N[:split], foreign_ND * factor_N[split:]

    @staticmethod
    def backward(ctx, *grads):
        *rows, scores_N, arrived_UK, number_N = ctx.saved_tensors
        split, dtype = len(rows[0]), rows[0].dtype
        factor_N = (number_N * scores_N).to(dtype).unsqueeze(1)
        grad_scores = number_N * (torch.cat(rows) * torch.cat(grads)).to(scores_N.dtype).sum(1)
        grads = grads[0] * factor_N[:split], grads[1] * factor_N[split:], grad_scores
        if ctx.backward is not None:
            ctx.backward.start(*grads, arrived_UK)
        return *grads, None, None, None


# P, M, K, plan, dtype of tokens and scores, tokens of each rank.
LAYERS = [
    (1, 4, 2, home, torch.float32, torch.float32, [9]),
    (2, 3, 2, lla, torch.bfloat16, torch.float32, [17, 30]),
    (3, 2, 3, lla, torch.float16, torch.bfloat16, [0, 13, 11]),
    (3, 2, 4, home, torch.float32, torch.float32, [12, 1, 0]),
    (5, 1, 3, arbitrary, torch.bfloat16, torch.bfloat16, [9, 7, 0, 1, 8]),
    (2, 2, 3, arbitrary, torch.float64, torch.float64, [10, 12]),
    (5, 1, 3, arbitrary_local, torch.float32, torch.float32, [9, 7, 0, 1, 8]),
    (4, 2, 2, cost, torch.bfloat16, torch.float32, [12, 0, 9, 16]),
    (2, 2, 2, lla, torch.float32, torch.float32, [0, 0]),
]


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: f"{case[0]}-{case[3].__name__}-{case[4]}")
def test_dispatch_and_combine(case, early, kernels, small_blocks, monkeypatch, draw):
    """Forward and backward on all ranks, with numbers so small that no dtype rounds them."""
    P, M, K, make, dtype, score_dtype, tokens = case
    E, D = P * M, 5
    ids = draw_ids(P, E, K, tokens, 6.0, True, draw.seed)
    plan = make(ids, E)
    goes = play(ids, plan)
    assert plan.spills or make not in (lla, cost) or sum(tokens) == 0

    def leaves(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
        numbers = [draw.index(T, width, high=5) - 2 for T in tokens]
        return [x.to(dtype).requires_grad_() for x in numbers]

    x, grad, scores = leaves(D, dtype), leaves(D, dtype), leaves(K, score_dtype)
    numbers_E = torch.arange(1, E + 1, device=DEVICE)
    group = Group(P)
    monkeypatch.setattr(
        dispatch_room.dist,
        "all_to_all_single",
        lambda *tensors, group, async_op: group.all_to_all(*tensors),
    )

    def layer(member: Member):
        rank = member.rank
        route, maps = route_of(ids, plan, rank, kernels, member)
        backward = DispatchBackward(route)
        dispatched = dispatch(x[rank], scores[rank], route, maps, backward)
        slots = torch.tensor(plan.slots(rank), device=DEVICE)
        counts = torch.tensor(route.rows_per_slot, device=DEVICE)
        number_N = numbers_E[slots.repeat_interleave(counts)]
        outs = Experts.apply(*dispatched, number_N, backward if early else None)
        y_TD = combine(*outs, dispatched.arrived_UK, route, maps)
        y_TD.backward(grad[rank].detach())
        return dispatched, y_TD

    done = group.run(layer)
    assert [len(sent) for sent in group.sent] == [4 if P > 1 else 0] * P
    for rank, (dispatched, y_TD) in enumerate(done):
        assert y_TD.dtype == dtype and scores[rank].grad.dtype == score_dtype
        assert len(dispatched.home_rows) == plan.tokens_EP[rank * M : (rank + 1) * M, rank].sum()
        assert dispatched.scores_N.dtype == torch.promote_types(score_dtype, torch.float32)
        rows_ND = torch.cat(dispatched[:2])
        for s, goes_TK2 in enumerate(goes):
            for t, k in np.argwhere(goes_TK2[..., 0] == rank):
                row = goes_TK2[t, k, 1]
                assert torch.equal(rows_ND[row], x[s][t]), draw.seed
                assert dispatched.scores_N[row] == scores[s][t, k], draw.seed
        wide_x, wide_scores = (
            leaf[rank].detach().double().requires_grad_() for leaf in (x, scores)
        )
        factor_TK = numbers_E[torch.from_numpy(ids[rank]).to(DEVICE)] * wide_scores
        expected_TD = wide_x * factor_TK.sum(1, keepdim=True)
        expected_TD.backward(grad[rank].detach().double())
        assert torch.equal(y_TD.double(), expected_TD), draw.seed
        assert torch.equal(x[rank].grad.double(), wide_x.grad), draw.seed
        assert torch.equal(scores[rank].grad.double(), wide_scores.grad), draw.seed

"""Grouped Triton products against torch in fp64, and how their work is laid out."""

import itertools

import numpy as np
import pytest
import torch
import triton.language as tl

from ds_llep.kernels import grouped_triton as triton_products
from ds_llep.kernels import products
from ds_llep.kernels.grouped_triton import HOPPER, Tiling
from ds_llep.kernels.grouped_triton_rows import can_pair
from ds_llep.kernels.grouped_work import Segment, Work, row_tiles, schedule

ON_GPU = torch.cuda.is_available()
TILING = HOPPER if ON_GPU else Tiling(32, 32, 32, warps=4, stages=2, band=2)
ROWS = 128 if ON_GPU else 32
COUNTS = [ROWS + 9, 0, 1, 2 * ROWS, ROWS - 1, 0]
D, F = 56, 104
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability()[0] != 9, reason="kernels for Hopper"
)


@pytest.fixture(autouse=True)
def interpreter_multiplies_bf16(monkeypatch):
    """Triton's interpreter keeps bf16 as integers, and multiplies those."""
    if ON_GPU:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return plain_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def dtype(request) -> torch.dtype:
    return request.param


def by_group(counts, product, *operands):
    """Each group's product of its rows of the operands, or of its matrix of those that have one."""
    stops = list(itertools.accumulate(counts))
    return [
        product(*(x[group] if x.dim() == 3 else x[stop - count : stop] for x in operands))
        for group, (count, stop) in enumerate(zip(counts, stops, strict=True))
    ]


def linear(rows_ND, weights_GFD, counts):
    return torch.cat(by_group(counts, lambda x, w: x @ w.t(), rows_ND, weights_GFD))


def backward(grad_NF, weights_GFD, counts):
    return torch.cat(by_group(counts, torch.matmul, grad_NF, weights_GFD))


def weight_gradient(grad_NF, rows_ND, counts):
    return torch.stack(by_group(counts, lambda g, x: g.t() @ x, grad_NF, rows_ND))


def inputs(draw, dtype, counts=COUNTS):
    """Rows, gradients of gate and up, w1 and w3; the matrices are parts of a larger bundle."""
    N, G = sum(counts), len(counts)
    bundle = draw.normal(G, 2, F, D, dtype=dtype)
    rows = [draw.normal(N, width, dtype=dtype) for width in (D, F, F)]
    return *rows, bundle[:, 0], bundle[:, 1]


@pytest.mark.parametrize("counts", [COUNTS, [1], [3 * ROWS]], ids=str)
def test_products(counts, draw, dtype, within_budget):
    rows_ND, grad_NF, _, w1_GFD, _ = inputs(draw, dtype, counts)
    out_NF = triton_products.product(rows_ND, w1_GFD, counts, tiling=TILING)
    args = rows_ND, w1_GFD
    within_budget(out_NF, linear(*args, counts), linear(*(x.double() for x in args), counts))
    out_ND = triton_products.product(grad_NF, w1_GFD, counts, False, tiling=TILING)
    args = grad_NF, w1_GFD
    within_budget(out_ND, backward(*args, counts), backward(*(x.double() for x in args), counts))


def test_sum_of_two_products_is_rounded_once(draw, dtype, within_budget):
    _, grad_gate, grad_up, w1, w3 = inputs(draw, dtype)
    out_ND = triton_products.dgrad(grad_gate, w1, grad_up, w3, COUNTS, tiling=TILING)
    exact = sum(
        backward(g.double(), w.double(), COUNTS) for g, w in [(grad_gate, w1), (grad_up, w3)]
    )
    within_budget(out_ND, exact.to(dtype), exact)


@pytest.mark.parametrize("swapped", [False, True])
def test_gate_and_up(swapped, draw, dtype, within_budget):
    rows_ND, _, _, w1, w3 = inputs(draw, dtype)
    if swapped:  # which of the two comes first in memory must not matter
        w1, w3 = w3, w1
    gate_NF, up_NF = triton_products.gate_up(rows_ND, w1, w3, COUNTS, tiling=TILING)
    for ours, w in ((gate_NF, w1), (up_NF, w3)):
        exact = linear(rows_ND.double(), w.double(), COUNTS)
        within_budget(ours, linear(rows_ND, w, COUNTS), exact)


@pytest.mark.parametrize("counts", [COUNTS, [1], [22 * ROWS], [5, 20 * ROWS, 0]], ids=str)
def test_weight_gradient(counts, draw, dtype, within_budget):
    rows_ND, grad_NF, *_ = inputs(draw, dtype, counts)
    exact = weight_gradient(grad_NF.double(), rows_ND.double(), counts)
    baseline = weight_gradient(grad_NF, rows_ND, counts)
    out_GFD = triton_products.wgrad(grad_NF, rows_ND, counts, tiling=TILING)
    within_budget(out_GFD, baseline, exact)
    again = triton_products.wgrad(grad_NF, rows_ND, counts, tiling=TILING)
    assert torch.equal(out_GFD, again), draw.seed


def test_weight_gradient_is_written_where_it_belongs(draw, dtype):
    rows_ND, grad_NF, *_ = inputs(draw, dtype)
    expected = triton_products.wgrad(grad_NF, rows_ND, COUNTS, tiling=TILING)
    bundle = draw.normal(len(COUNTS), 2, F, D, dtype=dtype)
    before = bundle[:, 0].clone()
    out_GFD = bundle[:, 1]
    found = triton_products.wgrad(grad_NF, rows_ND, COUNTS, out_GFD, tiling=TILING)
    assert found is out_GFD and torch.equal(out_GFD, expected), draw.seed
    assert torch.equal(bundle[:, 0], before), draw.seed


@pytest.mark.parametrize("counts", [COUNTS, [22 * ROWS], [5, 20 * ROWS, 0]], ids=str)
def test_beside_a_transfer_the_bits_are_the_same(counts, draw, dtype):
    rows_ND, grad_NF, *_ = inputs(draw, dtype, counts)
    alone, beside = (
        triton_products.wgrad(grad_NF, rows_ND, counts, beside=beside, tiling=TILING)
        for beside in (False, True)
    )
    assert torch.equal(alone, beside), draw.seed


@pytest.mark.parametrize("counts", [[70_000, 66_000] + 62 * [40], 64 * [1024], [0] * 5, [131_072]])
def test_every_item_is_dealt_once(counts):
    """A long tile to a program of its own, short ones together."""
    for work in schedule(counts, 276, 64, 132, CPU):
        if not work.num_items:
            continue
        tables = work.segment_of_item, work.segments, work.first_items, work.starts, work.queue
        assert all(table.data_ptr() % 16 == 0 for table in tables), "Triton would compile anew"
        starts = work.starts[: work.num_hands + 1].tolist()
        assert starts[0] == 0 and starts[-1] == work.num_items
        steps = [
            max(1, -(-min(s.last_row - s.first_row, s.part_rows) // 64))
            for s in segments_of(work)
            for _ in range(s.num_tiles * s.parts)
        ]
        for first, stop in itertools.pairwise(starts):
            hand = steps[first:stop]
            assert 1 <= len(hand) <= 16 and (len(hand) == 1 or sum(hand) <= 64)
        long = [n for n, count in enumerate(steps) if count > 64]
        assert set(long) <= set(starts)


def test_groups_do_not_reach_each_other(draw, dtype):
    clean = inputs(draw, dtype)
    group = 3
    start, stop = sum(COUNTS[:group]), sum(COUNTS[: group + 1])

    def all_results(rows, grad_gate, grad_up, w1, w3):
        return [
            *triton_products.gate_up(rows, w1, w3, COUNTS, tiling=TILING),
            triton_products.dgrad(grad_gate, w1, grad_up, w3, COUNTS, tiling=TILING),
            triton_products.wgrad(grad_gate, rows, COUNTS, tiling=TILING),
        ]

    infinite = [x.clone() for x in clean]
    for x in infinite[:3]:
        x[start:stop] = float("inf")
    for x in infinite[3:]:
        x[group] = float("inf")
    *of_rows, of_weights = zip(all_results(*clean), all_results(*infinite), strict=True)
    for expected, found in of_rows:
        assert torch.equal(found[:start], expected[:start]), draw.seed
        assert torch.equal(found[stop:], expected[stop:]), draw.seed
    expected, found = of_weights
    others = [g for g in range(len(COUNTS)) if g != group]
    assert torch.equal(found[others], expected[others]), draw.seed


def test_no_rows(draw, dtype):
    rows, grad_gate, grad_up, w1, w3 = inputs(draw, dtype, [0, 0])
    results = triton_products.gate_up(rows, w1, w3, [0, 0])
    assert [x.shape for x in results] == [(0, F)] * 2
    assert triton_products.dgrad(grad_gate, w1, grad_up, w3, [0, 0]).shape == (0, D)
    assert torch.equal(triton_products.wgrad(grad_gate, rows, [0, 0]), torch.zeros_like(w1))


def test_tiles_cover_each_row_once(draw):
    counts = draw.index(9, high=300).tolist()
    covered = []
    for group, row, stop in row_tiles(counts, 128, CPU).tolist():
        covered += [(group, n) for n in range(row, min(row + 128, stop))]
    expected = [group for group, count in enumerate(counts) for _ in range(count)]
    assert covered == list(zip(expected, itertools.count(), strict=False)), draw.seed


def segments_of(work: Work) -> list[Segment]:
    numbers = work.segments[: 8 * work.num_segments].view(-1, 8)
    return list(map(Segment._make, numbers.tolist()))


def loads(counts, tiles, programs):
    """Steps of each program, after checking that each row of each tile is summed once."""
    summed = np.zeros((sum(counts), tiles), dtype=int)
    load = np.zeros(programs, dtype=int)
    owner = np.repeat(np.arange(len(counts)), counts)
    for work in schedule(counts, tiles, 64, programs, CPU):
        item = 0
        for segment in segments_of(work):
            assert segment.first_item == item
            for nth in range(segment.num_tiles * segment.parts):
                start = segment.first_row + nth % segment.parts * segment.part_rows
                stop = min(start + segment.part_rows, segment.last_row)
                assert (owner[start:stop] == segment.group).all()
                summed[start:stop, segment.first_tile + nth // segment.parts] += 1
                load[item % programs] += max(-(-(stop - start) // 64), 1)
                item += 1
        assert work.num_items == item
    assert (summed == 1).all()
    return load


def test_schedule_covers_all_rows_of_all_tiles(draw):
    counts = (draw.index(6, high=4000) // draw.index(6, high=9).clamp(min=1)).tolist()
    tiles, programs = draw.index(2, high=40).add(1).tolist()
    loads(counts, tiles, programs)


@pytest.mark.parametrize(
    "counts, tiles, programs",
    [
        ([20000], 23, 11),
        ([9000, 4000, 100], 23, 11),
        ([9000, 100, 8900, 8800], 5, 11),
        ([500] * 30, 23, 11),
        ([1000, 64] * 20, 1, 2),
    ],
    ids=["one", "two", "alike", "equal", "in turns"],
)
def test_schedule_keeps_all_programs_busy(counts, tiles, programs):
    load = loads(counts, tiles, programs)
    assert load.max() < 1.1 * load.mean()


def test_what_is_supported(draw):
    x = draw.normal(4, 16, dtype=torch.bfloat16)
    assert triton_products.supported(x, x.half(), x[:, :8], x[None])
    narrow = draw.normal(4, 12, dtype=torch.bfloat16)
    for bad in (x.float(), x.t(), x[:, 1:9], x[:, ::2], x[:, :12], narrow):
        assert not triton_products.supported(x, bad)
    assert can_pair(x[:2], x[2:])
    assert not can_pair(x, x) and not can_pair(x[:, :8], x.clone()[:, :8].clone())


@pytest.mark.parametrize("rank, fused", [(8, True), (4, False), (9, False)])
def test_results_too_narrow_to_store_are_left_to_pytorch(draw, monkeypatch, rank, fused):
    """Those of low-rank factors, of which the operands may be wide enough."""
    called = []
    monkeypatch.setattr(products, "_fused", triton_products.supported)
    for name in ("product", "gate_up"):
        monkeypatch.setattr(triton_products, name, lambda *args: called.append(args))
    rows = draw.normal(5, D, dtype=torch.bfloat16)
    weights = draw.normal(2, 2, rank, D, dtype=torch.bfloat16)
    out = products.product(rows, weights[0], [2, 3])
    both = products.gate_up(rows, *weights, [2, 3])
    assert len(called) == (2 if fused else 0)
    assert fused or {x.shape for x in (out, *both)} == {(5, rank)}

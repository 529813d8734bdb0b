"""Row movement against loops over rows in fp64, and by its own identities."""

import numpy as np
import pytest
import torch

from ds_llep.kernels import reference, rows

# U, K, D. Rows of one element, of a block and a bit, and of several blocks of both kernels.
SIZES = [(5, 1, 1), (7, 2, 17), (6, 3, 48), (1, 8, 33), (3, 9, 1030), (2, 2, 4100)]
EMPTY = [(0, 2, 8), (3, 2, 0)]


def draw_targets(draw, U: int, K: int, spare: int = 3) -> tuple[torch.Tensor, int]:
    """int32 [U, K]: different rows, or any negative value; and the number of rows, N.

    `spare` rows are nobody's target, beside the last one, which takes what goes nowhere.
    """
    target_UK = draw.permutation(U * K + spare)[: U * K].view(U, K)
    negative_UK = torch.where(
        draw.index(U, K, high=2) == 0, -1, -draw.index(U, K, high=2**31 - 1) - 2
    )
    target_UK = torch.where(draw.index(U, K, high=3) == 0, negative_UK, target_UK)
    return target_UK.int(), U * K + spare + 1


def draw_sources(draw, U: int, K: int, num_rows: int) -> torch.Tensor:
    """int32 [U, K]: any rows, some of them more than once, or any negative value."""
    source_UK = draw.index(U, K, high=num_rows)
    if num_rows == 0:
        source_UK.fill_(-1)
    nowhere_UK = draw.index(U, K, high=4) == 0
    return torch.where(nowhere_UK, -draw.index(U, K, high=2**31 - 1) - 1, source_UK).int()


def loop_scatter(x_UD, target_UK, rows_ND):
    for u, targets in enumerate(target_UK.tolist()):
        for n in targets:
            if n >= 0:
                rows_ND[n] = x_UD[u]


def loop_sum(rows_ND, source_UK, parcels_VD=None, sent_UK=None):
    """In fp64; `rows_ND` are home's and foreign's joined."""
    y_UD = rows_ND.new_zeros((len(source_UK), rows_ND.shape[1]), dtype=torch.float64)
    for summands, index_UK in ((rows_ND, source_UK), (parcels_VD, sent_UK)):
        for u, indices in enumerate([] if index_UK is None else index_UK.tolist()):
            for n in indices:
                if n >= 0:
                    y_UD[u] += summands[n].double()
    return y_UD


def naive_sum(rows_ND, source_UK, parcels_VD=None, sent_UK=None):
    """The yardstick: one rounding to the rows' dtype for every addition."""
    y_UD = rows_ND.new_zeros((len(source_UK), rows_ND.shape[1]))
    for summands, index_UK in ((rows_ND, source_UK), (parcels_VD, sent_UK)):
        for k in range(0 if index_UK is None else index_UK.shape[1]):
            index_U = index_UK[:, k].long()
            padded = torch.cat((summands, summands.new_zeros((1, summands.shape[1]))))
            y_UD += padded[torch.where(index_U < 0, len(summands), index_U)]
    return y_UD


def in_a_parcel(x: torch.Tensor) -> torch.Tensor:
    """The same values in a wider buffer of bytes, which are NaN in every dtype."""
    numel = x.shape[1] * x.element_size()
    parcels = torch.full((len(x), numel + 80), 255, dtype=torch.uint8, device=x.device)
    return parcels[:, 32 : 32 + numel].view(x.dtype).copy_(x)


def assert_nothing_written_around(x: torch.Tensor) -> None:
    """Of what `in_a_parcel` returned."""
    numel = x.shape[1] * x.element_size()
    parcels = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    parcels = parcels.view(len(x), numel + 80)
    assert (parcels[:, :32] == 255).all() and (parcels[:, 32 + numel :] == 255).all()


def assert_same(x: torch.Tensor, y: torch.Tensor) -> None:
    """Bit for bit, where NaN is NaN."""
    torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
@pytest.mark.parametrize("values", [None, torch.float32, torch.bfloat16], ids=str)
def test_scatter(size, values, dtype, draw, kernels):
    U, K, D = size
    x_UD = draw.normal(U, D, dtype=dtype)
    target_UK, N = draw_targets(draw, U, K)
    rows_ND = x_UD.new_empty((N, D))
    expected_ND = rows_ND.clone()
    loop_scatter(x_UD, target_UK, expected_ND)
    given = ()
    if values is not None:
        values_UK, values_N = draw.normal(U, K, dtype=values), torch.empty(N, device=draw.device)
        given = values_UK, values_N
        expected_N = values_N.clone()
        for u, targets in enumerate(target_UK.tolist()):
            for k, n in enumerate(targets):
                if n >= 0:
                    expected_N[n] = values_UK[u, k]
    assert kernels.scatter_rows(x_UD, target_UK, rows_ND, *given) is None
    # Rows that are nobody's target are still NaN.
    torch.testing.assert_close(rows_ND[:-1], expected_ND[:-1], rtol=0, atol=0, equal_nan=True)
    if values is not None:
        torch.testing.assert_close(values_N[:-1], expected_N[:-1], rtol=0, atol=0, equal_nan=True)


def test_values_are_rounded_to_the_dtype_asked_for(draw, kernels):
    x_UD, values_UK = draw.normal(5, 4), draw.normal(5, 2)
    target_UK, N = draw_targets(draw, 5, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        values_N = torch.empty(N, dtype=dtype, device=draw.device)
        kernels.scatter_rows(x_UD, target_UK, x_UD.new_empty((N, 4)), values_UK, values_N)
        found_UK = values_N[target_UK.clamp(min=0).long()]
        same_UK = (found_UK == values_UK.to(dtype)) | (target_UK < 0)
        assert same_UK.all(), (dtype, draw.seed)


@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
@pytest.mark.parametrize("parcels", [False, True], ids=["rows", "parcels"])
def test_sum(size, parcels, dtype, draw, kernels, within_budget):
    U, K, D = size
    num_home, num_foreign, V = 4, 3, 5
    home_ND, foreign_MD = (
        draw.normal(num_home, D, dtype=dtype),
        draw.normal(num_foreign, D, dtype=dtype),
    )
    source_UK = draw_sources(draw, U, K, num_home + num_foreign)
    more = ()
    if parcels:
        more = draw.normal(V, D, dtype=dtype), draw_sources(draw, U, K, V)
    rows_ND = torch.cat((home_ND, foreign_MD))
    exact = loop_sum(rows_ND, source_UK, *more)
    y_UD = kernels.sum_rows(home_ND, foreign_MD, source_UK, *more)
    assert y_UD.dtype == dtype and y_UD.is_contiguous()
    within_budget(y_UD, naive_sum(rows_ND, source_UK, *more), exact)
    # Summed in fp32 and rounded once: half a unit in the last place, and little for the sum.
    sizes = loop_sum(rows_ND.abs(), source_UK, *[x.abs() if x.dtype == dtype else x for x in more])
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * sizes
    assert ((y_UD.double() - exact).abs() <= allowed).all(), draw.seed


@pytest.mark.parametrize("parts", [(0, 6), (6, 0), (1, 5), (0, 0)], ids=str)
def test_empty_parts(parts, dtype, draw, kernels, within_budget):
    """No home rows, no foreign rows, neither; with parcels, without any, and none at all."""
    home_ND, foreign_MD = (draw.normal(part, 19, dtype=dtype) for part in parts)
    source_UK = draw_sources(draw, 5, 3, sum(parts))
    rows_ND = torch.cat((home_ND, foreign_MD))
    for V in (None, 0, 4):
        more = ()
        if V is not None:
            more = draw.normal(V, 19, dtype=dtype), draw_sources(draw, 5, 3, V)
        y_UD = kernels.sum_rows(home_ND, foreign_MD, source_UK, *more)
        exact = loop_sum(rows_ND, source_UK, *more)
        within_budget(y_UD, naive_sum(rows_ND, source_UK, *more), exact)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_do_not_depend_on_where_home_ends(size, dtype, draw, kernels):
    U, K, D = size
    rows_ND, parcels_VD = draw.normal(6, D, dtype=dtype), draw.normal(4, D, dtype=dtype)
    source_UK, sent_UK = draw_sources(draw, U, K, 6), draw_sources(draw, U, K, 4)
    for more in ((), (parcels_VD, sent_UK)):
        y_UD = kernels.sum_rows(rows_ND, rows_ND[:0], source_UK, *more)
        for num_home in (0, 1, 3, 5):
            # Apart in memory, so that a row behind home's end is not foreign's first.
            foreign_MD = rows_ND[num_home:].clone()
            home_ND = rows_ND[:num_home].clone()
            found = kernels.sum_rows(home_ND, foreign_MD, source_UK, *more)
            assert torch.equal(found, y_UD), (num_home, draw.seed)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_triton_is_as_good_as_its_twin(size, dtype, draw, within_budget):
    U, K, D = size
    parts = [draw.normal(n, D, dtype=dtype) for n in (4, 3)]
    source_UK, sent_UK = draw_sources(draw, U, K, 7), draw_sources(draw, U, K, 5)
    arguments = *parts, source_UK, draw.normal(5, D, dtype=dtype), sent_UK
    ours, twin = rows.sum_rows(*arguments), reference.sum_rows(*arguments)
    within_budget(ours, twin, loop_sum(torch.cat(parts), *arguments[2:]))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sum_undoes_scatter(size, dtype, draw, kernels):
    """The sum of a token's K rows is K times the token; 16 bits a few times fit into fp32."""
    U, K, D = size
    x_UD = draw.normal(U, D, dtype=dtype)
    target_UK = draw.permutation(U * K).view(U, K).int()
    rows_ND = x_UD.new_empty((U * K + 1, D))
    kernels.scatter_rows(x_UD, target_UK, rows_ND)
    assert not rows_ND[:-1].isnan().any()
    y_UD = kernels.sum_rows(rows_ND[: U * K // 2], rows_ND[U * K // 2 : -1], target_UK)
    rtol = 1e-6 if dtype == torch.float32 else 0
    torch.testing.assert_close(y_UD, (x_UD.double() * K).to(dtype), rtol=rtol, atol=0)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64,) * 2],
    ids=str,
)
@pytest.mark.parametrize("parcels", [False, True], ids=["rows", "parcels"])
@pytest.mark.parametrize("size", [(0, 3, 4), (5, 2, 0), (7, 3, 9), (400, 3, 50)], ids=str)
def test_gather_values(size, parcels, dtypes, draw, kernels):
    (U, K, N), (values_dtype, out_dtype) = size, dtypes
    values_N, source_UK = draw.normal(N, dtype=values_dtype), draw_sources(draw, U, K, N)
    expected_UK = values_N.new_zeros(U, K)
    for (u, k), n in zip(np.ndindex(U, K), source_UK.flatten().tolist(), strict=True):
        expected_UK[u, k] = values_N[n] if n >= 0 else 0.0
    inputs = values_N, source_UK
    if parcels:
        parcels_VK = draw.normal(N, K + 3, dtype=values_dtype)[:, 1 : K + 1]
        place_UK = draw.index(U, K, high=N + 1) - 1
        sent_UK = torch.where(draw.index(U, K, high=2) == 0, place_UK, -place_UK - 2).int()
        for (u, k), v in zip(np.ndindex(U, K), place_UK.flatten().tolist(), strict=True):
            expected_UK[u, k] += parcels_VK[v, k] if v >= 0 else 0.0
        inputs += parcels_VK, sent_UK
    out = torch.full((U, K + 2), 3.0, dtype=out_dtype, device=draw.device)
    kernels.gather_values(*inputs, out_UK=out[:, 1:-1])
    assert torch.equal(out[:, 1:-1], expected_UK.to(out_dtype))
    assert (out[:, 0] == 3).all() and (out[:, -1] == 3).all()


def test_any_layout_of_what_is_read(layout, dtype, draw, kernels):
    U, K, D = 5, 3, 21
    x_UD, parts = draw.normal(U, D, dtype=dtype), [draw.normal(n, D, dtype=dtype) for n in (4, 3)]
    target_UK, N = draw_targets(draw, U, K)
    values_UK, source_UK = draw.normal(U, K), draw_sources(draw, U, K, 7)
    plain_ND, rows_ND = x_UD.new_empty((2, N, D))
    plain_N, values_N = values_UK.new_empty((2, N))
    kernels.scatter_rows(x_UD, target_UK, plain_ND, values_UK, plain_N)
    kernels.scatter_rows(layout(x_UD), target_UK, rows_ND, layout(values_UK), values_N)
    assert_same(rows_ND[:-1], plain_ND[:-1])
    assert_same(values_N[:-1], plain_N[:-1])
    plain_UD = kernels.sum_rows(*parts, source_UK)
    for home_ND, foreign_MD in [
        (layout(parts[0]), parts[1]),  # the parts' row strides differ
        (parts[0], layout(parts[1])),
        torch.cat(parts).split((4, 3)),  # two views of one buffer
    ]:
        assert_same(kernels.sum_rows(home_ND, foreign_MD, source_UK), plain_UD)
    repeated_MD = parts[1][:1].expand(3, D)
    expected = kernels.sum_rows(parts[0], repeated_MD.contiguous(), source_UK)
    assert_same(kernels.sum_rows(parts[0], repeated_MD, source_UK), expected)


@pytest.mark.parametrize("read", [False, True], ids=["written", "read"])
def test_parcels(read, dtype, draw, kernels):
    """Fields of a buffer of bytes are read and written like any rows, and nothing around them."""
    U, K, D = 6, 3, 21
    x_UD, target_UK, N = draw.normal(U, D, dtype=dtype), *draw_targets(draw, U, K)
    values_UK, source_UK = draw.normal(U, K), draw_sources(draw, U, K, 7)
    home_ND, foreign_MD = draw.normal(4, D, dtype=dtype), draw.normal(3, D, dtype=dtype)
    parcels_VD, sent_UK = draw.normal(5, D, dtype=dtype), draw_sources(draw, U, K, 5)
    plain_ND, plain_N = x_UD.new_empty((N, D)), values_UK.new_empty(N)
    kernels.scatter_rows(x_UD, target_UK, plain_ND, values_UK, plain_N)
    plain_UD = kernels.sum_rows(home_ND, foreign_MD, source_UK, parcels_VD, sent_UK)
    rows_ND, out_UD = torch.full_like(plain_ND, float("nan")), torch.full_like(plain_UD, -1)
    values_N = torch.full_like(plain_N, float("nan"))
    if read:
        x_UD, target_UK, values_UK = map(in_a_parcel, (x_UD, target_UK, values_UK))
        home_ND, foreign_MD, parcels_VD, source_UK = map(
            in_a_parcel, (home_ND, foreign_MD, parcels_VD, source_UK)
        )
    else:
        rows_ND, out_UD = in_a_parcel(rows_ND), in_a_parcel(out_UD)
    kernels.scatter_rows(x_UD, target_UK, rows_ND, values_UK, values_N)
    found = kernels.sum_rows(home_ND, foreign_MD, source_UK, parcels_VD, sent_UK, out_UD=out_UD)
    assert found is out_UD
    assert_same(found, plain_UD)
    assert_same(rows_ND[:-1], plain_ND[:-1])
    assert_same(values_N[:-1], plain_N[:-1])
    if not read:
        assert_nothing_written_around(rows_ND)
        assert_nothing_written_around(out_UD)


def test_float64_is_not_rounded(draw, kernels):
    U, K, D = 5, 3, 9
    x_UD, (target_UK, N) = draw.normal(U, D).double() / 3, draw_targets(draw, U, K)
    values_UK = draw.normal(U, K).double() / 3
    rows_ND, values_N = x_UD.new_empty((N, D)), x_UD.new_empty(N)
    expected_ND = rows_ND.clone()
    loop_scatter(x_UD, target_UK, expected_ND)
    kernels.scatter_rows(x_UD, target_UK, rows_ND, values_UK, values_N)
    assert_same(rows_ND[:-1], expected_ND[:-1])
    known_UK = target_UK >= 0
    assert_same(values_N[target_UK[known_UK].long()], values_UK[known_UK])
    parts, parcels_VD = [draw.normal(n, D).double() / 3 for n in (4, 3)], x_UD
    source_UK, sent_UK = draw_sources(draw, U, K, 7), draw_sources(draw, U, K, U)
    exact = loop_sum(torch.cat(parts), source_UK, parcels_VD, sent_UK)
    for out_UD in (None, torch.empty_like(exact)):
        y_UD = kernels.sum_rows(*parts, source_UK, parcels_VD, sent_UK, out_UD=out_UD)
        torch.testing.assert_close(y_UD, exact, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("index", [5, 6])
def test_twin_refuses_a_target_out_of_range(index, draw):
    target_UK = torch.tensor([[0], [index]], dtype=torch.int32)
    with pytest.raises(IndexError):
        reference.scatter_rows(torch.ones(2, 4), target_UK, torch.empty(5, 4))


def test_rows_more_than_2_to_the_31_elements_apart(draw, kernels):
    """Four rows with 2^30 elements from one to the next; most of the memory is never touched."""
    if draw.device.type == "cuda" and torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free GPU memory")
    filled, D = torch.utils.deterministic.fill_uninitialized_memory, 24
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        far = torch.empty((4, 2**30), dtype=torch.bfloat16, device=draw.device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    x_UD, rows_ND, out_UD = (far[:, i * D : (i + 1) * D] for i in range(3))
    near_UD = draw.normal(4, D, dtype=torch.bfloat16)
    x_UD.copy_(near_UD)
    order_UK = torch.tensor([[-1], [2], [0], [1]], dtype=torch.int32, device=draw.device)
    kernels.scatter_rows(x_UD, order_UK, rows_ND)
    assert torch.equal(rows_ND[:3], near_UD[[2, 3, 1]]), draw.seed
    order_UK = torch.tensor([[2], [-1], [1], [3]], dtype=torch.int32, device=draw.device)
    expected = near_UD[order_UK[:, 0].long()]
    expected[1] = 0
    for num_home in (4, 1):  # far ones are home rows, then foreign ones
        kernels.sum_rows(x_UD[:num_home], x_UD[num_home:], order_UK, out_UD=out_UD)
        assert torch.equal(out_UD, expected), draw.seed
    nothing_UK = torch.full_like(order_UK, -1)
    y_UD = kernels.sum_rows(near_UD, near_UD[:0], nothing_UK, x_UD, order_UK)
    assert torch.equal(y_UD, expected), draw.seed

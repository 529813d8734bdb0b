"""Row movement against formulas written as loops over rows in fp64, and by its own identities."""

import pytest
import torch

from ds_llep.kernels import reference, rows

# T, K, D, N. The last takes two blocks of row_dots.
SIZES = [(5, 1, 1, 7), (7, 2, 17, 3), (6, 3, 48, 10), (3, 8, 33, 24), (2, 16, 300, 9)]
EMPTY = [(0, 2, 8, 5), (0, 2, 8, 0), (3, 2, 0, 4)]


def loop_gather(x_TD, index_N, scale_N=None):
    rows_ND = torch.zeros(len(index_N), x_TD.shape[1], dtype=torch.float64, device=x_TD.device)
    for n, t in enumerate(index_N.tolist()):
        rows_ND[n] = x_TD[t].double() * (1 if scale_N is None else scale_N[n].double())
    return rows_ND


def loop_combine(rows_ND, position_TK, weight_TK=None):
    T, K = position_TK.shape
    y_TD = torch.zeros(T, rows_ND.shape[1], dtype=torch.float64, device=rows_ND.device)
    for t in range(T):
        for k in range(K):
            weight = 1 if weight_TK is None else weight_TK[t, k].double()
            y_TD[t] += weight * rows_ND[position_TK[t, k]].double()
    return y_TD


def loop_dots(rows_ND, position_TK, grad_TD):
    dots_TK = torch.zeros(position_TK.shape, dtype=torch.float64, device=rows_ND.device)
    for t in range(position_TK.shape[0]):
        for k in range(position_TK.shape[1]):
            dots_TK[t, k] = (rows_ND[position_TK[t, k]].double() * grad_TD[t].double()).sum()
    return dots_TK


@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_values(size, scaled, dtype, draw, kernels, within_budget):
    T, K, D, N = size
    rows_ND = draw.normal(N, D, dtype=dtype)
    index_N, position_TK = draw.index(T * K, high=N), draw.index(T, K, high=N)
    # The scale's dtype is not the rows' where these are 16 bits wide.
    scale_N, weight_TK = (draw.normal(T * K), draw.normal(T, K)) if scaled else (None, None)
    grad_TD = draw.normal(T, D, dtype=dtype)

    # A naive computation in the dtype itself is the yardstick: one rounding for every operation.
    moved = rows_ND[index_N]
    naive = moved if scale_N is None else moved * scale_N.to(dtype).unsqueeze(1)
    exact = loop_gather(rows_ND, index_N, scale_N)
    within_budget(kernels.gather_rows(rows_ND, index_N, scale_N), naive, exact)
    if not scaled:
        assert torch.equal(kernels.gather_rows(rows_ND, index_N), moved)

    moved_TKD = rows_ND[position_TK]
    naive = moved_TKD if weight_TK is None else moved_TKD * weight_TK.to(dtype).unsqueeze(2)
    exact = loop_combine(rows_ND, position_TK, weight_TK)
    within_budget(kernels.combine_rows(rows_ND, position_TK, weight_TK), naive.sum(1), exact)

    naive = (moved_TKD.float() * grad_TD.float().unsqueeze(1)).sum(2)
    exact = loop_dots(rows_ND, position_TK, grad_TD)
    within_budget(kernels.row_dots(rows_ND, position_TK, grad_TD), naive, exact)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_triton_is_as_good_as_its_twin(size, dtype, draw, within_budget):
    T, K, D, N = size
    rows_ND, grad_TD = draw.normal(N, D, dtype=dtype), draw.normal(T, D, dtype=dtype)
    index_N, position_TK = draw.index(T * K, high=N), draw.index(T, K, high=N)
    scale_N, weight_TK = draw.normal(T * K, dtype=dtype), draw.normal(T, K).double()
    for name, loop, arguments in [
        ("gather_rows", loop_gather, (rows_ND, index_N, scale_N)),
        ("combine_rows", loop_combine, (rows_ND, position_TK, weight_TK)),
        ("row_dots", loop_dots, (rows_ND, position_TK, grad_TD)),
    ]:
        ours, twin = getattr(rows, name)(*arguments), getattr(reference, name)(*arguments)
        within_budget(ours, twin, loop(*arguments))


@pytest.mark.parametrize("sizes", [(5, 3), (1, 9), (0, 4), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("D", [1, 17, 48, 4100])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_gather_from_two_parts_is_gather_from_both_joined(sizes, D, scaled, dtype, draw, kernels):
    T, M = sizes
    x_TD, tail_MD = draw.normal(T, D, dtype=dtype), draw.normal(M, D, dtype=dtype)
    joined = torch.cat((x_TD, tail_MD))
    # Twice as many as there are, so that some repeat, and the rows at both ends of both parts.
    index_N = draw.index(2 * (T + M), high=T + M)
    edges = [n for n in (0, T - 1, T, T + M - 1) if 0 <= n < T + M]
    index_N = torch.cat((index_N, index_N.new_tensor(edges)))
    scale_N = draw.normal(len(index_N)) if scaled else None
    rows_ND = kernels.gather_rows(x_TD, index_N, scale_N, tail_MD=tail_MD)
    assert rows_ND.is_contiguous() and rows_ND.dtype == dtype
    assert torch.equal(rows_ND, kernels.gather_rows(joined, index_N, scale_N)), draw.seed
    none = kernels.gather_rows(x_TD, index_N[:0], None, tail_MD=tail_MD)
    assert none.shape == (0, D)


def test_gather_from_two_parts_in_any_layout(layout, dtype, draw, kernels):
    T, M, D = 6, 5, 21
    x_TD, tail_MD = draw.normal(T, D, dtype=dtype), draw.normal(M, D, dtype=dtype)
    index_N = draw.index(T + M, 2, high=T + M)[:, 1]  # a strided view
    for parts in [
        (layout(x_TD), tail_MD),  # the parts' row strides differ
        (x_TD, layout(tail_MD)),
        (layout(x_TD), layout(tail_MD)),
        (x_TD, tail_MD[:1].expand(M, D)),
        torch.cat((x_TD, tail_MD)).split((T, M)),  # two views of one buffer
    ]:
        found = kernels.gather_rows(parts[0], index_N, tail_MD=parts[1])
        assert torch.equal(found, torch.cat(parts)[index_N]), draw.seed


def test_gather_from_two_parts_in_float64(draw, kernels):
    x_TD, tail_MD = draw.normal(4, 9).double() / 3, draw.normal(3, 9).double() / 3
    index_N, scale_N = draw.permutation(7), draw.normal(7).double() / 3
    rows_ND = kernels.gather_rows(x_TD, index_N, scale_N, tail_MD=tail_MD)
    exact = loop_gather(torch.cat((x_TD, tail_MD)), index_N, scale_N)
    torch.testing.assert_close(rows_ND, exact)


@pytest.mark.parametrize("sizes", [(3, 2), (0, 2), (3, 0)], ids=str)
@pytest.mark.parametrize("index", [-1, 5])
def test_twin_refuses_an_index_outside_both_parts(sizes, index, draw):
    x_TD, tail_MD = draw.normal(sizes[0], 4).cpu(), draw.normal(sizes[1], 4).cpu()
    with pytest.raises(IndexError):
        reference.gather_rows(x_TD, torch.tensor([0, index]), tail_MD=tail_MD)


def test_rows_longer_than_a_block(dtype, draw, kernels, within_budget):
    rows_ND, position_TK = draw.normal(3, 4100, dtype=dtype), draw.index(2, 2, high=3)
    moved = kernels.gather_rows(rows_ND, position_TK.flatten())
    assert torch.equal(moved, rows_ND[position_TK.flatten()]), draw.seed
    exact = loop_combine(rows_ND, position_TK)
    within_budget(kernels.combine_rows(rows_ND, position_TK), exact.to(dtype), exact)


def test_any_layout(layout, dtype, draw, kernels):
    T, K, D, N = 4, 3, 21, 8
    rows_ND, grad_TD = draw.normal(N, D, dtype=dtype), draw.normal(T, D, dtype=dtype)
    position_TK, weight_TK = draw.index(T, K, high=N), draw.normal(T, K)
    index_N, scale_N = position_TK[:, 1], weight_TK[:, 1]  # strided views
    plain = index_N.contiguous(), scale_N.contiguous()
    assert torch.equal(
        kernels.gather_rows(layout(rows_ND), index_N, scale_N), kernels.gather_rows(rows_ND, *plain)
    )
    across = position_TK.t().contiguous().t(), weight_TK.t().contiguous().t()
    assert torch.equal(
        kernels.combine_rows(layout(rows_ND), *across),
        kernels.combine_rows(rows_ND, position_TK, weight_TK),
    )
    torch.testing.assert_close(  # a GPU may sum in another order
        kernels.row_dots(layout(rows_ND), across[0], layout(grad_TD)),
        kernels.row_dots(rows_ND, position_TK, grad_TD),
    )


def test_gather_by_a_permutation_and_its_inverse_is_the_identity(dtype, draw, kernels):
    x_TD = draw.normal(19, 23, dtype=dtype)
    order = draw.permutation(19)
    there = kernels.gather_rows(x_TD, order)
    assert not torch.equal(there, x_TD), draw.seed
    assert torch.equal(kernels.gather_rows(there, torch.argsort(order)), x_TD), draw.seed


def test_combine_undoes_gather_where_weights_sum_to_one(dtype, draw, kernels, within_budget):
    T, K, D = 6, 4, 29
    x_TD = draw.normal(T, D, dtype=dtype)
    order = draw.permutation(T * K)
    rows_ND = kernels.gather_rows(x_TD, order // K)
    position_TK = torch.argsort(order).reshape(T, K)
    weight_TK = draw.normal(T, K).softmax(1)
    within_budget(kernels.combine_rows(rows_ND, position_TK, weight_TK), x_TD, x_TD.double())


def test_scaled_gather_and_dots_are_the_gradients_of_combine(draw, twin):
    T, K, D = 5, 3, 7
    rows_ND = draw.normal(T * K, D).double().requires_grad_()
    weight_TK = draw.normal(T, K).double().requires_grad_()
    grad_TD = draw.normal(T, D).double()
    order = draw.permutation(T * K)
    position_TK = torch.argsort(order).reshape(T, K)
    loop_combine(rows_ND, position_TK, weight_TK).backward(grad_TD)
    scale_N = weight_TK.detach().flatten()[order]
    torch.testing.assert_close(twin.gather_rows(grad_TD, order // K, scale_N), rows_ND.grad)
    dots_TK = twin.row_dots(rows_ND.detach(), position_TK, grad_TD)
    torch.testing.assert_close(dots_TK, weight_TK.grad)  # which is float64, unrounded


def test_float64_is_not_rounded(draw, kernels):
    T, K, D, N = 4, 3, 9, 5
    rows_ND, weight_TK = draw.normal(N, D).double() / 3, draw.normal(T, K).double() / 3
    position_TK, grad_TD = draw.index(T, K, high=N), draw.normal(T, D).double() / 3
    y_TD = kernels.combine_rows(rows_ND, position_TK, weight_TK)
    torch.testing.assert_close(y_TD, loop_combine(rows_ND, position_TK, weight_TK))
    dots_TK = kernels.row_dots(rows_ND, position_TK, grad_TD)
    torch.testing.assert_close(dots_TK, loop_dots(rows_ND, position_TK, grad_TD))
    index_N, scale_N = position_TK.flatten(), weight_TK.flatten()
    rows_ND_2 = kernels.gather_rows(rows_ND, index_N, scale_N)
    torch.testing.assert_close(rows_ND_2, loop_gather(rows_ND, index_N, scale_N))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 20 GB of GPU memory")
def test_more_than_2_to_the_31_elements(draw):
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    D = 2048
    T = 2**31 // D + 8
    tail = draw.normal(8, D, dtype=torch.bfloat16)
    x_TD = torch.empty(T, D, dtype=torch.bfloat16, device="cuda")
    x_TD[-8:] = tail
    index_N = torch.zeros(T, dtype=torch.int64, device="cuda")
    index_N[-8:] = torch.arange(T - 1, T - 9, -1)
    assert torch.equal(rows.gather_rows(x_TD, index_N)[-8:], tail.flip(0)), draw.seed
    y_TD = rows.combine_rows(x_TD, index_N.unsqueeze(1))
    assert torch.equal(y_TD[-8:], tail.flip(0)), draw.seed
    dots_TK = rows.row_dots(x_TD, index_N.unsqueeze(1), x_TD)[-8:]
    exact = (tail.double() * tail.flip(0).double()).sum(1, keepdim=True)
    torch.testing.assert_close(dots_TK.double(), exact, rtol=1e-4, atol=1e-3)

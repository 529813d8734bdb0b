"""Plain-PyTorch twins of the Triton launchers: the oracle of the tests and the path on a CPU.

Each twin says what its kernel means in a few tensor operations. All of them accumulate in the
input's dtype promoted to at least fp32 and round once, so that float64 goes through unrounded. They
are built from differentiable operations, but for `gather_rows` with a tail. Sums over K are loops
of K steps over [T, D] tensors: that costs K small calls and saves the [T, K, D] fp32 temporary of a
single one.

Shape letters: T tokens, K experts per token, D hidden size, F expert FFN size, N rows.
"""

import torch
import torch.nn.functional as F


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def gather_rows(
    x_TD: torch.Tensor,
    index_N: torch.Tensor,
    scale_N: torch.Tensor | None = None,
    *,
    tail_MD: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rows[n] = x[index[n]] * scale[n]`, multiplied in at least fp32 and rounded once.

    Args:
        x_TD: [T, D], any float dtype.
        index_N: [N] int64, each in [0, T), or in [0, T + M) with a tail; repeats allowed.
        scale_N: [N], any float dtype, or None for a plain copy.
        tail_MD: [M, D] in x's dtype: rows that are read as if they followed x's; or None. T or M
            may be 0; where neither is, the result is not differentiable.

    Returns:
        [N, D] in x's dtype.

    Raises:
        IndexError: an index is out of range (CPU only; on a GPU it is PyTorch's device-side
            assert).
    """
    rows_ND = _select_rows(x_TD, tail_MD, index_N)
    if scale_N is None:
        return rows_ND
    dtype = _accumulation_dtype(x_TD.dtype)
    return (rows_ND.to(dtype) * scale_N.to(dtype).unsqueeze(1)).to(x_TD.dtype)


def _select_rows(
    x_TD: torch.Tensor, tail_MD: torch.Tensor | None, index_N: torch.Tensor
) -> torch.Tensor:
    T = x_TD.shape[0]
    if tail_MD is None or tail_MD.shape[0] == 0:
        return x_TD.index_select(0, index_N)
    if T == 0:
        return tail_MD.index_select(0, index_N)
    # Each part is asked for every row, wrong ones included: to count the right ones on a GPU would
    # be a device-to-host synchronisation.
    rows_ND = x_TD.index_select(0, index_N.clamp(max=T - 1))
    from_tail_ND = tail_MD.index_select(0, (index_N - T).clamp(min=0))
    return torch.where((index_N < T).unsqueeze(1), rows_ND, from_tail_ND, out=rows_ND)


def combine_rows(
    rows_ND: torch.Tensor, position_TK: torch.Tensor, weight_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """`y[t] = sum_k weight[t, k] * rows[position[t, k]]`, summed in k order in at least fp32.

    Args:
        rows_ND: [N, D], any float dtype.
        position_TK: [T, K] int64, each in [0, N); repeats allowed.
        weight_TK: [T, K], any float dtype, or None for weights of one.

    Returns:
        [T, D] in rows' dtype, rounded once.

    Raises:
        IndexError: a position is out of range (CPU only).
    """
    T, K = position_TK.shape
    dtype = _accumulation_dtype(rows_ND.dtype)
    y_TD = rows_ND.new_zeros((T, rows_ND.shape[1]), dtype=dtype)
    for k in range(K):
        row_TD = rows_ND.index_select(0, position_TK[:, k])
        if weight_TK is None:
            y_TD += row_TD
        else:
            y_TD.addcmul_(row_TD.to(dtype), weight_TK[:, k : k + 1].to(dtype))
    return y_TD.to(rows_ND.dtype)


def row_dots(
    rows_ND: torch.Tensor, position_TK: torch.Tensor, grad_TD: torch.Tensor
) -> torch.Tensor:
    """`dots[t, k] = <rows[position[t, k]], grad[t]>`: the gradient of `combine_rows`' weights.

    Args:
        rows_ND: [N, D], any float dtype.
        position_TK: [T, K] int64, each in [0, N); repeats allowed.
        grad_TD: [T, D], any float dtype.

    Returns:
        [T, K], fp32, or float64 where rows or grad is float64.

    Raises:
        IndexError: a position is out of range (CPU only).
    """
    dtype = _accumulation_dtype(torch.promote_types(rows_ND.dtype, grad_TD.dtype))
    grad_TD = grad_TD.to(dtype)
    dots_TK = grad_TD.new_empty(position_TK.shape)
    for k in range(position_TK.shape[1]):
        row_TD = rows_ND.index_select(0, position_TK[:, k])
        dots_TK[:, k] = (row_TD.to(dtype) * grad_TD).sum(1)
    return dots_TK


def swiglu_forward(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    """`h = silu(gate) * up`, computed in at least fp32 and rounded once.

    Args:
        gate_NF, up_NF: [N, F], one float dtype.

    Returns:
        [N, F] in the inputs' dtype.
    """
    dtype = _accumulation_dtype(gate_NF.dtype)
    return (F.silu(gate_NF.to(dtype)) * up_NF.to(dtype)).to(gate_NF.dtype)


def swiglu_backward(
    dh_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor, *, into_dh: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu_forward`, and its output once more.

    The down projection's weight gradient needs h; recomputing it here is cheaper than keeping it
    from forward to backward.

    Args:
        dh_NF, gate_NF, up_NF: [N, F], one float dtype.
        into_dh: h takes dh's memory, which must be nobody else's. Not differentiable then.

    Returns:
        (dgate, dup, h), each [N, F] in the inputs' dtype; h is bit for bit what `swiglu_forward`
        returns.
    """
    dtype = _accumulation_dtype(gate_NF.dtype)
    dh, gate, up = dh_NF.to(dtype), gate_NF.to(dtype), up_NF.to(dtype)
    sigmoid = torch.sigmoid(gate)
    silu = F.silu(gate)
    # d silu / d gate = sigmoid * (1 + gate * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
    dgate = dh * up * (sigmoid + silu * (1 - sigmoid))
    out_dtype = gate_NF.dtype
    dup, h = (dh * silu).to(out_dtype), (silu * up).to(out_dtype)
    return dgate.to(out_dtype), dup, dh_NF.copy_(h) if into_dh else h

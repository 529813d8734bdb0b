"""Plain-PyTorch twins of what `swiglu.py` and `bias.py` launch, as `reference.py` has the others'.

Shape letters: G groups, N rows, D hidden size, F expert FFN size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .reference import accumulation_dtype
from .tables import HiddenBias


def swiglu_forward(
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    weight_N: torch.Tensor | None = None,
    bias: HiddenBias | None = None,
    clamp: tuple[float, float] | None = None,
) -> torch.Tensor:
    """`h = silu(gate) * up * weight`, computed in at least fp32 and rounded once.

    With `clamp` it is gpt-oss' form: gate at most `limit`, up within `limit` of 0, and
    `h = gate * sigmoid(alpha * gate) * (up + 1) * weight`.

    Args:
        gate_NF, up_NF: [N, F], one float dtype.
        weight_N: [N], any float dtype, or None for weights of one.
        bias: added to gate and up first; or None.
        clamp: (alpha, limit); or None.

    Returns:
        [N, F] in the inputs' dtype.
    """
    gate, _, up, _ = _gated(gate_NF, up_NF, bias, clamp)
    return _weighed(gate * up, weight_N).to(gate_NF.dtype)


def swiglu_backward(
    dh_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    weight_N: torch.Tensor | None = None,
    bias: HiddenBias | None = None,
    clamp: tuple[float, float] | None = None,
    *,
    into_dh: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `swiglu_forward`, and its output once more.

    The down projection's weight gradient needs h; recomputing it here is cheaper than keeping it
    from forward to backward.

    Args:
        dh_NF, gate_NF, up_NF: [N, F], one float dtype.
        weight_N, bias, clamp: as in forward.
        into_dh: h takes dh's memory, which must be nobody else's. Not differentiable then.

    Returns:
        (dgate, dup, h, dweight): three [N, F] in the inputs' dtype, of which h is bit for bit what
        `swiglu_forward` returns; and [N] in at least fp32, or None without weights.
    """
    out_dtype = gate_NF.dtype
    gate, gate_slope, up, up_slope = _gated(gate_NF, up_NF, bias, clamp)
    dh = dh_NF.to(gate.dtype)
    h = gate * up
    dweight_N = None if weight_N is None else (dh * h).sum(1)
    dh, h = _weighed(dh, weight_N), _weighed(h, weight_N)
    dgate, dup = (dh * up * gate_slope).to(out_dtype), (dh * gate * up_slope).to(out_dtype)
    h = h.to(out_dtype)
    return dgate, dup, dh_NF.copy_(h) if into_dh else h, dweight_N


def _gated(
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    bias: HiddenBias | None,
    clamp: tuple[float, float] | None,
) -> tuple[torch.Tensor, ...]:
    """The two factors of h, each followed by its slope."""
    dtype = accumulation_dtype(gate_NF.dtype)
    gate, up = gate_NF.to(dtype), up_NF.to(dtype)
    if bias is not None:
        group_N = _group_of_row(bias.stop_G, len(gate))
        gate = gate + bias.gate_GF.to(dtype)[group_N]
        up = up + bias.up_GF.to(dtype)[group_N]
    if clamp is None:
        sigmoid, silu = torch.sigmoid(gate), F.silu(gate)
        # d silu / d gate = sigmoid * (1 + gate * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
        return silu, sigmoid + silu * (1 - sigmoid), up, torch.ones_like(up)
    alpha, limit = clamp
    gate_inside, up_inside = gate <= limit, (up >= -limit) & (up <= limit)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = torch.sigmoid(alpha * gate)
    gated = gate * sigmoid
    slope = sigmoid + alpha * gated * (1 - sigmoid)
    return gated, slope * gate_inside, up + 1, up_inside.to(dtype)


def _weighed(x_NF: torch.Tensor, weight_N: torch.Tensor | None) -> torch.Tensor:
    return x_NF if weight_N is None else x_NF * weight_N.to(x_NF.dtype).unsqueeze(1)


def _group_of_row(stop_G: torch.Tensor, num_rows: int) -> torch.Tensor:
    rows_N = torch.arange(num_rows, device=stop_G.device, dtype=stop_G.dtype)
    return torch.searchsorted(stop_G, rows_N, right=True)


def add_bias(
    rows_ND: torch.Tensor,
    bias_GD: torch.Tensor,
    stop_G: torch.Tensor,
    weight_N: torch.Tensor | None = None,
) -> None:
    """`rows[n] += weight[n] * bias[g]` for each row n of group g, rounded once.

    Args:
        rows_ND: [N, D], group after group, any float dtype, changed in place.
        bias_GD: [G, D] in the same dtype; any row stride.
        stop_G: [G] int32: where each group ends.
        weight_N: [N], any float dtype, or None for weights of one.
    """
    dtype = accumulation_dtype(rows_ND.dtype)
    added_ND = bias_GD.to(dtype)[_group_of_row(stop_G, len(rows_ND))]
    rows_ND.copy_(rows_ND.to(dtype) + _weighed(added_ND, weight_N))


def gradient_of_bias_weight(
    grad_ND: torch.Tensor, bias_GD: torch.Tensor, stop_G: torch.Tensor
) -> torch.Tensor:
    """The gradient of `add_bias` with respect to the weights: `grad[n] . bias[g]`.

    Args:
        grad_ND: [N, D], any float dtype.
        bias_GD, stop_G: as in `add_bias`.

    Returns:
        [N] in at least fp32.
    """
    dtype = accumulation_dtype(grad_ND.dtype)
    bias_ND = bias_GD.to(dtype)[_group_of_row(stop_G, len(grad_ND))]
    return (grad_ND.to(dtype) * bias_ND).sum(1)


def gradient_of_bias(
    grad_ND: torch.Tensor, counts: Sequence[int], weight_N: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of `add_bias` with respect to the bias: each group's sum of `weight * grad`.

    Args:
        grad_ND: [N, D], group after group, any float dtype.
        counts: rows of each group; their sum is N.
        weight_N: as in `add_bias`.

    Returns:
        [G, D] in at least fp32; zero for groups without rows.
    """
    dtype = accumulation_dtype(grad_ND.dtype)
    out_GD = grad_ND.new_zeros((len(counts), grad_ND.shape[1]), dtype=dtype)
    start = 0
    for group, count in enumerate(counts):
        rows = slice(start, start + count)
        weight = None if weight_N is None else weight_N[rows]
        out_GD[group] = _weighed(grad_ND[rows].to(dtype), weight).sum(0)
        start += count
    return out_GD

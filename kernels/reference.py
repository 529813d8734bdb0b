"""Plain-PyTorch twins of the Triton launchers: the oracle of the tests and the path on a CPU.

Each twin says what its kernel means in a few tensor operations. All of them accumulate in the
input's dtype promoted to at least fp32 and round once, so that float64 goes through unrounded. None
waits for a GPU: what goes nowhere is written to a row that nobody reads, as to select what goes
somewhere would be a device-to-host synchronisation. Sums over K are loops of K steps over [U, D]
tensors: that costs K small calls and saves the [U, K, D] fp32 temporary of a single one.

`reference_mlp.py` has those of the experts' arithmetic.

Shape letters: T tokens, K experts per token, E experts, P ranks, D hidden size, N rows, U parcels.
"""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in."""
    return torch.promote_types(dtype, torch.float32)


def count_copies(
    selected_TK: torch.Tensor,
    scores_TK: torch.Tensor,
    num_experts: int,
    num_ranks: int,
    version: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What planning needs to know of this rank's routing.

    Args:
        selected_TK: [T, K] int64 expert ids; a rank is home to E / P consecutive ones.
        scores_TK: [T, K], any float dtype.
        num_experts, num_ranks: E and P.
        version: any number.

    Returns:
        int64 [2 E + P + 3]: copies of each expert; how many of them are their token's only one at
        the expert's home; tokens with an expert at home on each rank; copies of experts outside
        [0, E); scores that are NaN or infinite; the version. And what `address_copies` needs.
    """
    report = selected_TK.new_zeros(2 * num_experts + num_ranks + 3)
    copies_E, alone_E, reached_P, odd = report.split_with_sizes(
        [num_experts, num_experts, num_ranks, 3]
    )
    known_TK = (selected_TK >= 0) & (selected_TK < num_experts)
    expert_N = selected_TK.clamp(0, num_experts - 1).reshape(-1)
    home_TK = torch.where(known_TK, selected_TK // (num_experts // num_ranks), num_ranks)
    there_TP = home_TK.new_zeros((len(home_TK), num_ranks + 1))
    there_TP.scatter_add_(1, home_TK, torch.ones_like(home_TK))
    alone_TK = known_TK & (there_TP.gather(1, home_TK) == 1)
    copies_E.scatter_add_(0, expert_N, known_TK.reshape(-1).long())
    alone_E.scatter_add_(0, expert_N, alone_TK.reshape(-1).long())
    reached_P += (there_TP[:, :num_ranks] > 0).sum(0)
    odd[0] += known_TK.numel() - known_TK.sum()
    odd[1] += scores_TK.numel() - scores_TK.detach().isfinite().sum()
    odd[2] = version
    return report, selected_TK.new_empty(0)


def address_copies(
    selected_TK: torch.Tensor,
    blocks: torch.Tensor,
    runs_2EP: torch.Tensor,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which rank computes each copy of this rank's tokens, and in which of its rows.

    Args:
        selected_TK: [T, K] int64 expert ids; ids outside [0, E) get some address.
        blocks: from `count_copies`.
        runs_2EP: int32 [2, E, P]. When all copies are sorted by expert, stably, those of each
            expert that each rank computes are a run: the place behind it, and what is to be added
            to a copy's place to get its row.
        rank: this rank, to which nothing is sent.

    Returns:
        Three int32 [T, K], and what `place_parcels` needs beside them. `own`: the row of a copy
        that is computed here, else -1. `sent`: the rank p that computes the copy, for the first of
        a token's copies there; -(p + 2) for the others; -1 for own copies. `target`: the row of the
        copy on the rank that computes it: rows are in the order of the rank's experts, home before
        foreign ones, then of source ranks, then of tokens.
    """
    K, (end_EP, shift_EP) = selected_TK.shape[1], runs_2EP
    E, P = end_EP.shape
    selected_TK = selected_TK.clamp(0, E - 1)
    # Expert ids are small numbers, which sort in fewer passes.
    order_N = torch.sort(selected_TK.reshape(-1).to(torch.int16), stable=True).indices
    places_N = torch.arange(len(order_N), dtype=torch.int32, device=order_N.device)
    position_TK = torch.empty_like(places_N).scatter_(0, order_N, places_N).view(-1, K)
    to_TK = (end_EP[selected_TK] <= position_TK.unsqueeze(2)).sum(2).clamp(max=P - 1)
    target_TK = position_TK + shift_EP[selected_TK, to_TK]
    again_TK = torch.zeros_like(to_TK, dtype=torch.bool)
    for k in range(1, K):
        again_TK[:, k] = (to_TK[:, :k] == to_TK[:, k : k + 1]).any(1)
    sent_TK = torch.where(to_TK == rank, -1, torch.where(again_TK, -to_TK - 2, to_TK))
    own_TK = torch.where(to_TK == rank, target_TK, -1)
    return own_TK.int(), sent_TK.int(), target_TK.int(), to_TK.new_empty(0)


def place_parcels(sent_TK: torch.Tensor, parcels: torch.Tensor, first_P: torch.Tensor) -> None:
    """Give each parcel its place in the send buffer.

    Args:
        sent_TK: int32 [T, K], from `address_copies`, changed in place: ranks p become places u.
            Places of a rank are given in token order.
        parcels: from `address_copies`.
        first_P: [P] int32: the first place of each rank's parcels.
    """
    (T, _), P = sent_TK.shape, first_P.shape[0]
    to_TK = torch.where(sent_TK < -1, -sent_TK - 2, sent_TK).long()
    reached_TP = to_TK.new_zeros((T, P + 1)).scatter_(1, to_TK + 1, 1)[:, 1:]
    place_TP = first_P + reached_TP.cumsum(0) - reached_TP
    place_TK = place_TP.gather(1, to_TK.clamp(min=0)).int()
    placed_TK = torch.where(sent_TK >= 0, place_TK, -place_TK - 2)
    sent_TK.copy_(torch.where(sent_TK == -1, -1, placed_TK))


def label_parcels(
    sent_TK: torch.Tensor,
    target_TK: torch.Tensor,
    values_TK: torch.Tensor,
    targets_UK: torch.Tensor,
    values_UK: torch.Tensor,
) -> None:
    """Write on each parcel which rows its copies are, and their values.

    Args:
        sent_TK, target_TK: as from `address_copies` and `place_parcels`.
        values_TK: [T, K], any float dtype.
        targets_UK: [U + 1, K] int32, any row stride, changed in place: the row of each copy, -1 for
            choices that this parcel does not serve and for parcels that no token uses.
        values_UK: [U + 1, K], a float dtype, any row stride, changed in place where `targets_UK` is
            not -1.

    The last row of both takes what goes nowhere.
    """
    targets_UK.fill_(-1)
    place_TK = torch.where(sent_TK < -1, -sent_TK - 2, sent_TK).long()
    k_K = torch.arange(sent_TK.shape[1], device=sent_TK.device)
    targets_UK[place_TK, k_K] = target_TK
    values_UK[place_TK, k_K] = values_TK.to(values_UK.dtype)


def scatter_rows(
    x_UD: torch.Tensor,
    target_UK: torch.Tensor,
    rows_ND: torch.Tensor,
    values_UK: torch.Tensor | None = None,
    values_N: torch.Tensor | None = None,
) -> None:
    """`rows[target[u, k]] = x[u]`, and `values_N[target[u, k]] = values[u, k]` where given.

    Args:
        x_UD: [U, D], any float dtype.
        target_UK: [U, K] int32, each below N - 1 and, unless negative, different from all others;
            negative: nowhere.
        rows_ND: [N, D] in x's dtype, changed in place. Its last row takes what goes nowhere.
        values_UK: [U, K], any float dtype; or None.
        values_N: [N], a float dtype, changed in place; or None.

    Raises:
        IndexError: a target is out of range (CPU only; on a GPU it is PyTorch's device-side
            assert).
    """
    for k in range(target_UK.shape[1]):
        target_U = target_UK[:, k].clamp(min=-1).long()
        rows_ND[target_U] = x_UD
        if values_N is not None:
            values_N[target_U] = values_UK[:, k].to(values_N.dtype)


def gather_values(
    values_N: torch.Tensor,
    source_UK: torch.Tensor,
    parcels_VK: torch.Tensor | None = None,
    sent_UK: torch.Tensor | None = None,
    *,
    out_UK: torch.Tensor,
) -> None:
    """`out[u, k] = values[source[u, k]] + parcels[v, k]`, the undoing of `scatter_rows`' values and
    of `label_parcels`.

    Args:
        values_N: [N], a float dtype.
        source_UK: [U, K] int32, each below N; negative: 0.
        parcels_VK: [V, K] in the same dtype; or None.
        sent_UK: [U, K] int32: v, or -(v + 2); -1: 0. With parcels only.
        out_UK: [U, K], any float dtype, changed in place.
    """
    padded_N = torch.cat((values_N, values_N.new_zeros(1)))  # the last one is what -1 finds
    found_UK = padded_N[source_UK.clamp(min=-1).long()]
    if parcels_VK is not None:
        place_UK = torch.where(sent_UK < 0, -sent_UK - 2, sent_UK).long()
        padded_VK = torch.cat((parcels_VK, parcels_VK.new_zeros(1, source_UK.shape[1])))
        found_UK += padded_VK.gather(0, torch.where(place_UK < 0, len(parcels_VK), place_UK))
    out_UK.copy_(found_UK)


def sum_rows(
    home_ND: torch.Tensor,
    foreign_MD: torch.Tensor,
    source_UK: torch.Tensor,
    parcels_VD: torch.Tensor | None = None,
    sent_UK: torch.Tensor | None = None,
    *,
    out_UD: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y[u] = sum_k rows[source[u, k]] + sum_k parcels[sent[u, k]]`, in fp32, rounded once.

    The order of the sum is that of k, rows before parcels.

    Args:
        home_ND: [N, D], any float dtype.
        foreign_MD: [M, D] in the same dtype: rows that are read as if they followed home's.
        source_UK: [U, K] int32, each below N + M; negative: nothing.
        parcels_VD: [V, D] in the same dtype; or None.
        sent_UK: [U, K] int32, each below V; negative: nothing. With parcels only.
        out_UD: [U, D] in the same dtype, where y goes; None: new memory.

    Returns:
        [U, D].
    """
    shape, num_home = (len(source_UK), home_ND.shape[1]), len(home_ND)
    y_UD = home_ND.new_zeros(shape, dtype=accumulation_dtype(home_ND.dtype))
    sums = [(source_UK, [(home_ND, 0), (foreign_MD, num_home)])]
    if parcels_VD is not None:
        sums.append((sent_UK, [(parcels_VD, 0)]))
    for index_UK, parts in sums:
        for k in range(index_UK.shape[1]):
            index_U = index_UK[:, k].long()
            for rows, first in parts:
                if len(rows) == 0:
                    continue
                within_U = (index_U >= first) & (index_U < first + len(rows))
                row_UD = rows.index_select(0, torch.where(within_U, index_U - first, 0))
                y_UD += torch.where(within_U.unsqueeze(1), row_UD, 0)
    if out_UD is None:
        return y_UD.to(home_ND.dtype)
    return out_UD.copy_(y_UD)

"""Seconds of a layer's stages by part: AutoEP's and llep's.

A layer is a few stages, each ended by an all-to-all, so a stage lasts as long as its slowest rank:

    forward:   rows in send order | all-to-all | experts | all-to-all | sums
    backward:  rows in send order | all-to-all | experts | all-to-all | sums

AutoEP sends every copy of a token, also to its own rank, and a rank regroups what arrives by
expert. llep sends a token once to each rank (:mod:`ds_llep.bench.parcels`), places its own rank's
copies while the others travel, and sums the copies of a token before they travel back.

llep's weights travel beside products: fetches beside those of home experts, returned gradients
beside the last ones. With NCCL they use the communicator of the all-to-alls, which runs one thing
at a time, so they start when the all-to-all before them is over. The last all-to-all starts before
the gradients of w1 and w3, so that no rank waits for these products of another, but it costs its
time all the same: its kernel takes processors from them, and they last about as much longer.

Shape letters: `P` ranks of the EP group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ds_llep.bench.primitives import Kernels, Links, Products

Parts = dict[str, float]
"""Seconds by part."""

_LABEL = 4  # bytes of a score, and of the row of a copy
_SUM_BYTES = 10  # of memory traffic for each element of a gradient that is added at home in fp32


@dataclass(frozen=True, kw_only=True)
class Work:
    """What each rank computes, and what travels: from the first to the second index of ``PP``."""

    top_k: int
    home: Products
    foreign: Products
    foreign_rows_P: np.ndarray
    rows_PP: np.ndarray
    """Copies, by source and computing rank."""
    parcels_PP: np.ndarray
    """Tokens that travel, each once; none within a rank."""
    fetched_PP: np.ndarray
    """Experts, from home to helper."""
    fetched_again_PP: np.ndarray
    """The same in backward."""
    returned_PP: np.ndarray
    """Experts whose gradients return to the first index."""


def crossing(work: Work, kernels: Kernels) -> np.ndarray:
    """Bytes ``[P, P]`` of the four all-to-alls of llep's layer."""
    row, label = kernels.row_bytes, _LABEL * work.top_k
    there_PP = work.parcels_PP * (2 * row + 2 * label)
    return there_PP + work.parcels_PP.T * (2 * row + label)


def autoep(
    home: Products, rows_PP: np.ndarray, top_k: int, kernels: Kernels, links: Links
) -> tuple[Parts, Parts]:
    """Forward and backward of AutoEP's layer, where all experts are at home."""
    row, sent_P, rows_P = kernels.row_bytes, rows_PP.sum(1), rows_PP.sum(0)
    all_to_all = links.all_to_all(rows_PP * row)  # as long there as back
    order_P, regroup_P = kernels.passes(2 * sent_P * row), kernels.passes(2 * rows_P * row)
    sum_P = kernels.passes(sent_P * row * (1 + 1 / top_k))
    there, back = all_to_all + regroup_P, regroup_P + all_to_all + sum_P.max()

    home_P = home.forward + kernels.activation(rows_P)
    slowest = (2 * regroup_P + home_P).argmax()
    forward = {
        "dispatch": order_P.max() + there[slowest],
        "home": home_P[slowest],
        "combine": back[slowest],
    }
    # The sum of the two gradients of the rows is a pass of its own.
    added_P = kernels.passes(3 * rows_P * kernels.row_bytes)
    home_P = _hidden(home, rows_P, kernels) + added_P + home.gate_up
    slowest = (2 * regroup_P + home_P).argmax()
    backward = {
        # The scores' gradient reads all rows once more.
        "combine": (order_P + sum_P).max() + there[slowest],
        "home": home_P[slowest],
        "dispatch": back[slowest],
    }
    return _floats(forward), _floats(backward)


def llep(work: Work, kernels: Kernels, links: Links) -> tuple[Parts, Parts]:
    """Forward and backward of llep's layer."""
    row, expert, label = kernels.row_bytes, kernels.expert_bytes, _LABEL * work.top_k
    tokens_P, own_P = work.rows_PP.sum(1) / work.top_k, work.rows_PP.diagonal()
    sent_P, arrived_P = work.parcels_PP.sum(1), work.parcels_PP.sum(0)
    rows_P = work.rows_PP.sum(0)
    home_rows_P = rows_P - work.foreign_rows_P
    # There: tokens to parcels, tokens to own rows, parcels to the other rows. Back: these rows to
    # parcels, then parcels and own rows to tokens.
    pack_P = kernels.passes((tokens_P + sent_P) * row)
    keep_P = kernels.passes((tokens_P + own_P) * row)
    unpack_P = kernels.passes((arrived_P + rows_P - own_P) * row)
    sum_P = kernels.passes((own_P + sent_P + tokens_P) * row)

    def all_to_all(labels: int) -> float:  # as long there as back
        return links.all_to_all(work.parcels_PP * (row + labels * label))

    def placed(labels: int) -> np.ndarray:
        arrived = pack_P.max() + all_to_all(labels)
        return np.maximum(arrived, pack_P + keep_P) + unpack_P

    def wait(since_P: np.ndarray, home_P: np.ndarray, fetched_PP: np.ndarray) -> np.ndarray:
        there_P = _arrival(since_P, fetched_PP, links.transfer(fetched_PP * expert))
        return np.maximum(there_P - since_P - home_P, 0)

    dispatch_P = placed(labels=2)
    home_P = work.home.forward + kernels.activation(home_rows_P)
    foreign_P = work.foreign.forward + kernels.activation(work.foreign_rows_P)
    wait_P = wait(dispatch_P, home_P, work.fetched_PP)
    slowest = (dispatch_P + home_P + wait_P + foreign_P + unpack_P).argmax()
    forward = {
        "dispatch": dispatch_P[slowest],
        "home": home_P[slowest],
        "wait": wait_P[slowest],
        "foreign": foreign_P[slowest],
        "combine": unpack_P[slowest] + all_to_all(labels=0) + sum_P.max(),
    }

    combine_P = placed(labels=0)
    home_P = _hidden(work.home, home_rows_P, kernels)
    foreign_P = _hidden(work.foreign, work.foreign_rows_P, kernels)
    wait_P = wait(combine_P, home_P, work.fetched_again_PP)
    posted_P = combine_P + home_P + wait_P + foreign_P + unpack_P
    last = all_to_all(labels=1)
    sent_at_P = posted_P + work.foreign.gate_up
    computed_P = sent_at_P + work.home.gate_up + last
    returned_PP = work.returned_PP
    returned_P = _arrival(
        np.maximum(sent_at_P, posted_P.max() + last),
        returned_PP,
        links.transfer(returned_PP.T * expert),
    )
    added_P = kernels.passes(returned_PP.sum(1) * expert / kernels.element_size * _SUM_BYTES)
    return_P = np.maximum(returned_P - computed_P, 0) + added_P
    slowest = (computed_P + return_P + sum_P).argmax()
    backward = {
        "combine": combine_P[slowest],
        "home": (home_P + work.home.gate_up)[slowest],
        "wait": wait_P[slowest],
        "foreign": (foreign_P + work.foreign.gate_up)[slowest],
        "return": return_P[slowest],
        "dispatch": (unpack_P + sum_P)[slowest] + last,
    }
    return _floats(forward), _floats(backward)


def _hidden(products: Products, rows_P: np.ndarray, kernels: Kernels) -> np.ndarray:
    """Backward but for the gradients of w1 and w3."""
    return products.hidden + 2 * kernels.activation(rows_P)  # twice an activation's traffic


def _arrival(ready_P: np.ndarray, moved_PP: np.ndarray, transfer_P: np.ndarray) -> np.ndarray:
    """``[P]``: when a rank's transfers are done, which start when both ends are ready; 0: none."""
    together_PP = np.where((moved_PP + moved_PP.T) > 0, np.maximum.outer(ready_P, ready_P), 0)
    return np.where(transfer_P > 0, together_PP.max(1) + transfer_P, 0)


def _floats(parts: dict[str, np.ndarray]) -> Parts:
    return {name: float(value) for name, value in parts.items()}

"""Measures a machine's rates in a moment, on the ranks that will train.

All ranks measure at once, as they compute at once in training; the slowest one's values are
everyone's. ``ds-llep calibrate`` takes longer and tells more.

Shape letters: `D` hidden size, `F` expert FFN size, `G` groups, `N` rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

import deepspeed.comm as dist
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from ds_llep.config import LEAST_RATE, MOST_MICROSECONDS
from ds_llep.kernels.select import KernelSet, select_kernels
from ds_llep.ranks import RankTable
from ds_llep.rates import UNITS

_REPEATS = 5
_FEW, _MANY = 8, 32  # groups that the same rows are in
_EXPERTS = 2  # that travel beside products


class _Sizes(NamedTuple):
    rows: int
    hidden_size: int
    ffn_size: int
    transfer: int
    """Bytes that a rank sends to all others."""
    calls: int
    """In a row, so that no launch and no synchronisation counts."""


_ON_GPU = _Sizes(rows=49152, hidden_size=2048, ffn_size=768, transfer=2**26, calls=8)
_ON_CPU = _Sizes(rows=256, hidden_size=128, ffn_size=128, transfer=2**20, calls=1)


def measure_rates(
    table: RankTable,
    ep_group: dist.ProcessGroup,
    kernels: str,
    dtype: torch.dtype,
    keys: Sequence[str],
) -> dict[str, float]:
    """Measure some rates. A collective over all processes; about a second, 1.2 GB on a GPU.

    Args:
        table: all EP groups, of at least two ranks, and the nodes.
        ep_group: this process's.
        kernels: the config's choice.
        dtype: of rows and weights.
        keys: of :data:`ds_llep.rates.UNITS`, the same on every rank.

    Returns:
        By key, in the key's unit, the same on every rank; a link that no EP group has is missing.
    """
    device = torch.device(get_accelerator().current_device_name())
    probe = _Probe(table, ep_group, select_kernels(kernels, device), device, dtype)
    found = probe.measure(keys)
    del probe
    get_accelerator().empty_cache()  # the model may need the memory in other sizes
    return found


class _Probe:
    """The measurements of this rank. All ranks of the world call each of them."""

    def __init__(
        self,
        table: RankTable,
        ep_group: dist.ProcessGroup,
        kernels: KernelSet,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._table, self._group, self._kernels = table, ep_group, kernels
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._sizes = _ON_CPU if device.type == "cpu" else _ON_GPU
        # Not PyTorch's own generator, whose next numbers are the training's.
        self._generator = torch.Generator(device).manual_seed(0)
        N, D, F = self._sizes[:3]
        self._rows_ND = self._randn(N, D)
        shapes = (F, D), (D, F), (F, D)
        self._weights = [self._randn(_MANY, *shape).div_(D**0.5) for shape in shapes]

    def measure(self, keys: Sequence[str]) -> dict[str, float]:
        """As :func:`measure_rates`."""
        measurements = {
            "tflops": self._flop,
            "inside_gbytes": partial(self._byte, True),
            "between_gbytes": partial(self._byte, False),
            "expert_us": self._expert,
            "exposed": self._exposed,
            "spill_us": self._spill,
        }
        took = [measurements[key]() for key in keys]
        agreed = torch.tensor(took, dtype=torch.float64, device=self._like.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        found = {}
        for key, value in zip(keys, agreed.tolist(), strict=True):
            if key == "exposed":
                found[key] = min(max(value, 0.0), 1.0)
            elif key.endswith("_us"):  # noise may be larger than the price
                found[key] = min(max(value * 1e6, 1e-6), MOST_MICROSECONDS)
            elif value:
                found[key] = max(1 / (value * UNITS[key]), LEAST_RATE)
        return found

    def _flop(self) -> float:
        """Seconds of one at the experts' products."""
        N, D, F = self._sizes[:3]
        return self._seconds(self._products) / (18 * N * D * F)

    def _byte(self, inside: bool) -> float:
        """Seconds of one in an all-to-all within nodes or between them; 0: no such link."""
        links = [(nodes_P[:, None] == nodes_P) == inside for nodes_P in self._table.nodes]
        for link_PP in links:
            np.fill_diagonal(link_PP, False)
        if not any(link_PP.any() for link_PP in links):  # the same table on every rank
            return 0.0
        peers_P = links[self._table.group_index][self._table.ep_rank]
        splits = (peers_P * (self._sizes.transfer // len(peers_P))).tolist()
        sent = self._like.new_empty(sum(splits), dtype=torch.uint8)
        received = torch.empty_like(sent)
        took = self._seconds(
            lambda: dist.all_to_all_single(received, sent, splits, splits, group=self._group)
        )
        return took / len(sent) if len(sent) else 0.0

    def _expert(self) -> float:
        """Seconds of one more group of the same rows."""
        few, many = (self._seconds(partial(self._products, groups)) for groups in (_FEW, _MANY))
        return (many - few) / (_MANY - _FEW)

    def _spill(self) -> float:
        """Seconds of a second set of experts that has hardly any rows, which is fetched and whose
        gradients return: mostly the host's, which starts all of it."""
        calls, start = count(1), partial(self._transfer, self._weights[:1], 1)

        def second_set() -> None:
            self._finish(start())
            self._products(rows=_FEW * next(calls))  # other rows in every micro-batch
            self._finish(start())

        return self._seconds(second_set)

    def _exposed(self) -> float:
        """What a transfer adds to products beside it, of what it takes alone."""
        start = partial(self._transfer, self._weights, _EXPERTS)

        def both() -> None:
            works = start()
            self._products()
            self._finish(works)

        products = self._seconds(self._products)
        transfer = self._seconds(lambda: self._finish(start()))
        return (self._seconds(both) - products) / transfer

    def _products(self, groups: int = _FEW, rows: int | None = None) -> None:
        """Those of experts' forward and backward."""
        rows_ND, kernels = self._rows_ND[:rows], self._kernels
        w1, w2, w3 = (weights[:groups] for weights in self._weights)
        counts = [len(rows_ND) // groups] * groups
        gate_NF, up_NF = kernels.gate_up(rows_ND, w1, w3, counts)
        kernels.product(kernels.swiglu_forward(gate_NF, up_NF), w2, counts)
        # The rows stand in for the results' gradients.
        grad_NF = kernels.product(rows_ND, w2, counts, transpose=False)
        grad_gate, grad_up, act_NF, _ = kernels.swiglu_backward(grad_NF, gate_NF, up_NF)
        kernels.gradient_of_weights(rows_ND, act_NF, counts)
        kernels.gradient_of_rows(grad_gate, w1, grad_up, w3, counts)
        kernels.gradient_of_weights(grad_gate, rows_ND, counts)
        kernels.gradient_of_weights(grad_up, rows_ND, counts)

    def _transfer(self, matrices: Sequence[torch.Tensor], experts: int) -> list:
        """Experts' matrices to the next rank, as ``ds_llep/fetch.py`` sends them."""
        ranks, mine = self._table.own_group, self._table.ep_rank
        following, previous = ranks[(mine + 1) % len(ranks)], ranks[mine - 1]
        operations = []
        for weights in matrices:
            for expert in range(experts):
                received = weights[_MANY - 1 - expert]  # which nobody uses meanwhile
                operations.append(dist.P2POp(dist.isend, weights[expert], following, self._group))
                operations.append(dist.P2POp(dist.irecv, received, previous, self._group))
        return dist.batch_isend_irecv(operations)

    @staticmethod
    def _finish(works: list) -> None:
        for work in works:
            work.wait()

    def _seconds(self, work: Callable[[], object]) -> float:
        """Median of one call, on this rank; ranks start together."""
        times = []
        for _ in range(1 + _REPEATS):  # the first warms up
            dist.barrier()
            get_accelerator().synchronize()
            start = time.perf_counter()
            for _ in range(self._sizes.calls):
                work()
            get_accelerator().synchronize()
            times.append((time.perf_counter() - start) / self._sizes.calls)
        return statistics.median(times[1:])

    def _randn(self, *size: int) -> torch.Tensor:
        like, generator = self._like, self._generator
        return torch.randn(*size, generator=generator, dtype=like.dtype, device=like.device)

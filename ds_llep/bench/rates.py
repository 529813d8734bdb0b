"""The measurements that ``ds-llep calibrate`` is made of; all ranks make them together."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Sequence

import deepspeed.comm as dist
import numpy as np
import torch

from ds_llep.bench.batch import Batch
from ds_llep.bench.machine import Machine, Points
from ds_llep.bench.measure import milliseconds
from ds_llep.bench.micro_batches import from_workload
from ds_llep.bench.primitives import Kernels
from ds_llep.bench.routing import force_routing
from ds_llep.bench.shapes import Shape
from ds_llep.bench.stack import Stack, expert_parallel, results, shard, switch
from ds_llep.bench.step import System, step_cost
from ds_llep.config import LLEPConfig
from ds_llep.kernels.grouped_gemm import grouped_gemm, grouped_gemm_weight_gradient
from ds_llep.kernels.select import select_kernels
from ds_llep.plan import make_plan
from ds_llep.ranks import all_gather

GROUPS = (32, 8, 1)
TOP_K = 4
LEAST = 1e-7  # seconds: what is left where the noise is larger than an overhead

Group = tuple[list[int], dist.ProcessGroup | None]
"""Global ranks, and the process group of just these; None: of all."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured with."""

    matrix: int
    """Side of the dense product."""
    rows: int
    """Of a rank."""
    hidden_size: int
    ffn_size: int
    transfers: tuple[int, ...]
    """Bytes."""
    repeats: int


class Rates:
    """The measurements of this rank.

    Raises:
        ValueError: on every rank, if nodes have different numbers of ranks.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self._sizes, self._device = sizes, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.world = dist.get_world_size()
        hosts = all_gather(socket.gethostname())
        nodes = [
            [r for r in range(self.world) if hosts[r] == name] for name in dict.fromkeys(hosts)
        ]
        if len({len(node) for node in nodes}) > 1:
            counts = ", ".join(str(len(node)) for node in nodes)
            raise ValueError(f"the nodes have {counts} ranks; start equally many on each")
        self.nodes, self.ranks_per_node = len(nodes), len(nodes[0])
        self.all: Group = list(range(self.world)), None
        self.inside = self.between = self.all
        if self.nodes > 1:
            self.inside, self.between = self._own(nodes), self._own(list(zip(*nodes, strict=True)))

    def _own(self, groups: Sequence[Sequence[int]]) -> Group:
        # Every rank makes all groups, as PyTorch demands.
        made = [(list(group), dist.new_group(list(group))) for group in groups]
        return next(pair for pair in made if dist.get_rank() in pair[0])

    def _seconds(self, work: Callable[[], object]) -> float:
        return milliseconds(work, self._sizes.repeats) / 1e3

    def _seconds_in_a_row(self, work: Callable[[], object]) -> float:
        """Of one of several calls, so that on a GPU no launch and no synchronisation counts."""
        times = 1 if self._device.type == "cpu" else 10

        def in_a_row() -> None:
            for _ in range(times):
                work()

        return self._seconds(in_a_row) / times

    def _randn(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=self.dtype, device=self._device)

    def dense_rate(self) -> float:
        side = self._sizes.matrix
        a, b = self._randn(side, side), self._randn(side, side)
        return 2 * side**3 / self._seconds_in_a_row(lambda: a @ b)

    def memory_rate(self) -> float:
        rows_ND = self._randn(self._sizes.rows, self._sizes.hidden_size)
        target_N1 = torch.randperm(len(rows_ND), device=self._device).int().unsqueeze(1)
        out_ND = rows_ND.new_empty((len(rows_ND) + 1, rows_ND.shape[1]))
        scatter = select_kernels("auto", self._device).scatter_rows
        took = self._seconds_in_a_row(lambda: scatter(rows_ND, target_N1, out_ND))
        return 2 * rows_ND.nbytes / took

    def grouped_rate(self, machine: Machine) -> Points:
        """By the rows of a group, what the model needs to find the time of three products."""
        D, F = self._sizes.hidden_size, self._sizes.ffn_size
        points = {}
        for groups in GROUPS:
            each = max(1, self._sizes.rows // groups)
            rows_ND, grad_NF = self._randn(each * groups, D), self._randn(each * groups, F)
            weights, counts = self._randn(groups, F, D), [each] * groups

            def products(rows_ND=rows_ND, grad_NF=grad_NF, weights=weights, counts=counts) -> None:
                grouped_gemm(rows_ND, weights, counts)
                grouped_gemm(grad_NF, weights, counts, transpose=False)
                grouped_gemm_weight_gradient(grad_NF, rows_ND, counts)

            took = self._seconds_in_a_row(products)
            points[each] = self._rate_of(machine, took, np.full((groups, 1), each), D, F)
        return tuple(sorted(points.items()))

    def _rate_of(self, machine: Machine, took: float, rows_G1: np.ndarray, D: int, F: int) -> float:
        """The rate at which the model takes so long for the three products."""
        shape = Shape(len(rows_G1), D, F, 1, 1)

        def modelled(rate: float) -> float:
            at_rate = dataclasses.replace(machine, grouped_rate=((1.0, rate),))
            kernels = Kernels(at_rate, shape, self.dtype.itemsize)
            found = kernels.products(rows_G1, rows_G1 > 0)
            # Forward and backward of an expert are nine products; these are three of them.
            return float(sum(part[0] for part in found) / 3)

        reading = modelled(1e30)
        return modelled(1.0) / max(took - reading, took / 10)

    def links(self, group: Group) -> list[Points]:
        """All-to-all and point to point within a group, all groups at once."""
        members, process_group = group
        one_to_all, pairs = [], []
        mine = members.index(dist.get_rank())
        peer = members[mine ^ 1] if mine ^ 1 < len(members) else None
        for size in self._sizes.transfers:
            part = max(1, size // (len(members) - 1))
            out = torch.empty(part * len(members), dtype=torch.uint8, device=self._device)
            into = torch.empty_like(out)

            def all_to_all(out=out, into=into) -> None:
                dist.all_to_all_single(into, out, group=process_group)

            def exchange(out=out[:size], into=into[:size]) -> None:
                if peer is None:
                    return
                operations = [
                    dist.P2POp(dist.isend, out, peer, process_group),
                    dist.P2POp(dist.irecv, into, peer, process_group),
                ]
                for work in dist.batch_isend_irecv(operations):
                    work.wait()

            one_to_all.append((size, size / self._seconds_in_a_row(all_to_all)))
            pairs.append((size, size / self._seconds_in_a_row(exchange)))
        return [tuple(one_to_all), tuple(pairs)]

    def local_rate(self) -> float:
        """Of an all-to-all in which every rank keeps all it has."""
        out = torch.empty(max(self._sizes.transfers), dtype=torch.uint8, device=self._device)
        into, splits = torch.empty_like(out), [0] * self.world
        splits[dist.get_rank()] = out.numel()
        took = self._seconds_in_a_row(lambda: dist.all_to_all_single(into, out, splits, splits))
        return out.nbytes / took

    def latency(self, group: Group) -> float:
        members, process_group = group
        report = torch.zeros(260, dtype=torch.int64, device=self._device)
        gathered = report.new_empty(len(members) * 260)

        def gather() -> None:
            dist.all_gather_into_tensor(gathered, report, group=process_group)
            gathered.cpu()

        return self._seconds(gather)

    def plan_seconds(self) -> tuple[float, float]:
        """Host seconds of a plan for each expert, and for each spill times the ranks."""
        config = LLEPConfig(enabled=True, imbalance_threshold=1.0)
        took, choices, E = [], [], 256
        for num_ranks in (8, 64):
            ((counts_PE, _),) = from_workload("zipf:1", Shape(E, 1, 1, 8, 2048), num_ranks, 1, 0, 0)
            choices.append(len(make_plan(counts_PE, config).spills) * num_ranks)
            took.append(self._seconds(lambda counts_PE=counts_PE: make_plan(counts_PE, config)))
        per_choice = max((took[1] - took[0]) / (choices[1] - choices[0]), LEAST / E)
        return max((took[0] - choices[0] * per_choice) / E, LEAST / E), per_choice

    def overheads(self, machine: Machine) -> dict[str, float]:
        """What a balanced layer takes beyond what a machine explains, by the fields' names."""
        sizes, config = self._sizes, LLEPConfig(enabled=True)
        tokens = max(1, sizes.rows // TOP_K)
        shape = Shape(8 * self.world, sizes.hidden_size, sizes.ffn_size, TOP_K, tokens)
        stack = Stack(shape, 1, self.dtype, self._device, seed=0)
        shard(stack, expert_parallel(shape, self.world, self.dtype), config)
        batch = Batch("balanced", shape, self.world, 0, self._randn(0))
        force_routing(stack.layers[0], batch.ids(0, 0))

        @torch.no_grad()
        def forward() -> torch.Tensor:
            return stack(batch.tokens(0)[0])

        counts = from_workload("balanced", shape, self.world, 1, 0, 0)
        system = System(machine, machine.ranks_per_node, machine.dtype)
        found = {}
        for mode, prefix in (("ep", "autoep_"), ("llep", "")):
            switch(stack.layers, mode)
            took = self._seconds(forward)
            backward = self._seconds(lambda: results(stack, *batch.tokens(0))) - took
            explained = step_cost(mode, counts, config, system)
            found[f"{prefix}overhead_forward"] = max(took - explained.forward, LEAST)
            found[f"{prefix}overhead_backward"] = max(backward - explained.backward, LEAST)
        return found

"""A rank's tokens in one workload, routed anew at every step."""

from __future__ import annotations

import functools

import deepspeed.comm as dist
import numpy as np
import torch

from ds_llep.bench.shapes import Shape
from ds_llep.bench.workloads import Draw, parse


class Batch:
    """Inputs, output gradients and routing of this rank.

    Args:
        workload: its name.
        shape: of the layers.
        ep_size: ranks of an EP group.
        seed: of tokens and routing.
        like: tokens have this tensor's dtype and device.

    Raises:
        ValueError: an unknown workload, or one that does not fit the shape.
    """

    def __init__(
        self, workload: str, shape: Shape, ep_size: int, seed: int, like: torch.Tensor
    ) -> None:
        self._workload = parse(workload, shape.num_experts // ep_size)
        self._shape, self._ep_size, self._seed, self._like = shape, ep_size, seed, like
        # Kept, since every mode runs the same steps; on the host, since device memory is measured.
        self._ids = functools.lru_cache(None)(self._draw_ids)
        self._ids(0, 0)

    def ids(self, step: int, layer: int) -> torch.Tensor:
        """int64 ``[T, K]``: the experts of each token."""
        return self._ids(step, layer).to(self._like.device)

    def tokens(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and output gradient, each ``[1, T, D]``; T may change from step to step."""
        like, D = self._like, self._shape.hidden_size
        seed = self._seed * 1000 + dist.get_rank()
        return _tokens(len(self._ids(step, 0)), D, seed, like.dtype, like.device)

    def counts_PE(self, step: int, layer: int) -> np.ndarray:
        """int64 ``[P, E]`` of this rank's EP group."""
        first = self._sources()[0]
        return self._workload.counts_PE(self._ep_size, self._draw(step, layer, first))

    def reached(self, step: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 ``[P, P]``: a rank's tokens that have an expert at home on each rank of its group.

        And int64 ``[P, E]``: a rank's copies of each expert that are their token's only one at the
        expert's home. It draws the tokens of all these ranks.
        """
        P, E = self._ep_size, self._shape.num_experts
        reached_PP, alone_PE = np.zeros((P, P), dtype=np.int64), np.zeros((P, E), dtype=np.int64)
        for p, source in enumerate(self._sources()):
            ids_TK = self._workload.expert_ids(self._draw(step, layer, source))
            home_TK = ids_TK // (E // P)
            there_TP = np.stack([(home_TK == home).sum(1) for home in range(P)], axis=1)
            reached_PP[p] = (there_TP > 0).sum(0)
            is_alone_TK = np.take_along_axis(there_TP, home_TK, axis=1) == 1
            alone_PE[p] = np.bincount(ids_TK[is_alone_TK], minlength=E)
        return reached_PP, alone_PE

    def _draw_ids(self, step: int, layer: int) -> torch.Tensor:
        return torch.from_numpy(self._workload.expert_ids(self._draw(step, layer, dist.get_rank())))

    def _sources(self) -> range:
        """The ranks of this rank's EP group."""
        first = dist.get_rank() // self._ep_size * self._ep_size
        return range(first, first + self._ep_size)

    def _draw(self, step: int, layer: int, source: int) -> Draw:
        E, K, tokens = self._shape.num_experts, self._shape.top_k, self._shape.tokens
        return Draw(E, K, tokens, source, layer, step, self._seed)


@functools.lru_cache(4)  # one for all workloads with as many tokens
def _tokens(
    number: int, hidden_size: int, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    size = 1, number, hidden_size
    x = torch.randn(size, generator=generator, dtype=dtype, device=device)
    return x, torch.randn(size, generator=generator, dtype=dtype, device=device)

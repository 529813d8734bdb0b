"""Experts with biases, in AutoEP's three parameters: a bias follows its matrix as more rows of it.

AutoEP, and all that DeepSpeed knows of its experts (checkpoints, universal checkpoints, placement),
has the parameters w1, w2 and w3 and no others. So an expert's matrix ``[F, D]`` and bias ``[F]``
are one parameter ``[F + R, D]``: the bias fills the last R rows as far as it reaches, zeros the
rest. Whatever moves, shards or saves the matrix does so with its bias, and the matrix itself stays
contiguous. The price: an optimizer has no parameter of its own for biases, so weight decay is
theirs as well.

Shapes: ``G`` groups (experts), ``F`` expert FFN size, ``D`` hidden size, ``N`` rows.
"""

from __future__ import annotations

import torch
from deepspeed.moe.ep_experts import GroupedExperts, apply_expert_activation


def join(matrix_GFD: torch.Tensor, bias_GF: torch.Tensor) -> torch.Tensor:
    """``[G, F + R, D]``, where R is as many rows as a bias fills."""
    joined = empty_joint(*matrix_GFD.shape, like=matrix_GFD)
    matrix, bias = split(joined, matrix_GFD.shape[1])
    matrix.copy_(matrix_GFD)
    bias.copy_(bias_GF)
    return joined


def split(joined: torch.Tensor, F: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices ``[G, F, D]`` and the biases ``[G, F]`` of what :func:`join` made, as views."""
    return joined[:, :F], joined[:, F:].flatten(1)[:, :F]


def empty_joint(G: int, F: int, D: int, like: torch.Tensor) -> torch.Tensor:
    """Memory for :func:`split`, zero where neither matrix nor bias is."""
    joined = like.new_empty((G, F + -(-F // D), D))
    joined[:, F:].zero_()
    return joined


def has_bias(experts: GroupedExperts) -> bool:
    """Whether these are experts with biases, as AutoEP's or as llep's."""
    return getattr(experts, "has_bias", False)


class BiasedExperts(GroupedExperts):
    """AutoEP's grouped experts with biases, computed as AutoEP computes its own: without llep."""

    has_bias = True

    def forward(self, x: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """Apply each expert to its rows.

        Args:
            x: ``[N, D]``, expert after expert; rows behind the last expert's are padding, finite
                and without gradient.
            num_tokens_per_expert: ``[G]``, on the device of ``x``.

        Returns:
            ``[N, D]``.
        """
        (N, D), F = x.shape, self.w2.shape[2]
        stop_G = torch.cumsum(num_tokens_per_expert, 0, dtype=torch.int32)
        stop_G[-1] = N  # what a product leaves unwritten behind its last group may be NaN
        rows_N = torch.arange(N, device=x.device, dtype=torch.int32)
        expert_N = torch.searchsorted(stop_G, rows_N, right=True)
        # Added as a product, a bias gets its gradient from one: no atomics, and sums in fp32.
        member_NG = expert_N.unsqueeze(1) == torch.arange(len(stop_G), device=x.device)
        member_NG = member_NG.to(x.dtype)

        def project(rows: torch.Tensor, joined: torch.Tensor, size: int) -> torch.Tensor:
            matrix, rest = joined.to(x.dtype).split([size, joined.shape[1] - size], dim=1)
            bias = rest.flatten(1)[:, :size]
            return torch.addmm(self._product(rows, matrix, stop_G), member_NG, bias)

        gate, up = project(x, self.w1, F), project(x, self.w3, F)
        form = self.activation, self.activation_alpha, self.activation_limit
        act = apply_expert_activation(gate, up, *form, fused=x.is_cuda)
        return project(act, self.w2, D)

    def _product(
        self, rows_ND: torch.Tensor, matrix_GFD: torch.Tensor, stop_G: torch.Tensor
    ) -> torch.Tensor:
        """The kernel that AutoEP would take, as its options say."""
        if self.use_triton_grouped_mm:
            from deepspeed.ops.triton_ops.group_gemm_triton import group_gemm_triton

            return group_gemm_triton(rows_ND, matrix_GFD.contiguous(), stop_G, trans_b=True)
        if self.use_grouped_mm:
            return torch._grouped_mm(rows_ND, matrix_GFD.transpose(1, 2), offs=stop_G)
        stops = stop_G.tolist()
        spans = zip([0, *stops], stops, matrix_GFD, strict=False)
        return torch.cat([rows_ND[start:stop] @ matrix.T for start, stop, matrix in spans])

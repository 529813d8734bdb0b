"""The sizes of MoE layers that people fine-tune, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One MoE layer's routed experts, and the tokens that each rank feeds it."""

    num_experts: int
    hidden_size: int
    ffn_size: int
    """F, the width of one expert."""
    top_k: int
    tokens: int
    """T of each rank."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"shape: {name} is {value}; valid is 1 or more")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"shape: top_k {self.top_k} is more than the {self.num_experts} experts; "
                f"valid is 1 to {self.num_experts}"
            )

    @property
    def expert_numel(self) -> int:
        """Parameters of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.ffn_size

    def gemm_flop(self, rows: int) -> int:
        """Multiply-adds, counted as two, that the expert products of ``rows`` rows take in forward.

        Backward takes twice as many.
        """
        return 6 * rows * self.hidden_size * self.ffn_size


# Tokens per rank: what the LLEP paper's tests use where they name the shape, else as many as keep
# the rows of a rank near theirs.
PRESETS = {
    "gpt-oss-120b": Shape(128, 2880, 2880, 4, 32768),
    "gpt-oss-20b": Shape(32, 2880, 2880, 4, 32768),
    "qwen3-30b-a3b": Shape(128, 2048, 768, 8, 32768),
    "qwen3-235b-a22b": Shape(128, 4096, 1536, 8, 16384),
    "mixtral-8x7b": Shape(8, 4096, 14336, 2, 16384),
    "deepseek-v3": Shape(256, 7168, 2048, 8, 16384),
    "kimi-k2": Shape(384, 7168, 2048, 8, 16384),
    "tiny": Shape(16, 256, 128, 4, 512),
    "tiny-gpt-oss": Shape(16, 256, 136, 4, 512),
}


def preset(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ValueError: no such preset, with the names of all.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; valid are {', '.join(PRESETS)}")
    return PRESETS[name]

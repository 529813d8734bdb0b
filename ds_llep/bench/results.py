"""Reading the results of ``ds-llep bench``: JSON lines, one for each workload and mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError


class Result(BaseModel, strict=True, allow_inf_nan=False):
    """One line of ``ds-llep bench``, as far as its readers need it."""

    kind: Literal["bench"]
    shape: str | None
    num_experts: int
    hidden_size: int
    ffn_size: int
    top_k: int
    tokens: int
    layers: int
    ranks: int
    ep_size: int
    dtype: str
    device: str
    workload: str
    mode: Literal["ep", "llep", "ep_balanced"]
    seed: int
    repeats: int
    zero_stage: int | None = None
    llep: dict[str, Any] | None = None
    forward_ms: float | None = Field(gt=0)
    forward_backward_ms: float | None = Field(gt=0)
    step_ms: float | None = Field(gt=0)
    peak_bytes: int | None = Field(ge=0)
    floor_forward_ms: float | None = None
    breakdown_ms: dict[str, float] | None
    versions: dict[str, Any]
    commit: str | None

    def conditions(self) -> dict[str, str]:
        """What two results must have in common to be compared, in words."""
        sizes = f"E {self.num_experts}, D {self.hidden_size}, F {self.ffn_size}, K {self.top_k}"
        return {
            "shape": self.shape or sizes,
            "machine": f"{self.ranks} x {self.device}",
            "ep_size": f"EP {self.ep_size}",
            "tokens": f"{self.tokens} tokens per rank",
            "layers": f"{self.layers} layer{'s' * (self.layers > 1)}",
            "dtype": self.dtype,
            "zero_stage": "" if self.zero_stage is None else f"ZeRO {self.zero_stage}",
            "seed": f"seed {self.seed}",
        }


def read(path: str | Path) -> list[Result]:
    """The results in a file, in its order.

    Raises:
        ValueError: a line that is no result, with its number and what is wrong; no line at all.
        OSError: the file cannot be read.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is no text: results of `ds-llep bench` are JSON lines; a trace is drawn by "
            "load and experts"
        ) from None
    results = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            results.append(Result.model_validate_json(line))
        except ValidationError as error:
            wrong = [".".join(map(str, e["loc"])) + f": {e['msg']}" for e in error.errors()]
            raise ValueError(
                f"{path}, line {number} is no result of `ds-llep bench`: "
                f"{'; '.join(wrong[:3]).removeprefix(': ')}"
            ) from None
    if not results:
        raise ValueError(f"{path} is empty; `ds-llep bench` writes a line for each result")
    return results

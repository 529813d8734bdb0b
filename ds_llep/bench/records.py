"""What the bench is asked for, and what it reports: one flat record a workload and mode.

Every key is in every record, None where it was not measured, so that a file of records is a table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from ds_llep.bench.ranks import device_name
from ds_llep.bench.shapes import Shape
from ds_llep.bench.workloads import Draw, parse
from ds_llep.config import LLEPConfig
from ds_llep.plan import Plan

MODES = ("ep", "ep_balanced", "llep")
PARTS = ("forward", "backward", "step")


@dataclass(frozen=True)
class Settings:
    """What to measure; the options of ``ds-llep bench``."""

    shape: Shape
    shape_name: str | None
    layers: int
    workloads: list[str]
    modes: list[str]
    parts: list[str]
    ep_size: int | None
    zero_stage: int
    dtype: str
    repeats: int
    seed: int
    llep: LLEPConfig
    breakdown: bool

    def check(self, ranks: int) -> None:
        """Find what would fail on so many ranks.

        Raises:
            ValueError: an EP size or a workload that does not fit.
        """
        shape, ep_size = self.shape, self.ep_size or ranks
        check_ep_size(ep_size, ranks, shape.num_experts)
        for name in self.workloads:
            E, K, tokens = shape.num_experts, shape.top_k, shape.tokens
            draw = Draw(E, K, tokens, source=0, layer=0, step=0, seed=self.seed)
            parse(name, E // ep_size).counts(draw)

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        """What ``dtype`` means on a device."""
        auto = "float32" if device.type == "cpu" else "bfloat16"
        return getattr(torch, auto if self.dtype == "auto" else self.dtype)

    def points(self) -> list[tuple[str, str]]:
        """(workload, mode) in the order in which they are measured."""
        points = [(w, m) for w in self.workloads for m in ("ep", "llep") if m in self.modes]
        return [("balanced", "ep_balanced")] * ("ep_balanced" in self.modes) + points


def check_ep_size(ep_size: int, ranks: int, num_experts: int) -> None:
    """Find an EP size that cannot be.

    Raises:
        ValueError: it does not divide the ranks and the experts.
    """
    if ep_size < 1 or ranks % ep_size or num_experts % ep_size:
        raise ValueError(
            f"EP size {ep_size} must divide both the {ranks} ranks and the {num_experts} experts"
        )


def read_section(text: str) -> LLEPConfig:
    """The ``"llep"`` section from the command line.

    Raises:
        ValueError: no JSON, or a mistake in the section.
    """
    try:
        section = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--llep: no JSON: {error}") from None
    return LLEPConfig.from_ds_config({"llep": section})


def conditions(
    settings: Settings, workload: str, mode: str, ranks: int, ep_size: int, dtype: torch.dtype
) -> dict:
    """What is measured under which conditions, the part of a record that is known before."""
    return {
        "shape": settings.shape_name,
        **asdict(settings.shape),
        "layers": settings.layers,
        "ranks": ranks,
        "ep_size": ep_size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(),
        "workload": workload,
        "mode": mode,
        "seed": settings.seed,
        "repeats": settings.repeats,
        "zero_stage": settings.zero_stage if "step" in settings.parts else None,
        "llep": settings.llep.model_dump(mode="json") if mode == "llep" else None,
    }


def new_record(
    settings: Settings, workload: str, mode: str, ranks: int, ep_size: int, dtype: torch.dtype
) -> dict:
    """A record of which nothing is measured yet."""
    return {
        "kind": "bench",
        **conditions(settings, workload, mode, ranks, ep_size, dtype),
        "autoep": None,
        "errors": None,
        "forward_ms": None,
        "forward_backward_ms": None,
        "step_ms": None,
        "peak_bytes": None,
        "breakdown_ms": None,
        "breakdown_slowest_ms": None,
        "breakdown_floor_ms": None,
    }


def describe(record: dict, plans: Sequence[Plan], dense_rate: float) -> None:
    """Add what the plans of the timed steps did, mean over steps and layers, and the GEMM floors.

    Args:
        record: of one workload and mode.
        plans: of each timed step and layer, as llep makes them.
        dense_rate: FLOP/s of a large matrix product.
    """
    llep = record["mode"] == "llep"
    spills = [plan.spills if llep else () for plan in plans]
    expert_numel = 3 * record["hidden_size"] * record["ffn_size"]
    expert_bytes = expert_numel * getattr(torch, record["dtype"]).itemsize
    after = [plan.load_ratio_after if llep else plan.load_ratio_before for plan in plans]
    experts = _mean(map(len, spills))
    record |= {
        "load_ratio_before": _mean(plan.load_ratio_before for plan in plans),
        "load_ratio_after": _mean(after),
        "spilled_tokens": _mean(sum(spill.tokens for spill in of_plan) for of_plan in spills),
        "spilled_experts": experts,
        "spilled_bytes": experts * expert_bytes,
    }
    rows = _mean(plan.counts_PE.sum() / plan.num_ranks for plan in plans)
    forward = 1e3 * record["layers"] * 2 * expert_numel * rows / dense_rate
    record |= {"floor_forward_ms": forward, "floor_forward_backward_ms": 3 * forward}


def compare(records: dict[tuple[str, str], dict]) -> None:
    """Add ratios to the baselines, of forward+backward where it was measured, else of forward."""
    balanced = records.get(("balanced", "ep_balanced"), {})

    def same_rows(record: dict) -> bool:
        floor = balanced.get("floor_forward_ms", 0.0)
        return abs(record["floor_forward_ms"] - floor) < 0.01 * floor

    for (workload, _), record in records.items():
        key = "forward_backward_ms" if record["forward_backward_ms"] else "forward_ms"
        baselines = {
            "ep": records.get((workload, "ep"), {}).get(key),
            # Where tokens are missing on purpose, balanced routing of all of them says nothing.
            "ep_balanced": balanced.get(key) if same_rows(record) else None,
            "floor": record[f"floor_{key}"],
        }
        for name, other in baselines.items():
            record[f"ratio_to_{name}"] = record[key] / other if record[key] and other else None


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)

"""Pictures of the results of ``ds-llep bench``: speed-up and memory, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from ds_llep.bench.figures import Panel, bar_figure

TIMES = {"forward": "forward_ms", "forward+backward": "forward_backward_ms", "step": "step_ms"}
MODES = {"ep": "EP", "llep": "LLEP", "ep_balanced": "EP, balanced routing"}


class Result(BaseModel, strict=True, allow_inf_nan=False):
    """One line of ``ds-llep bench``, as far as pictures need it."""

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
    forward_ms: float | None = Field(gt=0)
    forward_backward_ms: float | None = Field(gt=0)
    step_ms: float | None = Field(gt=0)
    peak_bytes: int | None = Field(ge=0)
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


Comparable = dict[tuple[str, str], Result]
"""Results under the same conditions, by workload and mode."""


def read_results(path: Path) -> list[Comparable]:
    """The results in a file, in its order; of a point that was measured again, the last.

    Raises:
        ValueError: a line that is no result, with its number and what is wrong; no line at all.
        OSError: the file cannot be read.
    """
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is no text: bars and breakdown read the JSON lines of `ds-llep bench`; a "
            "trace is drawn by load and experts"
        ) from None
    found: dict[tuple[str, ...], Comparable] = {}
    read = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            result = Result.model_validate_json(line)
        except ValidationError as error:
            wrong = [".".join(map(str, e["loc"])) + f": {e['msg']}" for e in error.errors()]
            raise ValueError(
                f"{path}, line {number} is no result of `ds-llep bench`: "
                f"{'; '.join(wrong[:3]).removeprefix(': ')}"
            ) from None
        group = found.setdefault(tuple(result.conditions().values()), {})
        group[result.workload, result.mode] = result
        read += 1
    if not read:
        raise ValueError(f"{path} is empty; `ds-llep bench` writes a line for each result")
    again = read - sum(map(len, found.values()))
    if again:
        print(f"{path}: {again} of {read} lines left out: measured again further down")
    return list(found.values())


def describe(results: list[Comparable]) -> tuple[list[str], str]:
    """A title for each, of what it does not share with the others, and a caption for the rest."""
    conditions = [next(iter(group.values())).conditions() for group in results]
    apart = {key for key in conditions[0] if len({each[key] for each in conditions}) > 1}
    apart.add("shape")
    titles = [_enumerate(each[key] for key in each if key in apart) for each in conditions]
    drawn = [result for group in results for result in group.values()]

    def all_of(name: str, values: Iterable) -> str:
        return f"{name} {' and '.join(dict.fromkeys(map(str, values)))}"

    caption = [value for key, value in conditions[0].items() if key not in apart]
    caption.append(all_of("median of", (result.repeats for result in drawn)) + ", slowest rank")
    caption.append(all_of("torch", (result.versions.get("torch", "unknown") for result in drawn)))
    caption.append(all_of("commit", (result.commit or "unknown" for result in drawn)))
    return titles, _enumerate(caption)


def _enumerate(words: Iterable[str]) -> str:
    # Lines break at commas alone.
    return (
        ", ".join(filter(None, words))
        .replace(" ", "\N{NO-BREAK SPACE}")
        .replace(",\N{NO-BREAK SPACE}", ", ")
    )


def draw_bars(results: list[Comparable], time: str):
    """Speed-up over ``ep`` above peak memory, a panel for each shape, as in Figure 4 of LLEP.

    Args:
        time: a key of ``TIMES``.

    Raises:
        ValueError: nothing to compare in that time.
    """
    titles, caption = describe(results)
    panels = [_compare(title, group, time) for title, group in zip(titles, results, strict=True)]
    if all(np.isnan(row).all() for panel in panels for row in list(panel.rows[0].values())[1:]):
        raise ValueError(
            f"no workload has a {time} time of both ep and another mode; --time draws another one "
            f"of {', '.join(TIMES)}"
        )
    labels = [f"{time}:\nspeed-up over EP", "peak memory (GB)"]
    if all(np.isnan(row).all() for panel in panels for row in panel.rows[1].values()):
        panels, labels = [replace(panel, rows=panel.rows[:1]) for panel in panels], labels[:1]
    return bar_figure(panels, labels, caption)


def _compare(title: str, group: Comparable, time: str) -> Panel:
    workloads = list(dict.fromkeys(name for name, mode in group if mode != "ep_balanced"))
    if not workloads:
        print(f"{title}: not drawn, as only balanced routing was measured")
    # On balanced routing standard EP is its own ceiling, whichever of the two was measured.
    ceiling = group.get(("balanced", "ep_balanced")) or group.get(("balanced", "ep"))
    found: dict[tuple[str, str], Result | None] = {("balanced", "ep"): ceiling, **group}
    found |= {(name, "ep_balanced"): ceiling for name in workloads}

    def values(field: str, mode: str) -> np.ndarray:
        each = [getattr(found.get((name, mode)), field, None) for name in workloads]
        return np.array([np.nan if value is None else value for value in each])

    base = values(TIMES[time], "ep")
    speedup = {label: base / values(TIMES[time], mode) for mode, label in MODES.items()}
    memory = {label: values("peak_bytes", mode) / 1e9 for mode, label in MODES.items()}
    for what, row in ((f"speed-up in {time}", speedup), ("peak memory", memory)):
        missing = [
            f"{label} on {workloads[at]}"
            for label, numbers in row.items()
            for at in np.flatnonzero(np.isnan(numbers))
        ]
        if missing:
            print(f"{title}: no {what} of {', '.join(missing)}: not measured")
    return Panel(title, list(map(_short, workloads)), (speedup, memory))


def _short(workload: str) -> str:
    kind, colon, parameter = workload.partition(":")
    return kind + colon + (Path(parameter).stem if kind == "trace" else parameter)


def draw_breakdown(results: list[Comparable]):
    """The parts of llep's time, stacked, a panel for each shape.

    Raises:
        ValueError: no result of llep has them.
    """
    titles, caption = describe(results)
    panels = []
    for title, group in zip(titles, results, strict=True):
        ours = {name: result for (name, mode), result in group.items() if mode == "llep"}
        found = {name: each.breakdown_ms for name, each in ours.items() if each.breakdown_ms}
        missing = [name for name in ours if name not in found]
        if missing:
            print(f"{title}: no parts of LLEP's time on {', '.join(missing)}: not measured")
        if found:
            parts = dict.fromkeys(part for each in found.values() for part in each)
            row = {part: [each.get(part, np.nan) for each in found.values()] for part in parts}
            panels.append(Panel(title, list(map(_short, found)), (row,)))
    if not panels:
        raise ValueError('no line of mode "llep" has a "breakdown_ms"')
    return bar_figure(panels, ("time of LLEP (ms)",), caption, stacked=True)

"""Pictures of the results of ``ds-llep bench``: speed-up and memory, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ds_llep.bench.figures import Panel, bar_figure
from ds_llep.bench.results import Result, read

TIMES = {"forward": "forward_ms", "forward+backward": "forward_backward_ms", "step": "step_ms"}
MODES = {"ep": "EP", "llep": "LLEP", "ep_balanced": "EP, balanced routing"}


Comparable = dict[tuple[str, str], Result]
"""Results under the same conditions, by workload and mode."""


def group(path: Path) -> list[Comparable]:
    """The results in a file, in its order; of a point that was measured again, the last.

    Raises:
        ValueError: a file that is none of results.
        OSError: the file cannot be read.
    """
    found: dict[tuple[str, ...], Comparable] = {}
    results = read(path)
    for result in results:
        comparable = found.setdefault(tuple(result.conditions().values()), {})
        comparable[result.workload, result.mode] = result
    again = len(results) - sum(map(len, found.values()))
    if again:
        print(f"{path}: {again} of {len(results)} lines left out: measured again further down")
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
    for name in workloads:
        ours = group.get((name, "llep")) or group.get((name, "ep"))
        if ceiling is not None and _as_many_rows(ours, ceiling):
            found[name, "ep_balanced"] = ceiling

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


def _as_many_rows(one: Result, other: Result) -> bool:
    """Some workloads leave tokens out; then balanced routing of all of them is no ceiling."""
    floors = one.floor_forward_ms, other.floor_forward_ms
    return None in floors or abs(floors[0] - floors[1]) < 0.01 * floors[1]


def _short(workload: str) -> str:
    kind, colon, parameter = workload.partition(":")
    return kind + colon + (Path(parameter).stem if kind == "trace" else parameter)


PARTS = (  # of the picture: name, what it is made of
    ("expert products", ("home experts", "foreign experts")),
    ("all-to-all", ("/all-to-all",)),
    ("moving rows", ("/rows",)),
    (
        "router, counts, plan, addresses",
        ("router", "counts", "route", "wait for counts", "plan"),
    ),
    ("weights out, gradients home", ("fetch", "wait for foreign", "gradient return")),
    ("other parts", ()),
)


def _parts(breakdown_ms: dict[str, float]) -> dict[str, float]:
    """The time line's many parts, forward and backward, as the few of the picture."""
    found = dict.fromkeys([name for name, _ in PARTS], 0.0)
    inner = {name.split("/")[0] for name in breakdown_ms if "/" in name}
    for name, value in breakdown_ms.items():
        if name in inner:  # its inner parts are counted
            continue
        kinds = (kind for kind, members in PARTS if _belongs(name, members))
        found[next(kinds, PARTS[-1][0])] += value
    return found


def _belongs(name: str, members: tuple[str, ...]) -> bool:
    outer, slash, last = name.removesuffix(" backward").partition("/")
    return slash + last in members if slash else outer in members


def draw_breakdown(results: list[Comparable]):
    """The parts of llep's time, stacked, a panel for each shape.

    Raises:
        ValueError: no result of llep has them.
    """
    titles, caption = describe(results)
    panels = []
    for title, group in zip(titles, results, strict=True):
        ours = {name: result for (name, mode), result in group.items() if mode == "llep"}
        found = {n: _parts(each.breakdown_ms) for n, each in ours.items() if each.breakdown_ms}
        missing = [name for name in ours if name not in found]
        if missing:
            print(f"{title}: no parts of LLEP's time on {', '.join(missing)}: not measured")
        if found:
            row = {part: [each[part] for each in found.values()] for part, _ in PARTS}
            row = {part: values for part, values in row.items() if any(values)}
            panels.append(Panel(title, list(map(_short, found)), (row,)))
    if not panels:
        raise ValueError('no line of mode "llep" has a "breakdown_ms"')
    return bar_figure(panels, ("LLEP, mean of ranks (ms)",), caption, stacked=True)

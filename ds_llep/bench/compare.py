"""Two files of results side by side: what a change made faster, slower, larger or smaller."""

from __future__ import annotations

from ds_llep.bench import output
from ds_llep.bench.results import Result, read

MEASURED = (
    ("forward_ms", 1.0),
    ("forward_backward_ms", 1.0),
    ("step_ms", 1.0),
    ("peak_bytes", 1e9),
)


def show(before: str, after: str) -> int:
    """Print a table of the points that both files have, and name those that only one has.

    Raises:
        ValueError: a file without results, or no point in both.
        OSError: a file cannot be read.
    """
    old, new = _by_point(before), _by_point(after)
    common = [point for point in old if point in new]
    if not common:
        raise ValueError(
            f"{before} and {after} have no point in common, such as {', '.join(next(iter(old)))}"
        )
    columns = ["shape", "workload", "mode"]
    for name, _ in MEASURED:
        columns.append(
            name.replace("peak_bytes", "peak GB").replace("_ms", " ms").replace("_", " ")
        )
    rows = []
    for point in common:
        a, b = old[point], new[point]
        if a.zero_stage != b.zero_stage:  # it matters to the optimizer step alone
            a = a.model_copy(update={"step_ms": None})
        cells = [_change(getattr(a, name), getattr(b, name), unit) for name, unit in MEASURED]
        rows.append([a.shape or "-", a.workload, a.mode, *cells])
    output.table(f"{_label(before, old)} -> {_label(after, new)}", columns, rows)
    for path, points, others in ((before, old, new), (after, new, old)):
        alone = [", ".join(point) for point in points if point not in others]
        if alone:
            print(f"only in {path}: {len(alone)}, such as {alone[0]}")
    return 0


def _by_point(path: str) -> dict[tuple[str, ...], Result]:
    """Of results of the same point, the last one."""
    found = {}
    for result in read(path):
        conditions = result.conditions()
        del conditions["zero_stage"]
        found[(*conditions.values(), result.workload, result.mode)] = result
    return found


def _label(path: str, points: dict[tuple[str, ...], Result]) -> str:
    commits = sorted({str(result.commit) for result in points.values()})
    return f"{path} ({', '.join(commits)})"


def _change(old: float | None, new: float | None, unit: float) -> str:
    if not old or new is None:
        return "-"
    return f"{old / unit:.2f} -> {new / unit:.2f} ({100 * (new / old - 1):+.1f} %)"

"""Two files of results side by side: what a change made faster, slower, larger or smaller."""

from __future__ import annotations

from ds_llep.bench import output

SAME = ("shape", "num_experts", "hidden_size", "ffn_size", "top_k", "tokens", "layers", "ranks")
SAME += ("ep_size", "dtype", "device", "workload", "mode")
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
        raise ValueError(f"{before} and {after} have no point in common, that is equal {SAME}")
    columns = ["shape", "workload", "mode"]
    for name, _ in MEASURED:
        columns.append(
            name.replace("peak_bytes", "peak GB").replace("_ms", " ms").replace("_", " ")
        )
    rows = []
    for point in common:
        a, b = old[point], new[point]
        cells = [_change(a.get(name), b.get(name), unit) for name, unit in MEASURED]
        rows.append([a["shape"] or "-", a["workload"], a["mode"], *cells])
    output.table(f"{_label(before, old)} -> {_label(after, new)}", columns, rows)
    for path, points, others in ((before, old, new), (after, new, old)):
        alone = [f"{dict(zip(SAME, p, strict=True))}" for p in points if p not in others]
        if alone:
            print(f"only in {path}: {len(alone)}, such as {alone[0]}")
    return 0


def _by_point(path: str) -> dict[tuple, dict]:
    """Of results of the same point, the last one."""
    return {tuple(r.get(name) for name in SAME): r for r in output.read_json(path)}


def _label(path: str, points: dict[tuple, dict]) -> str:
    commits = sorted({str(record.get("commit")) for record in points.values()})
    return f"{path} ({', '.join(commits)})"


def _change(old: float | None, new: float | None, unit: float) -> str:
    if not old or new is None:
        return "-"
    return f"{old / unit:.2f} -> {new / unit:.2f} ({100 * (new / old - 1):+.1f} %)"

"""Draw what was measured, for print: ``ds-llep plot KIND FILE --out NAME``.

    bars       speed-up over standard expert parallelism, and peak memory; FILE: results of bench
    breakdown  which parts the time of llep has; FILE: results of bench
    load       rows of the ranks before and after the plan, step by step; FILE: a recorded trace
    experts    which experts are popular in which layer; FILE: a recorded trace

NAME.png and NAME.svg are written; a NAME that ends in .png or .svg is the only file. Where results
hold a point several times, the last one counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_llep.bench import figures, plot_results, plot_traces
from ds_llep.trace import Trace

SUFFIXES = (".png", ".svg")
RESULTS, TRACE = "results of `ds-llep bench`, JSON lines", "a recorded trace, .npz"
KINDS = {"bars": RESULTS, "breakdown": RESULTS, "load": TRACE, "experts": TRACE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, reads in KINDS.items():
        kind = kinds.add_parser(name)
        kind.add_argument("file", type=Path, metavar="FILE", help=reads)
        kind.add_argument("--out", required=True, type=Path, metavar="NAME", help="what to write")
        if name == "bars":
            kind.add_argument(
                "--time",
                choices=plot_results.TIMES,
                default="forward+backward",
                help="which time to compare (default: forward+backward)",
            )
        if name == "load":
            kind.add_argument("--layer", help="index or name (default: the most uneven layer)")


def run(args: argparse.Namespace) -> int:
    """Draw and save; the exit code.

    Raises:
        ValueError: a file that cannot be drawn, an output of another format, no matplotlib.
        OSError: a file that cannot be read or written.
    """
    outputs = _outputs(args.out)
    with figures.style():
        figure = _draw(args)
        for path in outputs:
            figures.save(figure, path)
            print(f"wrote {path}")
    return 0


def _draw(args: argparse.Namespace):
    if KINDS[args.kind] == RESULTS:
        results = plot_results.group(args.file)
        if args.kind == "bars":
            return plot_results.draw_bars(results, args.time)
        return plot_results.draw_breakdown(results)
    trace = Trace.load(args.file)
    if args.kind == "load":
        return plot_traces.draw_load(trace, args.layer)
    return plot_traces.draw_experts(trace)


def _outputs(name: Path) -> list[Path]:
    if name.suffix in SUFFIXES:
        return [name]
    if name.suffix:
        raise ValueError(
            f"--out {name}: {name.suffix} cannot be written; valid are {' and '.join(SUFFIXES)}, "
            "or a name without a suffix for both"
        )
    return [name.with_suffix(suffix) for suffix in SUFFIXES]

"""What the pictures of ``ds-llep plot`` share: style, legend, caption, files, panels of bars.

A figure has the size that it should be printed at, at most a page wide, with letters of 8 points or
more: what its width cannot hold goes below, nothing shrinks. The colours are Okabe and Ito's, which
colour-blind readers tell apart; lightness and hatches do it in grey. Nothing here needs a display:
figures are made without pyplot.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAGE, COLUMN = 7.0, 3.4  # inches: the text of a page, and of one of two columns
STYLES = (  # fill, hatch
    ("#E69F00", "////"),
    ("#0072B2", ""),
    ("#F0E442", "...."),
    ("#D55E00", "\\\\\\\\"),
    ("#56B4E9", ""),
    ("#009E73", "xxxx"),
    ("#CC79A7", "----"),
    ("#FFFFFF", ""),
)
RC = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#D0D0D0",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ds_llep",  # the same figure is the same file
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Figures are made and saved within it.

    Raises:
        ValueError: no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "drawing needs matplotlib, which is not installed: pip install 'ds_llep[tools]'"
        ) from None
    with matplotlib.rc_context(RC):
        yield


def new_figure(width: float, height: float):
    """An empty figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def finish(figure, caption: str) -> None:
    """A legend above all axes, of each name once, and a caption below them."""
    entries = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    for columns in range(len(entries), 0, -1):
        where = {"loc": "outside upper left", "ncols": columns}
        legend = figure.legend(entries.values(), entries, **where)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    lines = textwrap.fill(caption, int(figure.get_figwidth() * 16), break_long_words=False)
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=8)
    # Lay it out now, and not anew for every file.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def save(figure, path: Path) -> None:
    """Write a figure in the format that the path's suffix names.

    Raises:
        OSError: the path cannot be written.
    """
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


@dataclass(frozen=True)
class Panel:
    """Bars under the same conditions: ``rows`` of axes, one above the other, over the workloads."""

    title: str
    workloads: list[str]
    rows: tuple[dict[str, Sequence[float]], ...]
    """Of each row the series by name, with a value for each workload; NaN is no bar."""

    def split(self, most: int) -> list[Panel]:
        """Panels of at most as many workloads, which together are this one."""
        parts = []
        for start in range(0, len(self.workloads), most):
            part = slice(start, start + most)
            title = f"{self.title} (continued)" if start else self.title
            rows = tuple({name: row[name][part] for name in row} for row in self.rows)
            parts.append(Panel(title, self.workloads[part], rows))
        return parts


def bar_figure(panels: list[Panel], labels: Sequence[str], caption: str, stacked: bool = False):
    """Panels, as many side by side as a page is wide; bars side by side or stacked."""
    series = list(dict.fromkeys(name for panel in panels for row in panel.rows for name in row))
    # All in inches.
    bar = 0.4 if stacked else 0.14  # an upright number needs 0.12
    pitch = bar * (1 if stacked else len(series)) + 0.18
    label_width, ticks_width = 0.3, 0.42
    page = PAGE - label_width
    panels = [part for panel in panels for part in panel.split(int((page - ticks_width) / pitch))]
    inner = max(max(len(panel.workloads) for panel in panels) * pitch, 1.8)
    columns = min(len(panels), int(page / (inner + ticks_width)))
    lines = math.ceil(len(panels) / columns)
    width = max(label_width + columns * (inner + ticks_width), COLUMN)
    figure = new_figure(width, 0.8 + lines * (1.2 * len(labels) + 0.8))
    grid = figure.subplots(lines * len(labels), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for place, panel in enumerate(panels):
        line, column = divmod(place, columns)
        stack = grid[line * len(labels) :, column][: len(labels)]
        first, last = stack[0], stack[-1]
        for axes, row, label in zip(stack, panel.rows, labels, strict=True):
            axes.set_visible(True)
            _draw_row(axes, row, series, bar / pitch, stacked)
            axes.set_xlim(-0.5, inner / pitch - 0.5)
            axes.set_ylabel(label if column == 0 else "")
            axes.grid(axis="y")
            axes.set_xticks(range(len(panel.workloads)), panel.workloads)
            axes.tick_params(axis="x", length=0, labelbottom=axes is last)
        if max(map(len, panel.workloads)) * 0.07 > pitch:
            for text in last.get_xticklabels():
                text.set(rotation=35, ha="right", rotation_mode="anchor")
        title = textwrap.fill(panel.title, int(inner * 13), break_long_words=False)
        first.set_title(title, loc="left")
        if not stacked:
            first.axhline(1, color="black", linewidth=0.8, zorder=0.9)
            first.set_ylim(0, 1.35 * max(_highest(each.rows[0]) for each in panels))
    finish(figure, caption)
    return figure


def _highest(row: dict[str, Sequence[float]]) -> float:
    return np.nan_to_num([*row.values()]).max()


def _draw_row(axes, row: dict, series: list[str], bar: float, stacked: bool) -> None:
    """Bars of one axes, ``bar`` wide where two workloads are 1 apart, with numbers on them."""
    places = np.arange(len(next(iter(row.values()))))
    total = np.zeros(len(places))
    for index, name in enumerate(series):
        values = np.nan_to_num(row.get(name, np.zeros(len(places))))
        shift = 0 if stacked else (index - (len(series) - 1) / 2) * bar
        fill, hatch = STYLES[index % len(STYLES)]
        axes.bar(
            places + shift,
            values,
            bar,
            total if stacked else 0,
            color=fill,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.5,
            label=name,
        )
        total = total + values if stacked else values
        if not stacked or index == len(series) - 1:
            for place, value in zip(places + shift, total, strict=True):
                if value:
                    _write_number(axes, place, value, 0 if stacked else 90)
    axes.set_ylim(0, 1.35 * axes.dataLim.y1 or 1)


def _write_number(axes, place: float, value: float, rotation: int) -> None:
    axes.annotate(
        f"{value:.2f}" if value < 100 else f"{value:.0f}",
        (place, value),
        (0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=rotation,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0},
    )

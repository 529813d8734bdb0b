"""What all pictures of ``ds-llep plot`` share: style, colours, legend, caption, files.

A figure has the size that it should be printed at, at most a page wide, with letters of 8 points or
more: what its width cannot hold goes below, nothing shrinks. The colours are Okabe and Ito's, which
colour-blind readers tell apart; lightness and hatches do it in grey. Nothing here needs a display:
figures are made without pyplot.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

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

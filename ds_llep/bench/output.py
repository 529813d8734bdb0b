"""What benchmarks print and keep: tables on the terminal, JSON lines in files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("deepspeed", "triton", "transformers", "numpy")


def check_rich() -> None:
    """Find out before a long run that its results could not be printed.

    Raises:
        ValueError: the package ``rich`` is missing.
    """
    try:
        import rich.console
        import rich.table  # noqa: F401
    except ImportError:
        raise ValueError(
            "the tables need the package rich: pip install 'ds_llep[tools]' (or rich)"
        ) from None


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; columns of numbers are aligned to the right.

    Raises:
        ValueError: the package ``rich`` is missing.
    """
    check_rich()
    from rich.console import Console
    from rich.table import Table

    rows = [[str(cell) for cell in row] for row in rows]
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        number = any(row[index].lstrip("+-")[:1].isdigit() for row in rows)
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    # As wide as it needs: a terminal that is narrower breaks lines, where rich would cut numbers.
    Console(width=250).print(made)


def number(value: float | None, digits: int = 2) -> str:
    """A cell: the number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def gigabytes(nbytes: int | None) -> str:
    """A cell: bytes in GB, or a dash where they were not counted."""
    return "-" if nbytes is None else f"{nbytes / 1e9:.3g}"


def check_writable(path: str | None) -> None:
    """Find out before a long run that its results could not be kept.

    Raises:
        ValueError: a file at ``path`` could not be written, and why.
    """
    if path is None:
        return
    is_new = not os.path.exists(path)
    try:
        open(path, "a").close()
        if is_new:
            os.remove(path)
    except OSError as error:
        raise ValueError(f"cannot write {path!r}: {error.strerror}; name another file") from None


def append_json(path: str | None, records: Sequence[dict]) -> int:
    """Append a line for each record; where that fails, print the lines. The exit code."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if path is None:
        return 0
    try:
        with open(path, "a") as file:
            file.write(lines)
    except OSError as error:
        print(f"cannot write {path!r}: {error.strerror}. The results:", file=sys.stderr)
        print(lines, end="")
        return 2
    return 0


def origin() -> dict[str, Any]:
    """What every record says of where it is from."""
    command = " ".join(["ds-llep", *sys.argv[1:]])
    return {"versions": versions(), "commit": commit(), "command": command}


def versions() -> dict[str, str]:
    """Python's and the packages' that matter here."""
    # PyTorch's own word for itself: unlike its metadata it always names the CUDA build.
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit that this package runs from, with ``+`` if files differ; None without git."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        command = ["git", "-C", os.fspath(here), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie in a repository that is not this one.
        if git("ls-files", "--error-unmatch", Path(__file__).name):
            return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "-s") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    return None

"""Traces: what the router chose in a run, to summarise it, to replay it, to tune the planner.

A trace is one ``.npz`` file of counts, which any NumPy reads. ``S`` is the micro-batches in it, of
those that global rank 0's EP group had; ``P`` and ``E`` are that group's ranks and experts.

    counts_000, ...    uint32 [S, P, E], one array a layer, in the order of ``layer_names``: tokens
                       of source rank p that chose expert e; zeros where the layer did not run
    micro_batches      int64 [S], running numbers, from 0 at the start of the run
    steps              int64 [S], optimizer steps that were done before (``engine.global_steps``)
    training           bool [S], whether the layers were in training mode; else in evaluation
    about              a JSON string: ``format`` (1), ``ds_llep`` (its version), ``layer_names``,
                       ``top_k``, ``hidden_size``, ``ffn_size`` (lists, by layer), ``ep_size``,
                       ``dtype`` (what the experts compute in), ``llep`` (the config section)
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
_BY_LAYER = {"layer_names": str, "top_k": int, "hidden_size": int, "ffn_size": int}


@dataclass(frozen=True, eq=False)
class Trace:
    """A recorded run. Arrays are read-only; ``len(layer_names)`` layers, ``len(steps)`` rows."""

    layer_names: tuple[str, ...]
    top_k: tuple[int, ...]
    """K by layer, as are the next two."""
    hidden_size: tuple[int, ...]
    ffn_size: tuple[int, ...]
    ep_size: int
    """P."""
    dtype: str
    """What the experts computed in, such as ``"bfloat16"``."""
    llep: dict[str, Any]
    """The run's ``"llep"`` section, with defaults."""
    ds_llep: str
    """The version that recorded it."""
    micro_batches: np.ndarray
    """int64 [S]: running numbers; more than 1 apart where micro-batches were left out."""
    steps: np.ndarray
    """int64 [S]: optimizer steps before the micro-batch."""
    training: np.ndarray
    """bool [S]: False in evaluation."""
    layers: tuple[np.ndarray, ...]
    """uint32 [S, P, E] by layer, which may differ in E."""

    @property
    def num_micro_batches(self) -> int:
        """S."""
        return len(self.steps)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def counts(self, micro_batch: int, layer: int) -> np.ndarray:
        """int64 ``[P, E]``: row p is source rank p's tokens per expert, as ``make_plan`` takes it.

        Args:
            micro_batch: which of the recorded ones, 0 to S - 1.
            layer: index in ``layer_names``.
        """
        return self.layers[layer][micro_batch].astype(np.int64)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace.

        Raises:
            ValueError: the file is no trace, is damaged, or holds nothing.
            OSError: it cannot be read.
        """
        with open(path, "rb") as file:
            try:
                if not zipfile.is_zipfile(file):
                    raise ValueError("it is no .npz archive, or only the beginning of one")
                file.seek(0)
                with np.load(file, allow_pickle=False) as archive:
                    return _parse(dict(archive))
            except Exception as error:  # a damaged archive can raise anything
                what = f"it has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{path} cannot be read as a trace: {what}") from error


def _parse(arrays: dict[str, np.ndarray]) -> Trace:
    about = json.loads(arrays["about"].item())
    if about["format"] != FORMAT:
        raise ValueError(
            f"it has format {about['format']}, written by ds_llep {about['ds_llep']}; this version "
            f"reads format {FORMAT}"
        )
    num_layers, rows = len(about["layer_names"]), len(arrays["steps"])
    for key, kind in _BY_LAYER.items():
        values = about[key]
        if len(values) != num_layers or not all(type(value) is kind for value in values):
            raise ValueError(f'"{key}" of "about" is not one {kind.__name__} a layer')
    layers = tuple(arrays[_counts_name(index)] for index in range(num_layers))
    for array in layers:
        if array.dtype != np.uint32 or array.ndim != 3:
            raise ValueError(f"counts are {array.dtype} {array.shape}, expected uint32 [S, P, E]")
        if array.shape[:2] != (rows, about["ep_size"]):
            raise ValueError(f"counts have shape {array.shape} at {rows} steps")
    by_row = {"micro_batches": np.int64, "steps": np.int64, "training": np.bool_}
    for key, dtype in by_row.items():
        if arrays[key].dtype != dtype or arrays[key].shape != (rows,):
            raise ValueError(f'"{key}" is not one {np.dtype(dtype)} a micro-batch')
    if not rows:
        raise ValueError("it holds no micro-batch: its run ended before the first one")
    for array in arrays.values():
        array.setflags(write=False)
    return Trace(
        **{key: tuple(about[key]) for key in _BY_LAYER},
        **{key: about[key] for key in ("ep_size", "dtype", "llep", "ds_llep")},
        **{key: arrays[key] for key in by_row},
        layers=layers,
    )


def write(
    path: Path,
    about: dict[str, Any],
    rows: Sequence[tuple[int, int, bool]],
    layers: Sequence[np.ndarray],
) -> None:
    """Write a trace, so that nobody ever sees half of one under this name.

    Args:
        path: the file.
        about: as the module's docstring says, without the format.
        rows: running number, step and mode of each micro-batch.
        layers: uint32 [S, P, E] by layer.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    micro_batches, steps, training = zip(*rows, strict=True) if rows else ((), (), ())
    arrays = {
        "about": np.array(json.dumps({"format": FORMAT, **about})),
        "micro_batches": np.array(micro_batches, dtype=np.int64),
        "steps": np.array(steps, dtype=np.int64),
        "training": np.array(training, dtype=np.bool_),
    }
    arrays |= {_counts_name(layer): counts_SPE for layer, counts_SPE in enumerate(layers)}
    partial = path.with_name(f"{path.name}.partial")
    try:
        # What numpy.savez_compressed writes, at zlib's fastest level: an eighth of the time.
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _counts_name(layer: int) -> str:
    return f"counts_{layer:03d}"

"""Recording the router's choices while a run trains, into a file that :mod:`ds_llep.trace` reads.

Counts are kept whole, in bounded memory: a full recorder drops every second micro-batch and from
then on records half as many, so that a long run stays covered evenly, at the price of detail. Only
global rank 0 records, what its own EP group's plans were made from: nothing is exchanged for it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import numpy as np

from ds_llep.compat import __version__
from ds_llep.config import SECTION, LLEPConfig
from ds_llep.shards import whole_shape
from ds_llep.trace import write

_LOG = logging.getLogger(__name__)


def open_recorder(config: LLEPConfig, layers: Mapping[str, Any], ep_size: int) -> Recorder | None:
    """Global rank 0's recorder; None elsewhere, and where no trace is asked for.

    A collective over all processes where one is.

    Raises:
        ValueError: on every rank, if the trace cannot be written or has no room.
    """
    trace = config.trace
    if not trace.enabled:
        return None
    num_experts = [layer.num_experts for layer in layers.values()]
    least = 2 * micro_batch_bytes(ep_size, num_experts)
    if trace.max_bytes < least:
        raise ValueError(
            f'"{SECTION}.trace.max_bytes": {trace.max_bytes} has no room for two micro-batches of '
            f"{len(layers)} MoE layer(s) and {ep_size} rank(s). Give it {least} or more."
        )
    recorder, failure = None, [None]
    if dist.get_rank() == 0:
        about = {
            "ds_llep": __version__,
            "layer_names": list(layers),
            "top_k": [layer.top_k for layer in layers.values()],
            "hidden_size": [layer.hidden_size for layer in layers.values()],
            "ffn_size": [whole_shape(layer.experts.w2)[2] for layer in layers.values()],
            "ep_size": ep_size,
            "llep": config.model_dump(),
        }
        try:
            recorder = Recorder(trace.path, trace.interval, trace.max_bytes, num_experts, about)
        except Exception as error:  # whatever it is, the others wait for it
            failure = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ValueError(
            f'"{SECTION}.trace": rank 0 cannot record to {trace.path!r} ({failure[0]}). Set '
            f'"{SECTION}.trace.path" to a file in a folder that is there and that rank 0 may write '
            f'to, lower "{SECTION}.trace.max_bytes" if memory is short, or set '
            f'"{SECTION}.trace.enabled" to false.'
        )
    return recorder


def micro_batch_bytes(ranks: int, num_experts: Sequence[int]) -> int:
    """Bytes that a recorder needs for a micro-batch.

    Args:
        ranks: P.
        num_experts: E of each layer.
    """
    return ranks * sum(num_experts) * np.dtype(np.uint32).itemsize


class Recorder:
    """Keeps counts in memory and writes them, whole, to a file of its own.

    Args:
        path: the file; where it exists, ``name.1.npz``, ``name.2.npz``, ... is used.
        interval: one micro-batch of so many is recorded.
        max_bytes: memory for counts; room for two micro-batches at least.
        num_experts: E of each layer.
        about: goes into the file, see :func:`ds_llep.trace.write`.

    Raises:
        OSError: the file cannot be written.
        MemoryError: there is no room for ``max_bytes``.
    """

    def __init__(
        self,
        path: str | Path,
        interval: int,
        max_bytes: int,
        num_experts: Sequence[int],
        about: dict[str, Any],
    ) -> None:
        ranks = about["ep_size"]
        self._about = about
        self._interval = interval
        # Even: the micro-batch for which there is no room is then one that half of them leave in.
        self._capacity = max_bytes // micro_batch_bytes(ranks, num_experts) // 2 * 2
        # Zeros that nobody has touched take no memory yet.
        shapes = [(self._capacity, ranks, experts) for experts in num_experts]
        self._counts = [np.zeros(shape, dtype=np.uint32) for shape in shapes]
        self._rows: list[tuple[int, int, bool]] = []  # micro-batch, step, training
        self._passed = 0
        self._recording = False
        self._unwritten = False
        self._due = 1
        self.path = _claim(Path(path).absolute())
        try:
            self._write()
        except BaseException:
            self.path.unlink()
            raise

    def begin(self, step: int, training: bool, dtype: str) -> None:
        """A micro-batch begins, and with it the one before is complete."""
        if self._unwritten and len(self._rows) >= self._due:
            self.flush()
        number = self._passed
        self._passed += 1
        self._recording = number % self._interval == 0
        if self._recording:
            if len(self._rows) == self._capacity:
                self._thin_out()
            for counts_SPE in self._counts:
                counts_SPE[len(self._rows)] = 0
            self._rows.append((number, step, training))
            self._about["dtype"] = dtype
            self._unwritten = True

    def add(self, layer: int, counts_PE: np.ndarray) -> None:
        """A layer's counts in the micro-batch that has begun."""
        if self._recording:
            self._counts[layer][len(self._rows) - 1] = counts_PE

    def flush(self) -> None:
        """Write what is not in the file yet. A failure is a warning; the next write has it all."""
        if not self._unwritten:
            return
        try:
            self._write()
            self._unwritten = False
        except Exception as error:  # whatever it is, training goes on
            _LOG.warning(
                "llep: the trace could not be written to %s (%s: %s). Training goes on; what was "
                "recorded stays in memory, for the next write",
                *(self.path, type(error).__name__, error),
            )
        # By an eighth each time: a job that is killed loses little, and all writes of a growing
        # trace together are nine times its size.
        self._due = len(self._rows) + len(self._rows) // 8 + 1

    def _thin_out(self) -> None:
        self._rows = self._rows[::2]
        for counts_SPE in self._counts:
            counts_SPE[: len(self._rows)] = counts_SPE[::2]
        self._interval *= 2
        self._due = len(self._rows) + len(self._rows) // 8 + 1
        _LOG.warning(
            'llep: the trace has filled "llep.trace.max_bytes": every second micro-batch in it is '
            "dropped, and from now on one of %d is recorded",
            self._interval,
        )

    def _write(self) -> None:
        rows = self._rows
        write(self.path, self._about, rows, [counts[: len(rows)] for counts in self._counts])


def _claim(path: Path) -> Path:
    """Create an empty file, of this name or of the first one with a number that is free."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    numbered = (path.with_stem(f"{path.stem}.{number}") for number in itertools.count(1))
    for candidate in itertools.chain([path], numbered):
        try:
            candidate.open("xb").close()
            return candidate
        except FileExistsError:
            continue
    raise AssertionError("the numbers do not end")

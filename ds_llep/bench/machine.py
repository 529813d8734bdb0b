"""What the cost model knows of a machine: rates and latencies, kept as JSON.

A rate that depends on a size is a list of points. Times between two points are interpolated, not
rates, so that two points are a latency and a bandwidth, as links have them. Nothing here says where
a number comes from but `measured`, in words, and `given`, the names of the fields that nobody has
measured: a prediction is no better than they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Points = tuple[tuple[float, float], ...]
"""(size, rate), ascending in size."""

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of an element


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates in FLOP/s or bytes/s, times in seconds, all of one rank while all ranks do the same.

    Raises:
        ValueError: a field of the wrong type, or a number that is not above 0.
    """

    name: str
    measured: str
    """How the numbers came about: hardware, software, method."""
    given: tuple[str, ...]
    """The fields that were not measured."""
    dtype: str
    """What rows and weights are in, and the rates of products are for."""
    ranks_per_node: int
    dense_rate: float
    """FLOP/s of one large matrix product."""
    grouped_rate: Points
    """(rows of a group, FLOP/s) of a product over groups of rows, its tiles counted whole."""
    tile: tuple[int, int]
    """Rows and columns of the output that one processor computes at a time."""
    processors: int
    """How many tiles are computed at once."""
    memory_rate: float
    """bytes/s, read and written together, of a pass that moves rows."""
    local_rate: float
    """bytes/s of an all-to-all's rows that stay on their rank."""
    all_to_all_inside: Points
    """(bytes that a rank sends to others, bytes/s) inside a node."""
    all_to_all_between: Points
    """The same to other nodes."""
    point_to_point_inside: Points
    """(bytes from one rank to another and as many back, bytes/s of one direction) inside a node."""
    point_to_point_between: Points
    """The same between nodes."""
    latency_inside: float
    """Seconds of a small all-gather whose result the host reads, inside a node."""
    latency_between: float
    """The same between nodes."""
    plan_seconds_per_expert: float
    """Host seconds of a plan for each expert."""
    plan_seconds_per_choice: float
    """Host seconds of a plan for each spill and each rank that it is chosen from."""
    overhead_forward: float
    """Seconds of a layer's forward beside all else: launches, index maps, the router."""
    overhead_backward: float
    """The same of its backward."""
    autoep_overhead_forward: float
    """Seconds of an AutoEP layer's forward beside all else, its exchange of counts among them."""
    autoep_overhead_backward: float
    """The same of its backward."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _CHECKS[field.type](getattr(self, field.name), f"machine: {field.name}")
            object.__setattr__(self, field.name, value)
        if self.dtype not in DTYPES:
            raise ValueError(f"machine: dtype is {self.dtype!r}; valid are {', '.join(DTYPES)}")
        unknown = set(self.given) - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise ValueError(f"machine: given names no fields: {', '.join(sorted(unknown))}")

    @classmethod
    def load(cls, path: str | Path) -> Machine:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: no JSON object, keys missing or unknown, a value that is not valid.
            OSError: the file cannot be read.
        """
        try:
            values = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a machine is a JSON object, as ds-llep calibrate writes it")
        names = {field.name for field in dataclasses.fields(cls)}
        wrong = [f"missing: {name}" for name in sorted(names - values.keys())]
        wrong += [f"unknown: {name}" for name in sorted(values.keys() - names)]
        if wrong:
            raise ValueError(
                f"{path} is no machine of this version ({', '.join(wrong)}); write one with "
                "ds-llep calibrate --out FILE"
            )
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        values = dataclasses.asdict(self).items()
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in values]
        return "{\n" + ",\n".join(lines) + "\n}"


def seconds(points: Points, sizes: np.ndarray | float) -> np.ndarray:
    """Seconds for each size; 0 for size 0, and never less for more.

    Below the first point, time falls to what the first two points leave as latency; above the last
    one, its rate holds.
    """
    at = np.array([size for size, _ in points], dtype=float)
    took = np.maximum.accumulate(at / [rate for _, rate in points])
    latency = 0.0
    if len(at) > 1:
        latency = max(0.0, took[0] - (took[1] - took[0]) / (at[1] - at[0]) * at[0])
    sizes = np.asarray(sizes, dtype=float)
    within = np.interp(sizes, [0.0, *at], [latency, *took])
    return np.where(sizes > 0, within * np.maximum(sizes / at[-1], 1.0), 0.0)


def find(name: str) -> Machine:
    """A built-in machine by name, or one from a file.

    Raises:
        ValueError: neither, or a file that is no machine.
        OSError: the file cannot be read.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not Path(name).exists():
        raise ValueError(
            f"no machine {name!r}: valid are {', '.join(BUILT_IN)} and files that ds-llep "
            "calibrate --out FILE wrote"
        )
    return Machine.load(name)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {value!r}; valid is a number above 0")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{where} is {value}; valid is a number above 0")
    return float(value)


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where} is {value!r}; valid is an integer of 1 or more")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} is {value!r}; valid is a text that is not empty")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is {value!r}; valid is a list of texts")
    return tuple(_text(item, where) for item in value)


def _pair(value: Any, where: str) -> tuple:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{where} has {value!r}; valid is a pair of numbers")
    return tuple(value)


def _tile(value: Any, where: str) -> tuple[int, int]:
    return tuple(_whole(item, where) for item in _pair(value, where))


def _points(value: Any, where: str) -> Points:
    valid = "valid is a list of pairs [size, rate], ascending in size, at least one"
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{where} is {value!r}; {valid}")
    points = tuple(tuple(_number(item, where) for item in _pair(p, where)) for p in value)
    sizes = [size for size, _ in points]
    if sizes != sorted(set(sizes)):
        raise ValueError(f"{where} has sizes {sizes}; {valid}")
    return points


_CHECKS = {  # by the fields' annotations
    "str": _text,
    "tuple[str, ...]": _texts,
    "int": _whole,
    "tuple[int, int]": _tile,
    "float": _number,
    "Points": _points,
}

_MIB, _GIB = 2**20, 2**30
H200 = Machine(
    name="h200",
    measured="2 x H200 of one host (NVLink), torch 2.11, bf16. Fitted to the times of one layer of "
    "three shapes at three skews, AutoEP's and llep's (docs/simulate.md): grouped_rate, local_rate "
    "and the overheads",
    given=(
        "ranks_per_node",
        "tile",
        "all_to_all_between",
        "point_to_point_between",
        "latency_inside",
        "latency_between",
    ),
    dtype="bfloat16",
    ranks_per_node=8,
    dense_rate=741e12,
    grouped_rate=((1024, 670e12),),
    tile=(128, 256),
    processors=132,
    memory_rate=2 * 755e6 / 0.35e-3,
    local_rate=800e9,
    all_to_all_inside=((64 * _MIB, 177e9), (_GIB, 295e9)),
    all_to_all_between=((_GIB, 45e9),),
    point_to_point_inside=((64 * _MIB, 228e9), (_GIB, 336e9)),
    point_to_point_between=((_GIB, 45e9),),
    latency_inside=50e-6,
    latency_between=100e-6,
    plan_seconds_per_expert=0.4e-6,
    plan_seconds_per_choice=0.04e-6,
    overhead_forward=0.8e-3,
    overhead_backward=0.3e-3,
    autoep_overhead_forward=0.5e-3,
    autoep_overhead_backward=0.3e-3,
)
BUILT_IN = {"h200": H200}

"""What a machine can do, and what a layer's work therefore costs planner "cost".

Few rates, each of the whole of what it stands for: the price is accuracy, the gain that they are
measured in a moment or written down by hand. They are integers, so that prices follow from them by
exact arithmetic and are the same on every rank.

Shape letters: `D` hidden size, `F` expert FFN size, `K` experts per token, `P` ranks of the EP
group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ds_llep.config import SECTION, CostConfig, GivenRates
from ds_llep.costs import Costs
from ds_llep.kernels.planner_cost import library
from ds_llep.ranks import on_every_rank, on_rank_0

PICOSECONDS = 10**12
UNITS = {
    "tflops": 10**12,
    "inside_gbytes": 10**9,
    "between_gbytes": 10**9,
    "expert_us": 10**6,
    "exposed": 10**3,
    "spill_us": 10**6,
}
"""The config's and the file's keys, in the order of the fields of :class:`Rates`, and how many of
its units are one of theirs."""


@dataclass(frozen=True)
class Rates:
    """Of one rank while all ranks do the same."""

    flops: int
    """FLOP/s at the experts' products."""
    inside: int
    """bytes/s to other ranks of the node."""
    between: int
    """bytes/s to other nodes."""
    expert: int
    """Picoseconds of one more foreign expert, beside its rows."""
    exposed: int
    """Thousandths of a weight transfer that other work does not hide."""
    spill: int
    """Picoseconds of any spill in a layer, beside what it computes and moves."""

    @classmethod
    def of(cls, known: dict[str, float]) -> Rates:
        """From the config's keys and units. Without one of the two links, both are like the other:
        no EP group has links of that kind."""
        values = dict(known)
        values.setdefault("inside_gbytes", known.get("between_gbytes"))
        values.setdefault("between_gbytes", known.get("inside_gbytes"))
        return cls(*(round(values[key] * unit) for key, unit in UNITS.items()))

    def in_units(self) -> dict[str, float]:
        """By the config's keys, in its units."""
        values = vars(self).values()
        return {key: value / UNITS[key] for key, value in zip(UNITS, values, strict=True)}

    def __str__(self) -> str:
        return ", ".join(f"{key} {value:.4g}" for key, value in self.in_units().items())

    def costs(
        self,
        hidden_size: int,
        ffn_size: int,
        top_k: int,
        num_ranks: int,
        element_size: int,
        fetches: int,
    ) -> Costs:
        """The prices of one layer.

        Args:
            hidden_size, ffn_size, top_k, num_ranks: D, F, K, P.
            element_size: bytes of an element of rows, weights and the gradients that travel.
            fetches: how often foreign weights travel: 1 where they are kept for backward, else 2.
        """
        D, F, K, P = hidden_size, ffn_size, top_k, num_ranks
        # 6 D F in forward: a multiplication and an addition in three products; twice as many in
        # backward.
        row = 18 * D * F * PICOSECONDS // self.flops
        # A token travels to a rank once for all of its copies there, so that only a copy that is
        # the token's only one there is a parcel more: of K independent choices among P ranks,
        # (1 - 1 / P)^(K - 1) of them.
        parcels = Fraction((P - 1) ** (K - 1), P ** (K - 1))
        # There and back, and in backward once more.
        copy = 4 * D * element_size * parcels * PICOSECONDS
        # The gradients of an expert are as large as its weights.
        weights = (fetches + 1) * 3 * D * F * element_size * PICOSECONDS
        weights *= Fraction(self.exposed, UNITS["exposed"])
        return Costs(
            row=max(1, row),
            expert=self.expert,
            copy_inside=int(copy / self.inside),
            copy_between=int(copy / self.between),
            weights_inside=int(weights / self.inside),
            weights_between=int(weights / self.between),
            spill=self.spill,
        )


# Where nobody has measured anything: an H200 in a node of eight, with 400 Gbit/s to other nodes.
H200 = Rates.of(
    {
        "tflops": 600,
        "inside_gbytes": 250,
        "between_gbytes": 45,
        "expert_us": 10,
        "exposed": 0.5,
        "spill_us": 860,
    }
)


def find_rates(
    config: CostConfig, measure: Callable[[Sequence[str]], dict[str, float]]
) -> tuple[Rates, str]:
    """The rates that all ranks plan with, and where each is from. A collective over all processes.

    The planner itself is compiled first: a node without a compiler is an error everywhere. What the
    config gives is not looked for in the file, and what is in the file is not measured.

    Args:
        config: the ``"cost"`` section.
        measure: of some of the keys of :data:`UNITS`, the same on every rank; called by all of
            them. Keys that cannot be measured here may be missing from what it returns.

    Raises:
        ValueError: on every rank, if the file cannot be read or written, or holds no rates, or if
            any rank cannot compile the planner.
    """
    on_every_rank(library)
    given = config.model_dump(include=set(UNITS), exclude_none=True)
    # Another node may have another file of this name, or none: rank 0's is everyone's.
    given, kept = _on_first_rank(lambda: (given, _load(config.file)))
    missing = [key for key in UNITS if key not in {**kept, **given}]
    measured = measure(missing) if missing else {}
    if measured:
        _on_first_rank(lambda: _save({**kept, **measured}, config.file))
    used = {key: value for key, value in kept.items() if key not in given}
    sources = {"measured": measured, f"from {config.file}": used, "given": given}
    sources = {name: values for name, values in sources.items() if values}
    said = "; ".join(f"{', '.join(values)} {name}" for name, values in sources.items())
    return Rates.of({**measured, **used, **given}), said if len(sources) > 1 else "".join(sources)


def _load(path: str | None) -> dict[str, float]:
    if path is None:
        return {}
    try:
        values = json.loads(Path(path).read_text())
        if not isinstance(values, dict):
            raise ValueError(f"rates are a JSON object with the keys {', '.join(UNITS)}")
        return GivenRates(**values).model_dump(exclude_none=True)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(
            f'"{SECTION}.cost.file": {path}: {error}. Repair it, or remove it to have the rates '
            "measured"
        ) from None


def _save(values: dict[str, float], path: str | None) -> None:
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise ValueError(
            f'"{SECTION}.cost.file": the measured rates cannot be written to {path}: '
            f"{error.strerror}. Name a file in a folder that exists and that rank 0 may write to"
        ) from None


def _on_first_rank(work: Callable[[], object]) -> object:
    """What rank 0 gets; its error on every rank."""
    result, failure = on_rank_0(work)
    if failure is not None:
        raise ValueError(failure[1])
    return result

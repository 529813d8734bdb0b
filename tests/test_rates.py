"""Prices from rates, and rates from the config, a file or a measurement, alike on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed.comm as dist
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_llep.config import LEAST_RATE, CostConfig
from ds_llep.rates import H200, UNITS, Rates, find_rates

RATES = st.builds(
    Rates,
    flops=st.integers(10**8, 10**15),
    inside=st.integers(10**5, 10**13),
    between=st.integers(10**5, 10**13),
    expert=st.integers(1, 10**12),
    exposed=st.integers(0, 1000),
    spill=st.integers(0, 10**12),
)


@given(
    RATES,
    st.integers(1, 8192),
    st.integers(1, 4096),
    st.integers(1, 10),
    st.integers(2, 256),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 2]),
)
def test_prices(rates, D, F, K, P, element_size, fetches):
    """Work over rate, in picoseconds; a price is at most one of them too low."""
    costs = rates.costs(D, F, K, P, element_size, fetches)
    assert all(isinstance(price, int) for price in vars(costs).values())
    seconds = (6 + 12) * D * F / rates.flops  # three products forward, six backward
    assert costs.row == pytest.approx(seconds * 1e12, rel=1e-9, abs=1.0) and costs.row >= 1
    assert costs.expert == rates.expert and costs.spill == rates.spill
    # A token's copies on a rank travel as one: parcels that one copy more adds, where choices are
    # spread evenly.
    T = 10**5
    parcels = [T * (1 - (1 - copies / (T * K)) ** K) for copies in (T * K / P, T * K / P - 1)]
    share = parcels[0] - parcels[1]
    bundle = 3 * D * F * element_size * (fetches + 1) * rates.exposed / 1000
    for rate, copy, weights in (
        (rates.inside, costs.copy_inside, costs.weights_inside),
        (rates.between, costs.copy_between, costs.weights_between),
    ):
        expected = 4 * D * element_size * share / rate * 1e12
        assert copy == pytest.approx(expected, rel=1e-3, abs=1.0)
        assert weights == pytest.approx(bundle / rate * 1e12, rel=1e-9, abs=1.0)


def test_prices_by_hand():
    """Qwen3-30B-A3B in bf16 on eight H200s: 28.3 MFLOP a row, 9.4 MB an expert."""
    costs = H200.costs(2048, 768, top_k=1, num_ranks=8, element_size=2, fetches=2)
    assert costs.row == 47_185  # 18 * 2048 * 768 / 600e12 s
    assert costs.copy_inside == 65_536  # 4 * 4096 / 250e9 s: each copy is a parcel
    assert costs.copy_between == 364_088
    assert costs.weights_inside == 56_623_104  # 3 * 9.437184e6 / 250e9 s, half of it exposed
    assert costs.weights_between == 314_572_800
    assert costs.expert == 10_000_000
    assert costs.spill == 860_000_000


@given(st.integers(1, 10**6), st.sampled_from([1, 8, 256]))
def test_the_worst_rates_fit_into_64_bits(rows, num_ranks):
    """Of a large model, all rows of a rank at once."""
    given = dict.fromkeys(("tflops", "inside_gbytes", "between_gbytes"), LEAST_RATE)
    worst = Rates.of({**given, "expert_us": 1e6, "exposed": 1.0, "spill_us": 1e6})
    costs = worst.costs(7168, 2048, 8, num_ranks, 4, 2)
    assert rows * costs.row + 256 * costs.expert < 2**62
    assert rows * costs.copy_between < 2**61 and 256 * costs.weights_between < 2**61


@given(RATES)
def test_units(rates):
    assert Rates.of(rates.in_units()) == rates
    assert list(rates.in_units()) == list(UNITS)
    for key, value in rates.in_units().items():
        assert f"{key} {value:.4g}" in str(rates)


def test_a_link_that_nobody_has():
    known = H200.in_units()
    for missing, other in (("inside", "between"), ("between", "inside")):
        rest = {key: value for key, value in known.items() if key != f"{missing}_gbytes"}
        rates = Rates.of(rest)
        assert rates.inside == rates.between == getattr(H200, other)


MEASURED = {
    "tflops": 123.4,
    "inside_gbytes": 56.7,
    "between_gbytes": 8.9,
    "expert_us": 12.5,
    "exposed": 0.625,
    "spill_us": 345.5,
}


def find(folder: str, own_file: bool, settings: dict, lacking: tuple[str, ...] = ()) -> dict:
    """On every rank: the rates, or the error; with a file of its own where ``own_file``."""
    asked = []

    def measure(keys):
        asked.append(list(keys))
        return {key: MEASURED[key] for key in keys if key not in lacking}

    name = f"{folder}/rates{dist.get_rank() if own_file else ''}.json"
    config = CostConfig(**{"file": name, **settings})
    try:
        rates, said = find_rates(config, measure)
    except ValueError as error:
        return {"error": str(error)}
    return {"rates": rates, "said": said, "asked": asked}


def test_measured_once_and_kept(pools, tmp_path):
    """Rank 0 writes what was measured, and next time all ranks have it from rank 0's file."""
    pool = pools(4)
    for result in pool.run(find, str(tmp_path), True, {}):
        assert result["rates"] == Rates.of(MEASURED)
        assert result["said"] == "measured" and result["asked"] == [list(UNITS)]
    assert [path.name for path in tmp_path.iterdir()] == ["rates0.json"]
    assert json.loads((tmp_path / "rates0.json").read_text()) == MEASURED
    (tmp_path / "rates1.json").write_text(json.dumps({**MEASURED, "tflops": 1.0}))
    for result in pool.run(find, str(tmp_path), True, {}):
        assert result["rates"] == Rates.of(MEASURED) and not result["asked"]
        assert result["said"].startswith("from ")


def test_given_is_neither_read_nor_measured(pools, tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"inside_gbytes": 50.5, "exposed": 0.75}))
    given = {"tflops": 600, "exposed": 0.0}
    expected = {**MEASURED, "inside_gbytes": 50.5, **given}
    for result in pools(4).run(find, str(tmp_path), False, given):
        assert result["rates"] == Rates.of(expected)
        assert result["asked"] == [["between_gbytes", "expert_us", "spill_us"]]
        assert result["said"] == (
            f"between_gbytes, expert_us, spill_us measured; inside_gbytes from {path}; "
            "tflops, exposed given"
        )
    # The file gets what was measured, not what was given.
    kept = {key: MEASURED[key] for key in ("between_gbytes", "expert_us", "spill_us")}
    assert json.loads(path.read_text()) == {"inside_gbytes": 50.5, "exposed": 0.75, **kept}


def test_all_given(pools, tmp_path):
    for result in pools(4).run(find, str(tmp_path), False, {**MEASURED, "file": None}):
        assert result["rates"] == Rates.of(MEASURED)
        assert result["said"] == "given" and not result["asked"]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_measured_is_not_kept(pools, tmp_path):
    for result in pools(4).run(find, str(tmp_path), False, {}, ("between_gbytes",)):
        assert result["rates"].between == result["rates"].inside == 56_700_000_000
    assert set(json.loads((tmp_path / "rates.json").read_text())) == set(UNITS) - {"between_gbytes"}


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ["Expecting value"]),
        ("{", ["line 1"]),
        ("[1, 2]", ["JSON object", "tflops"]),
        ('{"tflop": 600}', ['unknown key "tflop"', 'did you mean "tflops"?']),
        ('{"tflops": "fast"}', ['"tflops"', "valid number", "got 'fast'"]),
        ('{"inside_gbytes": 0}', ['"inside_gbytes"', "0.0001", "got 0"]),
        ('{"exposed": 1.5}', ['"exposed"', "less than or equal to 1", "got 1.5"]),
        ('{"file": "other.json"}', ['unknown key "file"']),
        ("\xff", ["utf-8"]),
    ],
)
def test_bad_file(pools, tmp_path, text, parts):
    """An error on every rank, which names the file."""
    path = tmp_path / "rates.json"
    path.write_bytes(text.encode("latin-1"))
    for result in pools(4).run(find, str(tmp_path), False, {}):
        for part in ['"llep.cost.file"', str(path), "Repair it", *parts]:
            assert part in result["error"], result["error"]
        assert "DeepSpeed config" not in result["error"]


def test_file_that_cannot_be(pools, tmp_path):
    for name, why in (("missing/rates.json", "No such file"), (".", "directory")):
        path = Path(tmp_path) / name
        for result in pools(4).run(find, str(tmp_path), False, {"file": str(path)}):
            assert '"llep.cost.file"' in result["error"] and str(path) in result["error"]
            assert why in result["error"]

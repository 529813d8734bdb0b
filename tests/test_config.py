"""The "llep" section: its defaults, its mistakes, and the JSON files that ship with the package."""

from __future__ import annotations

import json
import math
from pathlib import Path

import deepspeed
import pytest
from deepspeed.module_inject.auto_ep_config import parse_autoep_config, validate_autoep_config
from hypothesis import given
from hypothesis import strategies as st

from ds_llep import LLEPConfig
from ds_llep.activate import check_compatible

DEFAULTS = {
    "enabled": False,
    "planner": "lla",
    "imbalance_threshold": 1.3,
    "capacity_factor": 1.0,
    "min_tokens_per_gemm": 1024,
    "weight_source": "auto",
    "backward_weights": "refetch",
    "max_foreign_experts": None,
    "max_foreign_bytes": None,
    "weight_cache": True,
    "kernels": "auto",
    "monitor": {"enabled": False, "interval": 10},
    "trace": {
        "enabled": False,
        "path": "llep_trace.npz",
        "interval": 1,
        "max_bytes": 64 * 1024 * 1024,
    },
    "cost": {
        "tflops": None,
        "inside_gbytes": None,
        "between_gbytes": None,
        "expert_us": None,
        "exposed": None,
        "spill_us": None,
        "file": None,
        "ranks_per_node": None,
    },
}
WITHOUT_LIMITS = {"imbalance_threshold": 1.0, "capacity_factor": None, "min_tokens_per_gemm": 0}
"""Other defaults with planner "cost"."""
CHOICES = {
    "planner": ["lla", "cost"],
    "weight_source": ["auto", "owner", "shards"],
    "backward_weights": ["refetch", "keep"],
    "kernels": ["auto", "triton", "torch"],
}
CONFIGS = Path(__file__).parent.parent / "ds_configs"
WORLDS = {
    "accelerate_zero3_ep2.json": [2, 4],
    "demo_cpu_monitored.json": [4],
    "demo_cpu_zero3_ep2.json": [4],
    "demo_gpu_zero3_ep2.json": [2, 4],
    "hf_trainer_zero3_ep2.json": [2, 4],
    "native_moe_zero2.json": [2, 4],
    "zero1_ep8.json": [8, 16],
    "zero3_ep16_two_nodes.json": [16, 32],
    "zero3_ep8_multi_node_offload.json": [16, 32],
    "zero3_ep8_one_node.json": [8],
}
"""The numbers of ranks that each file in ds_configs is meant for."""


def message_of(section) -> str:
    """What a user reads who puts ``section`` under "llep"."""
    with pytest.raises(ValueError) as caught:
        LLEPConfig.from_ds_config({"llep": section})
    assert type(caught.value) is ValueError  # not pydantic's own, which prints a page
    return str(caught.value)


def assert_explained(section, key: str, value, valid: str) -> None:
    """The error names the key, what was given, and, before that, what is valid."""
    message = message_of(section)
    assert f'"{key}"' in message
    assert f"got {value!r}" in message
    assert valid in message.split(", got ")[0]


def test_defaults():
    assert LLEPConfig().model_dump() == DEFAULTS
    assert LLEPConfig.from_ds_config({}) == LLEPConfig()
    assert LLEPConfig.from_ds_config({"llep": {}}) == LLEPConfig()


@pytest.mark.parametrize(
    "misspelt, meant",
    [
        ("imbalance_treshold", "imbalance_threshold"),
        ("enable", "enabled"),
        ("capacity-factor", "capacity_factor"),
        ("min_token_per_gemm", "min_tokens_per_gemm"),
        ("weight_sources", "weight_source"),
        ("kernel", "kernels"),
        ("Planner", "planner"),
    ],
)
def test_misspelt_key(misspelt, meant):
    message = message_of({misspelt: 1})
    assert f'"llep.{misspelt}"' in message
    assert f'did you mean "{meant}"?' in message


# "strict" and "self" are names of Python parameters on the way to pydantic.
@pytest.mark.parametrize("key", ["alpha", "autoep_size", "strict", "self", "data", ""])
def test_unknown_key(key):
    message = message_of({"enabled": True, key: 1})
    assert f'unknown key "llep.{key}"' in message
    assert f"valid keys: {', '.join(DEFAULTS)}" in message


def test_unknown_key_in_monitor():
    assert 'unknown key "llep.monitor.strict"' in message_of({"monitor": {"strict": True}})
    message = message_of({"monitor": {"intervall": 5}})
    assert 'unknown key "llep.monitor.intervall"' in message
    assert "valid keys: enabled, interval" in message
    assert 'did you mean "interval"?' in message


def test_unknown_key_in_trace():
    message = message_of({"trace": {"file": "trace.npz"}})
    assert 'unknown key "llep.trace.file"' in message
    assert "valid keys: enabled, path, interval, max_bytes" in message


NUMBERS = "valid number"
WHOLE = "valid integer"
WRONG = [
    *[("enabled", value, "boolean") for value in ("true", "auto", 1, 0, None, [], {})],
    *[
        ("planner", value, "'lla' or 'cost'")
        for value in ("auto", "LLA", "", 1, True, None, ["lla"])
    ],
    *[("imbalance_threshold", value, NUMBERS) for value in ("1.3", "auto", True, None, [1.3])],
    *[("imbalance_threshold", value, "1") for value in (0.99, 0, -2)],
    *[("capacity_factor", value, NUMBERS) for value in ("1", "auto", False, None, {})],
    *[("capacity_factor", value, "1") for value in (0.999, 0, -1.0)],
    *[
        (key, value, "finite number")
        for key in ("imbalance_threshold", "capacity_factor")
        for value in (math.nan, math.inf)
    ],
    *[("min_tokens_per_gemm", value, WHOLE) for value in ("8", "auto", 8.0, 8.5, True, None)],
    ("min_tokens_per_gemm", -1, "0"),
    *[("max_foreign_experts", value, WHOLE) for value in ("4", "auto", 4.0, False, [])],
    ("max_foreign_experts", -1, "0"),
    *[("max_foreign_bytes", value, WHOLE) for value in ("4G", "auto", 1e9, True, [])],
    ("max_foreign_bytes", 0, "1"),
    *[("weight_cache", value, "boolean") for value in ("auto", 1, None)],
    *[("weight_source", value, "'auto', 'owner' or 'shards'") for value in ("home", 1, None)],
    *[("backward_weights", value, "'refetch' or 'keep'") for value in ("auto", True, None)],
    *[("kernels", value, "'auto', 'triton' or 'torch'") for value in ("cuda", False, None)],
    *[
        (key, value, "dictionary")
        for key in ("monitor", "trace", "cost")
        for value in (True, None, "auto", [], 3)
    ],
]


@pytest.mark.parametrize("key, value, valid", WRONG, ids=str)
def test_wrong_value(key, value, valid):
    assert_explained({key: value}, f"llep.{key}", value, valid)


@pytest.mark.parametrize(
    "key, value, valid",
    [
        *[("enabled", value, "boolean") for value in ("true", "auto", 1, None)],
        *[("interval", value, WHOLE) for value in ("10", "auto", 10.0, True, None)],
        *[("interval", value, "1") for value in (0, -1)],
    ],
    ids=str,
)
def test_wrong_value_in_monitor(key, value, valid):
    assert_explained({"monitor": {key: value}}, f"llep.monitor.{key}", value, valid)


@pytest.mark.parametrize(
    "key, value, valid",
    [
        *[("enabled", value, "boolean") for value in ("true", "auto", 1, None)],
        *[("path", value, "valid string") for value in (None, 3, True, ["trace.npz"])],
        ("path", "", "at least 1 character"),
        *[("interval", value, WHOLE) for value in ("10", "auto", 10.0, True, None)],
        *[("interval", value, "1") for value in (0, -1)],
        *[("max_bytes", value, WHOLE) for value in ("64M", "auto", 1e6, True, None)],
        *[("max_bytes", value, "1") for value in (0, -1)],
    ],
    ids=str,
)
def test_wrong_value_in_trace(key, value, valid):
    assert_explained({"trace": {key: value}}, f"llep.trace.{key}", value, valid)


AT_LEAST = "greater than or equal to 0.0001"
RATES = ("tflops", "inside_gbytes", "between_gbytes")


@pytest.mark.parametrize(
    "key, value, valid",
    [
        *[("file", value, "valid string") for value in (3, True, ["rates.json"])],
        ("file", "", "at least 1 character"),
        *[("ranks_per_node", value, WHOLE) for value in ("8", "auto", 8.0, True)],
        *[("ranks_per_node", value, "1") for value in (0, -1)],
        *[(key, value, NUMBERS) for key in RATES for value in ("600", "auto", True, [])],
        *[(key, value, AT_LEAST) for key in RATES for value in (0, -1.0, 1e-5)],
        *[(key, math.inf, "finite number") for key in RATES],
        *[("expert_us", value, NUMBERS) for value in ("10", "auto", False)],
        *[("expert_us", value, "greater than 0") for value in (0, -1.0)],
        ("expert_us", math.inf, "less than or equal to 1000000"),
        *[("exposed", value, NUMBERS) for value in ("0.5", "auto", True)],
        *[("exposed", value, "greater than or equal to 0") for value in (-0.1, -1)],
        *[("exposed", value, "less than or equal to 1") for value in (1.01, 50)],
    ],
    ids=str,
)
def test_wrong_value_in_cost(key, value, valid):
    section = {"planner": "cost", "cost": {key: value}}
    assert_explained(section, f"llep.cost.{key}", value, valid)


def test_unknown_key_in_cost():
    message = message_of({"planner": "cost", "cost": {"tflop": 600}})
    assert 'unknown key "llep.cost.tflop"' in message
    assert f"valid keys: {', '.join(DEFAULTS['cost'])}" in message
    assert 'did you mean "tflops"?' in message


@pytest.mark.parametrize(
    "cost",
    [{"tflops": 600.5}, {"file": "rates.json"}, {"ranks_per_node": 8}, {"exposed": 0.0}],
    ids=str,
)
def test_prices_that_no_planner_reads(cost):
    """Given with planner "lla" they would have no effect; null is as if not given."""
    for section in ({"cost": cost}, {"planner": "lla", "cost": cost}):
        assert_explained(section, "llep.cost", cost, 'no effect with "planner": "lla"')
    assert LLEPConfig(planner="cost", cost=cost).cost.model_dump() == {**DEFAULTS["cost"], **cost}
    assert LLEPConfig(cost=dict.fromkeys(cost)) == LLEPConfig()


def test_no_limit_on_capacity_is_for_planner_cost():
    for section in ({}, {"planner": "lla"}):
        assert_explained(
            {**section, "capacity_factor": None}, "llep.capacity_factor", None, "valid number"
        )
    assert LLEPConfig(planner="cost", capacity_factor=None).capacity_factor is None


@pytest.mark.parametrize(
    "given",
    [{}, {"imbalance_threshold": 1.7}, {"capacity_factor": 2}, {"min_tokens_per_gemm": 64}],
    ids=str,
)
def test_limits_with_planner_cost(given):
    """None by default, each where it is given."""
    limits = LLEPConfig(planner="cost", **given).model_dump(include=set(WITHOUT_LIMITS))
    assert limits == {**WITHOUT_LIMITS, **given}


def test_every_mistake_is_named_at_once():
    message = message_of({"capacity_factor": 0.5, "planer": "lla", "monitor": {"interval": 0}})
    for key in ("llep.capacity_factor", "llep.planer", "llep.monitor.interval"):
        assert f'"{key}"' in message


@pytest.mark.parametrize("section", [True, None, "auto", 1, [], [["enabled", True]]], ids=str)
def test_section_is_no_object(section):
    message = message_of(section)
    assert '"llep" must be a JSON object' in message
    assert f"got {section!r}" in message


def test_immutable():
    config = LLEPConfig(enabled=True)
    for target, key in (
        (config, "enabled"),
        (config.monitor, "interval"),
        (config.trace, "path"),
        (config.cost, "tflops"),
    ):
        with pytest.raises(ValueError, match="frozen"):
            setattr(target, key, 3)
    assert config == LLEPConfig(enabled=True)


def rate() -> st.SearchStrategy:
    return st.none() | st.integers(1, 1000) | st.floats(1e-4, 1e4)


def ratio() -> st.SearchStrategy:
    """Numbers from 1 on, whole ones too: JSON's `2` is a valid float."""
    return st.integers(1, 1000) | st.floats(1, 1e6)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "enabled": st.booleans(),
            **{key: st.sampled_from(values) for key, values in CHOICES.items()},
            "imbalance_threshold": ratio(),
            "capacity_factor": ratio(),
            "min_tokens_per_gemm": st.integers(0, 10**9),
            "max_foreign_experts": st.none() | st.integers(0, 10**6),
            "max_foreign_bytes": st.none() | st.integers(1, 10**12),
            "weight_cache": st.booleans(),
            "monitor": st.fixed_dictionaries(
                {}, optional={"enabled": st.booleans(), "interval": st.integers(1, 10**9)}
            ),
            "trace": st.fixed_dictionaries(
                {},
                optional={
                    "enabled": st.booleans(),
                    "path": st.sampled_from(["trace.npz", "a folder/Spur é", " "]),
                    "interval": st.integers(1, 10**9),
                    "max_bytes": st.integers(1, 10**12),
                },
            ),
            "cost": st.fixed_dictionaries(
                {},
                optional={
                    **dict.fromkeys((*RATES, "expert_us", "spill_us"), rate()),
                    "exposed": st.none() | st.integers(0, 1) | st.floats(0, 1),
                    "file": st.none() | st.just("rates.json"),
                    "ranks_per_node": st.none() | st.integers(1, 1000),
                },
            ),
        },
    )
)
def test_valid_sections_round_trip(section):
    """Through JSON and back, nothing changes and what is absent is the default."""
    with_cost = section.get("planner") == "cost"
    if not with_cost:
        section.pop("cost", None)  # refused, see above
    config = LLEPConfig.from_ds_config(json.loads(json.dumps({"llep": section})))
    expected = {**DEFAULTS, **(WITHOUT_LIMITS if with_cost else {}), **section}
    for key in ("monitor", "trace", "cost"):
        expected[key] = {**DEFAULTS[key], **section.get(key, {})}
    assert config.model_dump() == expected
    assert LLEPConfig.from_ds_config({"llep": config.model_dump()}) == config


def unique_keys(pairs: list[tuple]) -> dict:
    assert len(dict(pairs)) == len(pairs), f"a key twice: {pairs}"
    return dict(pairs)


def no_constant(name: str):
    raise AssertionError(f"{name} is no JSON")


def as_trainer_fills(config: dict, world: int) -> dict:
    """The config with each "auto" outside of "llep" replaced, as HF Trainer or Accelerate do it."""
    filled = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }
    params = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    config = dict(config)
    for key, value in filled.items():
        if config.get(key) in ("auto", {"enabled": "auto"}):
            config[key] = value
    optimizer = dict(config["optimizer"]["params"])
    optimizer.update({k: v for k, v in params.items() if optimizer.get(k) == "auto"})
    config["optimizer"] = {**config["optimizer"], "params": optimizer}
    return config


def test_every_shipped_config_has_a_world():
    assert {path.name for path in CONFIGS.glob("*.json")} == set(WORLDS)


@pytest.mark.parametrize(
    "name, world", [(name, world) for name, worlds in WORLDS.items() for world in worlds]
)
def test_shipped_config(name, world, monkeypatch):
    """Strict JSON, and valid for llep, for DeepSpeed and for AutoEP at its number of ranks."""
    text = (CONFIGS / name).read_text()
    config = json.loads(text, object_pairs_hook=unique_keys, parse_constant=no_constant)
    assert LLEPConfig.from_ds_config(config).enabled

    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed.comm, "get_world_size", lambda: world)
    filled = as_trainer_fills(config, world)
    assert '"auto"' not in json.dumps({k: v for k, v in filled.items() if k != "llep"})
    ds_config = deepspeed.DeepSpeedConfig(filled)
    assert ds_config.world_size == world

    if name == "native_moe_zero2.json":  # for layers that AutoEP does not make
        assert "expert_parallel" not in config
        return
    zero = ds_config.zero_config
    validate_autoep_config(
        parse_autoep_config(config["expert_parallel"]),
        world_size=world,
        pp_size=1,
        tp_size=1,
        sp_size=1,
        zero_stage=zero.stage,
        zero_offload_optimizer=zero.offload_optimizer is not None,
        zero_offload_param=zero.offload_param is not None,
    )
    check_compatible(ds_config)

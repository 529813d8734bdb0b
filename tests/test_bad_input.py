"""What the user gets for each mistake: a clear error on every rank, and never a hang.

Every rank catches what it gets and sends it back. A rank that waits for the others instead fails
the test by the pool's time limit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import types
from unittest import mock

import deepspeed.comm as dist
import engines
import families
import layers
import pytest
import torch
import transformers
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.layers import set_autotp_mode
from deepspeed.utils import groups
from launcher import WARM, launch

import ds_llep
from ds_llep import activate, compat
from ds_llep.fetch import Exchange
from ds_llep.ranks import RankTable

TIMEOUT = 300


def moe(num_experts: int = 8) -> torch.nn.Module:
    with mock.patch.dict(families.SMALL, num_experts=num_experts, num_hidden_layers=1):
        config = transformers.AutoConfig.for_model(
            "qwen3_moe", **families.SMALL, moe_intermediate_size=48, num_experts_per_tok=2
        )
    return transformers.AutoModelForCausalLM.from_config(config)


def dense() -> torch.nn.Module:
    config = transformers.AutoConfig.for_model("qwen3", **families.SMALL, intermediate_size=64)
    return transformers.AutoModelForCausalLM.from_config(config)


def start_up(
    build, llep: dict | None, sections: dict, supported: dict | None = None
) -> tuple[str, str]:
    """Type and text of what ``deepspeed.initialize`` raises on this rank.

    Args:
        build: makes the model.
        llep: the "llep" section; None for none.
        sections: the other sections of the DeepSpeed config that are not as in other tests.
        supported: version ranges in the place of some of those known to work.
    """
    config = engines.ds_config(1, 2, llep=llep, **sections)
    try:
        with mock.patch.dict(compat.SUPPORTED, supported or {}):
            engine = engines.initialize(build(), config)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        set_autotp_mode(training=False)  # deepspeed.initialize sets it, for the whole process
    engine.destroy()
    return "nothing", ""


def expert_parallel(**options) -> dict:
    return {"expert_parallel": {"enabled": True, "autoep_size": 2, **options}}


# What is wrong: the model, the llep section, the other sections, what the message must say.
MISTAKES = {
    "misspelt key": (
        moe,
        {"imbalance_treshold": 2.0},
        {},
        ['"llep.imbalance_treshold"', 'did you mean "imbalance_threshold"?', "capacity_factor"],
    ),
    "unknown key": (moe, {"alpha": 1.0}, {}, ['unknown key "llep.alpha"', "valid keys: enabled"]),
    "wrong type": (
        moe,
        {"min_tokens_per_gemm": "many"},
        {},
        ['"llep.min_tokens_per_gemm"', "valid integer", "'many'"],
    ),
    "alpha below 1": (moe, {"capacity_factor": 0.5}, {}, ['"llep.capacity_factor"', "0.5"]),
    "threshold below 1": (
        moe,
        {"imbalance_threshold": 0.9},
        {},
        ['"llep.imbalance_threshold"', "equal to 1", "0.9"],
    ),
    "expert parallelism off": (
        moe,
        {},
        {"expert_parallel": {"enabled": False, "autoep_size": 2}},
        ['"llep.enabled"', '"expert_parallel": {"enabled": true, "autoep_size": N}'],
    ),
    "no expert parallelism": (
        moe,
        {},
        {"expert_parallel": {}},
        ['"llep.enabled"', '"expert_parallel": {"enabled": true, "autoep_size": N}'],
    ),
    "dense model": (
        dense,
        {},
        {},
        ["no MoE layer", "Qwen3ForCausalLM", '"llep.enabled" to false', "moe_layer_pattern"],
    ),
    "trace in no folder": (
        moe,
        {"trace": {"enabled": True, "path": "/no such folder/trace.npz"}},
        {},
        ['"llep.trace"', "'/no such folder/trace.npz'", "No such file", '"llep.trace.path"'],
    ),
    "trace is a folder": (
        moe,
        {"trace": {"enabled": True, "path": "."}},
        {},
        ['"llep.trace.path"', "is a folder"],
    ),
    "trace without room": (
        moe,
        {"trace": {"enabled": True, "max_bytes": 127}},
        {},
        ['"llep.trace.max_bytes": 127', "Give it 128 or more"],  # 2 x 1 layer, 2 ranks, 8 experts
    ),
    "trace without end": (
        moe,
        {"trace": {"enabled": True, "max_bytes": 10**18}},
        {},
        ['"llep.trace"', 'lower "llep.trace.max_bytes"'],
    ),
    "AutoTP folding": (
        moe,
        {},
        {"tensor_parallel": {"autotp_size": 2}},
        ['"llep"', "AutoTP", "autotp_size=2", "Set both to 1"],
    ),
    "expert tensor parallelism": (
        moe,
        {},
        expert_parallel(expert_tensor_parallel_size=2),
        ['"llep"', "expert_tensor_parallel_size=2", "Set both to 1"],
    ),
    "deepep": (
        moe,
        {},
        expert_parallel(comm_backend="deepep", comm_max_tokens_per_rank=64),
        ['"llep"', '"expert_parallel.comm_backend"', '"deepep"', '"comm"'],
    ),
}
if not torch.cuda.is_available():
    MISTAKES["Triton on a CPU"] = (
        moe,
        {"kernels": "triton"},
        {},
        ["llep.kernels", '"triton"', '"cpu"', '"auto" or "torch"'],
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_start_up(pools, mistake):
    build, llep, sections, fragments = MISTAKES[mistake]
    for kind, text in pools(4).run(start_up, build, llep, sections, timeout=TIMEOUT):
        assert kind == "ValueError", text
        for fragment in fragments:
            assert fragment in text


def start_up_without_kernels(bad_rank: int) -> tuple[str, str]:
    """:func:`start_up` where one rank's machine cannot have the kernels, as without a compiler."""
    missing = ValueError("Install a C compiler")
    fails = mock.patch.object(activate, "select_kernels", side_effect=missing)
    with fails if dist.get_rank() == bad_rank else contextlib.nullcontext():
        return start_up(moe, {}, {})


def test_one_rank_without_kernels(pools, seed):
    pool = pools(4)
    bad_rank = seed % pool.world_size
    for kind, text in pool.run(start_up_without_kernels, bad_rank, timeout=TIMEOUT):
        assert (kind, text) == ("ValueError", f"rank {bad_rank}: Install a C compiler")


def test_unsupported_transformers(pools):
    installed = importlib.metadata.version("transformers")
    supported = {"transformers": ("4.0.0", "4.1.0")}
    results = pools(4).run(start_up, moe, {}, {}, supported, timeout=TIMEOUT)
    for kind, text in results:
        assert kind == "ValueError", text
        assert f"transformers {installed} is not one of the versions known to work" in text
        assert 'pip install "transformers>=4.0.0,<=4.1.0"' in text
    # Off, llep has no say in it.
    results = pools(4).run(start_up, moe, {"enabled": False}, {}, supported, timeout=TIMEOUT)
    assert set(results) == {("nothing", "")}


def test_unsupported_deepspeed(monkeypatch):
    """``import ds_llep`` registers, on every rank, so it is there that this is found."""
    monkeypatch.setattr(importlib.metadata, "version", {"deepspeed": "99.1"}.get)
    with pytest.raises(ValueError) as caught:
        activate.register()
    first, last = compat.SUPPORTED["deepspeed"]
    text = str(caught.value)
    assert f"99.1 is not one of the versions known to work ({first} to {last})" in text
    assert f'pip install "deepspeed>={first},<={last}"' in text


@pytest.mark.parametrize("mistake", ["experts not divisible", "world not divisible", "too large"])
def test_errors_of_autoep(pools, mistake):
    """What AutoEP says of its own mistakes, llep does not change."""
    pool = pools(4)
    world = pool.world_size
    num_experts, ep_size, fragments = {
        "experts not divisible": (world + 1, world, [f"num_experts={world + 1}"]),
        "world not divisible": (24, world + 1 if world == 2 else world - 1, [str(world)]),
        "too large": (16, 16, [str(world)]),
    }[mistake]
    build = functools.partial(moe, num_experts)
    sections = expert_parallel(autoep_size=ep_size)
    ours = pool.run(start_up, build, {}, sections, timeout=TIMEOUT)
    theirs = pool.run(start_up, build, None, sections, timeout=TIMEOUT)
    assert ours == theirs
    for kind, text in ours:
        assert kind == "ValueError", text
        for fragment in ["autoep_size", str(ep_size), *fragments]:
            assert fragment in text


def test_options_without_effect():
    """AutoEP's options that llep makes moot are named at start-up, the others are not."""
    assert compat.overridden_options(parse_autoep_config({"enabled": True})) == []
    options = {"enabled": True, "autoep_size": 2, "route_scale": 2.0}
    options |= {"combine_impl": "fused_weighted_sum", "use_grouped_mm": False}
    found = compat.overridden_options(parse_autoep_config(options))
    assert found == ["combine_impl", "use_grouped_mm"]


@pytest.mark.parametrize(
    "what", [object(), None, torch.nn.Linear(1, 1), {}], ids=lambda what: type(what).__name__
)
def test_status_of_no_engine(what):
    with pytest.raises(ValueError) as caught:
        ds_llep.status(what)
    assert "deepspeed.initialize" in str(caught.value)
    assert f"got {type(what).__name__}" in str(caught.value)


def break_router(layer, how: str) -> None:
    """Make a layer's router give what no expert can be found for, in its first token alone."""
    route = type(layer.router).forward

    def forward(router, x_TD, expert_bias=None):
        if how == "raises":
            raise RuntimeError("the router broke")
        if how == "NaN tokens":
            x_TD = x_TD.clone()
            x_TD[0, 0] = float("nan")
        scores_TK, ids_TK, counts_E = route(router, x_TD, expert_bias)
        if how in ("inf", "NaN"):
            scores_TK = scores_TK.clone()
            scores_TK[0, -1] = float(how)
        if how in ("-1", "8"):
            ids_TK = ids_TK.clone()
            ids_TK[0, -1] = int(how)
        return scores_TK, ids_TK, counts_E

    layer.router.forward = types.MethodType(forward, layer.router)


def one_bad_router(ep_size: int, together: bool, bad_rank: int, how: str, seed: int) -> dict:
    """On every rank: the error of a forward with one bad router, then AutoEP's result and ours.

    With ``together`` all EP groups exchange their counts, as they do where shards are sent.
    """
    theirs = layers.autoep_layer("qwen3_moe", ep_size, seed, torch.float32)
    ours = layers.llep_twin(theirs)
    x, grad, ids = layers.draw(theirs, "one_hot_expert", 24, torch.float32, seed)
    if dist.get_rank() == bad_rank:
        break_router(ours, how)
    of_group = ours.llep.exchange
    if together:
        edp_group = groups._get_expert_data_parallel_group(ours.ep_group_name)
        table = RankTable.gather(ours.ep_group, edp_group)
        ours.llep.exchange = Exchange(
            table, ours.ep_group, sharded=True, always_ready=True, cache=True
        )
    try:
        ours(x)
        error = ("nothing", "", "")
    except Exception as raised:
        error = (type(raised).__name__, str(raised), repr(raised.__cause__))
    ours.llep.exchange = of_group
    expected, found = (layers.run(layer, x, grad, ids) for layer in (theirs, ours))
    return {
        "error": error,
        "ep_rank": ours.ep_rank,
        "off": layers.errors(found, expected),
        "spilled": ours.llep.statistics.last()["spilled_tokens"],
    }


BAD_ROUTERS = {
    "-1": "expert ids outside [0, 8)",
    "8": "expert ids outside [0, 8)",
    "NaN": "scores that are NaN or infinite",
    "inf": "scores that are NaN or infinite",
    "NaN tokens": "scores that are NaN or infinite",
    "raises": "the router raised",
}


@pytest.mark.parametrize("ep_size, together", [(4, False), (2, False), (2, True)])
@pytest.mark.parametrize("how", BAD_ROUTERS)
def test_one_bad_router(pools, ep_size, together, how, seed):
    """All ranks of its EP group raise, other groups go on unless they exchange counts as well, and
    then all compute as if it had not.

    A rank that had left a collective to the others would hang here or compute nonsense.
    """
    pool = pools(4)
    ep_size = min(ep_size, pool.world_size)
    bad_rank = seed % pool.world_size
    case = one_bad_router, ep_size, together, bad_rank, how, seed
    results = pool.run(*case, timeout=TIMEOUT)
    for rank, result in enumerate(results):
        kind, text, cause = result["error"]
        if together or rank // ep_size == bad_rank // ep_size:
            assert kind == "ValueError", text
            assert "MoE layer 'layer'" in text
            assert BAD_ROUTERS[how] in text
            assert f"on rank(s) [{bad_rank}]" in text
            raised_here = how == "raises" and rank == bad_rank
            assert ("the router broke" in cause) == raised_here, cause
        else:
            assert kind == "nothing", text
        assert result["spilled"][0] > 0, "nothing was spilled: the test tests nothing"
        assert all(error < 1e-4 for error in result["off"].values()), result["off"]


SCRIPT = """
import deepspeed, deepspeed.comm as dist, engines, families, torch
import ds_llep

deepspeed.init_distributed()
config = engines.ds_config(stage=3, ep_size=2, llep={"weight_source": "SOURCE"})
engine = engines.initialize(families.build("qwen3_moe", seed=1), config)
assert ds_llep.status(engine)["active"]
for step in range(3):
    if step == 1 and dist.get_rank() == 3:
        router = engines.moe_layers(engine.module)[1].router
        router.register_forward_hook(lambda _, inputs, out: (out[0] * float("nan"), *out[1:]))
    loss = engine(**engines.batch(torch.float32, step)).loss
    engine.backward(loss)
    engine.step()
    print(f"rank {dist.get_rank()} did step {step}\\n", end="", flush=True)  # in one write
"""


@pytest.mark.parametrize("source", ["owner", "shards"])
def test_launched_job_ends(source, tmp_path):
    """Under the launcher, one rank's NaN ends the job, with the reason, in bounded time.

    ZeRO-3 and two EP groups. Where home ranks send, the ranks of the other group wait for the
    failed ones in ZeRO's gathers, and it takes the launcher to end them; where shards are sent,
    all groups exchange their counts and all ranks raise.
    """
    (tmp_path / "train.py").write_text(SCRIPT.replace("SOURCE", source))
    code, out = launch(4, WARM, "train.py", cwd=tmp_path, timeout=600)
    assert code != 0, out[-4000:]
    assert out.count("did step 0") == 4, out[-4000:]
    assert "did step 1" not in out
    assert "ValueError: llep: MoE layer 'model.layers.1.mlp'" in out, out[-4000:]
    assert "NaN or infinite on rank(s) [3]" in out

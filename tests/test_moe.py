"""DeepSpeed's own MoE layer and ours with the same weights: results and every gradient.

The budget is DeepSpeed's own: our error against fp64 may be twice its error, plus 1e-6.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import deepspeed
import deepspeed.comm as dist
import deepspeed.moe.layer
import engines
import layers
import natives
import pytest
import torch
from deepspeed.module_inject.layers import set_autotp_mode
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import safe_get_full_grad

import ds_llep
from ds_llep import bundle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compare(
    kind: str,
    ep_size: int,
    dtype: torch.dtype,
    seed: int,
    settings: dict | None = None,
    checkpointing: str = "none",
    train: bool = True,
    some_unused: bool = False,
    **options,
) -> dict:
    """On every rank: tensors over budget as ``{name: (ours, DeepSpeed's)}``, and the plan."""
    theirs = natives.layer(kind, ep_size, seed, dtype, **options).train(train)
    ours = natives.twin(theirs, **settings or {})
    x, grad = natives.draw([theirs], 48, dtype, seed)
    used = torch.arange(48, device=x.device).remainder(3).clamp(max=1) if some_unused else None
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    try:
        found_theirs, found_ours = (
            natives.run(moe, x, grad, seed, checkpointing, used) for moe in (theirs, ours)
        )
        expected = natives.reference(kind, theirs, x, grad, seed, dtype, used, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    same = ("l_aux", "exp_counts")
    unequal = layers.unequal(*({n: found[n] for n in same} for found in (found_theirs, found_ours)))
    error_theirs, error_ours = (
        layers.errors(found, expected) for found in (found_theirs, found_ours)
    )
    return {
        "unequal": unequal,
        "over": layers.over_budget(error_ours, error_theirs),
        "tensors": {name for name, tensor in expected.items() if tensor is not None},
        **ours.deepspeed_moe.llep.statistics.last(),
    }


def check(results: list[dict], seed: int, spills: bool = True) -> None:
    for rank, result in enumerate(results):
        assert not result["unequal"], f"rank {rank}, seed {seed}: {result['unequal']}"
        assert not result["over"], f"rank {rank}, seed {seed}: {result['over']}"
        if spills:
            assert result["foreign_experts"][0] > 0, "nothing was spilled: the test tests nothing"
            assert result["load_ratio_after"][0] < result["load_ratio_before"][0]


@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_choices(pools, k, ep_size, seed):
    """EP 2 in a world of 4: the groups draw different tokens and so plan differently."""
    for dtype in DTYPES.values():
        results = pools(4).run(compare, "mlp", ep_size, dtype, seed, k=k, drop_tokens=False)
        check(results, seed)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_dropped_tokens(pools, k, seed):
    options = dict(k=k, capacity_factor=0.7)
    results = pools(4).run(compare, "mlp", 4, torch.float32, seed, **options)
    check(results, seed, spills=False)


@pytest.mark.parametrize("kind", natives.KINDS)
def test_experts(pools, kind, seed):
    results = pools(4).run(compare, kind, 4, torch.float32, seed, k=2, drop_tokens=False)
    check(results, seed)
    names = {name.rpartition("deepspeed_experts.")[2] for name in results[0]["tensors"]}
    expected = {name for name, _ in natives.KINDS[kind]().named_parameters()}
    skipped = {"frozen": {"up.weight", "unused"}, "all frozen": expected}.get(kind, set())
    assert names & {f"0.{name}" for name in expected} == {f"0.{n}" for n in expected - skipped}


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1, "noisy_gate_policy": "Jitter"},
        {"k": 1, "noisy_gate_policy": "RSample"},
        {"k": 1, "use_rts": False, "capacity_factor": 0.5, "drop_tokens": True},
        {"k": 1, "some_unused": True},
        {"k": 2, "noisy_gate_policy": "Jitter"},
        {"k": 4, "noisy_gate_policy": "Jitter", "use_residual": True},
        {"k": 2, "top2_2nd_expert_sampling": False},
        {"k": 2, "use_residual": True},
        {"k": 2, "train": False},
        {"k": 2, "ep_size": 1},
    ],
    ids=str,
)
def test_gates(pools, options, seed):
    """Gates draw what DeepSpeed's draw, and a residual branch stays what it is."""
    options = {"ep_size": 4, "drop_tokens": False, **options}
    results = pools(4).run(compare, "gated", dtype=torch.float32, seed=seed, **options)
    check(results, seed, spills=options["ep_size"] > 1 and not options["drop_tokens"])


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
@pytest.mark.parametrize(
    "settings",
    [{"backward_weights": "keep"}, {"weight_cache": False}, {"max_foreign_experts": 1}],
    ids=str,
)
def test_settings(pools, checkpointing, settings, seed):
    """Neither settings nor activation checkpointing change the result."""
    options = dict(k=2, drop_tokens=False, settings=settings, checkpointing=checkpointing)
    check(pools(4).run(compare, "scaled", 4, torch.float32, seed, **options), seed)


def order_of_backward(kind: str, seed: int) -> tuple[list[str], list[int]]:
    """What happens in backward, first to last, and how many experts each layer borrows."""
    moe = natives.twin(natives.layer(kind, 4, seed, k=2, drop_tokens=False))
    order, give_back = [], bundle._return
    for expert in moe.deepspeed_moe.experts.deepspeed_experts:
        expert.register_full_backward_hook(lambda *_: order.append("home"))

    def noted(job):
        order.append("return")
        return give_back(job)

    with mock.patch.object(bundle, "_return", noted):
        natives.run(moe, *natives.draw([moe], 48, torch.float32, seed), seed)
    return order, moe.deepspeed_moe.llep.statistics.last()["foreign_experts"]


@pytest.mark.parametrize("kind", ["gated", "all frozen"])
def test_gradients_return_behind_the_home_experts(pools, kind, seed):
    """Earlier, a home rank would wait for its helpers while it has work of its own."""
    results = pools(4).run(order_of_backward, kind, seed)
    for order, foreign in results:
        assert min(foreign) > 0, "nothing was spilled: this tests nothing"
        homes = [at for at, what in enumerate(order) if what == "home"]
        assert homes and order[len(homes) :] == ([] if kind == "all frozen" else ["return"])


def one_step(make, stage: int, llep: dict | None, seed: int, saved: str, loaded: str | None):
    """Loss, gradients and stepped parameters, and the status, of an engine with EP 2.

    Args:
        make: the class of its MoE layers.
        stage: of ZeRO.
        llep: the section, or None.
        seed: of weights and input.
        saved: folder for a checkpoint that is written before the step.
        loaded: folder of the checkpoint that is read before that; None: none is.
    """
    model = natives.Model(make, layers.fit(2), seed)
    params = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    config = engines.ds_config(stage, 1, llep=llep)
    del config["expert_parallel"]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=params, config=config)
    if loaded:
        engine.load_checkpoint(loaded)
    engine.save_checkpoint(saved)
    x, _ = natives.draw([model.residual, model.plain], 48, torch.float32, seed)
    torch.manual_seed(seed + dist.get_rank())
    loss = engine(x)
    engine.backward(loss)
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        found[f"gradient of {name}"] = safe_get_full_grad(parameter).clone()
    engine.step()
    found |= {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    status = ds_llep.status(engine)
    engine.destroy()
    return found, status


def compare_engines(stage: int, seed: int, folder: str) -> tuple[list[dict], dict]:
    """Relative differences between DeepSpeed's engine and ours, before and after each has loaded
    the checkpoint of the other; and our status.

    Both start from the same weights: after a step, rounding might send a token elsewhere.
    """
    off = []
    for moment, by_theirs, by_ours in (("first", None, None), ("then", "ours", "theirs")):
        loaded = [name and f"{folder}/first/{name}" for name in (by_theirs, by_ours)]
        saved = [f"{folder}/{moment}/{name}" for name in ("theirs", "ours")]
        number = seed + len(off)
        native = deepspeed.moe.layer.MoE
        theirs, _ = one_step(native, stage, None, number, saved[0], loaded[0])
        ours, status = one_step(ds_llep.MoE, stage, {}, number, saved[1], loaded[1])
        off.append(layers.errors(ours, theirs))
    return off, status


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_engine(pools, stage, seed, tmp_path):
    """Of layers made as ours: they share the popular experts of a residual and a smaller layer."""
    for off, status in pools(4).run(compare_engines, stage, seed, str(tmp_path)):
        for errors in off:
            assert max(errors.values()) < 1e-4, f"seed {seed}: {errors}"
        assert status["active"] and status["layer_names"] == ["residual", "plain"]
        assert min(status["foreign_experts"]) > 0, "nothing was spilled"


def changed_weights(what: str, seed: int) -> list[dict[str, float]]:
    """Differences from DeepSpeed's layer before and after an expert's tensors have changed."""
    theirs = natives.layer("scaled", 4, seed, k=2, drop_tokens=False)
    ours = natives.twin(theirs)
    x, grad = natives.draw([theirs], 48, torch.float32, seed)
    off = []
    for _ in range(2):
        off.append(layers.errors(*(natives.run(moe, x, grad, seed) for moe in (ours, theirs))))
        for moe in (theirs, ours):
            expert = moe.deepspeed_moe.experts.deepspeed_experts[0]
            with torch.no_grad():
                getattr(expert, what).mul_(2) if what == "scale" else expert.first.weight.mul_(2)
    assert ours.deepspeed_moe.llep.statistics.last()["foreign_experts"][0] > 0
    return off


@pytest.mark.parametrize("what", ["scale", "weight"])
def test_changes_reach_helpers(pools, what, seed):
    """A helper's cache does not outlive a change of a buffer or a parameter at home."""
    for off in pools(4).run(changed_weights, what, seed):
        assert max(max(errors.values()) for errors in off) < 1e-4, off


def under_autocast(seed: int) -> dict[str, float]:
    theirs = natives.layer("mlp", 4, seed, k=2, drop_tokens=False)
    ours = natives.twin(theirs)
    x, grad = natives.draw([theirs], 48, torch.float32, seed)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        found = [natives.run(moe, x, grad, seed) for moe in (ours, theirs)]
    assert {each["output"].dtype for each in found} == {torch.bfloat16}
    assert ours.deepspeed_moe.llep.statistics.last()["foreign_experts"][0] > 0
    return layers.errors(*found)


def test_autocast(pools, seed):
    """Helpers compute in the dtypes of the home rank, in backward too."""
    for off in pools(4).run(under_autocast, seed):
        assert max(off.values()) < 0.03, off


def refused(function, *args, **kwargs) -> tuple[str, str]:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def first_forward(kind: str, tokens_by_rank: list[int], seed: int, **options) -> tuple[str, str]:
    """What the first forward of a balanced layer raises; DeepSpeed's own minimum is 4 tokens."""
    with mock.patch.dict(natives.KINDS, {"random": natives.Random, "norm": natives.Normalised}):
        theirs = natives.layer(kind, 4, seed, drop_tokens=False, **options)
    ours = natives.twin(theirs)
    x, _ = natives.draw([theirs], tokens_by_rank[dist.get_rank()], torch.float32, seed)
    return refused(ours, x)


# What is wrong: kind of experts, tokens of each rank, options of the layer, words of the message.
FORWARD = {
    "dropout": ("random", [48] * 4, {}, ["'layer'", "draw random numbers", "dropout to 0"]),
    "buffers": ("norm", [48] * 4, {}, ["'layer'", "change their buffers"]),
    "one gate": ("mlp", [48, 48, 2, 48], {"min_capacity": 4}, ["router raised", "rank(s) [2]"]),
}


@pytest.mark.parametrize("mistake", FORWARD)
def test_refused_in_forward(pools, mistake, seed):
    """By all ranks, also what one alone has found."""
    kind, tokens, options, words = FORWARD[mistake]
    if pools(4).world_size < 4 and len(set(tokens)) > 1:
        pytest.skip("needs 4 ranks")
    for kind_of_error, message in pools(4).run(first_forward, kind, tokens, seed, **options):
        assert kind_of_error == "ValueError", message
        assert all(word in message for word in words), message


def start_up(build, sections: dict) -> tuple[str, str]:
    """What ``deepspeed.initialize`` raises."""
    config = engines.ds_config(1, 1, **{"llep": {}, **sections})
    if "expert_parallel" not in sections:
        del config["expert_parallel"]
    try:
        return refused(engines.initialize, build(), config)
    finally:
        set_autotp_mode(training=False)  # deepspeed.initialize sets it, for the whole process


def model(expert=natives.mlp, ep_sizes=(2,), **options) -> torch.nn.Module:
    return torch.nn.Sequential(
        *(ds_llep.MoE(natives.HIDDEN, expert(), 4, size, **options) for size in ep_sizes)
    )


def changed(change) -> torch.nn.Module:
    """The model after something was done to what is inside its layer."""
    found = model()
    change(found[0].deepspeed_moe)
    return found


def with_tutel(moe) -> None:
    moe.use_tutel = True  # as the constructor does where Tutel is installed


def another_gate(moe) -> None:
    moe.gate.__class__ = type("MyGate", (type(moe.gate),), {})


def unlike_experts(moe) -> None:
    moe.experts.deepspeed_experts[1][0].bias.requires_grad_(False)


# What is wrong: the model, sections of the JSON, words of the message.
START_UP = {
    "dropout": (
        partial(model, natives.with_dropout),
        {},
        ["layer '0'", "dropout '1.1' (p=0.1)", "Set its p to 0"],
    ),
    "ZeRO-3": (
        model,
        {"zero_optimization": {"stage": 3}},
        ["not supported with ZeRO Stage 3", "AutoEP", "stage 1/2"],
    ),
    "AutoEP as well": (
        model,
        {"expert_parallel": {"enabled": True, "autoep_size": 2}},
        ['"expert_parallel" is enabled', "Remove one of the two"],
    ),
    "trace": (model, {"llep": {"trace": {"enabled": True}}}, ["llep.trace"]),
    "tensor-parallel experts": (
        partial(model, enable_expert_tensor_parallelism=True),
        {},
        ["enable_expert_tensor_parallelism=False"],
    ),
    "AutoTP": (
        model,
        {"tensor_parallel": {"autotp_size": 2}},
        ["the model is tensor-parallel over 2 ranks. Set that to 1"],
    ),
    "Tutel": (
        partial(changed, with_tutel),
        {},
        ["layer '0': it dispatches with Tutel. Set use_tutel=False"],
    ),
    "gate": (
        partial(changed, another_gate),
        {},
        ["layer '0'", "a MyGate in the place of DeepSpeed's TopKGate"],
    ),
    "experts": (
        partial(changed, unlike_experts),
        {},
        ["layer '0': its experts differ in their parameters or buffers. Make them alike"],
    ),
    "two EP sizes": (partial(model, ep_sizes=(1, 2)), {}, ["one ep_size", "[1, 2]"]),
    "shards": (
        model,
        {"llep": {"weight_source": "shards"}},
        ['"llep.weight_source": "shards"'],
    ),
}


@pytest.mark.parametrize("mistake", START_UP)
def test_refused_at_start_up(pools, mistake):
    build, sections, words = START_UP[mistake]
    for kind_of_error, message in pools(2).run(start_up, build, sections):
        assert kind_of_error == "ValueError", message
        assert all(word in message for word in words), message

"""The workspace as a cache, in engines: what is fetched, what is not, and that it is fresh.

A stale or misplaced expert gives numbers that look fine. So weights change a lot here, and results
are held bit for bit to those without a cache.
"""

from __future__ import annotations

import deepspeed
import deepspeed.comm as dist
import engines
import layers
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_fp32_param
from families import build
from traffic import EXPERT, watched

import ds_llep

FP32 = torch.float32


def start(stage: int, ep_size: int, seed: int, llep: dict, gas: int = 1):
    """An engine whose weights change a lot in a step."""
    overrides = {"lr": 0.3, "gradient_accumulation_steps": gas}
    config = engines.ds_config(stage, ep_size, llep=llep, **overrides)
    return engines.initialize(build("qwen3_moe", seed), config)


def evaluate(engine, seed: int) -> torch.Tensor:
    engine.eval()
    with torch.no_grad():
        logits = engine(**engines.batch(FP32, seed)).logits
    engine.train()
    return logits


def fixed(*experts_of_token: tuple[int, int, int]) -> list[torch.Tensor]:
    """Ids for both layers of an engine: these, in turn."""
    ids = torch.tensor(experts_of_token * engines.SEQ_LEN)[: engines.SEQ_LEN]
    return [ids.to(engines.get_accelerator().current_device_name())] * 2


def micro_batches(stage: int, source: str, cache: bool, seed: int) -> tuple[list, dict]:
    """Traffic of two steps of three micro-batches and two evaluations; logits and gradients."""
    llep = {"max_foreign_bytes": 8 * EXPERT, "weight_source": source, "weight_cache": cache}
    engine = start(stage, 2, seed, llep, gas=3)
    same = engines.routing("hot_rank", engine.module.config, 2, seed)
    # Of three hot experts the first two are borrowed: 0 1, then 1 2, then 0 2.
    mixed = [fixed((0, 1, 2)), fixed((1, 2, 3)), fixed((0, 2, 3))]
    traffic, tensors = [], {}
    with watched() as log:
        for number, ids in enumerate([same, same, same, *mixed, same, same]):
            log.received, log.places = 0, []
            engines.set_routing(engine.module, ids)
            if number < 6:
                output = engine(**engines.batch(FP32, seed + number))
                engine.backward(output.loss)
                tensors[f"logits {number}"] = output.logits.detach()
            else:
                tensors[f"logits {number}"] = evaluate(engine, seed)
            status = ds_llep.status(engine)
            scattered = [p for p in log.places if p and p != list(range(p[0], p[0] + len(p)))]
            counts = status["foreign_experts"], status["fetched_experts"]
            traffic.append((*counts, log.received, len(scattered)))
            if number in (2, 5):
                for name, parameter in engine.module.named_parameters():
                    tensors[f"{name} {number}"] = safe_get_full_grad(parameter).detach().clone()
            if number < 6:
                engine.step()
    assert status["weight_source"] == source
    engine.destroy()
    return traffic, tensors


def with_and_without(stage: int, source: str, seed: int) -> dict:
    on, tensors = micro_batches(stage, source, True, seed)
    off, expected = micro_batches(stage, source, False, seed)
    trained = not torch.equal(tensors["logits 0"], tensors["logits 6"])
    tensors["again"], expected["again"] = tensors["logits 7"], tensors["logits 6"]
    return {
        "different": layers.unequal(tensors, expected),
        "trained": trained,
        "on": on,
        "off": off,
    }


@pytest.mark.parametrize("stage, source", [(2, "owner"), (3, "owner"), (3, "shards")])
def test_micro_batches(pools, stage, source, seed):
    """Fetched once for all micro-batches of a step, as far as they borrow the same experts."""
    results = pools(4).run(with_and_without, stage, source, seed)
    for result in results:
        assert not result["different"] and result["trained"], (seed, result["different"])
        foreign, fetched, *_ = zip(*result["on"], strict=True)
        assert min(foreign[0]) > 0, "nothing was spilled: the test tests nothing"
        assert all(foreign[number] == foreign[0] for number in (1, 2, 6, 7))
        assert fetched[:3] == (foreign[0], [0, 0], [0, 0])
        assert foreign[3:6] == ([2, 2],) * 3 and fetched[3:6] == ([2, 2], [1, 1], [0, 0])
        assert fetched[6:] == (foreign[6], [0, 0])
        for number, (foreign, fetched, _, scattered) in enumerate(result["off"]):
            passes = 2 if number < 6 else 1  # forward and backward
            assert fetched == [passes * count for count in foreign] and not scattered
            assert foreign == result["on"][number][0]
    for number in range(8):
        received, scattered = (sum(result["on"][number][i] for result in results) for i in (2, 3))
        assert (received > 0) == (number not in (1, 2, 5, 7))
        assert scattered or number not in (4, 5)


def changes(stage: int, source: str, directory: str, seed: int) -> dict:
    """For each way to change weights: what held, as seen by evaluations before and after."""
    engine = start(stage, 2, seed, {"max_foreign_bytes": 8 * EXPERT, "weight_source": source})
    engines.set_routing(engine.module, engines.routing("hot_rank", engine.module.config, 2, seed))
    first, *_ = moes = engines.moe_layers(engine.module)
    weights = [weight for moe in moes for weight in moe.experts.parameters()]

    def step():
        engine.backward(engine(**engines.batch(FP32, seed + 1)).loss)
        engine.step()

    def gather():
        with deepspeed.zero.GatheredParameters(weights, modifier_rank=0), torch.no_grad():
            for weight in weights:
                weight.mul_(3)

    def load_state_dict():
        state = {name: 3 * tensor for name, tensor in engine.module.state_dict().items()}
        engine.module.load_state_dict(state)

    def set_master_weights():
        for weight in weights:
            safe_set_full_fp32_param(weight, 3 * safe_get_full_fp32_param(weight))
        step()

    engine.save_checkpoint(directory)
    ways = {
        "step": step,
        "checkpoint": lambda: engine.load_checkpoint(directory),
        "by hand": gather if stage == 3 else load_state_dict,
        "master weights": set_master_weights,
    }
    found = {}
    for name, change in ways.items():
        before = evaluate(engine, seed), evaluate(engine, seed)
        found[name] = {"cached": ds_llep.status(engine)["fetched_experts"] == [0, 0]}
        change()
        after = evaluate(engine, seed)
        first.llep.exchange.forget()
        found[name]["spilled"] = min(ds_llep.status(engine)["spilled_tokens"]) > 0
        found[name]["changed"] = torch.equal(*before) and not torch.equal(before[0], after)
        found[name]["fresh"] = torch.equal(after, evaluate(engine, seed))
    engine.destroy()
    return found


@pytest.mark.parametrize("stage, source", [(1, "owner"), (2, "owner"), (3, "owner"), (3, "shards")])
def test_changes_of_weights(pools, stage, source, tmp_path, seed):
    for found in pools(4).run(changes, stage, source, str(tmp_path), seed):
        for name, held in found.items():
            assert len(held) == 4 and all(held.values()), (seed, name, held)


def in_place(seed: int) -> dict:
    """The hot rank alone changes its experts, between forward passes of a layer without engine."""
    theirs = layers.autoep_layer("qwen3_moe", 4, seed, FP32)
    ours = layers.llep_twin(theirs, max_foreign_bytes=8 * EXPERT)
    experts, last = ours.experts, ours.llep.statistics.last
    x, _, ids = layers.draw(theirs, "hot_rank", 24, FP32, seed)
    for layer in (theirs, ours):
        layers.force_routing(layer, ids)

    def load():
        experts.load_state_dict({name: 3 * w for name, w in experts.state_dict().items()})

    ways = {
        "mul_": lambda: experts.w2.mul_(3),
        "data": lambda: setattr(experts.w2, "data", torch.randn_like(experts.w2)),
        "load_state_dict": load,
    }
    found = {}
    with torch.no_grad():
        for name, change in ways.items():
            before = ours(x)
            if ours.ep_rank == 0:
                change()
            theirs.experts.load_state_dict(experts.state_dict())
            after, expected = ours(x), theirs(x)
            assert last()["fetched_experts"] == last()["foreign_experts"] > [0]
            again = ours(x)
            assert last()["fetched_experts"] == [0]
            changed = (before - expected).norm() > 0.1 * expected.norm()
            right = (after - expected).norm() < 1e-5 * expected.norm()
            found[name] = bool(changed and right) and torch.equal(after, again)
    return found


def test_changes_in_place(pools, seed):
    for found in pools(4).run(in_place, seed):
        assert found == {"mul_": True, "data": True, "load_state_dict": True}, (seed, found)


def alternate(settings: list[tuple], which: tuple[int, ...], seed: int) -> list[dict]:
    """Two steps of those of two engines: logits by micro-batch and final weights of each."""
    started = {n: start(*settings[n], seed + n, {"max_foreign_bytes": None}, gas=2) for n in which}
    # In the engine with EP 2 only the first EP group has something to spill.
    even = fixed(*[(i, (i + 3) % 8, (i + 5) % 8) for i in range(8)])
    ids = [fixed((0, 1, 2)) if dist.get_rank() < 2 else even, fixed((0, 1, 7))]
    found = [{}, {}]
    for number in range(4):
        losses = []
        for n, engine in started.items():
            engines.set_routing(engine.module, ids[n])
            found[n][f"evaluated {number}"] = evaluate(engine, seed)
            output = engine(**engines.batch(FP32, seed + number))
            found[n][f"logits {number}"] = output.logits.detach()
            losses.append((engine, output.loss))
        for engine, loss in losses:  # after the forward pass of both
            engine.backward(loss)
            engine.step()
    for n, engine in started.items():
        for name, parameter in engine.module.named_parameters():
            found[n][name] = safe_get_full_fp32_param(parameter).detach().clone()
        found[n]["spilled"] = torch.tensor(ds_llep.status(engine)["spilled_tokens"])
        engine.destroy()
    return found


def together_and_alone(stages: tuple[int, int], seed: int) -> dict:
    settings = [(stages[0], 2), (stages[1], 4)]
    together = alternate(settings, (0, 1), seed)
    alone = alternate(settings, (0,), seed)[0], alternate(settings, (1,), seed)[1]
    different = [layers.unequal(*pair) for pair in zip(together, alone, strict=True)]
    return {"different": different, "spilled": [engine["spilled"].tolist() for engine in alone]}


@pytest.mark.parametrize("stages", [(2, 2), (3, 2), (2, 3)], ids=str)
def test_two_engines(pools, stages, seed):
    """They share the memory, and all ranks must agree on what still lies there."""
    results = pools(4).run(together_and_alone, stages, seed, timeout=300)
    for result in results:
        assert result["different"] == [[], []], (seed, result["different"])
        assert min(result["spilled"][1]) > 0
    assert min(results[0]["spilled"][0]) > 0

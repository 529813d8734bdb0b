"""Where spilled weights come from changes who sends which bytes, and nothing else.

Engines under ZeRO-3. A source is a ``weight_source`` and a place where ZeRO keeps parameters. Ranks
have three experts each, so that ZeRO cuts some of them in two.
"""

from __future__ import annotations

from collections import Counter

import deepspeed
import deepspeed.comm as dist
import engines
import layers
import numpy as np
import pytest
import torch
import workloads
from families import FAMILIES, build
from test_bad_input import moe, start_up
from test_engine import DTYPES, MoEBlocks, needs_gpu_for_fp16

import ds_llep
from ds_llep import LLEPConfig, make_plan

# AutoEP's default product needs rows of a multiple of 16 bytes; on GPUs, also of aligned matrices,
# which those in a gathered buffer of odd sizes are not.
GPU = torch.cuda.is_available()
TIMEOUT = 900  # several engines, on a machine that may have other work
PER_RANK = 3  # experts
NORMAL, PADDED = (72, 40), (71, 41)  # hidden and FFN size; over two ranks the second needs padding

SHARDS = {"weight_source": "shards"}
SOURCES = {  # the llep section, and additions to "zero_optimization"
    "owner": ({"weight_source": "owner"}, {}),
    "shards": (SHARDS, {}),
    "offloaded": (SHARDS, {"offload_param": {"device": "cpu", "pin_memory": True}}),
    "pageable": (SHARDS, {"offload_param": {"device": "cpu", "pin_memory": False}}),
    "persistent": (SHARDS, {"stage3_param_persistence_threshold": 100_000}),
}


def gradients(ep_size, dtype, checkpointing, workload, sizes, freeze, sources, seed) -> dict:
    """On every rank, for every source: tensors over AutoEP's budget, and where weights were."""
    found, facts = {}, {}
    with engines.sizes(PER_RANK * layers.fit(ep_size), *sizes):

        def make():
            model = build("qwen3_moe", seed, DTYPES[dtype])
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(freeze not in name)
            engines.enable_checkpointing(model, checkpointing)
            return MoEBlocks(model) if workload == "empty_rank" else model

        tokens = workloads.tokens_on_rank(workload, engines.SEQ_LEN, dist.get_rank())
        ids = engines.routing(workload, FAMILIES["qwen3_moe"](), ep_size, seed)
        ids = [ids_TK[:tokens] for ids_TK in ids]
        for name in ("AutoEP", *sources):
            llep, zero = SOURCES.get(name, (None, {}))
            config = engines.ds_config(3, ep_size, dtype, llep, zero=zero)
            config["expert_parallel"]["use_grouped_mm"] = sizes != PADDED and not GPU
            engine = engines.initialize(make(), config)
            inputs = engines.batch(DTYPES[dtype], seed, tokens)
            found[name] = engines.engine_gradients(engine, inputs, ids)
            weights = engines.expert_weights(engine)
            held = {(w.ds_persist, w.ds_numel, w.ds_tensor.ds_numel) for w in weights}
            devices = {w.ds_tensor.device.type for w in weights}
            facts[name] = {"status": ds_llep.status(engine), "held": held, "devices": devices}
            engine.destroy()
        wide = make().double().to(inputs["labels"].device)
        expected = engines.reference_gradients(wide, inputs, ids, ep_size)
    expected = {name: tensor for name, tensor in expected.items() if tensor is not None}
    errors = {name: layers.errors(tensors, expected) for name, tensors in found.items()}
    for name in sources:
        pairs = [(key, tensor, found[name][key]) for key, tensor in found[sources[0]].items()]
        facts[name] |= {
            "over": layers.over_budget(errors[name], errors["AutoEP"]),
            "compared": list(errors[name]),
            "without": [key for key, tensor in found[name].items() if tensor is None],
            "different": [key for key, a, b in pairs if a is not None and not a.equal(b)],
        }
    return {name: facts[name] for name in sources}


# A covering selection: sizes of groups, dtypes, checkpointing, and what tells sources apart.
@pytest.mark.parametrize(
    "ep_size, dtype, checkpointing, workload, sizes, freeze, sources",
    [
        (2, "fp32", "none", "hot_rank", NORMAL, "nothing", list(SOURCES)),
        (2, "bf16", "reentrant", "per_layer", NORMAL, "nothing", ["owner", "shards"]),
        (2, "fp32", "non_reentrant", "hot_rank", PADDED, "nothing", ["owner", "shards"]),
        (2, "fp32", "none", "empty_rank", NORMAL, "nothing", ["owner", "shards"]),
        (2, "bf16", "none", "hot_rank", NORMAL, ".experts.", ["owner", "shards", "persistent"]),
        (4, "fp32", "reentrant", "idle_ranks", NORMAL, "nothing", ["owner", "shards"]),
        (4, "bf16", "none", "one_hot_expert", NORMAL, "nothing", ["owner", "offloaded"]),
        (1, "bf16", "non_reentrant", "balanced", NORMAL, "nothing", ["owner", "shards"]),
    ],
)
def test_gradients(pools, ep_size, dtype, checkpointing, workload, sizes, freeze, sources, seed):
    case = ep_size, dtype, checkpointing, workload, sizes, freeze, sources, seed
    results = pools(4).run(gradients, *case, timeout=TIMEOUT)
    ep_size = min(ep_size, len(results))
    edp_size, matrix = len(results) // ep_size, sizes[0] * sizes[1]
    numel, part = PER_RANK * matrix, -(-PER_RANK * matrix // edp_size)
    experts = {f"model.layers.{i}.mlp.experts.w{w}" for i in range(2) for w in (1, 2, 3)}
    for result in results:
        for name, found in result.items():
            assert not found["over"], f"seed {seed}, {name}: {found['over']}"
            # The same numbers in the same order; GPUs may sum in another.
            assert GPU or not found["different"], found["different"]
            assert experts <= set(found["compared" if freeze == "nothing" else "without"])
            status = found["status"]
            assert status["weight_source"] == ("owner" if name == "owner" else "shards")
            assert (status["ep_size"], status["edp_size"]) == (ep_size, edp_size)
            assert (sum(status["foreign_experts"]) > 0) == (ep_size > 1)
            if checkpointing == "none":  # a second forward may find all in the cache
                assert (sum(status["fetched_experts"]) > 0) == (ep_size > 1)
            assert name not in ("offloaded", "pageable") or found["devices"] == {"cpu"}
            assert found["held"] == {(name == "persistent", numel, part)}
            assert edp_size == 1 or part % matrix, "no expert is cut in two"
            assert (sizes, edp_size) != (PADDED, 2) or part * edp_size > numel, "no padding"


TRAINED = {  # each combination with another place for parameters, so that all see steps
    "shards": {"overlap_comm": True, "contiguous_gradients": True},
    "offloaded": {"overlap_comm": True, "contiguous_gradients": False},
    "persistent": {"overlap_comm": False, "contiguous_gradients": True},
    "pageable": {"overlap_comm": False, "contiguous_gradients": False},
}


def loss_curves(dtype: str, overflow: bool, seed: int, steps: int = 8, gas: int = 2) -> dict:
    """Losses by source, of AutoEP and of the fp64 reference, with accumulation and clipping.

    With ``overflow`` a step precedes them whose gradients are infinite, so that it is skipped. Its
    loss is what overflows: a high loss scale would leave to rounding how many steps are skipped.
    """
    sections = {"gradient_clipping": 0.5, "gradient_accumulation_steps": gas}
    curves, spilled = {}, {}
    with engines.sizes(PER_RANK * layers.fit(2)):
        for name, options in [("AutoEP", {}), *TRAINED.items()]:
            llep, zero = SOURCES.get(name, (None, {}))
            model, zero = build("qwen3_moe", seed, DTYPES[dtype]), {**zero, **options}
            config = engines.ds_config(3, 2, dtype, llep, zero=zero, **sections)
            config["expert_parallel"]["use_grouped_mm"] = not GPU
            engine, curves[name] = engines.initialize(model, config), []
            for micro_step in range(-gas if overflow else 0, steps * gas):
                ids = engines.routing("per_layer", model.config, 2, seed + max(micro_step, 0))
                engines.set_routing(engine.module, ids)
                loss = engine(**engines.batch(DTYPES[dtype], seed + max(micro_step, 0))).loss
                engine.backward(loss if micro_step >= 0 else loss * 2.0**30)
                engine.step()
                if micro_step >= 0:
                    curves[name].append(engines.mean_over_ranks(loss))
            assert (engine.global_steps, engine.skipped_steps) == (steps + overflow, overflow)
            spilled[name] = sum(ds_llep.status(engine).get("spilled_tokens", []))
            engine.destroy()
        run = build("qwen3_moe", seed, DTYPES[dtype]).double(), DTYPES[dtype], 2, seed, steps, gas
        curves["reference"], norms = engines.reference_curve(*run, max_norm=0.5)
    return {"curves": curves, "spilled": spilled, "clipped": max(norms) > 0.5}


@pytest.mark.parametrize(
    "dtype, overflow", [("fp32", False), pytest.param("fp16", True, marks=needs_gpu_for_fp16)]
)
def test_training(pools, dtype, overflow, seed):
    result = pools(4).run(loss_curves, dtype, overflow, seed, timeout=TIMEOUT)[0]
    reference = np.array(result["curves"].pop("reference"))
    assert result["clipped"]
    errors = {name: np.linalg.norm(reference - c) for name, c in result["curves"].items()}
    assert set(errors) == {"AutoEP", *TRAINED}
    budget = 2 * errors.pop("AutoEP") + 1e-6 * np.linalg.norm(reference)
    for name, error in errors.items():
        assert result["spilled"][name] > 0 and error <= budget, f"{name}: {error}, {budget}"


@pytest.mark.parametrize(
    "zero, reason",
    [
        *(({"stage": stage}, f"ZeRO stage {stage}") for stage in (0, 1, 2)),
        ({"stage": 3, "zero_quantized_weights": True}, "quantized weights"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "quantized weights"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "NVMe"),
    ],
)
def test_shards_that_do_not_exist(pools, zero, reason, tmp_path):
    if "offload_param" in zero:
        zero = {**zero, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
    case = start_up, moe, SHARDS, {"zero_optimization": zero}
    for kind, text in pools(4).run(*case, timeout=TIMEOUT):
        assert kind == "ValueError", text
        assert '"llep.weight_source": "shards"' in text and reason in text and '"owner"' in text


@pytest.mark.parametrize(
    "options, fragment",
    [({"zero_hpz_partition_size": 2}, "hpZ"), ({"zero_quantized_gradients": True}, "gradients")],
)
def test_what_autoep_refuses(pools, options, fragment):
    pool, sections = pools(4), {"zero_optimization": {"stage": 3, **options}}
    off, auto, shards = (
        pool.run(start_up, moe, llep, sections, timeout=TIMEOUT) for llep in (None, {}, SHARDS)
    )
    assert off == auto == shards
    for kind, text in off:
        assert kind == "AssertionError" and "AutoEP" in text and fragment in text, text


def made_under_zero_init(seed: int, steps: int = 3) -> dict:
    """Losses where parameters are partitioned before AutoEP sees them, of AutoEP and ours."""
    losses = {}
    for name, llep in (("AutoEP", None), ("ours", {**SHARDS, "weight_cache": True})):
        config, found = engines.ds_config(3, 2, "fp32", llep), losses.setdefault(name, [])
        plain = {
            key: value for key, value in config.items() if key not in ("expert_parallel", "llep")
        }
        source = build("qwen3_moe", seed)
        with deepspeed.zero.Init(config_dict_or_path=plain):
            model = type(source)(source.config)
        for ours, theirs in zip(model.parameters(), source.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([ours], modifier_rank=0), torch.no_grad():
                ours.copy_(theirs)
        engine = engines.initialize(model, config)
        for step in range(steps):
            engines.set_routing(engine.module, engines.routing("hot_rank", source.config, 2, seed))
            loss = engine(**engines.batch(torch.float32, seed + step)).loss
            engine.backward(loss)
            engine.step()
            found.append(engines.mean_over_ranks(loss))
        status = ds_llep.status(engine)
        engine.destroy()
    return {"losses": losses, "status": status}


def test_zero_init(pools, seed):
    for result in pools(4).run(made_under_zero_init, seed, timeout=TIMEOUT):
        ours, theirs = result["losses"]["ours"], result["losses"]["AutoEP"]
        assert ours == pytest.approx(theirs, rel=1e-5) and len(set(ours)) == len(ours)
        assert result["status"]["weight_source"] == "shards"
        assert sum(result["status"]["fetched_experts"]) > 0


def status_of(stage: int, ep_size: int, seed: int) -> dict:
    config = engines.ds_config(stage, ep_size, llep={})
    engine = engines.initialize(build("qwen3_moe", seed), config)
    status = ds_llep.status(engine)
    engine.destroy()
    return status


@pytest.mark.parametrize(
    "stage, ep_size, source, reason",
    [(3, 2, "shards", "2 ranks"), (3, 4, "owner", "EDP size 1"), (2, 2, "owner", "stage 2")],
)
def test_automatic_source(pools, stage, ep_size, source, reason, seed):
    results = pools(4).run(status_of, stage, ep_size, seed, timeout=TIMEOUT)
    if stage == 3 and len(results) == ep_size:  # fewer ranks than asked for
        source, reason = "owner", "EDP size 1"
    for status in results:
        why = status["weight_source_reason"]
        assert status["weight_source"] == source and why.startswith("auto: ") and reason in why


def traffic(source: str, ep_size: int, dtype: str, seed: int) -> dict:
    """Messages of one forward and backward without a cache, and what they follow from.

    Layer 0 is hot in every EP group, layer 1 exactly balanced, layer 2 hot in the first group.
    """
    with engines.sizes(PER_RANK * layers.fit(ep_size), *NORMAL, num_layers=3):
        model = build("qwen3_moe", seed, DTYPES[dtype])
        llep = {"weight_source": source, "weight_cache": False}
        engine = engines.initialize(model, engines.ds_config(3, ep_size, dtype, llep))
        hot = engines.routing("hot_rank", model.config, ep_size, seed)[0]
        other = engines.routing("one_hot_expert", model.config, ep_size, seed)[2]
        even = torch.arange(hot.numel(), device=hot.device).view_as(hot) % model.config.num_experts
        ids = [hot, even, other if dist.get_rank() < layers.fit(ep_size) else even]
        with engines.point_to_point(engine) as found:
            engines.engine_gradients(engine, engines.batch(DTYPES[dtype], seed), ids)
        parts = [weight.ds_tensor.ds_numel for weight in engines.expert_weights(engine)]
        engine.destroy()
    counts = [torch.bincount(i.flatten(), minlength=model.config.num_experts) for i in ids]
    return {**found, "parts": parts, "counts": torch.stack(counts).tolist()}


def planned(source, plans, part: int, itemsize: int) -> tuple[Counter, Counter]:
    """One layer's bytes of weights and of gradients, by (size of the group, sender, receiver)."""
    weights, returned = Counter(), Counter()
    matrix, world = NORMAL[0] * NORMAL[1], len(plans) * plans[0].num_ranks
    for group, plan in enumerate(plans):
        ep_size = plan.num_ranks
        for spill in plan.spills:
            home, helper = group * ep_size + spill.home, group * ep_size + spill.helper
            returned[ep_size, helper, home] += 3 * matrix * itemsize
            if source == "owner":
                weights[ep_size, home, helper] += 3 * matrix * itemsize
                continue
            held_by = np.arange(PER_RANK * matrix) // part  # EDP rank, for every element
            held_by = held_by.reshape(PER_RANK, matrix)[spill.expert % PER_RANK]
            for edp_rank, numel in enumerate(np.bincount(held_by).tolist()):
                weights[world, edp_rank * ep_size + spill.home, helper] += 3 * numel * itemsize
    return +weights, +returned


@pytest.mark.parametrize(
    "source, ep_size, dtype", [("shards", 2, "bf16"), ("shards", 4, "fp32"), ("owner", 2, "fp32")]
)
def test_bytes_on_the_wire(pools, source, ep_size, dtype, seed):
    results = pools(4).run(traffic, source, ep_size, dtype, seed, timeout=TIMEOUT)
    world, ep_size = len(results), min(ep_size, len(results))
    edp_size, itemsize = world // ep_size, DTYPES[dtype].itemsize
    sent = {key: nbytes for result in results for key, nbytes in result["isend"].items()}
    received = {key: nbytes for result in results for key, nbytes in result["irecv"].items()}
    assert sent == received, "a send without its receive, or one of another size"
    passes = [*((i, "forward") for i in range(3)), *((i, "backward") for i in (2, 1, 0))]
    assert all(result["passed"] == passes for result in results)
    (part,) = set().union(*(result["parts"] for result in results))
    whole = NORMAL[0] * NORMAL[1] * itemsize
    messages = {n for key in sent if key[1] == "forward" for n in sent[key]}
    if source == "owner":
        assert all(nbytes % (3 * whole) == 0 for nbytes in messages), "whole experts"
        assert max(messages) > 3 * whole, "no two in one message"
    else:
        assert max(messages) == whole
        assert (min(messages) < whole) == (edp_size > 1), "no expert was cut"
    for layer in range(3):
        counts_RE = np.array([result["counts"][layer] for result in results])
        config = LLEPConfig(imbalance_threshold=1.0, min_tokens_per_gemm=1)
        plans = [make_plan(counts_PE, config) for counts_PE in np.split(counts_RE, edp_size)]
        hot = [layer == 0 or (layer == 2 and group == 0) for group in range(edp_size)]
        assert [bool(plan.spills) for plan in plans] == hot
        weights, returned = planned(source, plans, part, itemsize)
        for direction, expected in (("forward", weights), ("backward", weights + returned)):
            found = {k[2:]: sum(sent[k]) for k in sent if k[:2] == (layer, direction)}
            assert found == expected, f"layer {layer}, {direction}, seed {seed}"
        for rank in range(world):  # helpers get whole experts, holders send their share
            arrived = sum(nbytes for (*_, to), nbytes in weights.items() if to == rank)
            foreign = plans[rank // ep_size].foreign_experts(rank % ep_size)
            assert arrived == len(foreign) * 3 * whole
            holders = range(rank % ep_size, world, ep_size)
            left = [sum(n for (_, by, _), n in weights.items() if by == at) for at in holders]
            assert source == "owner" or max(left) <= sum(left) / edp_size + 3 * whole

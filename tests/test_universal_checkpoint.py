"""DeepSpeed's own checkpoint tools treat what an engine with llep saved as they treat AutoEP's.

What they do with AutoEP checkpoints in the first place: ``ds_to_universal`` converts them under
ZeRO 1, 2 and 3, experts whole and with their moments, and ``"load_universal"`` cuts them to another
EP size; everything that consolidates weights by itself refuses them, or leaves experts out.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import deepspeed.comm as dist
import engines
import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import LossScalerBase
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
)
from families import build

import ds_llep

STEPS = 2  # before the checkpoint, and as many after it
TAG = f"global_step{STEPS}"
NO_GRADIENT = "model.embed_tokens.weight"  # the engines get embeddings, so its moments stay zero
GROUP_TABLES = (
    "_EXPERT_PARALLEL_GROUP",
    "_EXPERT_PARALLEL_GROUP_RANKS",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
)


@contextlib.contextmanager
def process_of_its_own() -> Iterator[None]:
    """Hide the groups of other EP sizes that this process has made.

    Under ZeRO 1 and 2 DeepSpeed cuts universal experts by the largest EP group of the process,
    whichever engine loads them; a job that resumes has one EP size.
    """
    with contextlib.ExitStack() as stack:
        for table in GROUP_TABLES:
            stack.enter_context(mock.patch.dict(getattr(groups, table), clear=True))
        yield


def start(stage: int, ep_size: int, llep: bool, seed: int, **sections):
    config = engines.ds_config(stage, ep_size, "fp32", {} if llep else None, **sections)
    return engines.initialize(build("qwen3_moe", seed), config)


def train(engine, steps: range, seed: int) -> list[float]:
    """Losses; inputs and routing are the same whatever the EP size."""
    losses = []
    for step in steps:
        engines.set_routing(
            engine.module, engines.routing("per_layer", engine.module.config, 2, seed + step)
        )
        loss = engine(**engines.batch(torch.float32, seed + step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(engines.mean_over_ranks(loss))
    return losses


def weights(engine) -> dict[str, torch.Tensor]:
    """Every fp32 parameter, whole: experts of all EP ranks."""
    return {
        f"{name}/fp32": whole(engine, name, safe_get_full_fp32_param(parameter))
        for name, parameter in engine.module.named_parameters()
    }


def moments(engine) -> dict[str, torch.Tensor]:
    """Adam's state in the same form, and its steps."""
    if engine.zero_optimization_stage() < 3:
        # DeepSpeed links moments to parameters after the step of the first parameter group, when
        # the experts', which are another group, have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {
        f"{name}/{key}": whole(engine, name, safe_get_full_optimizer_state(parameter, key))
        for name, parameter in engine.module.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }
    steps = {float(values["step"]) for values in engine.basic_optimizer.state.values()}
    return {**found, "steps": torch.tensor(sorted(steps))}


def whole(engine, name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().contiguous()
    if ".mlp.experts." in name:
        group = engines.moe_layers(engine.module)[0].ep_group
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group=group))]
        dist.all_gather(parts, tensor, group=group)
        tensor = torch.cat(parts)
    return tensor.to("cpu", copy=True)


def spilled(engine) -> int:
    return sum(ds_llep.status(engine)["spilled_tokens"])


def train_and_save(stage: int, ep_size: int, directory: str, seed: int) -> dict:
    """Train with llep, save, and train on; what was saved lies in ``state.pt``."""
    with process_of_its_own():
        engine = start(stage, ep_size, True, seed)
        train(engine, range(STEPS), seed)
        result = {"spilled": spilled(engine)}
        engine.save_checkpoint(directory, client_state={"epoch": 7})
        state = {**weights(engine), **moments(engine)}
        if dist.get_rank() == 0:
            torch.save(state, f"{directory}/state.pt")
        result["losses"] = train(engine, range(STEPS, 2 * STEPS), seed)
        engine.destroy()
    return result


def resume(stage: int, ep_size: int, directory: str, seed: int) -> dict:
    """Load the universal checkpoint into an engine with llep and other weights; train on."""
    saved = torch.load(f"{directory}/state.pt")
    with process_of_its_own():
        engine = start(stage, ep_size, True, seed + 1, checkpoint={"load_universal": True})
        fresh = weights(engine)
        _, client_state = engine.load_checkpoint(directory)
        loaded = {**weights(engine), **moments(engine)}
        # From a universal checkpoint DeepSpeed's ZeRO-3 gives all parameter groups one tensor as
        # their count of steps, and PyTorch's Adam counts it up once for each of them.
        for values in engine.basic_optimizer.state.values():
            values["step"] = values["step"].clone()
        result = {
            "epoch": client_state["epoch"],
            "global_steps": engine.global_steps,
            "were_equal": [name for name in fresh if torch.equal(fresh[name], saved[name])],
            "compared": sorted(saved),
            "zero": [name for name in saved if not saved[name].any()],
            "missing": sorted(saved.keys() ^ loaded.keys()),
            "different": [name for name in saved if not torch.equal(loaded[name], saved[name])],
            "losses": train(engine, range(STEPS, 2 * STEPS), seed),
            "spilled": spilled(engine),
            "status": ds_llep.status(engine),
        }
        engine.destroy()
    return result


def convert(directory: Path) -> Path:
    """What ``ds_to_universal.py`` does on the command line."""
    universal = directory / f"{TAG}_universal"
    ds_to_universal.main(
        types.SimpleNamespace(
            input_folder=str(directory / TAG),
            output_folder=str(universal),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
    return universal


# ZeRO 1 and 2 share the code that cuts experts, so one of them goes from 4 to 2.
@pytest.mark.parametrize(
    "stage, saved, targets",
    [(1, 2, [2, 4]), (2, 2, [2, 4]), (2, 4, [2]), (3, 2, [2, 4]), (3, 4, [2])],
)
def test_universal_checkpoint_resumes(pools, stage, saved, targets, tmp_path, seed):
    pool = pools(4)
    other = 4 if pool.world_size >= 4 else 1  # 1 is the only other EP size of two ranks
    saved, *targets = (other if size == 4 else size for size in (saved, *targets))
    went_on = pool.run(train_and_save, stage, saved, str(tmp_path), seed)
    assert all((result["spilled"] > 0) == (saved > 1) for result in went_on)
    convert(tmp_path)
    for ep_size in targets:
        resumed = pool.run(resume, stage, ep_size, str(tmp_path), seed)
        check(went_on, resumed, ep_size)


def check(went_on: list[dict], resumed: list[dict], ep_size: int) -> None:
    for before, after in zip(went_on, resumed, strict=True):
        assert not after["were_equal"], "the engine had the saved weights before loading"
        assert (after["epoch"], after["global_steps"]) == (7, STEPS)
        assert not after["missing"] and not after["different"]
        assert {f"{NO_GRADIENT}/exp_avg", f"{NO_GRADIENT}/exp_avg_sq"} == set(after["zero"])
        assert sum(".experts.w" in name for name in after["compared"]) == 2 * 3 * 3
        assert after["losses"] == pytest.approx(before["losses"], rel=1e-5)
        assert after["status"]["active"] and after["status"]["ep_size"] == ep_size
        assert (after["spilled"] > 0) == (ep_size > 1)


def save_both(stage: int, directory: str, seed: int) -> dict:
    """A checkpoint of an engine with llep, and plain AutoEP's of the same weights and moments."""
    with process_of_its_own():
        balanced = start(stage, 2, True, seed)
        train(balanced, range(STEPS), seed)
        balanced.save_checkpoint(f"{directory}/llep")
        plain = start(stage, 2, False, seed + 1)
        plain.load_checkpoint(f"{directory}/llep")
        plain.save_checkpoint(f"{directory}/autoep")
        result = {
            "spilled": spilled(balanced),
            "active": [ds_llep.status(engine)["active"] for engine in (balanced, plain)],
        }
        balanced.destroy()
        plain.destroy()
    return result


def outcome(function: Callable, directory: str | Path, *args):
    """What a function returns, or what it raises, without the directory's name."""
    try:
        return function(str(directory), *args)
    except Exception as error:
        return type(error).__name__, str(error).replace(str(directory), "")


def same(ours, theirs) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, LossScalerBase):  # has no __eq__
        return vars(ours) == vars(theirs)
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return ours == theirs


def contents(folder: Path) -> dict[str, object]:
    """Everything that the files of a folder hold, but for the settings of who wrote them."""
    found = {}
    for path in sorted(folder.rglob("*.pt")):
        value = torch.load(path, map_location="cpu", weights_only=False)
        if isinstance(value, dict):
            value.pop("ds_config", None)
        found[str(path.relative_to(folder))] = value
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tools_see_an_autoep_checkpoint(pools, stage, tmp_path, seed):
    """``zero_to_fp32``: whatever it makes of AutoEP's checkpoint.

    Under ZeRO 1 and 2 it takes the files of single experts for model states and gives up; under
    ZeRO-3 it refuses AutoEP and refers to ``ds_to_universal``.
    """
    for result in pools(4).run(save_both, stage, str(tmp_path), seed):
        assert result["spilled"] > 0 and result["active"] == [True, False]
    ours, theirs = tmp_path / "llep", tmp_path / "autoep"

    expected = {
        1: ("ValueError", "is not a model state checkpoint"),
        2: ("ValueError", "is not a model state checkpoint"),
        3: ("NotImplementedError", "does not support AutoEP ZeRO-3"),
    }
    for tool, arguments in (
        (get_fp32_state_dict_from_zero_checkpoint, ()),
        (convert_zero_checkpoint_to_fp32_state_dict, (str(tmp_path / "fp32"),)),
    ):
        assert same(outcome(tool, ours, *arguments), outcome(tool, theirs, *arguments))
        kind, message = outcome(tool, ours, *arguments)
        assert kind == expected[stage][0] and expected[stage][1] in message

    assert same(contents(ours / TAG), contents(theirs / TAG))
    converted = contents(convert(ours))
    assert same(converted, contents(convert(theirs)))
    assert len([name for name in converted if ".experts.w" in name]) >= 2 * 3 * 3

"""What an engine saves is what transformers saves of the unsharded model."""

from __future__ import annotations

import json
import types
from pathlib import Path
from unittest import mock

import accelerate
import deepspeed.comm as dist
import engines
import pytest
import quantized
import safetensors.torch
import torch
import transformers
from accelerate.utils import DistributedType
from families import build
from transformers.integrations import HfDeepSpeedConfig

import ds_llep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def start(family: str, stage: int, ep_size: int, dtype: str, llep: bool, seed: int, **zero):
    """An engine, and its model's weights from before."""
    model = build(family, seed, DTYPES[dtype])
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = engines.ds_config(stage, ep_size, dtype, {} if llep else None, zero=zero)
    return engines.initialize(model, config), before


def step(engine, seed: int) -> None:
    vocabulary = engine.module.config.vocab_size
    ids = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(engine.device)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def own_tensors(engine) -> dict[str, torch.Tensor]:
    """What this rank holds of what is saved: all, or its pieces under ZeRO-3."""
    saved = engine.module.state_dict()
    found = {n: getattr(p, "ds_tensor", p).detach() for n, p in engine.module.named_parameters()}
    found |= {name: buffer for name, buffer in engine.module.named_buffers() if name in saved}
    return found


def read(directory: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def save(
    family: str, stage: int, ep_size: int, dtype: str, llep: bool, directory: str, seed: int
) -> None:
    """Save, train, save again; and see that what was saved is what is in the engine."""
    unsharded = build(family, seed, DTYPES[dtype])
    engine, before = start(family, stage, ep_size, dtype, llep, seed)
    fresh, trained = f"{directory}/fresh", f"{directory}/trained"
    ds_llep.save_pretrained(engine, fresh, max_shard_size="40KB")
    if dist.get_rank() == 0:
        unsharded.load_state_dict(before)
        unsharded.save_pretrained(f"{directory}/expected", max_shard_size="40KB")
        ours, theirs = read(fresh), read(f"{directory}/expected")
        assert ours.keys() == theirs.keys()
        assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        assert not [name for name in theirs if ours[name].dtype != theirs[name].dtype]
        configs = [
            json.loads(Path(folder, "config.json").read_text())
            for folder in (fresh, f"{directory}/expected")
        ]
        assert configs[0] == configs[1]
        index = json.loads(Path(fresh, "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == ours.keys()
        assert len(set(index["weight_map"].values())) > 2, "one file: the test tests little"
        assert Path(fresh, "generation_config.json").exists()
    step(engine, seed)
    ds_llep.save_pretrained(engine, trained)
    step(engine, seed)  # saving leaves the engine able to go on
    ds_llep.save_pretrained(engine, trained)
    expected = {name: value.clone() for name, value in own_tensors(engine).items()}
    engine.destroy()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=DTYPES[dtype])
    assert set(read(trained)) == set(read(fresh))
    changed = [n for n, v in loaded.state_dict().items() if not torch.equal(v, before[n].cpu())]
    assert any("experts" in name for name in changed), "training changed nothing"
    again = engines.initialize(
        loaded, engines.ds_config(stage, ep_size, dtype, {} if llep else None)
    )
    found = own_tensors(again)
    again.destroy()
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize(
    "family, stage, ep_size, dtype, llep",
    [
        ("mixtral", 3, 2, "fp32", True),
        ("mixtral", 0, 4, "bf16", False),
        ("qwen3_moe", 1, 4, "bf16", True),
        ("qwen3_moe", 3, 2, "bf16", True),
        ("qwen2_moe", 2, 2, "fp32", True),
        ("deepseek_v2", 2, 4, "fp32", False),
        ("deepseek_v3", 3, 4, "fp32", True),
        ("deepseek_v3", 0, 2, "fp32", True),
        ("qwen3_5_moe", 3, 2, "fp32", False),
        ("minimax_m3", 1, 2, "bf16", True),
        ("gpt_oss", 2, 4, "bf16", True),
    ],
)
def test_saves_what_transformers_saves(pools, family, stage, ep_size, dtype, llep, tmp_path, seed):
    pools(4).run(save, family, stage, ep_size, dtype, llep, str(tmp_path), seed)


def message(function, *args) -> str:
    with pytest.raises(ValueError) as caught:
        function(*args)
    return str(caught.value)


def failures(directory: str, seed: int) -> dict:
    """Errors that rank 0 alone meets, and the engine's state afterwards."""
    engine, before = start("mixtral", 3, 2, "fp32", True, seed)
    Path(directory, f"file-{dist.get_rank()}").touch()
    found = {"file": message(ds_llep.save_pretrained, engine, f"{directory}/file-0")}
    full = mock.Mock(side_effect=[None, OSError(28, "No space left on device")])
    with mock.patch.object(safetensors.torch, "save_file", full):
        found["full"] = message(ds_llep.save_pretrained, engine, f"{directory}/full", "40KB")
    assert full.call_count == 2 * (dist.get_rank() == 0)
    step(engine, seed)
    engine.module.config.vocab_size += 1
    found["config"] = message(ds_llep.save_pretrained, engine, f"{directory}/config")
    engine.module.config.vocab_size -= 1
    engine.destroy()
    found["no engine"] = message(ds_llep.save_pretrained, torch.nn.Linear(1, 1), directory)
    assert not Path(directory, "config").exists()
    return found


def test_errors_are_every_ranks(pools, tmp_path, seed):
    results = pools(4).run(failures, str(tmp_path), seed)
    assert all(result == results[0] for result in results)
    assert "FileExistsError" in results[0]["file"] and "room" in results[0]["file"]
    assert "No space left" in results[0]["full"]
    assert "lm_head.weight" in results[0]["config"] and "layers" not in results[0]["config"]
    assert "Linear" in results[0]["no engine"]


def whole_state_dicts(stage: int, directory: str, seed: int) -> None:
    """DeepSpeed's and Accelerate's ways; what transformers makes of them on rank 0."""
    gather = {"stage3_gather_16bit_weights_on_model_save": True}
    engine, before = start("deepseek_v3", stage, 2, "fp32", True, seed, **gather)
    assert engine.save_16bit_model(directory)
    accelerator = types.SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, deepspeed_config=engine.config
    )
    state_dict = accelerate.Accelerator.get_state_dict(accelerator, engine)
    if dist.get_rank() == 0:
        saved = torch.load(f"{directory}/pytorch_model.bin")
        assert saved.keys() == before.keys() == state_dict.keys()
        assert all(torch.equal(saved[name], before[name]) for name in before)
        assert all(torch.equal(state_dict[name], before[name]) for name in before)
        engine.module.config.save_pretrained(directory)
        engine.module.save_pretrained(f"{directory}/trainer", state_dict=state_dict)
        for folder in (directory, f"{directory}/trainer"):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
            assert all(torch.equal(loaded[name], before[name]) for name in before)
    else:
        assert state_dict is None
    with pytest.raises(ValueError, match="exclude_frozen"):
        engine.save_16bit_model(directory, exclude_frozen_parameters=True)
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_whole_state_dicts(pools, stage, tmp_path, seed):
    pools(4).run(whole_state_dicts, stage, str(tmp_path), seed)


def dequantized(kind: str, stage: int, llep: bool, directory: str, seed: int) -> None:
    """A quantized checkpoint into an engine, and out again in all ways as what it stands for."""
    write, loaded_with = quantized.WRITERS[kind]
    published = Path(directory, "published")
    meant = write(published, seed) if dist.get_rank() == 0 else {}
    dist.barrier()
    gather = {"stage3_gather_16bit_weights_on_model_save": True}
    config = engines.ds_config(stage, 2, "bf16", {} if llep else None, zero=gather)
    keep = HfDeepSpeedConfig(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        published, quantization_config=loaded_with(dequantize=True), dtype=torch.bfloat16
    )
    engine = engines.initialize(model, config)
    del keep
    ds_llep.save_pretrained(engine, f"{directory}/ours")
    if llep:
        engine.save_16bit_model(directory)
        accelerator = types.SimpleNamespace(
            distributed_type=DistributedType.DEEPSPEED, deepspeed_config=engine.config
        )
        state_dict = accelerate.Accelerator.get_state_dict(accelerator, engine)
    if dist.get_rank() == 0:
        found = [read(f"{directory}/ours")]
        if llep:
            engine.module.save_pretrained(f"{directory}/trainer", state_dict=state_dict)
            found.append(read(f"{directory}/trainer"))
            saved = torch.load(f"{directory}/pytorch_model.bin")
            loaded = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/ours")
            assert saved.keys() == loaded.state_dict().keys()
            assert all(torch.equal(saved[n], t) for n, t in loaded.state_dict().items())
        for tensors in found:
            assert tensors.keys() == meant.keys(), tensors.keys() ^ meant.keys()
            assert not [name for name in meant if not torch.equal(tensors[name], meant[name])]
        settings = json.loads(Path(directory, "ours", "config.json").read_text())
        assert "quantization_config" not in settings
    engine.destroy()


@pytest.mark.parametrize(
    "kind, stage, llep",
    [("mxfp4", 1, True), ("mxfp4", 3, True), ("mxfp4", 2, False), ("fp8", 3, True)],
)
def test_what_was_quantized(pools, kind, stage, llep, tmp_path, seed):
    pools(2).run(dequantized, kind, stage, llep, str(tmp_path), seed)


def plain_engines(directory: str, seed: int) -> None:
    """Without llep, and where the JSON says not to gather, DeepSpeed's ways are as they were."""
    balanced, _ = start("mixtral", 3, 2, "fp32", True, seed)
    assert balanced.save_16bit_model(directory) is False
    assert not Path(directory, "pytorch_model.bin").exists()
    balanced.destroy()
    plain, _ = start("mixtral", 3, 2, "fp32", False, seed)
    with pytest.raises(NotImplementedError):
        plain.save_16bit_model(directory)
    plain.destroy()


def test_what_is_left_alone(pools, tmp_path, seed):
    pools(4).run(plain_engines, str(tmp_path), seed)

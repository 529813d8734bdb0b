"""from_pretrained under ZeRO-3: a rank never holds the model whole, and the weights are right."""

from __future__ import annotations

import gc
from pathlib import Path
from unittest import mock

import deepspeed
import deepspeed.comm as dist
import engines
import pytest
import safetensors.torch
import torch
import transformers
import transformers.modeling_utils
from families import build
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations import HfDeepSpeedConfig

import ds_llep
from ds_llep.bench.live_bytes import StorageTracker
from ds_llep.export import whole_state_dict
from ds_llep.load import blocks

LAYERS = 8


def test_blocks():
    names = ["embed.weight", "m.layers.0.a", "m.layers.10.a", "m.layers.0.x.3.b", "norm", "2.a"]
    assert blocks(names) == [
        ["embed.weight", "norm"],
        ["m.layers.0.a", "m.layers.0.x.3.b"],
        ["m.layers.10.a"],
        ["2.a"],
    ]


def write(directory: str, family: str, seed: int) -> None:
    """Rank 0 saves a model, in several files, as transformers does."""
    if dist.get_rank() == 0:
        model = build(family, seed)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_()
        model.save_pretrained(directory, max_shard_size="100KB")
    dist.barrier()


def peaks(directory: str, streaming: bool, seed: int) -> dict:
    """Load and convert; the most bytes that this rank held in each, and what it holds after both.

    Weights on their way from a mapped file do not count.
    """
    config = engines.ds_config(3, 2, llep={} if streaming else None)
    read = transformers.modeling_utils.load_state_dict

    def read_unseen(*args, **kwargs):
        with _disable_current_modes():
            return read(*args, **kwargs)

    with engines.sizes(8, hidden=64, ffn=64, num_layers=LAYERS):
        write(directory, "qwen3_moe", seed)
    keep = HfDeepSpeedConfig(config)
    with (
        StorageTracker() as memory,
        mock.patch.object(transformers.modeling_utils, "load_state_dict", read_unseen),
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        found = {"load": memory.peak()}
        gc.collect()
        memory.reset_peak()
        with (
            mock.patch.object(deepspeed.DeepSpeedEngine, "_configure_optimizer", stop),
            pytest.raises(EOFError),
        ):
            engines.initialize(model, config)
        found |= {"convert": memory.peak(), "after": memory.live()}
    del keep
    return found


def stop(*args) -> None:
    raise EOFError


def test_no_rank_holds_the_model(pools, tmp_path, seed):
    """Without llep transformers holds it on every rank: what the hook is for."""
    pool = pools(4)
    for streaming in (False, True):
        directory = tmp_path / str(streaming)
        found = pool.run(peaks, str(directory), streaming, seed)
        whole = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        for result in found:
            assert (result["load"] > whole) == (not streaming), (result, whole)
            if streaming:
                share, layer = whole / pool.world_size, whole / LAYERS
                assert result["load"] < share + 3 * layer, (result, whole)
                assert result["convert"] < share + 3 * layer, (result, whole)
                assert result["after"] < share + layer, (result, whole)


def round_trip(directory: str, family: str, seed: int) -> dict:
    """A directory into a ZeRO-3 engine, and out again at once."""
    config = engines.ds_config(3, 2, llep={})
    write(directory, family, seed)
    keep = HfDeepSpeedConfig(config)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    engine = engines.initialize(model, config)
    found = whole_state_dict(engine)
    ds_llep.save_pretrained(engine, f"{directory}/again")
    engine.destroy()
    del keep
    if dist.get_rank() != 0:
        return {"missing": info["missing_keys"], "different": []}
    expected = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    again = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/again").state_dict()
    assert found.keys() <= expected.keys() == again.keys()
    return {
        "missing": info["missing_keys"],
        "different": [n for n in expected if not torch.equal(expected[n], again[n])]
        + [n for n in found if not torch.equal(found[n].cpu(), expected[n])],
        "files": [read_names(directory), read_names(f"{directory}/again")],
    }


def read_names(directory: str) -> set[str]:
    paths = Path(directory).glob("*.safetensors")
    return {name for path in paths for name in safetensors.torch.load_file(path)}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_5_moe", "gpt_oss"])
def test_weights_in_and_out(pools, family, tmp_path, seed):
    """The names in the files stay too: without conversions that loading did not use."""
    results = pools(4).run(round_trip, str(tmp_path), family, seed)
    assert not any(result["missing"] or result["different"] for result in results)
    before, after = results[0]["files"]
    assert before == after

"""Every way in, by its real launcher on CPU ranks: llep is active, spills, and changes no loss."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import engines
import families
import pytest
import transformers
from deepspeed.runtime.engine import DeepSpeedEngine
from launcher import ROOT, WARM
from launcher import run as launch
from ranks import free_port, remove_shared_buffers
from safetensors.torch import load_file

import ds_llep

SCRIPT = str(ROOT / "tests" / "on_and_off.py")


class Door:
    """A training script's two runs, before and after."""

    def __init__(self, folder: Path, config: str, script: str, *args: str) -> None:
        self.folder, self.runs = folder, []
        for name in ("on", "off"):
            ds_config = json.loads((ROOT / "ds_configs" / config).read_text())
            balanced = {"enabled": True, "imbalance_threshold": 1.0, "min_tokens_per_gemm": 1}
            ds_config["llep"] = balanced if name == "on" else {"enabled": False}
            path = folder / f"{name}.json"
            path.write_text(json.dumps(ds_config))
            self.runs.append({"name": name, "config": str(path), "port": free_port()})
        plan = {
            "script": str(ROOT / "examples" / script),
            "args": [*args, "--seq-len", "32", "--micro-batch", "2"],
            "runs": self.runs,
            "out": str(folder),
        }
        self.plan = folder / "plan.json"
        self.plan.write_text(json.dumps(plan))

    def launch(self, *command: str) -> str:
        """Run it; what it printed."""
        command = [sys.executable, "-m", *command, str(self.plan)]
        on, off = (run["port"] for run in self.runs)
        code, out = launch(command, on, ROOT, timeout=600)
        remove_shared_buffers(off)
        assert code == 0, out[-6000:]
        return out

    def check(self, ranks: int, micro_batches: int, stopped: str | None) -> list[dict]:
        """The statuses with llep on, by rank, and that all else was as without it.

        Args:
            stopped: words with which the script refuses to go without llep; None: it does not.
        """
        statuses = []
        for rank in range(ranks):
            on, off = (
                json.loads((self.folder / f"{name}{rank}.json").read_text())
                for name in ("on", "off")
            )
            assert off["status"] == {"active": False}
            assert off["stopped"] is None if stopped is None else stopped in off["stopped"]
            assert on["status"]["active"] and on["stopped"] is None
            assert sum(on["status"]["spilled_tokens"]) > 0
            assert len(on["losses"]) == micro_batches
            # Not closer: a token may choose another expert where two are as good as equal.
            assert on["losses"] == pytest.approx(off["losses"], rel=1e-3)
            statuses.append(on["status"])
        return statuses


@pytest.mark.parametrize("how", ["config file", "plugin"])
def test_accelerate(tmp_path, how, seed):
    """`accelerate launch` by a config file, or the plugin in the script; by the module runner."""
    plugin = ["--deepspeed_config", "{config}"] if how == "plugin" else []
    door = Door(
        *(tmp_path, "accelerate_zero3_ep2.json", "accelerate_loop.py", *plugin),
        *("--steps", "3", "--accumulate", "2", "--seed", str(seed)),
    )
    port = str(free_port())
    if how == "plugin":
        command = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    else:
        config = "ds_configs/accelerate_zero3_ep2.yaml"
        command = ["accelerate.commands.launch", "--config_file", config]
        command += ["--main_process_port", port]
    out = door.launch(*command, WARM, "-m", "ds_llep.run", SCRIPT)
    assert "3 steps on 2 ranks through Accelerate" in out
    door.check(2, micro_batches=6, stopped="Accelerate's engine does not run ds_llep")


def test_trl(tmp_path, seed):
    """SFTTrainer under `torchrun`, through the module runner."""
    pytest.importorskip("trl")
    door = Door(
        *(tmp_path, "hf_trainer_zero3_ep2.json", "trl_sft.py", "--deepspeed_config", "{config}"),
        *("--steps", "3", "--accumulate", "2", "--checkpointing", "no_reentrant"),
        *("--seed", str(seed), "--output-dir", str(tmp_path)),
    )
    port = ["--master_port", str(free_port())]
    command = ["torch.distributed.run", "--nproc_per_node", "2", *port, WARM, "-m", "ds_llep.run"]
    out = door.launch(*command, SCRIPT)
    assert "3 steps on 2 ranks through SFTTrainer" in out
    door.check(2, micro_batches=6, stopped="SFTTrainer's engine does not run ds_llep")


def test_trl_with_adapters(tmp_path, seed):
    """On attention and routed experts; what is saved is PEFT's."""
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    config = json.loads((ROOT / "ds_configs" / "hf_trainer_zero3_ep2.json").read_text())
    config["llep"] = {"enabled": True, "imbalance_threshold": 1.0, "min_tokens_per_gemm": 1}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(port), WARM, "examples/trl_sft.py"]
    command += ["--lora", "4", "--steps", "3"]
    command += ["--deepspeed_config", str(tmp_path / "ds.json"), "--seq-len", "32"]
    command += ["--checkpointing", "no_reentrant", "--seed", str(seed)]
    code, out = launch([*command, "--output-dir", str(tmp_path / "saved")], port, ROOT, timeout=600)
    assert code == 0, out[-6000:]
    assert "3 steps on 2 ranks through SFTTrainer" in out
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    last = {name: tensor for name, tensor in saved.items() if ".lora_B." in name}
    assert len(last) == 4 * (4 + 2)  # of each layer attention's matrices and the experts'
    untrained = [name for name, tensor in last.items() if not tensor.any()]  # they start at zero
    assert not untrained, untrained


def test_native_moe(tmp_path, seed):
    """DeepSpeed's own MoE layers in a plain loop under `torchrun`."""
    door = Door(
        *(tmp_path, "native_moe_zero2.json", "native_moe.py", "--deepspeed_config", "{config}"),
        *("--steps", "4", "--skew", "2", "--seed", str(seed)),
    )
    port = ["--master_port", str(free_port())]
    out = door.launch("torch.distributed.run", "--nproc_per_node", "2", *port, WARM, SCRIPT)
    for status in door.check(2, micro_batches=4, stopped=None):
        assert status["layers"] == 4
    before, after = re.search(r"llep on: .* mean load ratio ([\d.]+) -> ([\d.]+)", out).groups()
    assert float(after) < float(before)


def test_hf_trainer_on_two_nodes(tmp_path, seed):
    """HF Trainer under `deepspeed`, one launcher a node, as a hostfile without ssh has it."""
    door = Door(
        *(tmp_path, "hf_trainer_zero3_ep2.json", "hf_trainer.py", "--deepspeed_config", "{config}"),
        *("--steps", "5", "--seed", str(seed), "--output-dir", str(tmp_path)),
    )
    hosts = tmp_path / "hosts"
    hosts.write_text("first slots=2\nsecond slots=2\n")
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    nodes = [
        ["deepspeed.launcher.runner", "--hostfile", str(hosts), *address]
        + ["--no_ssh", "--node_rank", node, "--no_local_rank", WARM, SCRIPT]
        for node in ("0", "1")
    ]
    with ThreadPoolExecutor() as pool:
        out, _ = pool.map(lambda command: door.launch(*command), nodes)
    assert "llep: active on 4 MoE layer(s), ep_size=2, edp_size=2" in out
    for status in door.check(4, micro_batches=5, stopped="Trainer's engine does not run ds_llep"):
        assert status["nodes"] == [0, 0, 1, 1]
        # A home's other pieces are on the other node.
        assert status["weight_source"] == "owner"
    ratios = re.findall(r"step \d+: loss [\d.]+, load ratio ([\d.]+) -> ([\d.]+)", out)
    assert len(ratios) == 1  # the Trainer logs each 5 steps
    assert float(ratios[0][1]) < float(ratios[0][0])


def test_hf_trainer_goes_on(tmp_path, seed):
    """From a checkpoint as if there had been none; and the last one holds the whole model."""

    def train(*args: str) -> list[tuple[str, str]]:
        port = free_port()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--master_port", str(port), WARM, "examples/hf_trainer.py"]
        command += ["--steps", "10", *args]
        command += ["--deepspeed_config", "ds_configs/hf_trainer_zero3_ep2.json"]
        command += ["--seq-len", "32", "--micro-batch", "2", "--seed", str(seed)]
        code, out = launch(command, port, ROOT, timeout=600)
        assert code == 0, out[-6000:]
        return re.findall(r"step (\d+): loss ([\d.]+)", out)

    whole = train("--output-dir", str(tmp_path / "whole"), "--save-steps", "5")
    half = str(tmp_path / "whole" / "checkpoint-5")
    assert [step for step, _ in whole] == ["5", "10"]
    assert train("--output-dir", str(tmp_path / "rest"), "--resume", half) == whole
    _, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole" / "checkpoint-10", output_loading_info=True
    )
    assert not any(found.values()), found


def late_import(seed: int) -> str:
    config = engines.ds_config(stage=1, ep_size=2, llep={})
    name = "_configure_expert_parallel"
    before = getattr(DeepSpeedEngine, name).__wrapped__  # as it is without ds_llep
    with mock.patch.object(DeepSpeedEngine, name, before):
        engine = engines.initialize(families.build("qwen3_moe", seed), config)
    with pytest.raises(ValueError) as caught:
        ds_llep.status(engine)
    engine.destroy()
    return str(caught.value)


def test_import_after_initialize(pools, seed):
    for message in pools(2).run(late_import, seed):
        assert '"llep.enabled" is true, but ds_llep was not imported yet' in message
        assert "deepspeed --module ds_llep.run" in message

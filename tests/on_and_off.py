"""Runs a training script twice on the rank that a launcher started: with llep and without.

    LAUNCHER tests/on_and_off.py PLAN.json

PLAN.json names the script, its arguments (``{config}`` stands for the DeepSpeed JSON), one
DeepSpeed JSON and one port for each of the two runs, and a folder for what they end with: the loss
of every micro-batch and ``ds_llep.status``. Both runs are forked from this process, so the imports,
which take longer than the training, are paid for once.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from pathlib import Path


def train(plan: dict, run: dict) -> None:
    import deepspeed
    import torch

    from ds_llep.hf import LLEPCallback

    os.environ["MASTER_PORT"] = str(run["port"])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's knows the other port only
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:  # from Accelerate's config file
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = run["config"]
    seen: dict = {"losses": []}
    backward = deepspeed.DeepSpeedEngine.backward

    def recording(engine, loss, *args, **kwargs):
        seen["engine"] = engine
        seen["losses"].append(loss.item())
        return backward(engine, loss, *args, **kwargs)

    deepspeed.DeepSpeedEngine.backward = recording
    if run["name"] == "off":  # this callback refuses to train so
        LLEPCallback.on_train_begin = lambda callback, *args, **kwargs: None
    torch.set_num_threads(1)
    sys.argv = [plan["script"], *(arg.format(config=run["config"]) for arg in plan["args"])]
    stopped = None
    try:
        runpy.run_path(plan["script"], run_name="__main__")
    except AssertionError as error:
        stopped = str(error)
    status = sys.modules["ds_llep"].status(seen["engine"])
    found = {"losses": seen["losses"], "status": status, "stopped": stopped}
    name = f"{run['name']}{os.environ['RANK']}.json"
    Path(plan["out"], name).write_text(json.dumps(found))


def main() -> None:
    plan = json.loads(Path(sys.argv[-1]).read_text())
    sys.path.insert(0, os.path.dirname(plan["script"]))
    runpy.run_path(plan["script"], run_name="imports only")
    import common  # the examples'
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  every engine does, in seconds

    common._SHARED["initializer_range"] = 0.1  # the usual small weights would hide errors
    gc.freeze()  # collections then leave out what imports made, which is most of their work
    for run in plan["runs"]:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(plan, run)
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                if code:
                    sys.excepthook(*sys.exc_info())
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"the run '{run['name']}' failed")


if __name__ == "__main__":
    main()

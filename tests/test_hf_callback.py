"""HF Trainer's logs, through real runs of a tiny model."""

from __future__ import annotations

from unittest import mock

import families
import pytest
import torch
from ranks import RankPool
from test_monitor import written
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers import trainer as trainer_module

from ds_llep.hf import LLEPCallback

STEPS, LOGGING, EVALUATION = 5, 2, 3


@pytest.fixture(scope="module")
def pair():
    """Two ranks of their own: the Trainer leaves settings in its process for all that follows."""
    if torch.cuda.device_count() == 1:
        pytest.skip("needs 2 GPUs, this machine has 1")
    pool = RankPool(2)
    yield pool
    pool.stop()


class Reporter(TrainerCallback):
    """Stands where TensorBoard and W&B stand, and notes what they would write."""

    entries: list[dict] = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.entries.append(dict(logs))


def new_trainer(folder: str, seed: int, llep: dict, callbacks: list) -> Trainer:
    on_gpu = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=folder,
        deepspeed={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 2},
            "expert_parallel": {"enabled": True, "autoep_size": 2},
            "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"},
            "llep": llep,
        },
        max_steps=STEPS,
        learning_rate=1e-3,
        per_device_train_batch_size=1,
        logging_steps=LOGGING,
        eval_strategy="steps",
        eval_steps=EVALUATION,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        seed=seed,
    )
    ids = torch.randint(0, 96, (20, 32), generator=torch.Generator().manual_seed(seed))
    data = [{"input_ids": row, "labels": row} for row in ids]
    Reporter.entries = []
    defaults = [*trainer_module.DEFAULT_CALLBACKS, Reporter]
    with mock.patch.object(trainer_module, "DEFAULT_CALLBACKS", defaults):
        return Trainer(
            families.build("qwen3_moe", seed),
            args,
            train_dataset=data,
            eval_dataset=data[:4],
            callbacks=callbacks,
        )


BALANCING = {
    "enabled": True,
    "imbalance_threshold": 1.0,
    "min_tokens_per_gemm": 1,
    "monitor": {"enabled": True, "interval": LOGGING},
}


def train_logged(folder: str, seed: int, attach: str) -> tuple[list[dict], list[dict]]:
    """``log_history``, and what a reporter saw."""
    callbacks = [] if attach == "alone" else [LLEPCallback()]
    trainer = new_trainer(folder, seed, BALANCING, callbacks)
    if attach != "no":
        callback = LLEPCallback.attach(trainer)
        assert sum(isinstance(c, LLEPCallback) for c in trainer.callback_handler.callbacks) == 1
        assert not callbacks or callback is callbacks[0]
    trainer.train()
    return trainer.state.log_history, Reporter.entries


def llep_values(entry: dict) -> dict[str, float]:
    return {
        key.removeprefix("llep/"): value for key, value in entry.items() if key.startswith("llep/")
    }


@pytest.mark.parametrize("attach", ["no", "alone", "as well"])
def test_logs(pair, attach, tmp_path, seed):
    """Training entries have what DeepSpeed's monitor got for the same steps; others nothing."""
    results = pair.run(train_logged, str(tmp_path), seed, attach)
    history, reported = results[0]
    monitored = written(tmp_path)
    steps = [entry["step"] for entry in history if "loss" in entry]
    assert steps == [2, 4]
    for index, entry in enumerate(entry for entry in history if "loss" in entry):
        expected = {name: values[index][1] for name, values in monitored.items()}
        assert llep_values(entry) == pytest.approx(expected)
        assert expected["spilled_token_share"] > 0
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert len(evaluations) == 2 and not any(map(llep_values, evaluations))
    assert llep_values(history[-1]).keys() == monitored.keys(), "the fifth step is lost"
    seen = [llep_values(entry) for entry in reported]
    logged = [llep_values(entry) for entry in history]
    assert seen == ([{} for _ in logged] if attach == "no" else logged)


def train_without_llep(folder: str, seed: int) -> str:
    trainer = new_trainer(folder, seed, {"enabled": False}, [LLEPCallback()])
    with pytest.raises(ValueError) as caught:
        trainer.train()
    return str(caught.value)


def test_not_active(pair, tmp_path, seed):
    for message in pair.run(train_without_llep, str(tmp_path), seed):
        assert "LLEPCallback: llep is not active" in message
        assert '"llep": {"enabled": true}' in message

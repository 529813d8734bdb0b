"""Fine-tuning steps of a whole Hugging Face model on one rank, as AutoEP's and as llep's.

One engine serves both modes, which differ in the class of its MoE layers. To be timed, its learning
rate is 0: the optimizer does all of its work, and weights stay what they are, so that every mode
runs the same steps and what they find can be compared. The price is that no loss falls there;
`losses.py` trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from unittest import mock

import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import safe_get_full_grad

from ds_llep import fetch
from ds_llep.activate import active_on
from ds_llep.bench.batch import Batch
from ds_llep.bench.measure import (
    WARM_UPS,
    allocator_peaks,
    milliseconds,
    relative_error,
    reset_allocator,
)
from ds_llep.bench.random_model import MODELS, make_model
from ds_llep.bench.ranks import device_name
from ds_llep.bench.records import check_ep_size
from ds_llep.bench.routing import force_routing
from ds_llep.bench.session import WrongResults
from ds_llep.bench.shapes import Shape
from ds_llep.bench.stack import expert_parallel, make_engine, set_variant, switch, variants
from ds_llep.bench.workloads import Draw, parse
from ds_llep.config import LLEPConfig
from ds_llep.workspace import Workspace

TRIALS = 3  # timed steps for each of AutoEP's variants
COMPARED_LOGITS = 256  # positions of a sequence, the last ones
# Rounding through four layers stays below, and grows with the root of their number; a lost gradient
# or a wrong sum is far above.
MOST_DIFFERENCE = {torch.bfloat16: 0.1, torch.float32: 1e-4}


@dataclass(frozen=True)
class ModelSettings:
    """What to measure; the options of ``ds-llep model``."""

    shape: Shape
    shape_name: str
    layers: int
    seq_len: int
    workloads: list[str]
    """With ``"balanced"``, the reference, first."""
    ep_size: int | None
    zero_stage: int
    checkpointing: bool
    repeats: int
    seed: int
    llep: LLEPConfig

    def check(self, ranks: int) -> None:
        """Find what would fail on so many ranks.

        Raises:
            ValueError: an EP size or a workload that does not fit.
        """
        shape, ep_size = self.shape, self.ep_size or ranks
        E, K, tokens = shape.num_experts, shape.top_k, shape.tokens
        check_ep_size(ep_size, ranks, E)
        for name in self.workloads:
            workload = parse(name, E // ep_size)
            for step in range(WARM_UPS + self.repeats):
                draw = Draw(E, K, tokens, source=0, layer=0, step=step, seed=self.seed)
                rows_P = workload.counts_PE(ranks, draw).sum(axis=1)
                if (rows_P != tokens * K).any():
                    raise ValueError(
                        f"workload {name!r} routes {min(rows_P) // K} to {max(rows_P) // K} tokens "
                        f"a rank, but a model's layers get all {tokens} tokens of every rank; "
                        "leave out ragged, empty and traces of another number of tokens"
                    )


class FineTuning:
    """The steps of one model on this rank; all ranks do the same.

    Args:
        settings: what to measure.
        device: this rank's.
        lr: the learning rate.

    Raises:
        ValueError: settings that do not fit the ranks.
    """

    def __init__(self, settings: ModelSettings, device: torch.device, lr: float = 0.0) -> None:
        settings.check(dist.get_world_size())
        self.settings = settings
        self.ep_size = settings.ep_size or dist.get_world_size()
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._like = torch.empty(0, dtype=self.dtype, device=device)
        self._section = expert_parallel(settings.shape, self.ep_size, self.dtype)
        self._section["preset_model"] = MODELS[settings.shape_name]["model_type"]
        self.engine = make_engine(
            make_model(settings, self.dtype, device),
            self._section,
            settings.llep,
            self.dtype,
            settings.zero_stage,
            lr=lr,
            fused=True,
        )
        modules = self.engine.module.modules()
        self.layers = [module for module in modules if isinstance(module, AutoEPMoELayer)]
        size = settings.shape.tokens // settings.seq_len, settings.seq_len
        generator = torch.Generator().manual_seed(settings.seed * 1000 + dist.get_rank())
        vocabulary = MODELS[settings.shape_name]["vocab_size"]
        self._ids_BS = torch.randint(vocabulary, size, generator=generator).to(device)

    def run(self) -> Iterator[list[dict]]:
        """Measure: each workload's records as soon as there are, of ``"ep"`` and of ``"llep"``.

        Raises:
            WrongResults: llep's results are not AutoEP's.
        """
        balanced_ms = None
        for workload in self.settings.workloads:
            batch = self.batch(workload)
            with mock.patch.object(fetch, "WORKSPACE", Workspace()):
                errors = self._compare(batch, workload)
            records = [self._measure(batch, workload, mode) for mode in ("ep", "llep")]
            ep, llep = records
            # The plan's, whoever follows it.
            ep |= {"load_ratio_before": llep["load_ratio_before"]}
            ep |= {"load_ratio_after": llep["load_ratio_before"]}
            llep |= {"errors": errors}
            balanced_ms = balanced_ms or ep["step_ms"]
            for record in records:
                record["speedup"] = ep["step_ms"] / record["step_ms"]
                record["ratio_to_balanced"] = record["step_ms"] / balanced_ms
            yield records

    def batch(self, workload: str) -> Batch:
        """What a workload routes on this rank."""
        return Batch(workload, self.settings.shape, self.ep_size, self.settings.seed, self._like)

    def prepare(self, batch: Batch, step: int) -> None:
        """Let the next step be routed as that step of the batch."""
        for index, layer in enumerate(self.layers):
            force_routing(layer, batch.ids(step, index))

    def step(self) -> torch.Tensor:
        """A whole optimizer step; this rank's loss before it."""
        loss = self.engine(input_ids=self._ids_BS, labels=self._ids_BS).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def _compare(self, batch: Batch, workload: str) -> dict[str, float]:
        """One step in each mode; the relative differences between them."""
        found = {}
        for mode in ("ep", "llep"):
            switch(self.layers, mode)
            self.prepare(batch, 0)
            output = self.engine(input_ids=self._ids_BS, labels=self._ids_BS)
            self.engine.backward(output.loss)
            # The gradients that have come through every layer.
            found[mode] = {
                f"gradient of {name}": safe_get_full_grad(weight).clone()
                for name, weight in self.layers[0].experts.named_parameters()
            }
            found[mode]["logits"] = output.logits[:, -COMPARED_LOGITS:].detach().clone()
            del output
            self.engine.step()
        errors = {
            name: relative_error(found["llep"][name], exact) for name, exact in found["ep"].items()
        }
        most = MOST_DIFFERENCE[self.dtype] * max(self.settings.layers / 4, 1) ** 0.5
        wrong = {name: f"{error:.2e}" for name, error in errors.items() if not error <= most}
        if wrong:
            raise WrongResults(
                f"workload {workload}: llep's results are not AutoEP's, so no time is given: the "
                f"relative difference is {wrong}; rounding accounts for less than {most:.3g}"
            )
        return errors

    def _measure(self, batch: Batch, workload: str, mode: str) -> dict:
        """Time and memory of whole steps, and what llep's plans did in those that were timed."""
        settings, engine = self.settings, self.engine
        window = active_on(engine).statistics.open_window()

        def prepare(step: int) -> None:
            self.prepare(batch, step)
            if step == WARM_UPS:
                window.take()

        switch(self.layers, mode)
        variant = None
        with mock.patch.object(fetch, "WORKSPACE", Workspace()):  # none is left for AutoEP to bear
            if mode == "ep":
                choices = variants(self._section)
                if len(choices) > 1:
                    choices.sort(key=lambda choice: self._time_variant(choice, prepare))
                variant = choices[0]
                set_variant(self.layers, variant)
            reset_allocator()
            step_ms = milliseconds(self.step, settings.repeats, prepare)
            peaks = allocator_peaks()
        did = window.take()
        tokens = dist.get_world_size() * settings.shape.tokens
        return {
            "kind": "model",
            **self.describe(workload, mode),
            "repeats": settings.repeats,
            "autoep": variant,
            "errors": None,
            "step_ms": step_ms,
            "tokens_per_second": 1e3 * tokens / step_ms,
            **peaks,
            "load_ratio_before": did.get("load_ratio_before_mean"),
            "load_ratio_after": did.get("load_ratio_after_mean"),
            "spilled_token_share": did.get("spilled_token_share"),
            "foreign_experts": did.get("foreign_experts"),
            "fetched_bytes": did.get("fetched_bytes"),
        }

    def describe(self, workload: str, mode: str) -> dict:
        """What a record says of its run."""
        settings = self.settings
        return {
            "shape": settings.shape_name,
            **asdict(settings.shape),
            "layers": settings.layers,
            "seq_len": settings.seq_len,
            "ranks": dist.get_world_size(),
            "ep_size": self.ep_size,
            "zero_stage": settings.zero_stage,
            "checkpointing": settings.checkpointing,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": device_name(),
            "workload": workload,
            "mode": mode,
            "seed": settings.seed,
            "llep": settings.llep.model_dump(mode="json") if mode == "llep" else None,
        }

    def _time_variant(self, variant: dict, prepare) -> float:
        set_variant(self.layers, variant)
        return milliseconds(self.step, TRIALS, prepare)

"""One run of the bench on one rank: every workload in every mode, checked before it is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from unittest import mock

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from ds_llep import fetch
from ds_llep.bench import floors
from ds_llep.bench.batch import Batch
from ds_llep.bench.measure import WARM_UPS, agreed_max, milliseconds, peak_bytes, relative_error
from ds_llep.bench.records import Settings, compare, describe, new_record
from ds_llep.bench.routing import force_routing
from ds_llep.bench.stack import (
    Stack,
    expert_parallel,
    make_engine,
    results,
    set_variant,
    shard,
    switch,
    variants,
    widened,
)
from ds_llep.plan import Plan
from ds_llep.ranks import all_gather
from ds_llep.shards import weights_changed
from ds_llep.timeline import Timeline
from ds_llep.workspace import Workspace

WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}


class WrongResults(Exception):
    """llep's results are not the baseline's; says where and by how much."""


def refuse_wrong(
    workload: str, errors: dict[str, tuple[float, float]], wide: torch.dtype, baseline: str
) -> None:
    """llep's error may be twice the baseline's plus 1e-6.

    Args:
        workload: its name.
        errors: llep's and the baseline's, relative, by what they are the errors of.
        wide: what the reference was computed in.
        baseline: its name.

    Raises:
        WrongResults: which errors are larger.
    """
    wrong = {
        name: f"{ours:.2e} ({baseline}'s {theirs:.2e})"
        for name, (ours, theirs) in errors.items()
        if not ours <= 2 * theirs + 1e-6
    }
    if wrong:
        raise WrongResults(
            f"workload {workload}: llep's results are wrong, so no time is given: the relative "
            f"error against {wide} is {wrong}"
        )


class Session:
    """The bench of one shape on this rank; all ranks do the same.

    Args:
        settings: what to measure.
        device: this rank's.
        machine: a file with this machine's rates; None: measure those that the floors need.

    Raises:
        ValueError: settings that do not fit the ranks.
    """

    def __init__(self, settings: Settings, device: torch.device, machine: str | None) -> None:
        self.settings, self.device = settings, device
        self.world = dist.get_world_size()
        self.ep_size = settings.ep_size or self.world
        shape = settings.shape
        settings.check(self.world)
        self.dtype = settings.torch_dtype(device)
        like = torch.empty(0, dtype=self.dtype, device=device)
        points = settings.points()
        self.batches = {
            workload: Batch(workload, shape, self.ep_size, settings.seed, like)
            for workload, _ in points
        }
        self.records = {
            point: new_record(settings, *point, self.world, self.ep_size, self.dtype)
            for point in points
        }
        self.section = expert_parallel(shape, self.ep_size, self.dtype)
        self.best = floors.best_rates(machine, device)

    def run(self) -> list[dict]:
        """Measure everything; a record for each workload and mode.

        Raises:
            WrongResults: llep's results are not AutoEP's.
        """
        bare = self._stack()
        shard(bare, self.section, self.settings.llep)
        layer = bare.layers[0]
        weights = layer.experts.w1, layer.experts.w2, layer.experts.w3
        layer.llep.prepare(weights, weights[0], layer.top_k, layer.ep_size)
        self.make_plans = layer.llep.make_plans
        for workload in self.batches:
            # As large as this workload needs it, whatever was measured before.
            with mock.patch.object(fetch, "WORKSPACE", Workspace()):
                if (workload, "llep") in self.records:
                    self._check(bare, workload)
                for point in self._points(workload):
                    self._time_layers(bare, *point)
        del bare
        get_accelerator().empty_cache()
        if "step" in self.settings.parts:
            engine = make_engine(
                self._stack(),
                self.section,
                self.settings.llep,
                self.dtype,
                self.settings.zero_stage,
            )
            for workload in self.batches:
                for point in self._points(workload):
                    self._time_step(engine, *point)
            engine.destroy()
        for point, record in self.records.items():
            describe(record, self._plans(point[0]), self.best.dense)
        compare(self.records)
        return list(self.records.values())

    def _points(self, workload: str) -> list[tuple[str, str]]:
        return [point for point in self.records if point[0] == workload]

    def _stack(self) -> Stack:
        settings = self.settings
        return Stack(settings.shape, settings.layers, self.dtype, self.device, settings.seed)

    def _check(self, stack: Stack, workload: str) -> None:
        """llep's error may be twice AutoEP's plus 1e-6, against more precise arithmetic."""
        self._prepare(stack, workload, 0)
        wide = WIDER[self.dtype]
        tokens = self.batches[workload].tokens(0)
        with widened(stack, wide):
            switch(stack.layers, "ep")
            exact = results(stack, *(tensor.to(wide) for tensor in tokens))
        errors = {}
        for mode in ("ep", "llep"):
            switch(stack.layers, mode)
            found = results(stack, *tokens)
            errors[mode] = {name: relative_error(found[name], exact[name]) for name in exact}
            del found
        pairs = {name: (errors["llep"][name], errors["ep"][name]) for name in exact}
        self.records[workload, "llep"]["errors"] = pairs
        refuse_wrong(workload, pairs, wide, "AutoEP")

    def _prepare(self, stack: Stack, workload: str, step: int) -> None:
        for index, layer in enumerate(stack.layers):
            force_routing(layer, self.batches[workload].ids(step, index))
        weights_changed()  # as after an optimizer step: what lies in the cache is stale

    def _time_layers(self, stack: Stack, workload: str, mode: str) -> None:
        """Forward, forward+backward, peak memory and, for llep, where the time goes."""
        settings, record, batch = (
            self.settings,
            self.records[workload, mode],
            self.batches[workload],
        )
        step = 0

        def prepare(next_step: int) -> None:
            nonlocal step
            step = next_step
            self._prepare(stack, workload, step)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return stack(batch.tokens(step)[0])

        def both() -> dict[str, torch.Tensor]:
            return results(stack, *batch.tokens(step))

        work = both if "backward" in settings.parts else forward
        switch(stack.layers, "llep" if mode == "llep" else "ep")
        if mode != "llep":
            choices = variants(self.section)
            if len(choices) > 1:
                choices.sort(key=lambda choice: self._time_variant(stack, choice, work, prepare))
            record["autoep"] = choices[0]
            set_variant(stack.layers, choices[0])
        if "forward" in settings.parts:
            record["forward_ms"] = milliseconds(forward, settings.repeats, prepare)
        if "backward" in settings.parts:
            record["forward_backward_ms"] = milliseconds(both, settings.repeats, prepare)
        record["peak_bytes"] = peak_bytes(work)
        if mode == "llep":
            record["peak_bytes"] += int(agreed_max(fetch.WORKSPACE.nbytes()))
            if settings.breakdown:
                self._break_down(record, workload, work, prepare)

    def _time_variant(self, stack: Stack, variant: dict, work: Callable, prepare) -> float:
        set_variant(stack.layers, variant)
        return milliseconds(work, self.settings.repeats, prepare)

    def _break_down(self, record: dict, workload: str, work: Callable, prepare) -> None:
        """Each part's median: the mean over the ranks, and the slowest rank's."""
        steps = []
        with Timeline() as timeline:
            for step in range(WARM_UPS + self.settings.repeats):
                prepare(step)
                dist.barrier()
                work()
                steps.append(timeline.take())
        mine = {
            name: statistics.median(step.get(name, 0.0) for step in steps[WARM_UPS:])
            for name in steps[-1]
        }
        layers, shape = self.settings.layers, self.settings.shape
        plans = self._plans(workload)[:layers]  # those of one step
        reached = [self.batches[workload].reached(WARM_UPS, layer) for layer in range(layers)]
        ep_rank = dist.get_rank() % self.ep_size
        floor = floors.of_parts(self.best, plans, reached, shape, ep_rank, self.dtype)
        everyone = all_gather((mine, floor))
        # An outer part that is entered twice has inner ones that begin after its successors.
        outer = list(dict.fromkeys(name.split("/")[0] for name in mine))
        names = sorted(mine, key=lambda name: outer.index(name.split("/")[0]))
        by_part = {name: [parts[name] for parts, _ in everyone] for name in names}
        record["breakdown_ms"] = {n: statistics.fmean(ranks) for n, ranks in by_part.items()}
        record["breakdown_slowest_ms"] = {name: max(ranks) for name, ranks in by_part.items()}
        record["breakdown_floor_ms"] = {
            name: max(floor[name] for _, floor in everyone) for name in floor if name in mine
        }

    def _time_step(self, engine, workload: str, mode: str) -> None:
        """A whole optimizer step of a DeepSpeed engine."""
        record, batch = self.records[workload, mode], self.batches[workload]
        stack, step = engine.module, 0
        switch(stack.layers, "llep" if mode == "llep" else "ep")
        if mode != "llep":
            set_variant(stack.layers, record["autoep"])

        def prepare(next_step: int) -> None:
            nonlocal step
            step = next_step
            self._prepare(stack, workload, step)

        def work() -> None:
            x, grad = batch.tokens(step)
            engine.backward(torch.sum(engine(x) * grad, dtype=torch.float32))
            engine.step()

        record["step_ms"] = milliseconds(work, self.settings.repeats, prepare)

    def _plans(self, workload: str) -> list[Plan]:
        """This EP group's plans of all timed steps, layer by layer."""
        batch, settings = self.batches[workload], self.settings
        steps = range(WARM_UPS, WARM_UPS + settings.repeats)
        counts = [batch.counts_PE(s, layer) for s in steps for layer in range(settings.layers)]
        return [self.make_plans([counts_PE])[0] for counts_PE in counts]

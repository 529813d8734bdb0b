"""The bench of DeepSpeed's own MoE layers on one rank: checked first, then timed and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import deepspeed.comm as dist
import torch

from ds_llep import fetch
from ds_llep.bench.measure import WARM_UPS, agreed_max, milliseconds, peak_bytes, relative_error
from ds_llep.bench.native_stack import CLASSES, NativeBatch, NativeStack, force_choices
from ds_llep.bench.records import Settings, conditions
from ds_llep.bench.session import WIDER, refuse_wrong
from ds_llep.bench.stack import in_dtype, make_exchange, results
from ds_llep.bench.workloads import Draw, parse
from ds_llep.convert import adopt
from ds_llep.ranks import all_gather
from ds_llep.shards import weights_changed
from ds_llep.workspace import Workspace


@dataclass(frozen=True)
class NativeSettings(Settings):
    """What to measure; the options of ``ds-llep moe``."""

    gated: bool
    """Experts of three matrices; else two, with biases."""

    def check(self, ranks: int) -> None:
        """Find what would fail on so many ranks.

        Raises:
            ValueError: an EP size or a workload that does not fit.
        """
        super().check(ranks)
        E, K, tokens = self.shape.num_experts, self.shape.top_k, self.shape.tokens
        for name in self.workloads if K == 1 else ():
            for step in range(WARM_UPS + self.repeats):
                draw = Draw(E, K, tokens, source=0, layer=0, step=step, seed=self.seed)
                rows_P = parse(name, E // (self.ep_size or ranks)).counts_PE(ranks, draw).sum(1)
                if min(rows_P) != max(rows_P):
                    raise ValueError(
                        f"workload {name!r} gives the ranks {min(rows_P)} to {max(rows_P)} tokens, "
                        "and with one choice DeepSpeed's gate needs as many on every rank; use "
                        "--top-k 2 or another workload"
                    )


@contextmanager
def counted_traffic() -> Iterator[Counter]:
    """Counts bytes that leave this rank: of ``"all_to_all"``, and of ``"weight"`` transfers, which
    carry experts and their gradients."""
    sent: Counter = Counter()
    exchange, post = dist.all_to_all_single, dist.batch_isend_irecv

    def counted_exchange(output, tensor, receive=None, send=None, group=None, **others):
        if send is None:
            stays = tensor.nbytes // dist.get_world_size(group=group)
        else:
            stays = tensor.nbytes * send[dist.get_rank(group=group)] // max(1, len(tensor))
        sent["all_to_all"] += tensor.nbytes - stays
        return exchange(output, tensor, receive, send, group=group, **others)

    def counted_post(operations):
        sent["weight"] += sum(each.tensor.nbytes for each in operations if each.op == "isend")
        return post(operations)

    with (
        mock.patch.object(dist, "all_to_all_single", counted_exchange),
        mock.patch.object(dist, "batch_isend_irecv", counted_post),
    ):
        yield sent


class NativeSession:
    """The bench on this rank; all ranks do the same.

    Args:
        settings: what to measure.
        device: this rank's.

    Raises:
        ValueError: settings that do not fit the ranks.
    """

    def __init__(self, settings: NativeSettings, device: torch.device) -> None:
        self.settings, self.world = settings, dist.get_world_size()
        settings.check(self.world)
        self.ep_size = settings.ep_size or self.world
        self.dtype = settings.torch_dtype(device)
        self.stack = NativeStack(
            settings.shape,
            settings.gated,
            settings.layers,
            self.ep_size,
            self.dtype,
            device,
            settings.seed,
        )
        named = {f"layer {index}": layer for index, layer in enumerate(self.stack.layers)}
        exchange, rates = make_exchange(self.ep_size, settings.llep, self.dtype)
        self.statistics = adopt(named, settings.llep, exchange, rates=rates)
        like = torch.empty(0, dtype=self.dtype, device=device)
        self.batches = {
            name: NativeBatch(name, settings.shape, self.ep_size, settings.seed, like)
            for name in settings.workloads
        }

    def run(self) -> list[dict]:
        """Measure everything; a record for each workload and mode.

        Raises:
            WrongResults: llep's results are not DeepSpeed's.
        """
        records = []
        for workload in self.batches:
            # As large as this workload needs it, whatever was measured before.
            with mock.patch.object(fetch, "WORKSPACE", Workspace()):
                errors = self._check(workload)
                theirs, ours = (self._measure(workload, mode) for mode in CLASSES)
            # The plan's, whoever follows it.
            theirs |= {"load_ratio_before": ours["load_ratio_before"]}
            theirs |= {"load_ratio_after": ours["load_ratio_before"]}
            ours |= {"errors": errors}
            for record in (theirs, ours):
                record["speedup"] = theirs["forward_backward_ms"] / record["forward_backward_ms"]
            records += [theirs, ours]
        return records

    def _check(self, workload: str) -> dict[str, tuple[float, float]]:
        """llep's errors and DeepSpeed's against more precise arithmetic, by name."""
        self._prepare(workload, 0)
        stack, wide, tokens = self.stack, WIDER[self.dtype], self.batches[workload].tokens(0)
        stack.switch("deepspeed")
        with in_dtype(stack, wide):
            exact = results(stack, *(tensor.to(wide) for tensor in tokens))
        errors = {}
        for mode in CLASSES:
            stack.switch(mode)
            found = results(stack, *tokens)
            errors[mode] = {name: relative_error(found[name], exact[name]) for name in exact}
            del found
        pairs = {name: (errors["llep"][name], errors["deepspeed"][name]) for name in exact}
        refuse_wrong(workload, pairs, wide, "DeepSpeed")
        return pairs

    def _prepare(self, workload: str, step: int) -> None:
        for index, layer in enumerate(self.stack.layers):
            force_choices(layer.deepspeed_moe.gate, self.batches[workload].ids(step, index))
        weights_changed()  # as after an optimizer step: what lies in the cache is stale

    def _measure(self, workload: str, mode: str) -> dict:
        """The record of one workload and mode."""
        settings, stack, batch = self.settings, self.stack, self.batches[workload]
        step, window = 0, self.statistics.open_window()

        def prepare(next_step: int) -> None:
            nonlocal step
            step = next_step
            if step == WARM_UPS:
                window.take()
            self._prepare(workload, step)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return stack(batch.tokens(step)[0])

        def both() -> dict[str, torch.Tensor]:
            return results(stack, *batch.tokens(step))

        stack.switch(mode)
        forward_ms = milliseconds(forward, settings.repeats, prepare)
        both_ms = milliseconds(both, settings.repeats, prepare)
        did = window.take()
        self._prepare(workload, step)
        with counted_traffic() as sent:
            peak = peak_bytes(both)
        if mode == "llep":  # it was there before
            peak += int(agreed_max(fetch.WORKSPACE.nbytes()))
        everyone = all_gather(sent)
        names = conditions(settings, workload, mode, self.world, self.ep_size, self.dtype)
        traffic = {
            f"{kind}_bytes{suffix}": of_ranks(sent[kind] for sent in everyone)
            for kind in ("all_to_all", "weight")
            for suffix, of_ranks in (("", sum), ("_max", max))
        }
        return {
            "kind": "moe",
            **names,
            "gated": settings.gated,
            "errors": None,
            "forward_ms": forward_ms,
            "forward_backward_ms": both_ms,
            **traffic,
            "peak_bytes": peak,
            "load_ratio_before": did.get("load_ratio_before_mean"),
            "load_ratio_after": did.get("load_ratio_after_mean"),
        }

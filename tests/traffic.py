"""What goes into the workspace of a rank, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import deepspeed.comm as dist

from ds_llep import fetch, layer
from ds_llep.fetch import ForeignWeights
from ds_llep.workspace import Workspace

EXPERT = 3 * 32 * 48 * 4  # bytes of one expert of the tiny Qwen3-MoE in fp32


@contextmanager
def watched() -> Iterator[SimpleNamespace]:
    """A workspace of its own; counts experts that arrive there, notes sizes, places and plans."""
    log = SimpleNamespace(workspace=Workspace(), received=0, nbytes=[0], places=[], plans=[])
    post, wait = dist.batch_isend_irecv, ForeignWeights.wait

    def noted_post(operations):
        memory = log.workspace.view(0, 1, operations[0].tensor).untyped_storage().data_ptr()
        tensors = [operation.tensor for operation in operations]
        there = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() == memory]
        log.received += sum(tensor.numel() for tensor in there) // (EXPERT // 4)
        log.nbytes.append(log.workspace.nbytes())
        return post(operations)

    def noted_wait(foreign):
        log.places.append(list(foreign._places))
        return wait(foreign)

    def noted(make):  # on the host, or on the device
        def noted_plan(*args):
            log.plans.append(make(*args))
            return log.plans[-1]

        return noted_plan

    with (
        mock.patch.object(fetch, "WORKSPACE", log.workspace),
        mock.patch.object(dist, "batch_isend_irecv", noted_post),
        mock.patch.object(ForeignWeights, "wait", noted_wait),
        mock.patch.object(layer, "make_plan", noted(layer.make_plan)),
        mock.patch.object(layer, "plan_from_tokens", noted(layer.plan_from_tokens)),
    ):
        yield log

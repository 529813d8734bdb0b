"""Shared by all tests: pools of rank processes and seeds that are fresh in every run."""

from __future__ import annotations

import os
import random

import pytest
import torch
import warm
from hypothesis import HealthCheck, settings
from launcher import start_warm_ranks
from ranks import RankPool

# No test fails because the machine has other work.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

GPUS = torch.cuda.device_count()
LAUNCH_JOBS = {"test_examples", "test_doors", "test_bad_input", "test_model", "test_bench"}
LAUNCH_JOBS |= {"test_ranks", "test_run", "test_native_bench"}


def pytest_report_header() -> str:
    if not GPUS:
        return "ranks: CPU processes, gloo"
    fewer = f"; tests for 4 ranks run on {GPUS}, with EP sizes to match" if GPUS < 4 else ""
    return f"ranks: {GPUS} GPUs, NCCL{fewer}"


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and warm.ADDRESS not in os.environ:
        start_warm_ranks()  # one server for all of xdist's workers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is waited for at the end."""
    items.sort(key=lambda item: item.path.stem not in LAUNCH_JOBS)


@pytest.fixture(scope="session")
def pools():
    """Rank pools by world size, started when first asked for.

    A machine with fewer GPUs than ranks gives a smaller pool: ask it for its ``world_size``.
    """
    running: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if GPUS:
            world_size = min(world_size, GPUS)
        if world_size < 2:
            pytest.skip("needs 2 GPUs, this machine has 1")
        if world_size not in running:
            running[world_size] = RankPool(world_size)
        return running[world_size]

    yield pool
    for started in running.values():
        started.stop()


@pytest.fixture
def seed() -> int:
    """Another one in every run; a failing test shows it among its arguments."""
    return random.SystemRandom().randrange(1, 1_000_000)

"""Shared by all tests: pools of rank processes and seeds that are fresh in every run."""

from __future__ import annotations

import random

import pytest
import torch
from ranks import RankPool


@pytest.fixture(scope="session")
def pools():
    """Rank pools by world size, started when first asked for."""
    running: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if torch.cuda.is_available() and torch.cuda.device_count() < world_size:
            pytest.skip(f"needs {world_size} GPUs, this machine has {torch.cuda.device_count()}")
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

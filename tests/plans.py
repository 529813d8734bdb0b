"""Configs and counts for tests of planners."""

from types import SimpleNamespace

import numpy as np


def config_of(**changes):
    defaults = {
        "planner": "lla",
        "imbalance_threshold": 1.0,
        "capacity_factor": 1.0,
        "min_tokens_per_gemm": 0,
        "max_foreign_experts": None,
    }
    return SimpleNamespace(**{**defaults, **changes})


def scatter(load_E, P, seed=0):
    """[P, E] counts with the column sums `load_E`, dealt to the source ranks at random."""
    rng = np.random.default_rng(seed)
    share_P = rng.dirichlet(np.full(P, 0.5))
    return np.stack([rng.multinomial(load, share_P) for load in load_E], axis=1)

"""Pictures of a recorded trace: ranks' load over steps, popularity of experts by layer.

Only micro-batches of training are drawn. Plans are made anew from the recorded counts, with the
trace's own ``"llep"`` section, so they are those of the run.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ds_llep.bench.figures import PAGE, finish, new_figure
from ds_llep.bench.micro_batches import training_rows
from ds_llep.config import LLEPConfig
from ds_llep.plan import Plan, make_plan
from ds_llep.trace import Trace

MOST_STEPS = 300  # as many as the width can show
# Blue below an even share, orange above, and the more tokens the darker, so that it reads in grey.
HEAT = ("#F4F9FC", "#C5E1F2", "#C9C3B4", "#DD7A1E", "#5C1A00")


def draw_load(trace: Trace, layer: str | None):
    """Rows per rank before and after the plan: the median over layers, and one layer.

    Args:
        layer: its index or name; None: the one with the highest mean load ratio.

    Raises:
        ValueError: no such layer, or nothing recorded in training.
    """
    index = None if layer is None else _layer_index(trace, layer)
    steps, loads_SL4 = load_over_steps(trace)
    worst = int(loads_SL4[:, :, 0].mean(axis=0).argmax())
    index = worst if index is None else index
    title = f"layer {index}, {trace.layer_names[index]}"
    panels = {
        f"median over {trace.num_layers} layers": np.median(loads_SL4, axis=1),
        f"{title}, the most uneven one" if index == worst else title: loads_SL4[:, index],
    }
    config = LLEPConfig(**trace.llep)
    caption = (
        f"{_origin(trace)}; imbalance_threshold {config.imbalance_threshold}, "
        f"capacity_factor {config.capacity_factor}, min_tokens_per_gemm "
        f"{config.min_tokens_per_gemm}"
    )
    return _bands(steps, panels, caption)


def draw_experts(trace: Trace):
    """How popular which expert is in which layer, over all of training.

    Raises:
        ValueError: no token in training, or layers of different numbers of experts.
    """
    rows = training_rows(trace, trace.num_micro_batches)
    sizes = {layer.shape[-1] for layer in trace.layers}
    if len(sizes) > 1:
        raise ValueError(f"layers have {sorted(sizes)} experts; valid is one number for all")
    counts_LE = np.stack([layer[rows].sum((0, 1), dtype=np.int64) for layer in trace.layers])
    if not counts_LE.any():
        raise ValueError("no layer had a token in training")
    mean_L1 = counts_LE.mean(axis=1, keepdims=True)
    popularity_LE = counts_LE / np.where(mean_L1, mean_L1, 1)
    layer, expert = np.unravel_index(popularity_LE.argmax(), popularity_LE.shape)
    caption = (
        f"{_origin(trace)}; hottest: expert {expert} in layer {layer} "
        f"({trace.layer_names[layer]}), {popularity_LE[layer, expert]:.1f} times an even share"
    )
    return _heat_map(popularity_LE, trace.ep_size, caption)


def load_over_steps(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Optimizer steps int64 ``[S]``, and of each and every layer four loads ``[S, L, 4]``.

    The loads are those of the most and the least loaded rank before the plan, and of both after it,
    relative to the mean over ranks, averaged over the step's micro-batches. Of many steps, some.

    Raises:
        ValueError: nothing recorded in training.
    """
    rows = np.array(training_rows(trace, trace.num_micro_batches))
    steps = np.unique(trace.steps[rows])
    if len(steps) > MOST_STEPS:
        print(f"{MOST_STEPS} of {len(steps)} steps are drawn, equally far apart")
        steps = steps[np.linspace(0, len(steps) - 1, MOST_STEPS).round().astype(int)]
        rows = rows[np.isin(trace.steps[rows], steps)]
    at_R = np.searchsorted(steps, trace.steps[rows])
    loads_SL4 = np.zeros((len(steps), trace.num_layers, 4))
    for layer in range(trace.num_layers):
        numel = 3 * trace.hidden_size[layer] * trace.ffn_size[layer]
        expert_bytes = numel * getattr(torch, trace.dtype).itemsize
        config, _ = LLEPConfig(**trace.llep).with_room(expert_bytes)
        for row, at in zip(rows.tolist(), at_R, strict=True):
            loads_SL4[at, layer] += _loads(make_plan(trace.counts(row, layer), config))
    return steps, loads_SL4 / np.bincount(at_R)[:, None, None]


def _loads(plan: Plan) -> tuple[float, float, float, float]:
    before_P, after_P = plan.home_load_P, plan.rank_load_P
    mean = before_P.mean()
    if not mean:
        return 1.0, 1.0, 1.0, 1.0
    return tuple(load / mean for side in (before_P, after_P) for load in (side.max(), side.min()))


def _layer_index(trace: Trace, layer: str) -> int:
    if layer in trace.layer_names:
        return trace.layer_names.index(layer)
    if not (layer.isdecimal() and int(layer) < trace.num_layers):
        raise ValueError(
            f"there is no layer {layer!r}; valid is 0 to {trace.num_layers - 1}, or a name such as "
            f"{trace.layer_names[-1]}"
        )
    return int(layer)


def _origin(trace: Trace) -> str:
    number = int(np.count_nonzero(trace.training))
    return f"{number} micro-batch{'es' * (number > 1)} of training, EP {trace.ep_size}"


def _bands(steps: np.ndarray, panels: dict[str, np.ndarray], caption: str):
    """A panel ``[S, 4]`` for each title, see :func:`load_over_steps`."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(PAGE, 0.9 + 1.9 * len(panels))
    column = figure.subplots(len(panels), sharex=True)
    sides = ("before", "#F9DDA6", "////", "#B07800"), ("after", "#56B4E9", "", "#0072B2")
    # Half a step more on both sides, so that one step alone has a width, too.
    steps = np.array([steps[0] - 0.5, *steps, steps[-1] + 0.5])
    for axes, (title, loads_S4) in zip(column, panels.items(), strict=True):
        loads_S4 = np.pad(loads_S4, ((1, 1), (0, 0)), mode="edge")
        pairs = np.split(loads_S4, 2, axis=1)
        for (side, fill, hatch, dark), pair_S2 in zip(sides, pairs, strict=True):
            axes.fill_between(
                steps,
                *pair_S2.T,
                facecolor=fill,
                hatch=hatch,
                edgecolor=dark,
                linewidth=0,
                label=f"least to most loaded rank, {side} the plan",
            )
            axes.plot(steps, pair_S2, color=dark, linewidth=1.2)
        # Under the edges of the bands: it shows where they do not lie on it.
        mean = {"linestyle": "--", "linewidth": 0.9, "zorder": 1.9}
        axes.axhline(1, color="black", label="mean of the ranks", **mean)
        axes.set_ylim(0, None)
        axes.set_title(title, loc="left")
        axes.set_ylabel("rows of a rank / mean")
        axes.grid(axis="y")
    column[-1].set_xlabel("optimizer step")
    column[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    finish(figure, caption)
    return figure


def _heat_map(popularity_LE: np.ndarray, ranks: int, caption: str):
    """1 is an even share; what nobody chose stays white."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import MaxNLocator

    L, E = popularity_LE.shape
    M = E // ranks
    height = min(max(0.11 * L, 1.3), 8.0)
    figure = new_figure(PAGE, height + 1.4)
    axes = figure.subplots()
    octaves = max(1, math.ceil(math.log2(popularity_LE.max())))
    image = axes.imshow(
        np.ma.masked_equal(popularity_LE, 0),
        cmap=LinearSegmentedColormap.from_list("heat", HEAT),
        norm=LogNorm(2.0**-octaves, 2.0**octaves),
        aspect="auto",
        interpolation="nearest",
    )
    axes.vlines(np.arange(M, E, M) - 0.5, -0.5, L - 0.5, color="black", linewidth=0.6)
    used = np.flatnonzero(popularity_LE.any(axis=1))
    axes.scatter(
        popularity_LE[used].argmax(axis=1),
        used,
        s=9,
        color="white",
        edgecolors="black",
        linewidths=0.6,
        label="hottest expert of the layer",
    )
    step = math.ceil(octaves / 3)
    powers = range(-(octaves // step) * step, octaves + 1, step)
    bar = figure.colorbar(image, extend="min", pad=0.02, aspect=8 * height)
    bar.set_label("tokens of the expert / even share")
    bar.set_ticks(
        [2.0**power for power in powers],
        labels=[f"{2**power}" if power >= 0 else f"1/{2**-power}" for power in powers],
    )
    bar.minorticks_off()
    above = axes.secondary_xaxis("top")
    labelled = np.arange(0, ranks, math.ceil(ranks / 16))
    above.set_xticks(labelled * M + (M - 1) / 2, labelled)
    above.tick_params(length=0)
    above.set_xlabel("home rank")
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(min(L, 12), integer=True))
    finish(figure, caption)
    return figure

"""`ds-llep plot`: what the pictures show, that it can be read, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from ds_llep import LLEPConfig, cli, make_plan
from ds_llep.bench import figures, plot_results, plot_traces
from ds_llep.bench.plot_results import MODES, TIMES, draw_bars, draw_breakdown, group
from ds_llep.bench.shapes import PRESETS
from ds_llep.bench.workloads import Draw, parse
from ds_llep.trace import Trace

WORKLOADS = [
    *("balanced", "30:4", "50:4", "80:4", "95:1", "80:16", "zipf:1.2", "hot_rank", "spread"),
    *("rotating", "burst", "real:gsm_english", "real:copa_english", "trace:/a/b/some_run.2.npz"),
]


@pytest.fixture(autouse=True)
def style():
    with figures.style():
        yield


def result(workload: str, mode: str, **changes) -> dict:
    """One line of ``ds-llep bench``."""
    usual = {
        "kind": "bench",
        "shape": "gpt-oss-120b",
        **{"num_experts": 128, "hidden_size": 2880, "ffn_size": 2880, "top_k": 4},
        **{"tokens": 32768, "layers": 1, "ranks": 2, "ep_size": 2, "dtype": "bfloat16"},
        "device": "NVIDIA H200",
        **{"workload": workload, "mode": mode, "seed": 0, "repeats": 10},
        **{"forward_ms": 10.0, "forward_backward_ms": 30.0, "step_ms": None},
        "peak_bytes": 4_000_000_000,
        **{"load_ratio_before": 1.95, "load_ratio_after": 1.0, "spilled_tokens": 60000},
        **{"spilled_experts": 1, "spilled_bytes": 10**8, "floor_forward_ms": 8.8},
        "floor_forward_backward_ms": 26.4,
        "breakdown_ms": None,
        "versions": {"torch": "2.11.0", "deepspeed": "0.19.8"},
        "commit": "25799466",
    }
    return {**usual, **changes}


def measured(random_seed: int, shapes: list[str], workloads: list[str], **changes) -> list[dict]:
    """Lines with random times and peaks for all modes."""
    rng = random.Random(random_seed)
    lines = []
    for shape, workload in itertools.product(shapes, workloads):
        for mode in MODES:
            if mode == "ep_balanced" and workload != "balanced":
                continue
            sizes = {
                "shape": shape,
                "tokens": PRESETS[shape].tokens,
                "forward_ms": rng.uniform(5, 50),
                "forward_backward_ms": rng.uniform(50, 100),
                "step_ms": rng.uniform(100, 300),
                "peak_bytes": rng.randrange(10**9, 20 * 10**9),
            }
            if mode == "llep":
                parts = ("route", "plan", "dispatch", "experts", "combine")
                sizes["breakdown_ms"] = {part: rng.uniform(1, 9) for part in parts}
            lines.append(result(workload, mode, **{**sizes, **changes}))
    return lines


def save_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save_trace(
    path: Path,
    layers: list[np.ndarray],
    steps: list[int] | None = None,
    training: list[bool] | None = None,
    **llep,
) -> Path:
    """A trace file of counts ``[S, P, E]`` by layer."""
    S, P, _ = layers[0].shape
    about = {
        **{"format": 1, "ds_llep": "0.1.0", "ep_size": P, "dtype": "bfloat16"},
        "layer_names": [f"model.layers.{index}.mlp" for index in range(len(layers))],
        **{name: [8] * len(layers) for name in ("top_k", "hidden_size", "ffn_size")},
        "llep": {"enabled": True, "imbalance_threshold": 1.1, "min_tokens_per_gemm": 2, **llep},
    }
    np.savez(
        path,
        about=np.array(json.dumps(about)),
        micro_batches=np.arange(S),
        steps=np.array(range(S) if steps is None else steps, dtype=np.int64),
        training=np.array([True] * S if training is None else training),
        **{f"counts_{at:03d}": counts.astype(np.uint32) for at, counts in enumerate(layers)},
    )
    return path


def draw_counts(seed: int, S: int, P: int, E: int, L: int, workload="zipf:1") -> list[np.ndarray]:
    draw = Draw(num_experts=E, top_k=2, tokens=64, source=0, layer=0, step=0, seed=seed)
    return [
        np.stack(
            [
                parse(workload).counts_PE(P, Draw(**{**vars(draw), "layer": layer, "step": step}))
                for step in range(S)
            ]
        )
        for layer in range(L)
    ]


def visible(figure) -> list:
    return [axes for axes in figure.axes if axes.get_visible()]


def heights(axes) -> dict[str, list[float]]:
    return {
        bars.get_label(): [patch.get_height() for patch in bars.patches] for bars in axes.containers
    }


def numbers(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("time", TIMES)
def test_bars(time, tmp_path, seed):
    """Speed-ups are ratios of the chosen time, memory is in GB, each bar bears its number."""
    names = ["balanced", "50:4", "95:1"]
    lines = measured(seed, ["qwen3-30b-a3b"], names)
    figure = draw_bars(group(save_lines(tmp_path / "r.jsonl", lines)), time)
    speedup, memory = visible(figure)
    found = {(line["workload"], line["mode"]): line for line in lines}
    for mode, label in MODES.items():
        own = [found[("balanced" if mode == "ep_balanced" else n), mode] for n in names]
        ratios = [
            found[n, "ep"][TIMES[time]] / each[TIMES[time]]
            for n, each in zip(names, own, strict=True)
        ]
        assert heights(speedup)[label] == pytest.approx(ratios)
        assert heights(memory)[label] == pytest.approx([each["peak_bytes"] / 1e9 for each in own])
        assert {f"{ratio:.2f}" for ratio in ratios} <= set(numbers(speedup))
    assert heights(speedup)["EP"] == [1, 1, 1]
    assert len(numbers(speedup)) == len(numbers(memory)) == 9
    assert [text.get_text() for text in memory.get_xticklabels()] == names
    assert time in speedup.get_ylabel() and "GB" in memory.get_ylabel()
    assert speedup.get_title("left") == "qwen3-30b-a3b"
    caption = figure.get_supxlabel().replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ")
    for words in ("2 x NVIDIA H200", "EP 2", "torch 2.11.0", "commit 25799466", "32768 tokens"):
        assert words in caption
    assert "median of 10" in caption


@pytest.mark.parametrize("mode", ["ep", "ep_balanced"])
def test_balanced_routing_needs_one_measurement(mode, tmp_path):
    """Standard EP on balanced routing is the ceiling and the base there, whatever it is called."""
    lines = [
        result("balanced", mode, forward_backward_ms=20.0, peak_bytes=10**9),
        result("balanced", "llep", forward_backward_ms=25.0),
        result("95:1", "ep", forward_backward_ms=60.0),
        result("95:1", "llep", forward_backward_ms=30.0),
    ]
    speedup, memory = visible(draw(tmp_path, lines))
    expected = {"EP": [1, 1], "LLEP": [0.8, 2], "EP, balanced routing": [1, 3]}
    assert heights(speedup) == {label: pytest.approx(ratios) for label, ratios in expected.items()}
    assert heights(memory)["EP, balanced routing"] == [1, 1]


def draw(tmp_path: Path, lines: list[dict], time: str = "forward+backward"):
    return draw_bars(group(save_lines(tmp_path / "r.jsonl", lines)), time)


def test_the_last_line_of_a_point_counts(tmp_path, capsys):
    lines = [result("95:1", "ep"), result("95:1", "llep", forward_backward_ms=29.0)]
    lines += [result("95:1", "llep", forward_backward_ms=15.0, commit="abcd", repeats=20)]
    figure = draw(tmp_path, lines)
    assert "1 of 3 lines left out: measured again further down" in capsys.readouterr().out
    assert heights(visible(figure)[0])["LLEP"] == [2]
    caption = figure.get_supxlabel().replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ")
    assert "commit 25799466 and abcd" in caption and "median of 10 and 20" in caption


def test_what_differs_is_not_compared(tmp_path):
    """A panel of its own for each seed and machine, which its title names."""
    lines = measured(1, ["gpt-oss-120b"], ["95:1"], seed=1)
    lines += measured(2, ["gpt-oss-120b"], ["95:1"], seed=2)
    lines += measured(3, ["gpt-oss-120b"], ["95:1"], seed=2, ranks=8, zero_stage=3)
    axes = visible(draw(tmp_path, lines))
    titles = [each.get_title("left") for each in axes]
    titles = [each.replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ") for each in titles]
    assert [title for title in titles if title] == [
        "gpt-oss-120b, 2 x NVIDIA H200, seed 1",
        "gpt-oss-120b, 2 x NVIDIA H200, seed 2",
        "gpt-oss-120b, 8 x NVIDIA H200, ZeRO 3, seed 2",
    ]


def test_nothing_is_left_out_in_silence(tmp_path, capsys):
    lines = [
        result("95:1", "ep", peak_bytes=None),
        result("95:1", "llep"),
        result("50:4", "llep", forward_backward_ms=None),
    ]
    speedup, memory = visible(draw(tmp_path, lines))
    out = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    balanced = "EP, balanced routing on 95:1, EP, balanced routing on 50:4"
    assert f"no speed-up in forward+backward of EP on 50:4, LLEP on 50:4, {balanced}" in out
    assert f"no peak memory of EP on 95:1, EP on 50:4, {balanced}" in out
    assert heights(speedup)["LLEP"] == [1, 0] and numbers(speedup) == ["1.00", "1.00"]
    assert heights(memory)["LLEP"] == [4, 4] and numbers(memory) == ["4.00", "4.00"]

    without = [{**line, "peak_bytes": None} for line in lines]
    assert len(visible(draw(tmp_path, without))) == 1
    only_balanced = [*lines, result("balanced", "ep_balanced", shape="tiny")]
    assert len(visible(draw(tmp_path, only_balanced))) == 2
    assert "tiny: not drawn, as only balanced routing" in capsys.readouterr().out.replace(
        "\N{NO-BREAK SPACE}", " "
    ).replace("32768 tokens per rank, ", "")


def test_breakdown(tmp_path, capsys, seed):
    """Parts of llep on top of each other, each counted once, the sum above them."""
    lines = measured(seed, ["tiny"], ["balanced", "95:1"])
    lines.append(result("50:4", "llep", shape="tiny", tokens=512))
    of = {
        "expert products": ["home experts", "foreign experts backward"],
        "all-to-all": ["dispatch/all-to-all", "combine backward/all-to-all"],
        "moving rows": ["dispatch/rows"],
        "router, counts, plan, addresses": ["router", "plan"],
        "weights out, gradients home": ["fetch backward", "gradient return"],
        "other parts": ["something new"],
    }
    rng = np.random.default_rng(seed)
    parts = [line for line in lines if line["breakdown_ms"]]
    for line in parts:
        line["breakdown_ms"] = {name: rng.uniform(1, 9) for names in of.values() for name in names}
        line["breakdown_ms"] |= {"dispatch": 1e3, "combine backward": 1e3}  # sums of the inner ones
    (axes,) = visible(draw_breakdown(group(save_lines(tmp_path / "r.jsonl", lines))))
    below = np.zeros(2)
    for bars in axes.containers:
        assert [patch.get_y() for patch in bars.patches] == pytest.approx(list(below))
        names = of.pop(bars.get_label())
        values = [sum(line["breakdown_ms"][name] for name in names) for line in parts]
        assert [patch.get_height() for patch in bars.patches] == pytest.approx(values)
        below += values
    assert not of
    assert numbers(axes) == [f"{total:.2f}" for total in below]
    assert "no parts of LLEP's time on 50:4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "lines, message",
    [
        ([result("95:1", "llep")], "no workload has a forward+backward time of both ep and"),
        ([result("95:1", "ep", forward_backward_ms=None)], "--time draws another one of forward"),
    ],
)
def test_nothing_to_compare(lines, message, tmp_path):
    with pytest.raises(ValueError) as error:
        draw(tmp_path, lines)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="no line of mode"):
        draw_breakdown(group(tmp_path / "r.jsonl"))


GOOD = json.dumps(result("95:1", "ep"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("", " is empty"),
        ("\n \n", " is empty"),
        (f"{GOOD}\n\n{{'kind'\n", ", line 3 is no result of `ds-llep bench`: Invalid JSON"),
        (f"{GOOD}\n[1, 2]\n", ", line 2 is no result of `ds-llep bench`: Input should be an obj"),
        (GOOD.replace('"mode": "ep", ', ""), ", line 1 is no result.*: mode: Field required"),
        (GOOD.replace('"bench"', '"simulate"'), ", line 1 .* kind: Input should be 'bench'"),
        (GOOD.replace('"ep"', '"eplb"'), ".*mode: Input should be 'ep', 'llep' or 'ep_balanced'"),
        (GOOD.replace("10.0", '"10"'), ".*forward_ms: Input should be a valid number"),
        (GOOD.replace("30.0", "0"), ".*forward_backward_ms: Input should be greater than 0"),
        (GOOD.replace("30.0", "NaN"), ".*forward_backward_ms: Input should be a finite number"),
        (b"\x93NUMPY\xff\xfe", " is no text: .*; a trace is drawn by load and experts"),
    ],
)
def test_files_that_are_no_results(content, message, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{path}{message}"):
        group(path)


def test_load(tmp_path, seed):
    """Most and least loaded rank of the recorded plans, averaged over a step's micro-batches."""
    layers = draw_counts(seed, 6, 4, 16, 3)
    layers[0][2] = 0  # a layer that had nothing to do
    path = save_trace(tmp_path / "t.npz", layers, [0, 0, 1, 1, 1, 4], [True] * 4 + [False, True])
    config = LLEPConfig(imbalance_threshold=1.1, min_tokens_per_gemm=2)
    expected_SL4 = np.zeros((3, 3, 4))
    for at, rows in enumerate([(0, 1), (2, 3), (5,)]):
        for layer, counts_SPE in enumerate(layers):
            loads = []
            for row in rows:
                plan = make_plan(counts_SPE[row], config)
                sides = [
                    side / max(side.mean(), 1) for side in (plan.home_load_P, plan.rank_load_P)
                ]
                loads.append([f(side) if side.any() else 1 for side in sides for f in (max, min)])
            expected_SL4[at, layer] = np.mean(loads, axis=0)
    trace = Trace.load(path)
    steps, loads_SL4 = plot_traces.load_over_steps(trace)
    assert steps.tolist() == [0, 1, 4]
    assert loads_SL4 == pytest.approx(expected_SL4)
    assert (loads_SL4[..., 0] > loads_SL4[..., 2]).any()

    worst = expected_SL4[:, :, 0].mean(axis=0).argmax()
    for layer, shown in ((None, worst), ("1", 1), ("model.layers.2.mlp", 2)):
        median, one = plot_traces.draw_load(trace, layer).axes
        assert f"layer {shown}, model.layers.{shown}.mlp" in one.get_title("left")
        assert ("most uneven" in one.get_title("left")) == (shown == worst)
        for axes, loads_S4 in (
            (median, np.median(expected_SL4, axis=1)),
            (one, expected_SL4[:, shown]),
        ):
            lines = [line.get_ydata()[1:-1] for line in axes.lines if len(line.get_ydata()) == 5]
            assert np.array(lines).T == pytest.approx(loads_S4)


def test_load_of_many_steps(tmp_path, capsys, seed):
    """Some of them, the first and the last among them, and a line that says so."""
    (counts_SPE,) = draw_counts(seed, 10, 2, 4, 1)
    steps = list(range(3, 703, 1))
    path = save_trace(tmp_path / "t.npz", [np.tile(counts_SPE, (70, 1, 1))], steps)
    found, loads_SL4 = plot_traces.load_over_steps(Trace.load(path))
    assert "300 of 700 steps" in capsys.readouterr().out
    assert len(found) == 300 and found[0] == 3 and found[-1] == 702
    for at in (0, 100, 299):
        load_P = counts_SPE[(found[at] - 3) % 10].sum(0).reshape(2, 2).sum(1)
        assert loads_SL4[at, 0, 0] == load_P.max() / load_P.mean()


@pytest.mark.parametrize(
    "limits", [{"max_foreign_experts": 0}, {"max_foreign_bytes": 3 * 8 * 8 * 2}]
)
def test_load_under_limits(limits, tmp_path):
    """As the run planned: with no foreign expert, or with one, which the bytes make room for."""
    counts_PE = np.array([[90, 90, 90, 90, 5, 5, 5, 5], [90, 90, 90, 90, 5, 5, 5, 5]])
    path = save_trace(tmp_path / "t.npz", [counts_PE[None]], **limits)
    _, loads_SL4 = plot_traces.load_over_steps(Trace.load(path))
    most = limits.get("max_foreign_experts", 1)
    config = LLEPConfig(max_foreign_experts=most, min_tokens_per_gemm=2, imbalance_threshold=1.1)
    plan = make_plan(counts_PE, config)
    assert plan.capped_tokens and len(plan.spills) == most
    assert loads_SL4[0, 0, 2] == plan.load_ratio_after


def test_experts(tmp_path, seed):
    """Tokens of an expert over an even share, summed over training; ranks' borders, hottest."""
    layers = draw_counts(seed, 5, 4, 16, 3)
    layers[1] *= np.arange(16) == 5  # one expert has all tokens, and fewer than other layers have
    layers[1] //= 40
    layers[1][0, 0, 5] += 1
    layers.append(np.zeros_like(layers[0]))  # a layer that never ran
    training = [True, False, True, True, True]
    trace = Trace.load(save_trace(tmp_path / "t.npz", layers, training=training))
    figure = plot_traces.draw_experts(trace)
    axes, colours = figure.axes
    counts_LE = np.stack([counts[np.array(training)].sum((0, 1)) for counts in layers])
    popularity_LE = np.zeros(counts_LE.shape)
    for layer in range(3):
        popularity_LE[layer] = counts_LE[layer] / counts_LE[layer].mean()
    assert popularity_LE[1].max() == 16
    (image,) = axes.images
    assert image.get_array().filled(0) == pytest.approx(popularity_LE)
    assert image.norm(1.0) == pytest.approx(0.5) and image.norm.vmax >= popularity_LE.max()
    borders, hottest = axes.collections
    assert [path[0][0] for path in borders.get_segments()] == [3.5, 7.5, 11.5]
    assert hottest.get_offsets().tolist() == [
        [int(row.argmax()), layer] for layer, row in enumerate(popularity_LE[:3])
    ]
    assert "expert 5 in layer 1 (model.layers.1.mlp), 16.0 times" in figure.get_supxlabel()
    assert "4 micro-batches of training, EP 4" in figure.get_supxlabel()
    ticks = [text.get_text() for text in colours.get_yticklabels()]
    assert "1" in ticks and any(tick.startswith("1/") for tick in ticks)


def test_traces_that_cannot_be_drawn(tmp_path, seed):
    layers = draw_counts(seed, 2, 2, 8, 2)
    evaluated = Trace.load(save_trace(tmp_path / "a.npz", layers, training=[False, False]))
    for figure_of in (plot_traces.draw_experts, lambda t: plot_traces.draw_load(t, None)):
        with pytest.raises(ValueError, match="no training micro-batch: it was recorded in eval"):
            figure_of(evaluated)
    idle = Trace.load(save_trace(tmp_path / "c.npz", [np.zeros((1, 2, 8))]))
    with pytest.raises(ValueError, match="no layer had a token in training"):
        plot_traces.draw_experts(idle)
    mixed = Trace.load(save_trace(tmp_path / "b.npz", [layers[0], layers[1][:, :, :6]]))
    with pytest.raises(ValueError, match=r"layers have \[6, 8\] experts"):
        plot_traces.draw_experts(mixed)
    for layer in ("2", "-1", "mlp"):
        with pytest.raises(
            ValueError, match=f"no layer '{layer}'; valid is 0 to 1, or a name such"
        ):
            plot_traces.draw_load(mixed, layer)


def cases():
    """Figures of many sizes, by what is much or little in them."""
    for shapes, workloads in ((1, 2), (3, 8), (3, 2), (3, 4), (2, 14)):
        yield f"bars-{shapes}x{workloads}"
    yield "breakdown-2x14"
    for P, E, L in ((2, 8, 2), (8, 128, 48), (64, 256, 61), (64, 64, 1)):
        yield f"experts-{P}x{E}x{L}"
        yield f"load-{P}x{E}x{L}"


def figure_of(case: str, tmp_path: Path, seed: int):
    kind, _, sizes = case.partition("-")
    if kind in ("bars", "breakdown"):
        shapes, workloads = map(int, sizes.split("x"))
        device = {"device": "NVIDIA H100 80GB HBM3"}
        names = dict.fromkeys(["balanced", *WORKLOADS[1 - workloads :]])
        lines = measured(seed, list(PRESETS)[1 : 1 + shapes], list(names), **device)
        lines.append(result("50:4", "llep", breakdown_ms={"all": 3.0}, shape=None, ranks=16))
        results = group(save_lines(tmp_path / "r.jsonl", lines))
        return draw_bars(results, "step") if kind == "bars" else draw_breakdown(results)
    P, E, L = map(int, sizes.split("x"))
    counts = draw_counts(seed, 2, P, E, L, "95:1" if L == 1 else "zipf:1")
    trace = Trace.load(save_trace(tmp_path / "t.npz", counts))
    return (
        plot_traces.draw_experts(trace) if kind == "experts" else plot_traces.draw_load(trace, "0")
    )


@pytest.mark.parametrize("case", cases())
def test_all_can_be_read(case, tmp_path, seed, monkeypatch):
    """At most a page wide, letters of 8 points, nothing cut off, no text on another one."""
    from matplotlib.text import Text

    figure = figure_of(case, tmp_path, seed)
    draw_text, drawn = Text.draw, {}

    def record(text, renderer):
        if text.get_visible() and text.get_text().strip():
            drawn[text] = text.get_window_extent()
        draw_text(text, renderer)

    monkeypatch.setattr(Text, "draw", record)
    figure.draw_without_rendering()
    assert figure.get_figwidth() <= figures.PAGE
    assert len(drawn) > 8
    page = figure.bbox.padded(1)
    for text, box in drawn.items():
        assert text.get_fontsize() >= 8, text
        assert page.x0 <= box.x0 and box.x1 <= page.x1, text
        assert page.y0 <= box.y0 and box.y1 <= page.y1, text
    upright = {text: box for text, box in drawn.items() if text.get_rotation() in (0, 90)}
    for (one, a), (other, b) in itertools.combinations(upright.items(), 2):
        assert not a.padded(-1).overlaps(b), (one, other)
    (legend,) = figure.legends
    for axes in visible(figure):
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_styles_differ_in_grey():
    """Of any two fills, hatch or lightness differ."""
    from matplotlib.colors import to_rgb

    def lightness(fill):
        return float(np.dot(to_rgb(fill), (0.299, 0.587, 0.114)))

    for (fill, hatch), (other, other_hatch) in itertools.combinations(figures.STYLES, 2):
        assert hatch != other_hatch or abs(lightness(fill) - lightness(other)) > 0.1
    shades = [lightness(fill) for fill in plot_traces.HEAT]
    assert all(a - b > 0.05 for a, b in itertools.pairwise(shades))


def test_every_workload_is_drawn(tmp_path, seed):
    """Also where they are more than a line holds."""
    lines = measured(seed, ["tiny", "kimi-k2"], WORKLOADS)
    axes = visible(draw(tmp_path, lines))
    labelled = [each for each in axes if each.xaxis.get_tick_params()["labelbottom"]]
    names = [text.get_text() for each in labelled for text in each.get_xticklabels()]
    short = [name.replace("/a/b/some_run.2.npz", "some_run.2") for name in WORKLOADS]
    assert names == short * 2
    assert sum(len(numbers(each)) for each in axes) == 2 * 2 * 3 * len(WORKLOADS)
    titles = [each.get_title("left") for each in axes if each.get_title("left")]
    assert ["(continued)" in title for title in titles] == [False, True] * 2


def plot(*args) -> int:
    return cli.main(["plot", *map(str, args)])


def test_command(tmp_path, capsys, seed):
    """Both formats, or the one asked for; text in an SVG is text, and the same file each time."""
    results = save_lines(tmp_path / "r.jsonl", measured(seed, ["tiny"], ["balanced", "95:1"]))
    trace = save_trace(tmp_path / "t.npz", draw_counts(seed, 2, 2, 8, 2))
    for kind, file in (
        ("bars", results),
        ("breakdown", results),
        ("load", trace),
        ("experts", trace),
    ):
        assert plot(kind, file, "--out", tmp_path / kind) == 0
        png, svg = tmp_path / f"{kind}.png", tmp_path / f"{kind}.svg"
        assert capsys.readouterr().out == f"wrote {png}\nwrote {svg}\n"
        assert png.read_bytes().startswith(b"\x89PNG")
        first = svg.read_text()
        assert first.count("<text") > 8 and "EP" in first and str(tmp_path) not in first
        svg.unlink()
        assert plot(kind, file, "--out", svg) == 0
        assert capsys.readouterr().out == f"wrote {svg}\n"
        assert svg.read_text() == first
    assert "forward+backward:" in (tmp_path / "bars.svg").read_text()
    assert plot("bars", results, "--time", "step", "--out", tmp_path / "bars.svg") == 0
    assert "step:" in (tmp_path / "bars.svg").read_text()
    assert plot("bars", results, "--out", tmp_path / "a.png") == 0
    assert plot("load", trace, "--layer", "model.layers.1.mlp", "--out", tmp_path / "b.svg") == 0
    assert "layer 1, model.layers.1.mlp" in (tmp_path / "b.svg").read_text()
    made = {path.name for path in tmp_path.iterdir()}
    assert {"a.png", "b.svg"} <= made and not {"a.svg", "b.png"} & made


def test_command_refuses(tmp_path, capsys, seed):
    """One line that says what is wrong, exit code 2, and no file."""
    results = save_lines(tmp_path / "r.jsonl", measured(seed, ["tiny"], ["95:1"]))
    trace = save_trace(tmp_path / "t.npz", draw_counts(seed, 2, 2, 8, 2))
    out = tmp_path / "out"
    for args, message in (
        (
            ["bars", results, "--out", f"{out}.pdf"],
            ".pdf cannot be written; valid are .png and .svg",
        ),
        (["bars", tmp_path / "none.jsonl", "--out", out], "none.jsonl"),
        (["bars", results, "--out", tmp_path / "no" / "folder"], "folder.png"),
        (["bars", trace, "--out", out], "t.npz is no text"),
        (["experts", results, "--out", out], "r.jsonl cannot be read as a trace"),
        (["load", trace, "--layer", "9", "--out", out], "no layer '9'"),
    ):
        before = set(tmp_path.iterdir())
        assert plot(*args) == 2
        err = capsys.readouterr().err
        assert err.startswith("ds-llep plot: ") and err.count("\n") == 1 and message in err
        assert set(tmp_path.iterdir()) == before
    for args in (["bars", results], ["pie", results, "--out", out], []):
        with pytest.raises(SystemExit) as stop:
            plot(*args)
        assert stop.value.code == 2


def test_without_matplotlib(tmp_path, capsys, monkeypatch, seed):
    """Says what to install. Files and arguments are read without it."""
    results = save_lines(tmp_path / "r.jsonl", measured(seed, ["tiny"], ["95:1"]))
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert plot("bars", results, "--out", tmp_path / "out") == 2
    assert "pip install 'ds_llep[tools]'" in capsys.readouterr().err
    assert plot_results.group(results)

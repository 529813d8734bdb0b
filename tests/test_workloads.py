"""Workloads: exact counts, one routing at any EP size, and the skew that each name promises."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llep.bench import workloads
from ds_llep.bench.workloads import BURST_STEPS, REAL, Draw, parse

NAMES = [
    *("balanced", "30:4", "95:1", "80:16", "zipf:0.5", "zipf:2", "hot_rank", "hot_rank:3"),
    *("spread", "spread:5", "ragged", "empty", "rotating", "burst", "real:mmlu_english"),
]
GOLDEN = {  # name: (tokens of the first 8 experts, experts of token 500)
    "95:1": ([7656, 4, 5, 4, 3, 0, 0, 2], [83, 49, 108, 127, 84, 43, 48, 39]),
    "zipf:1.2": ([17, 18, 100, 13, 32, 37, 36, 13], [119, 17, 29, 51, 37, 98, 11, 56]),
    "real:arc_hebrew": ([0, 57, 156, 30, 28, 120, 5, 87], [29, 65, 115, 26, 39, 59, 21, 95]),
}
draws = st.builds(
    Draw,
    num_experts=st.just(128),
    top_k=st.sampled_from([1, 2, 4, 8]),
    tokens=st.integers(0, 300),
    source=st.integers(0, 7),
    layer=st.integers(0, 60),
    step=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)


def for_all(*strategies):
    """`given`, with more examples."""
    return lambda test: settings(max_examples=200)(given(*strategies)(test))


def draw_of(seed: int, **changes) -> Draw:
    usual = Draw(num_experts=128, top_k=4, tokens=8192, source=0, layer=3, step=5, seed=seed)
    return replace(usual, **changes)


def counts_of(name: str, seed: int, **changes) -> np.ndarray:
    return parse(name).counts(draw_of(seed, **changes))


def load_ratio(name: str, ranks: int, draw: Draw) -> float:
    """Max / mean rows per rank, experts at home, of as many source ranks."""
    load_P = parse(name).counts_PE(ranks, draw).sum(0).reshape(ranks, -1).sum(1)
    return load_P.max() / load_P.mean()


def hottest(counts_E: np.ndarray, number: int) -> set[int]:
    return set(np.argsort(counts_E)[-number:].tolist())


@for_all(st.sampled_from(NAMES), draws)
def test_experts_of_each_token(name, draw):
    """As many as counted, K to a token and no two alike, except where `R:H` repeats them."""
    workload = parse(name)
    ids_TK, counts_E = workload.expert_ids(draw), workload.counts(draw)
    tokens = draw.tokens
    if name == "ragged" and draw.source % 2:
        tokens //= 4
    if name == "empty" and draw.source == 1:
        tokens = 0
    assert ids_TK.dtype == counts_E.dtype == np.int64
    assert ids_TK.shape == (tokens, draw.top_k)
    assert np.bincount(ids_TK.ravel(), minlength=128).tolist() == counts_E.tolist()
    if not name[0].isdigit():
        assert (np.diff(np.sort(ids_TK, axis=1), axis=1) > 0).all()


@for_all(st.data(), st.integers(2, 24))
def test_as_many_distinct_experts_as_there_are(data, num_experts):
    """Few experts, most of them chosen by every token."""
    top_k = data.draw(st.integers(1, num_experts))
    name = data.draw(st.sampled_from(["balanced", "zipf:3", "hot_rank", "spread:1", "empty"]))
    draw = replace(data.draw(draws), num_experts=num_experts, top_k=top_k, source=0)
    ids_TK = parse(name).expert_ids(draw)
    assert all(len(set(ids)) == top_k for ids in ids_TK.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_at_any_ep_size(name, seed):
    """What eight source ranks route does not depend on which of them form an EP group."""
    workload, draw = parse(name), draw_of(seed, tokens=500, source=0)
    counts_PE = workload.counts_PE(8, draw)
    singles = [workload.counts(replace(draw, source=source)) for source in range(8)]
    assert counts_PE.tolist() == np.stack(singles).tolist()
    for ranks in (2, 4):
        groups = [
            workload.counts_PE(ranks, replace(draw, source=first)) for first in range(0, 8, ranks)
        ]
        assert np.concatenate(groups).tolist() == counts_PE.tolist()
        # The coarser the ranks, the more of the finer ranks' loads each has: nothing else differs.
        load_8 = counts_PE.sum(0).reshape(8, -1).sum(1)
        load_P = sum(groups).sum(0).reshape(ranks, -1).sum(1)
        assert load_P.tolist() == load_8.reshape(ranks, -1).sum(1).tolist()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_same_in_every_process(name):
    """Fixed numbers: a benchmark of last year and one of today route alike."""
    draw = Draw(num_experts=128, top_k=8, tokens=1000, source=3, layer=7, step=11, seed=42)
    counts, ids = GOLDEN[name]
    assert parse(name).counts(draw)[:8].tolist() == counts
    assert parse(name).expert_ids(draw)[500].tolist() == ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["seed", "step", "layer", "source"])
def test_what_a_draw_depends_on(name, what, seed):
    draw = draw_of(seed)
    other = replace(draw, **{what: getattr(draw, what) + 2})  # ragged: of the same length
    workload = parse(name)
    assert workload.counts(draw).tolist() == workload.counts(draw).tolist()
    assert workload.counts(draw).tolist() != workload.counts(other).tolist()
    ids, theirs = workload.expert_ids(draw), workload.expert_ids(other)
    assert ids.shape == theirs.shape and (ids != theirs).any()


def test_tokens_and_choices_come_in_no_order(seed):
    """The hot tokens are not the first ones, and no column of choices is of some experts only."""
    hot_T = parse("50:4").expert_ids(draw_of(seed))[:, 0] < 4
    assert abs(hot_T[: len(hot_T) // 2].mean() - 0.5) < 0.06
    for column in parse("balanced").expert_ids(draw_of(seed)).T:
        assert len(set(column.tolist())) == 128


@pytest.mark.parametrize("ranks", [2, 8])
def test_balanced(ranks, seed):
    assert load_ratio("balanced", ranks, draw_of(seed)) < 1.05


@pytest.mark.parametrize("percent, hot", [(30, 4), (95, 1), (80, 16), (12.5, 2), (100, 3), (0, 5)])
def test_share_on_hot(percent, hot, seed):
    """R % of the tokens, with all of their choices, on the first H; each side is uniform."""
    draw = draw_of(seed)
    ids_TK = parse(f"{percent}:{hot}").expert_ids(draw)
    on_hot_TK = ids_TK < hot
    assert (on_hot_TK.all(axis=1) | ~on_hot_TK.any(axis=1)).all()
    share = percent / 100
    tolerance = 6 * (share * (1 - share) / draw.tokens) ** 0.5
    assert abs(on_hot_TK[:, 0].mean() - share) <= tolerance
    counts_E = np.bincount(ids_TK.ravel(), minlength=128)
    for side_E in (counts_E[:hot], counts_E[hot:]):
        assert np.abs(side_E - side_E.mean()).max() <= 8 * side_E.mean() ** 0.5


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.4])
def test_zipf(exponent, seed):
    """The exponent is the slope of popularity over rank, in logarithms, where nothing is capped."""
    counts_E = np.sort(counts_of(f"zipf:{exponent}", seed, top_k=2, tokens=200_000))[::-1]
    rank_E = 1 + np.arange(128)
    open_E = counts_E < 200_000 // 2
    assert open_E.sum() > 100
    slope, _ = np.polyfit(np.log(rank_E[open_E]), np.log(counts_E[open_E]), 1)
    assert slope == pytest.approx(-exponent, abs=0.05)


def test_order_of_zipf(seed):
    """Ranks and steps find the same experts popular, other layers and seeds find others."""

    def top(**changes):
        return hottest(counts_of("zipf:1.5", changes.pop("seed", seed), **changes), 4)

    assert top() == top(source=6) == top(step=17)
    assert len({frozenset(top(layer=layer)) for layer in range(6)}) > 3
    assert len({frozenset(top(seed=other)) for other in range(6)}) > 3


def test_hot_rank(seed):
    """Eight neighbours, equally hot, all at home on the first rank."""
    counts_E = counts_of("hot_rank", seed)
    assert hottest(counts_E, 8) == set(range(8))
    hot_E, cold_E = counts_E[:8], counts_E[8:]
    assert hot_E.min() > 5 * cold_E.max()
    assert np.abs(hot_E - hot_E.mean()).max() < 6 * hot_E.mean() ** 0.5
    assert load_ratio("hot_rank", 2, draw_of(seed)) > 1.4
    assert load_ratio("hot_rank", 8, draw_of(seed)) > 4
    assert hottest(counts_of("hot_rank", seed, num_experts=10), 5) == set(range(5))


@pytest.mark.parametrize("ranks, hot, num_experts", [(2, 8, 128), (8, 8, 128), (4, 12, 32)])
def test_spread(ranks, hot, num_experts, seed):
    """The heat of `hot_rank`, and yet even ranks."""
    draw = draw_of(seed, num_experts=num_experts)
    assert load_ratio(f"spread:{hot}", ranks, draw) < 1.05
    spread_E, gathered_E = (parse(f"{kind}:{hot}").counts(draw) for kind in ("spread", "hot_rank"))
    assert spread_E.max() > 2 * spread_E.mean()
    difference_E = np.abs(np.sort(spread_E) - np.sort(gathered_E))
    assert (difference_E <= 8 * gathered_E.max() ** 0.5).all()


@for_all(st.integers(1, 8), st.integers(1, 8), st.integers(2, 12))
def test_spread_puts_as_many_hot_experts_on_each_rank(ranks, hot_per_rank, more):
    experts_per_rank = hot_per_rank + more
    E, H = ranks * experts_per_rank, ranks * hot_per_rank
    heat_E = workloads._hot("spread", H, draw_of(0, num_experts=E))
    hot_E = heat_E == heat_E.max()
    assert hot_E.reshape(ranks, -1).sum(1).tolist() == [hot_per_rank] * ranks


def test_ragged(seed):
    counts_PE = parse("ragged").counts_PE(5, draw_of(seed, tokens=402))
    assert counts_PE.sum(1).tolist() == [4 * tokens for tokens in (402, 100, 402, 100, 402)]


def test_empty(seed):
    """A source rank without tokens, and at eight ranks six homes that nobody sends any."""
    draw = draw_of(seed)
    counts_PE = parse("empty").counts_PE(8, draw)
    assert (counts_PE.sum(1) > 0).tolist() == [True, False, *[True] * 6]
    assert parse("empty").expert_ids(replace(draw, source=1)).shape == (0, 4)
    assert (counts_PE.sum(0) > 0).tolist() == [True] * 32 + [False] * 96


@pytest.mark.parametrize("name, period", [("rotating", 1), ("burst", BURST_STEPS)])
def test_moving(name, period, seed):
    """The eight hot experts of one period are none of the next one's, and at last start over."""

    def hot(step):
        return hottest(counts_of(name, seed, step=step), 8)

    for place in (0, 1, 2, 15):
        steps = {place * period, (place + 1) * period - 1}
        for step in steps:
            assert hot(step) == set(range(8 * place, 8 * place + 8)), step
    assert hot(16 * period) == hot(0)


@pytest.mark.parametrize("name", ["gsm_english", "mmlu_english", "arc_hebrew", "copa_english"])
def test_real(name, seed):
    """Popularity in a layer is the file's for that layer, within sampling error, and no other's."""
    with np.load(REAL) as sets:
        shares_LE = sets[name].astype(np.float64)
    assert shares_LE.shape == (48, 128)

    def chi_squared(counts_E, layer):
        """The mean over experts: about 1 for a sample of the layer's popularity."""
        share_E = shares_LE[layer] / shares_LE[layer].sum()
        expected_E = counts_E.sum() * share_E
        known = expected_E >= 30
        assert known.sum() > 60
        return (((counts_E - expected_E) ** 2 / expected_E.clip(min=1e-9))[known]).mean()

    for layer in (0, 20, 47):
        counts_E = counts_of(f"real:{name}", seed, layer=layer, top_k=8, tokens=32768)
        assert chi_squared(counts_E, layer) < 2.5
        assert chi_squared(counts_E, (layer + 1) % 48) > 100
        assert not counts_E[shares_LE[layer] == 0].any()
        again = counts_of(f"real:{name}", seed, layer=layer + 48, top_k=8, tokens=32768)
        assert chi_squared(again, layer) < 2.5


def test_real_load_ratio(seed):
    """Over the layers, on 8 ranks, as the popularity in the file has it."""
    ratios = [
        load_ratio("real:gsm_english", 8, draw_of(seed, top_k=8, layer=layer, tokens=4096))
        for layer in range(48)
    ]
    assert np.median(ratios) == pytest.approx(1.51, abs=0.03)
    assert max(ratios) == pytest.approx(2.07, abs=0.06)


@pytest.fixture
def trace(tmp_path, seed) -> tuple[str, np.ndarray]:
    """A workload that replays a file, and the counts ``[S, L, P, E]`` of training in it."""
    counts_SLPE = np.random.default_rng(seed).integers(1, 99, (4, 2, 4, 8))
    counts_SLPE[..., 0] += -counts_SLPE.sum(-1) % 2  # two experts a token
    about = {
        **{"format": 1, "ds_llep": "0.1.0", "ep_size": 4, "dtype": "float32", "llep": {}},
        **{"layer_names": ["a", "b"], "top_k": [2, 2], "hidden_size": [6, 6], "ffn_size": [5, 5]},
    }
    np.savez(
        tmp_path / "run.npz",
        about=np.array(json.dumps(about)),
        micro_batches=np.arange(4),
        steps=np.arange(4),
        training=np.array([True, False, True, True]),
        **{f"counts_{layer:03d}": counts_SLPE[:, layer].astype(np.uint32) for layer in range(2)},
    )
    return f"trace:{tmp_path / 'run.npz'}", counts_SLPE[[0, 2, 3]]


def test_trace(trace, seed):
    """Exactly the recorded counts, from the start again at the end of steps, layers and ranks."""
    name, counts_SLPE = trace
    workload = parse(name)
    draw = draw_of(seed, num_experts=8, top_k=2, layer=0, step=0)
    for step, layer, source in ((0, 0, 0), (2, 1, 3), (4, 2, 6)):
        drawn = replace(draw, step=step, layer=layer, source=source)
        recorded_E = counts_SLPE[step % 3, layer % 2, source % 4]
        assert workload.counts(drawn).tolist() == recorded_E.tolist()
        ids_TK = workload.expert_ids(drawn)
        assert np.bincount(ids_TK.ravel(), minlength=8).tolist() == recorded_E.tolist()
    with pytest.raises(ValueError, match="the trace has 8 experts, the layer 16"):
        workload.counts(replace(draw, num_experts=16))
    top_k = int(counts_SLPE[0, 0, 0].sum()) + 1
    with pytest.raises(ValueError, match=f"do not have top_k {top_k} experts each"):
        workload.counts(replace(draw, top_k=top_k))


def test_no_trace(tmp_path):
    with pytest.raises(ValueError, match="workload 'trace:.*none.npz': .*No such file"):
        parse(f"trace:{tmp_path / 'none.npz'}")
    (tmp_path / "broken.npz").write_text("nothing")
    with pytest.raises(ValueError, match="workload 'trace:.*broken.npz': .*be read as a trace"):
        parse(f"trace:{tmp_path / 'broken.npz'}")


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "unknown workload ''; known are balanced, R:H (such as 95:1), zipf:S"),
        ("balance", "unknown workload 'balance'; known are balanced"),
        ("balanced:2", "unknown workload 'balanced:2'"),
        ("burst:3", "unknown workload 'burst:3'"),
        ("-5:1", "unknown workload '-5:1'"),
        ("101:1", "workload '101:1': 101 % is more than all tokens; known are"),
        ("95:0", "workload '95:0': 0 is not above 0; known are"),
        ("95", "workload '95': "),
        ("95:1.5", "workload '95:1.5': .*'1.5'"),
        ("zipf:", "workload 'zipf:': "),
        ("zipf:nan", "workload 'zipf:nan': nan is not above 0"),
        ("zipf:inf", "workload 'zipf:inf': inf is not above 0"),
        ("hot_rank:-2", "workload 'hot_rank:-2': -2 is not above 0"),
        ("spread:x", "workload 'spread:x': .*'x'"),
        ("real:gsm", "no data set 'gsm'; there are gsm_english, mmlu_english, arc_hebrew"),
    ],
)
def test_names_that_are_none(name, message):
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=pattern):
        parse(name)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("95:16", {"num_experts": 16}, "16 hot experts of 16; valid is 1 to 15"),
        ("hot_rank:9", {"num_experts": 8}, "9 hot experts of 8; valid is 1 to 7"),
        ("spread:8", {"num_experts": 8}, "8 hot experts of 8; valid is 1 to 7"),
        ("real:gsm_english", {"num_experts": 64}, "of 128 experts, the layer has 64"),
        ("zipf:5000", {}, "fewer than top_k 4 experts have any popularity"),
    ],
)
def test_layers_that_do_not_fit(name, changes, message, seed):
    for draw_with in (parse(name).counts, parse(name).expert_ids):
        with pytest.raises(ValueError, match=f"workload '{name}': .*{message}"):
            draw_with(draw_of(seed, **changes))

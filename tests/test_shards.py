"""Where bytes lie: pieces of shards, versions of weights, the choice of a source, directories."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from hypothesis import given
from hypothesis import strategies as st

from ds_llep import shards
from ds_llep.ranks import RankTable
from ds_llep.shards import Version, check_weight_source, choose_weight_source, cut
from ds_llep.workspace import BundleLayout, Directory, Workspace


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 7))
def test_pieces_are_where_zero_puts_them(num_experts, matrix_numel, num_parts):
    """Experts cut across parts, padding at the end, parts without anything: put together again."""
    flat = torch.arange(num_experts * matrix_numel)
    part_numel = -(-len(flat) // num_parts)
    padded = torch.full((part_numel * num_parts,), -1)
    padded[: len(flat)] = flat
    parts = padded.view(num_parts, part_numel)
    for expert in range(num_experts):
        pieces = list(cut(expert, matrix_numel, part_numel))
        assert [piece.place for piece in pieces][0] == 0
        found = [parts[p.part, p.held_at : p.held_at + p.numel] for p in pieces]
        assert all(len(run) == piece.numel > 0 for run, piece in zip(found, pieces, strict=True))
        expected = flat[expert * matrix_numel : (expert + 1) * matrix_numel]
        assert torch.equal(torch.cat(found), expected)
        for before, after in zip(pieces, pieces[1:], strict=False):
            assert before.place + before.numel == after.place and before.part + 1 == after.part


def test_version_sees_every_kind_of_change():
    """In-place writes, new memory, optimizer steps; and nothing where nothing changed."""
    whole = torch.nn.Parameter(torch.randn(3, 4))
    sharded = torch.nn.Parameter(torch.empty(0))
    sharded.ds_tensor = torch.randn(6)
    version = Version()
    seen = [version.of([whole, sharded])]

    def changed() -> bool:
        seen.append(version.of([whole, sharded]))
        return seen[-1] not in seen[:-1]

    assert not changed()
    sharded.data = torch.randn(12)  # ZeRO-3 gathers
    assert not changed()
    with torch.no_grad():
        whole.mul_(2)
    assert changed()
    with torch.no_grad():
        sharded.ds_tensor.narrow(0, 2, 2).copy_(torch.zeros(2))
    assert changed()
    for _ in range(4):
        whole.data = whole.data * 3
        whole.data = whole.data * 3  # the allocator may give the first memory once more
        assert changed()
    shards.weights_changed()
    assert changed()


def table(*groups: tuple[int, ...], nodes: str) -> RankTable:
    """Ranks of EP groups, and for each rank a letter for its node."""
    return RankTable(groups, 0, 0, dict(enumerate(nodes)))


ONE_NODE = table((0, 1), (2, 3), nodes="aaaa")


@pytest.mark.parametrize(
    "ranks, zero, source, why",
    [
        (ONE_NODE, {"stage": 3}, "shards", "over 2 ranks"),
        (ONE_NODE, {"stage": 3, "offload_param": {"device": "cpu"}}, "shards", "over 2 ranks"),
        (ONE_NODE, {"stage": 2}, "owner", "stage 2"),
        (ONE_NODE, {"stage": 0}, "owner", "stage 0"),
        (table((0, 1), nodes="aa"), {"stage": 3}, "owner", "EDP size 1"),
        (ONE_NODE, {"stage": 3, "zero_quantized_weights": True}, "owner", "quantized"),
        (ONE_NODE, {"stage": 3, "zero_quantized_nontrainable_weights": True}, "owner", "quant"),
        (
            ONE_NODE,
            {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}},
            "owner",
            "NVMe",
        ),
        # EP groups inside nodes, shards across them: the home is nearer.
        (table((0, 1), (2, 3), nodes="aabb"), {"stage": 3}, "owner", "other nodes"),
        # EP groups across nodes: the home may be as far as any shard.
        (table((0, 1), (2, 3), nodes="abab"), {"stage": 3}, "shards", "over 2 ranks"),
        (table((0, 2), (1, 3), nodes="aabb"), {"stage": 3}, "shards", "over 2 ranks"),
    ],
)
def test_weight_source(ranks, zero, source, why):
    zero_config = DeepSpeedZeroConfig(**zero)
    chosen, reason = choose_weight_source("auto", zero_config, ranks)
    assert chosen == source and why in reason and reason.startswith("auto: ")
    assert choose_weight_source("owner", zero_config, ranks) == ("owner", "as configured")
    impossible = source == "owner" and "EDP" not in why and "nodes" not in why
    if not impossible:
        assert choose_weight_source("shards", zero_config, ranks) == ("shards", "as configured")
        return
    with pytest.raises(ValueError) as caught:
        check_weight_source("shards", zero_config)
    assert why in str(caught.value) and '"owner"' in str(caught.value)


@st.composite
def requests(draw):
    """A workspace's size, and what layers ask of it one after the other."""
    size = draw(st.one_of(st.none(), st.integers(1, 6)))
    experts = st.lists(st.integers(0, 9), max_size=size or 6, unique=True).map(sorted)
    return size, draw(st.lists(st.tuples(st.integers(0, 3), experts), max_size=12))


@given(requests())
def test_directory(request):
    """Played with a workspace of labels: every expert asked for is in its place."""
    size, asked = request
    directory, workspace = Directory(size), {}
    for layer, experts in asked:
        held = directory.size
        all_there = {(layer, expert) for expert in experts} <= set(workspace.values())
        places, missing = directory.place(layer, experts)
        if directory.size != held:  # it grew: new memory
            workspace = {}
        workspace.update({place: (layer, expert) for expert, place in missing})
        assert [workspace[place] for place in places] == [(layer, e) for e in experts]
        assert len(set(places)) == len(places) and all(0 <= p < directory.size for p in places)
        new = [place for _, place in missing]
        assert new == list(range(new[0], new[0] + len(new))) if new else True
        assert not (all_there and missing), "fetched what was there"
    directory.forget(lambda key: key[0] == 0)
    for layer, experts in asked:
        if layer == 0 and experts:
            assert [expert for expert, _ in directory.place(0, experts)[1]] == experts
            break


def test_directory_keeps_layers_side_by_side():
    directory = Directory(5)
    assert directory.place(0, [3, 7]) == ([0, 1], [(3, 0), (7, 1)])
    assert directory.place(1, [3, 4]) == ([2, 3], [(3, 2), (4, 3)])
    assert directory.place(0, [3, 7]) == ([0, 1], [])
    # One of the two is there; the new one goes where the oldest would be next.
    assert directory.place(1, [3, 5]) == ([2, 4], [(5, 4)])
    assert directory.place(2, [1, 2, 6]) == ([0, 1, 2], [(1, 0), (2, 1), (6, 2)])
    assert directory.place(0, [7]) == ([3], [(7, 3)])


def test_hits_in_the_way_are_fetched_again():
    """Places in a row for what is missing matter more than a hit in their middle."""
    directory = Directory(3)
    directory.place(0, [1, 2, 3])
    assert directory.place(0, [2, 8, 9]) == ([0, 1, 2], [(2, 0), (8, 1), (9, 2)])


def test_workspace_grows_and_is_reused():
    workspace = Workspace()
    wide, half = torch.empty(0), torch.empty(0, dtype=torch.bfloat16)
    with torch.inference_mode():
        first = workspace.view(2, 10, wide)
    assert first.shape == (2, 10) and not workspace.view(2, 10, wide).is_inference()
    assert workspace.view(1, 5, wide).data_ptr() == first.data_ptr()
    assert workspace.view(4, 10, half).data_ptr() == first.data_ptr()
    assert workspace.nbytes() == 80
    assert workspace.view(4, 10, wide).shape == (4, 10)
    assert workspace.nbytes() == 160
    assert workspace.view(0, 10, wide).shape == (0, 10)


def test_workspace_changes_hands():
    workspace, ours, theirs = Workspace(), object(), object()
    assert workspace.claim(ours) and not workspace.claim(ours)
    assert workspace.claim(theirs) and workspace.claim(ours) and not workspace.claim(ours)


def test_bundle_layout(seed):
    torch.manual_seed(seed)
    weights = [torch.randn(4, 6, 3), torch.randn(4, 3, 6), torch.randn(4, 6, 2)]
    layout = BundleLayout(tuple(weight.shape[1:] for weight in weights))
    assert layout.numels == (18, 18, 12) and layout.numel == 48
    bundles = torch.cat([weight.flatten(1) for weight in weights], dim=1)
    for view, weight in zip(layout.views(bundles), weights, strict=True):
        assert torch.equal(view, weight)
        assert view.untyped_storage().data_ptr() == bundles.untyped_storage().data_ptr()


def test_layouts_of_different_layers_differ():
    small, large = (BundleLayout((torch.Size([2, n]),)) for n in (3, 4))
    assert small != large
    assert small == BundleLayout((torch.Size([2, 3]),))

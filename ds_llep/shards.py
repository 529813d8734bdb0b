"""Where an expert's bytes are: the only room that knows how ZeRO keeps parameters.

Each of an expert's matrices is a range of its layer's parameter ``[M, ., .]``, flattened. Under
ZeRO-3 every rank of the home's EDP group holds one part of it (``param.ds_tensor``): equal parts,
the last one padded, cut without regard to experts. Otherwise the home rank holds all of it, which
is the same thing with one part. The parts are what the optimizer updates, also for parameters that
ZeRO-3 keeps gathered (persistent ones), for frozen ones, and in host memory (``offload_param``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch.multiprocessing.reductions import StorageWeakRef

from ds_llep.ranks import RankTable

_changes = 0  # how often weights may have changed, see weights_changed


class Piece(NamedTuple):
    """A run of one matrix of one expert, as long as one rank holds it."""

    part: int
    """Which part of the parameter it lies in: the EDP rank of its holder."""
    held_at: int
    """Where it starts in that part, in elements."""
    place: int
    """Where it starts in the expert's matrix, in elements."""
    numel: int


def cut(expert: int, matrix_numel: int, part_numel: int) -> Iterator[Piece]:
    """The pieces of one matrix of one expert, in order.

    Args:
        expert: its index on its home rank.
        matrix_numel: elements of the matrix.
        part_numel: elements of a part, padding of the last one included.
    """
    start, end = expert * matrix_numel, (expert + 1) * matrix_numel
    at = start
    while at < end:
        part, held_at = divmod(at, part_numel)
        numel = min(end - at, part_numel - held_at)
        yield Piece(part, held_at, at - start, numel)
        at += numel


@cache
def cut_bundle(
    expert: int, numels: tuple[int, ...], part_numels: tuple[int, ...]
) -> tuple[tuple[int, Piece], ...]:
    """The pieces of all matrices of one expert, each with its matrix' index, in order.

    Args:
        expert: as for :func:`cut`, like the elements of each matrix and of its parameter's parts.
    """
    sizes = enumerate(zip(numels, part_numels, strict=True))
    return tuple((index, piece) for index, size in sizes for piece in cut(expert, *size))


def is_sharded(param: torch.Tensor) -> bool:
    """Whether ZeRO-3 has partitioned this parameter."""
    return getattr(param, "ds_tensor", None) is not None


def whole_shape(param: torch.Tensor) -> torch.Size:
    """The parameter's shape, gathered or not."""
    return param.ds_shape if is_sharded(param) else param.shape


def part_numel(param: torch.Tensor) -> int:
    """Elements of one part of a parameter, padding included."""
    return param.ds_tensor.ds_numel


def part_of(param: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter, flat: its ZeRO-3 part.

    Read anew for every use: ZeRO replaces a part's memory when it makes its buffers.
    """
    return param.ds_tensor.detach()


def on_device(piece: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The piece in ``like``'s dtype and on its device, ready to be sent.

    Nothing is copied where it is so already. From host memory it goes through pinned memory, so
    that the copy is asynchronous; PyTorch's pinned allocator keeps the buffer until it is done.
    """
    if piece.device == like.device and piece.dtype == like.dtype:
        return piece
    if piece.device != like.device and not piece.is_pinned():
        piece = get_accelerator().pin_memory(piece)
    return piece.to(like.device, non_blocking=True).to(like.dtype)


def weights_changed(*_: Any) -> None:
    """Tell that weights may have changed in a way that their version counters do not show."""
    global _changes
    _changes += 1


class Version:
    """Numbers the states that this rank's part of some weights is seen in.

    In-place writes and new memory show in the tensors themselves. Optimizer steps and checkpoints
    write around PyTorch's version counters and are told through :func:`weights_changed`.
    """

    def __init__(self) -> None:
        self._state: list[Any] = []
        self._number = 0

    def of(self, params: Sequence[torch.Tensor]) -> int:
        """Another number than the last time if the weights may have changed since."""
        state: list[Any] = [_changes]
        for param in params:
            held = param.ds_tensor if is_sharded(param) else param
            # Memory by a weak reference: while that is held, no new memory looks the same.
            state.append(StorageWeakRef(held.untyped_storage()))
            state += [held.storage_offset(), 0 if held.is_inference() else held._version]
        if state != self._state:
            self._state, self._number = state, self._number + 1
        return self._number


def why_not_shards(zero_config: Any) -> str | None:
    """What keeps this ZeRO configuration from serving experts from its shards; None: nothing."""
    if zero_config.stage < 3:
        return f"ZeRO stage {zero_config.stage} keeps experts whole on their home rank"
    offload = zero_config.offload_param
    if offload is not None and offload.device == OffloadDeviceEnum.nvme:
        return "offload_param to NVMe keeps the shards on disk"
    if zero_config.zero_quantized_weights or zero_config.zero_quantized_nontrainable_weights:
        # The home computes with weights that went through the quantizer, a helper would not.
        return "ZeRO++ quantized weights differ from their shards"
    return None


def check_weight_source(requested: str, zero_config: Any) -> None:
    """Refuse a source that does not exist.

    Raises:
        ValueError: ``"shards"`` where ZeRO keeps no shards that could be sent.
    """
    obstacle = why_not_shards(zero_config)
    if requested == "shards" and obstacle:
        raise ValueError(
            f'"llep.weight_source": "shards" is not possible: {obstacle}. Set it to "owner" or '
            '"auto", or use "zero_optimization" with stage 3, unquantized weights, and parameters '
            "on the device or (offload_param) in host memory."
        )


def choose_weight_source(requested: str, zero_config: Any, table: RankTable) -> tuple[str, str]:
    """Who sends spilled experts' weights, and why.

    Args:
        requested: ``"auto"``, ``"owner"`` or ``"shards"``.
        zero_config: the engine's parsed ``"zero_optimization"`` section.
        table: all EP groups, with their nodes.

    Returns:
        ``"owner"`` or ``"shards"``, and the reason in a few words.

    Raises:
        ValueError: as :func:`check_weight_source`.
    """
    check_weight_source(requested, zero_config)
    if requested != "auto":
        return requested, "as configured"
    obstacle = why_not_shards(zero_config)
    if obstacle:
        return "owner", f"auto: {obstacle}"
    if table.edp_size == 1:
        return "owner", "auto: EDP size 1, so a home rank's shard is all of its experts"
    homes_near = not any(map(table.spans_nodes, table.groups))
    if homes_near and any(map(table.spans_nodes, zip(*table.groups, strict=True))):
        return "owner", "auto: shards lie on other nodes, home ranks do not"
    return "shards", f"auto: ZeRO-3 shards each expert over {table.edp_size} ranks"

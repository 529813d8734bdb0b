"""Checkpoints as gpt-oss and DeepSeek-V3 are published, quantized, of small random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from families import build
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, Mxfp4Config

Tensors = dict[str, torch.Tensor]


def write_mxfp4(directory: Path, seed: int) -> Tensors:
    """A gpt-oss with FFN size 64, whose experts' matrices are in MXFP4.

    Returns:
        What all tensors stand for, as transformers has them in a model that is not quantized.
    """

    def pack(name: str, tensor: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        drawn = torch.randn(tensor.transpose(1, 2).shape)
        blocks, scales, meant = _to_mxfp4(drawn)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}, meant

    settings = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    return _write(directory, "gpt_oss", seed, settings, pack, intermediate_size=64)


def write_fp8(directory: Path, seed: int) -> Tensors:
    """A DeepSeek-V3, of whose layers every matrix but the routers' is in FP8; as above."""

    def pack(name: str, tensor: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if "layers" not in name or tensor.ndim < 2 or name.endswith("gate.weight"):
            return None
        scale = 2.0 ** torch.floor(torch.log2(tensor.abs().max())) / 256
        packed = (tensor / scale).to(torch.float8_e4m3fn)
        found = {name: packed, f"{name}_scale_inv": scale.float().reshape(1, 1)}
        return found, packed.float() * scale

    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    return _write(directory, "deepseek_v3", seed, settings, pack)


WRITERS: dict[str, tuple[Callable[[Path, int], Tensors], Callable]] = {
    "mxfp4": (write_mxfp4, Mxfp4Config),
    "fp8": (write_fp8, FineGrainedFP8Config),
}
"""How each kind is written, and what makes the ``quantization_config`` that it is loaded with."""


def _write(directory, family, seed, quantization, pack, **settings) -> Tensors:
    torch.manual_seed(seed)
    build(family, seed, torch.bfloat16, **settings).save_pretrained(directory)
    meant = load_file(directory / "model.safetensors")
    tensors = {}
    for name, tensor in meant.items():
        if packed := pack(name, tensor.float()):
            more, meant[name] = packed[0], packed[1].to(tensor.dtype)
        else:
            more = {name: tensor}
        tensors |= more
    assert tensors.keys() != meant.keys(), "nothing was quantized"
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": quantization}
    path.write_text(json.dumps(config))
    return meant


def _to_mxfp4(matrix_EFD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks and scales of MXFP4, 32 numbers a block, and what they stand for as ``[E, D, F]``."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    E, F, D = matrix_EFD.shape
    blocks = matrix_EFD.reshape(E, F, D // 32, 32)
    power = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    codes = (blocks.unsqueeze(-1) / 2 ** power[..., None, None] - values).abs().argmin(-1)
    meant = values[codes] * 2 ** power[..., None]
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed, (power + 127).to(torch.uint8), meant.reshape(E, F, D).transpose(1, 2)

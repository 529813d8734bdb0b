"""What this machine can do: `python -m ds_llep.report`.

Prints what `ds_report` prints, then what ds_llep relies on: versions, the places in DeepSpeed that
it hooks into, the models that AutoEP knows, and the kernels, which are launched and compared where
there is a GPU. The exit code is 0 if llep can be enabled here, else 1, with the reasons last.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata

import torch
from deepspeed import env_report
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS

import ds_llep
from ds_llep import compat
from ds_llep.kernels import grouped_gemm, reference
from ds_llep.kernels.select import select_kernels

PACKAGES = (
    "deepspeed",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "mpi4py",
    "pydantic",
    "numpy",
)


@dataclass(frozen=True)
class Section:
    """Lines to print under a title, and what in them keeps llep from being enabled."""

    title: str
    lines: list[str]
    problems: list[str]


def versions() -> Section:
    """The installed version of everything that matters, and whether it is a supported one."""
    lines = [f"{'ds_llep':<13} {ds_llep.__version__}"]
    lines.append(f"{'python':<13} {platform.python_version()}")
    problems = []
    for package in PACKAGES:
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed = "not installed"
        line = f"{package:<13} {installed}"
        if package in compat.SUPPORTED:
            found = compat.version_problems(package)
            problems += [f"{problem}. {compat.install_hint(package)}" for problem in found]
            first, last = compat.SUPPORTED[package]
            line = f"{line:<32}supported: {first} to {last}: {'NO' if found else 'ok'}"
        lines.append(line)
    return Section("versions", lines, problems)


def seams() -> Section:
    """The methods of DeepSpeed that the plugin relies on, each `ok` or what is different."""
    names = [f"{owner.__name__}.{method}" for owner, method, _ in compat.SEAMS]
    problems = compat.seam_problems()
    lines = []
    for name in names:
        different = [problem for problem in problems if problem.startswith(f"{name} ")]
        lines += different or [f"{name}: ok"]
    return Section("seams in DeepSpeed", lines, problems)


def presets() -> Section:
    """AutoEP's presets: Hugging Face model types, and whether transformers has them."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        return Section("AutoEP presets", [f"{', '.join(PRESET_MODELS)} (no transformers)"], [])
    lines = []
    for name, preset in PRESET_MODELS.items():
        found = [
            f"{model_type} ({'found' if model_type in CONFIG_MAPPING_NAMES else 'NOT FOUND'})"
            for model_type in preset.hf_model_types
        ]
        lines.append(f"{name:<13} {', '.join(found)}")
    return Section("AutoEP presets and their model types in transformers", lines, [])


def devices() -> Section:
    """The GPUs that PyTorch can use, and the accelerator that DeepSpeed chose."""
    accelerator = get_accelerator().device_name()
    lines = [f"DeepSpeed's accelerator: {accelerator}"]
    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return Section("devices", [*lines, f"CUDA: not usable (PyTorch: {build})"], [])
    lines.append(f"CUDA: usable, {torch.version.cuda}, {torch.cuda.device_count()} GPU(s)")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"GPU {index}: {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return Section("devices", lines, [])


def kernels() -> Section:
    """Which kernels `"auto"` picks here and, on a GPU, whether they compile and agree."""
    device = torch.device(get_accelerator().device_name())
    lines = [f"Triton: {_triton()}"]
    try:
        chosen = select_kernels("auto", device)
        lines.append(f'"llep.kernels": "auto" picks: {chosen.name}')
        if device.type != "cuda":
            lines.append("no GPU: plain-PyTorch kernels, expert GEMMs in a loop over experts")
            return Section("kernels", lines, [])
        x_TD = torch.randn((16, 64), dtype=torch.bfloat16, device=device)
        source_TK = torch.arange(-1, 31, dtype=torch.int32, device=device).view(16, 2)
        arguments = x_TD, x_TD.flip(0), source_TK
        agree = torch.equal(chosen.sum_rows(*arguments), reference.sum_rows(*arguments))
    except Exception as error:  # whatever a broken compiler or driver raises is the finding
        problem = f"the {device} kernels fail: {type(error).__name__}: {error}. {_KERNELS_HINT}"
        return Section("kernels", [*lines, problem], [problem])
    if not agree:
        problem = f"sum_rows gives wrong sums on {device}. {_KERNELS_HINT}"
        return Section("kernels", [*lines, problem], [problem])
    lines.append(f"sum_rows ({chosen.name}): runs on the GPU and agrees with plain PyTorch")
    one_kernel = grouped_gemm.is_one_kernel(x_TD)
    lines.append(
        "expert GEMMs in bf16: "
        + ("torch._grouped_mm, one kernel" if one_kernel else "a loop over experts")
    )
    return Section("kernels", lines, [])


_KERNELS_HINT = 'Until that is repaired, set "llep.kernels" to "torch"'


def _triton() -> str:
    try:
        import triton
    except ImportError as error:
        return f"cannot be imported ({error})"
    return f"{triton.__version__}, importable"


def main() -> int:
    """Print the report; the exit code."""
    env_report.main()
    problems = []
    for section in (versions(), seams(), presets(), devices(), kernels()):
        print(f"\nds_llep: {section.title}")
        print("\n".join(f"  {line}" for line in section.lines))
        problems += section.problems
    if problems:
        print(f"\nllep CANNOT be enabled here: {'; '.join(problems)}")
        return 1
    print("\nllep can be enabled here")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The ranks that a benchmark runs on: those of a launcher, or its own."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks")
    group.add_argument(
        "--ranks",
        type=int,
        help="ranks to start on this machine (default: its GPUs, or 2 on the CPU); under a "
        "launcher (torchrun, deepspeed, mpirun) the ranks are the launcher's",
    )
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")


def launched() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    return "RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ


def number_to_start(args: argparse.Namespace) -> int:
    """How many ranks the options ask for.

    Raises:
        ValueError: fewer devices than ranks, or no rank.
    """
    gpus = _gpus(args)
    ranks = args.ranks if args.ranks is not None else gpus or 2
    if ranks < 1:
        raise ValueError(f"--ranks {ranks}; valid is 1 or more")
    if gpus and ranks > gpus:
        raise ValueError(
            f"too few devices: --ranks {ranks}, but PyTorch finds {gpus} GPU(s). Use --ranks "
            f"{gpus} or fewer, --device cpu, or a launcher with more machines"
        )
    return ranks


def run(args: argparse.Namespace, work: Callable[[torch.device], int]) -> int:
    """Do this command's work on every rank; the exit code.

    Args:
        args: the command's. Where no launcher has started this process, ranks are started that run
            the same command line.
        work: what a rank does; takes its device, returns an exit code. A ``ValueError`` must be the
            same on every rank: one of them speaks.

    Raises:
        ValueError: as :func:`number_to_start`.
    """
    if not launched():
        return _start(args, sys.argv[1:])
    try:
        return work(_join(args))
    except ValueError as error:
        if is_first():
            print(f"ds-llep {args.command}: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _start(args: argparse.Namespace, argv: list[str]) -> int:
    """Run ``python -m ds_llep ARGV`` on ranks of its own."""
    ranks = number_to_start(args)
    if not _gpus(args):
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="ds-llep",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "ds_llep", *argv)
    except ChildFailedError as error:
        return max(failure.exitcode for failure in error.failures.values())
    return 0


def _gpus(args: argparse.Namespace) -> int:
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    if args.device == "cuda" and not gpus:
        raise ValueError("--device cuda, but PyTorch finds no GPU; leave it out or use cpu")
    return gpus


def _join(args: argparse.Namespace) -> torch.device:
    """Become one of the launcher's ranks; this rank's device.

    Raises:
        ValueError: on every rank, if the launcher's ranks are not those asked for.
    """
    if args.device != "auto" and args.device != get_accelerator().device_name():
        raise ValueError(
            f"--device {args.device}, but DeepSpeed uses {get_accelerator().device_name()} here; "
            "under a launcher set DS_ACCELERATOR for the launcher"
        )
    initialize("ERROR")
    if args.ranks not in (None, dist.get_world_size()):
        raise ValueError(
            f"--ranks {args.ranks}, but the launcher started {dist.get_world_size()}; leave it out"
        )
    return torch.device(get_accelerator().current_device_name())


def initialize(log_level: str) -> None:
    """Take this rank's device and join the process group; DeepSpeed logs from this level on."""
    # mpirun's name for it, until DeepSpeed has given it its own.
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))
    get_accelerator().set_device(int(local_rank))
    deepspeed.utils.logger.setLevel(log_level)
    # DeepSpeed calls a few PyTorch functions by their old names.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    deepspeed.init_distributed(verbose=False)


def is_first() -> bool:
    """Whether this process speaks for all: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(line: str) -> None:
    """Print a line, once for all ranks."""
    if is_first():
        print(line, flush=True)


def device_name() -> str:
    """Of this rank's device, as its maker calls it."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"

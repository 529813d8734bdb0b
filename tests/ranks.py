"""Pools of long-lived rank processes, so that a test on four ranks costs no imports.

A test hands a module-level function to :meth:`RankPool.run`; every rank calls it with the same
arguments and sends back what it returns. A rank that raises or hangs fails the test and costs the
pool, which the next test starts anew.

On CPU the ranks are forked from a server that has imported everything once (gloo). On GPUs each
rank is a fresh process with a device of its own (NCCL).
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "deepspeed", "transformers", "ds_llep", "transformers.models.qwen3_moe"]
GRACE_SECONDS = 30  # for the other ranks, once one has failed


class RankFailure(AssertionError):
    """At least one rank raised or did not answer; the message holds every rank's traceback."""


class RankPool:
    """``world_size`` rank processes with an initialised process group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._port: int | None = None

    def run(self, function: Callable, *args: Any, timeout: float = 600, **kwargs: Any) -> list:
        """Call ``function`` on every rank; the list of what it returned, by rank.

        Raises:
            RankFailure: a rank raised, died or took longer than ``timeout`` seconds.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        answers: list[Any] = [None] * self.world_size
        deadline = time.monotonic() + timeout
        waiting = set(range(self.world_size))
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                try:
                    if not self._pipes[rank].poll(0.005):
                        continue
                    answers[rank] = self._pipes[rank].recv()
                except EOFError:
                    answers[rank] = ("error", "the process died")
                waiting.remove(rank)
                if answers[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        failed = {
            rank: answer[1]
            for rank, answer in enumerate(answers)
            if answer and answer[0] == "error"
        }
        if waiting or failed:
            self.stop()
            report = [f"--- rank {rank} ---\n{text}" for rank, text in failed.items()]
            report += [f"--- rank {rank} --- did not answer" for rank in sorted(waiting)]
            raise RankFailure("\n".join(report))
        return [answer[1] for answer in answers]

    def stop(self) -> None:
        """End the ranks that this pool started."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        remove_shared_buffers(self._port)

    def _start(self) -> None:
        import torch

        if torch.cuda.is_available():
            context = multiprocessing.get_context("spawn")
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
        port = self._port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main,
                args=(rank, self.world_size, port, theirs, list(sys.path)),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def remove_shared_buffers(port: int | None) -> None:
    """Free what DeepSpeed's CPU ranks that met at this port leave in memory: 69 MB each."""
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        path.unlink(missing_ok=True)


def _rank_main(rank: int, world_size: int, port: int, pipe: Any, path: list[str]) -> None:
    sys.path[:] = path
    os.environ.pop("TRITON_INTERPRET", None)  # the kernel tests' own; ranks run as users' do
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TOKENIZERS_PARALLELISM="false",
    )
    import deepspeed
    import torch

    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(verbose=False)
    gc.freeze()  # collections then leave out what imports made, which is most of their work
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("ok", function(*args, **kwargs))
        except BaseException:
            answer = ("error", traceback.format_exc())
        gc.collect()
        pipe.send(answer)


def free_port() -> int:
    """A port that nobody listens on, of those that no connection gets before the ranks listen."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)  # below Linux' ephemeral ones
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port

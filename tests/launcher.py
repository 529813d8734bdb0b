"""The real `deepspeed` launcher, with CPU ranks on every machine."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import warm
from ranks import free_port, remove_shared_buffers

ROOT = Path(__file__).parent.parent
WARM = warm.__file__
"""Before a script in a launcher's command line: its ranks are forked and import nothing."""
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the repository and its tests first on Python's path."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **more}


def launch(ranks: int, *args: str, cwd: Path, timeout: float) -> tuple[int, str]:
    """Run ``deepspeed --num_gpus RANKS ARGS``; its exit code and all that it and its ranks print.

    The repository and its tests are on the ranks' path. Nothing is left running.

    Raises:
        AssertionError: it took longer than ``timeout`` seconds.
    """
    port = free_port()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return run([*command, "--master_port", str(port), *args], port, cwd, timeout)


def run(command: list[str], port: int, cwd: Path, timeout: float) -> tuple[int, str]:
    """:func:`launch` with any command whose ranks meet at ``port``."""
    env = warm_environment() if WARM in command else environment(**ON_CPU)
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its ranks can be ended with it
    )
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{out[-6000:]}") from None
    finally:
        remove_shared_buffers(port)
    return process.returncode, out


def start_warm_ranks() -> None:
    """Start the server of :data:`WARM`, which ends with this process, for it and its children."""
    folder = tempfile.TemporaryDirectory()  # not a test's: a socket's name must be short
    address = os.environ[warm.ADDRESS] = os.path.join(folder.name, "ranks")
    server = subprocess.Popen(
        [sys.executable, "-u", WARM, "--serve", address],
        env=environment(**ON_CPU),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # so that no signal to this process's group reaches it
    )

    def stop() -> None:
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(stop)


def warm_environment() -> dict[str, str]:
    """:func:`environment` for commands with :data:`WARM`, whose server listens."""
    if warm.ADDRESS not in os.environ:
        start_warm_ranks()
    deadline = time.monotonic() + 600
    while not os.path.exists(os.environ[warm.ADDRESS]):
        assert time.monotonic() < deadline, "the server of warm ranks has not started"
        time.sleep(0.05)
    return environment(**ON_CPU)

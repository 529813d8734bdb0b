"""Launched ranks that import nothing: each is forked from a server that has done so once.

    LAUNCHER ... tests/warm.py train.py ARGS        in the place of    LAUNCHER ... train.py ARGS
    LAUNCHER ... tests/warm.py -m package.train ARGS

The imports of a rank take longer than what the tests let it do. So the process that a launcher
starts only asks the server for a fork, which takes over its command line, environment, directory
and files and runs the script as ``python`` would. It passes on signals, ends as its fork ends, and
takes it along if it is killed.

``ds_llep`` is not among the imports: whether and when a script imports it is for tests to find out.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path

ADDRESS = "WARM_RANKS"  # the environment variable with the server's socket
IMPORTS = [
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine does, in seconds
    "transformers.integrations.mxfp4",
    "transformers.loss.loss_utils",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.trainer",
    "accelerate",
    "peft",
    "trl.trainer.sft_trainer",
]
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def ask(address: str) -> None:
    """Have the server run this process's command line, and end as that does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
        header = len(request).to_bytes(8, "little")
        socket.send_fds(server, [header], [0, 1, 2])
        server.sendall(request)
        answers = server.makefile("r")
        rank = int(answers.readline())

        def forward(number, _):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)

        for number in FORWARDED:
            signal.signal(number, forward)
        ended = answers.readline()
    code = int(ended or -signal.SIGKILL)  # nothing where the server was ended
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(address: str) -> list[str]:
    """Fork whoever is asked for; returns in the fork, with the command line that it is to run.

    Ends, and ends all forks, when its standard input is closed, as at its starter's end.
    """
    for name in IMPORTS:
        with contextlib.suppress(ImportError):  # what needs it is skipped or reports it
            importlib.import_module(name)
    gc.freeze()  # collections then leave out what imports made, which is most of their work
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.early")
        listener.listen()
        os.rename(f"{address}.early", address)  # only now does anyone find it
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return keep(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):  # keepers that have ended
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def keep(connection: socket.socket) -> list[str]:
    """Fork a rank, which returns, and tell its asker how it ended."""
    header, files, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as request:
        argv, environment, directory = json.loads(request.read(int.from_bytes(header, "little")))
    rank = os.fork()
    if rank == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.modules["numpy"].random.seed()  # not the same on all ranks; Python's own is anew
        return argv
    for file in files:  # whoever reads what the rank writes waits for the last writer's end
        os.close(file)
    connection.sendall(b"%d\n" % rank)
    exit_of_rank = os.pidfd_open(rank)
    ready, _, _ = select.select([exit_of_rank, connection, 0], [], [])
    if exit_of_rank not in ready:  # its asker or the server's starter is gone
        os.kill(rank, signal.SIGKILL)
    _, status = os.waitpid(rank, 0)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def run(argv: list[str]) -> None:
    """As ``python ARGV``, but that a launcher's own argument may come first; and end with it.

    Without taking apart what was imported, which would copy most of the server's memory.
    """
    code = 1
    try:
        run_target(argv)
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, int | None):
            code = ended.code or 0
        else:
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_target(argv: list[str]) -> None:
    of_launcher = argv[:1] if argv[0].startswith(("--local_rank=", "--local-rank=")) else []
    argv = argv[len(of_launcher) :]
    if argv[0] == "-m":
        sys.argv = [argv[1], *of_launcher, *argv[2:]]
        sys.path[0] = os.getcwd()
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [argv[0], *of_launcher, *argv[1:]]
        sys.path[0] = str(Path(argv[0]).resolve().parent)
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        run(serve(sys.argv[2]))
    else:
        ask(os.environ[ADDRESS])

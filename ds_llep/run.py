"""Run a training script, unedited, with ds_llep switched on.

    deepspeed --module ds_llep.run train.py --deepspeed --deepspeed_config ds.json
    deepspeed --module ds_llep.run -m package.train ...

Importing the package that this module is in registers the plugin, so all that is left to do here
is to run the script. The launcher puts ``--local_rank=N`` in front of the script's name; it is
handed on in front of the script's own arguments, where the script would have seen it without this
runner.
"""

from __future__ import annotations

import os
import runpy
import sys

USAGE = "usage: deepspeed --module ds_llep.run [--local_rank=N] (train.py | -m package.module) ..."


def main(argv: list[str]) -> None:
    """Run the script or module named in ``argv`` as ``__main__``.

    Args:
        argv: the arguments behind the runner's own name.

    Raises:
        ValueError: no script, or one that does not exist.
    """
    launcher_args, rest = split_launcher_args(argv)
    is_module = rest[:1] == ["-m"]
    rest = rest[is_module:]
    if not rest:
        raise ValueError(f"ds_llep.run: no training script given. {USAGE}")
    target, *script_args = rest
    if not is_module and not os.path.isfile(target):
        raise ValueError(f"ds_llep.run: no such script: {target!r}. {USAGE}")

    sys.argv = [target, *launcher_args, *script_args]
    if is_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
        runpy.run_path(target, run_name="__main__")


def split_launcher_args(argv: list[str]) -> tuple[list[str], list[str]]:
    """``--local_rank=N`` and ``--local_rank N`` in front of the script's name, and the rest."""
    if argv and argv[0].startswith(("--local_rank=", "--local-rank=")):
        return argv[:1], argv[1:]
    if argv and argv[0] in ("--local_rank", "--local-rank"):
        return argv[:2], argv[2:]
    return [], argv


if __name__ == "__main__":
    main(sys.argv[1:])

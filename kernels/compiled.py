"""Host code in C, compiled by the machine's compiler when it is first used.

What the host works out for every layer and micro-batch, while the device waits, would take many
times as long in Python. DeepSpeed and Triton compile with the same compiler, so it asks for nothing
new. It takes half a second or so, once in each process, and leaves nothing behind.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_COMPILERS = ("cc", "gcc", "clang")


def compiled(what: str, sources: Sequence[str], instead: str) -> ctypes.CDLL:
    """The library of these files beside this one.

    Args:
        what: is compiled, for error messages.
        sources: names of files.
        instead: what a user may do who has no compiler.

    Raises:
        ValueError: there is no C compiler, or it failed.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise ValueError(
            f"{what} is compiled when it is first used, and none of "
            f"{', '.join(_COMPILERS)} is in PATH. Install a C compiler (Debian: apt install gcc), "
            f"or {instead}."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "compiled.so")
        flags = "-O3", "-std=c11", "-ffp-contract=off", "-shared", "-fPIC"
        files = [Path(__file__).with_name(name) for name in sources]
        command = [compiler, *flags, "-o", path, *files]
        run = functools.partial(subprocess.run, capture_output=True, text=True)
        try:
            # A tenth faster for this very processor, where the compiler knows it.
            if run([*command, "-march=native"]).returncode:
                run(command, check=True)
            return ctypes.CDLL(str(path))
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f"{compiler} cannot compile {what}: {error.stderr.strip()}. Install "
                f"another C compiler, or {instead}."
            ) from None
        except OSError as error:  # such as a folder for temporary files that may hold no program
            raise ValueError(
                f"{what} was compiled into {folder} but cannot be loaded: {error}. Let the "
                "environment variable TMPDIR name a folder that programs may run from, or "
                f"{instead}."
            ) from None

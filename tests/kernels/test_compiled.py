"""Host code in C, where the compiler is not what it should be."""

import shutil

import pytest

from ds_llep.kernels import compiled, grouped_work, planner_cost

LIBRARIES = {
    'planner "cost"': (planner_cost.library, 'set "llep.planner" to "lla"'),
    "the layout of grouped products": (grouped_work.library, 'set "llep.kernels" to "torch"'),
}


@pytest.fixture(params=LIBRARIES)
def library(request):
    """A library that was not compiled before, what it is and what to do without it."""
    load, instead = LIBRARIES[request.param]
    load.cache_clear()
    yield load, request.param, instead
    load.cache_clear()


@pytest.fixture
def use_compiler(tmp_path, monkeypatch):
    def use(script: str | None) -> None:
        path = tmp_path / "cc"
        if script is not None:
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        found = shutil.which("cc", path=str(tmp_path))
        monkeypatch.setattr(compiled.shutil, "which", lambda name: found)

    return use


@pytest.mark.parametrize(
    "script, message",
    [
        (None, "{} is compiled .*none of cc, gcc, clang is in PATH. Install a C compiler"),
        ("echo no header files >&2; exit 1", "cannot compile {}: no header files"),
        ("exit 0", "{} was compiled .*cannot be loaded: .*TMPDIR"),
    ],
    ids=["none", "fails", "makes nothing"],
)
def test_without_a_working_compiler(script, message, library, use_compiler):
    """Both ways out are named: another compiler or folder, and doing without."""
    load, what, instead = library
    use_compiler(script)
    with pytest.raises(ValueError, match=f"{message.format(what)}.*{instead}"):
        load()


def test_a_compiler_that_does_not_know_the_processor(library, use_compiler):
    load, *_ = library
    use_compiler(f'case "$*" in *native*) exit 1;; esac\nexec {shutil.which("cc")} "$@"')
    assert load()

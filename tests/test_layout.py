"""The rooms of the package: who may import whom, and what a built or copied package holds."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 300

KERNELS = {"kernels.select", "kernels.grouped_gemm", "kernels.tables"}
GROUP_GEMM = "deepspeed.ops.triton_ops.group_gemm_triton"
ROOMS = {
    # module of ds_llep: (modules of ds_llep below it, packages from outside)
    "config": (set(), {"pydantic", "deepspeed.runtime.config_utils"}),
    "cut": ({"kernels.planner_cost"}, {"numpy"}),
    "costs": ({"cut"}, {"numpy"}),
    "planners": ({"costs", "kernels.planner_cost"}, {"numpy"}),
    "plan": ({"costs", "cut", "planners"}, {"numpy"}),
    "counts": (KERNELS, {"numpy", "torch", "deepspeed.comm", "deepspeed.accelerator"}),
    "timeline": (set(), {"deepspeed.accelerator"}),
    "route": ({"plan", "kernels.planner_cost"} | KERNELS, {"numpy", "torch", "deepspeed.comm"}),
    "dispatch": ({"route", "timeline"}, {"torch", "deepspeed.comm"}),
    "activation": (KERNELS, {"torch", "deepspeed.moe.ep_experts"}),
    "biased": (set(), {"torch", "deepspeed.moe.ep_experts", GROUP_GEMM}),
    "low_rank": (KERNELS, {"torch"}),
    "mlp": ({"activation", "biased", "low_rank"} | KERNELS, {"numpy", "torch"}),
    "gpt_oss": ({"biased"}, {"torch", "deepspeed.module_inject", "deepspeed.moe.ep_repack"}),
    "ranks": (set(), {"numpy", "torch", "deepspeed.comm"}),
    "rates": ({"config", "costs", "kernels.planner_cost", "ranks"}, set()),
    "probe": (
        {"config", "ranks", "rates"} | KERNELS,
        {"numpy", "torch", "deepspeed.comm", "deepspeed.accelerator"},
    ),
    "shards": ({"ranks"}, {"torch", "deepspeed.accelerator", "deepspeed.runtime.zero"}),
    "workspace": (set(), {"torch"}),
    "fetch": (
        {"plan", "ranks", "shards", "timeline", "workspace"},
        {"numpy", "torch", "deepspeed.comm"},
    ),
    "returns": ({"plan", "fetch", "workspace"}, {"torch", "deepspeed.comm"}),
    "experts": (
        {"activation", "dispatch", "plan", "fetch", "mlp", "returns", "timeline"} | KERNELS,
        {"torch", "deepspeed.moe.ep_experts"},
    ),
    "trace": (set(), {"numpy"}),
    "recorder": ({"compat", "config", "shards", "trace"}, {"numpy", "deepspeed.comm"}),
    "monitor": ({"config", "plan", "recorder"}, {"torch"}),
    "layer": (
        {"config", "plan", "counts", "route", "dispatch", "shards", "fetch", "experts"}
        | {"costs", "monitor", "rates", "timeline"}
        | KERNELS,
        {"torch", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.compiler"},
    ),
    "grouped_experts": (KERNELS, {"numpy", "torch"}),
    "bundle": (
        {"dispatch", "fetch", "grouped_experts", "plan", "returns", "timeline", "workspace"}
        | KERNELS,
        {"torch", "deepspeed.comm"},
    ),
    "moe": (
        {"bundle", "config", "counts", "dispatch", "fetch", "layer", "plan", "route", "timeline"}
        | KERNELS,
        {"torch", "deepspeed.accelerator", "deepspeed.moe", "deepspeed.runtime.compiler"},
    ),
    "convert": (
        {"bundle", "config", "fetch", "grouped_experts", "moe", "monitor", "rates", "recorder"}
        | KERNELS,
        {"torch", "deepspeed.moe"},
    ),
    "adapters": ({"mlp", "whole"}, {"torch", "deepspeed"}),
    "expert_lora": ({"adapters", "shards"}, {"torch", "deepspeed", "peft"}),
    "lora": ({"adapters", "expert_lora"}, {"torch", "deepspeed", "peft"}),
    "load": ({"config"}, {"transformers", "deepspeed.runtime.zero"}),
    "layouts": ({"biased"}, {"torch", "deepspeed.module_inject.auto_ep_config", "deepspeed.moe"}),
    "whole": ({"layouts", "load", "shards"}, {"torch", "deepspeed"}),
    "export": (
        {"adapters", "layer", "layouts", "lora", "ranks", "whole"},
        {"torch", "deepspeed", "transformers", "huggingface_hub", "safetensors"},
    ),
    "compat": ({"config"}, {"packaging", "deepspeed"}),
    "families": ({"config", "gpt_oss"}, {"torch", "deepspeed.module_inject"}),
    "active": (
        {"compat", "config", "monitor", "ranks", "rates", "recorder"},
        {"deepspeed.utils"},
    ),
    "activate": (
        {"compat", "config", "ranks", "shards", "fetch", "layer", "experts", "monitor", "recorder"}
        | {
            "active",
            "biased",
            "convert",
            "export",
            "families",
            "gpt_oss",
            "load",
            "lora",
            "probe",
            "rates",
        }
        | KERNELS,
        {"torch", "deepspeed"},
    ),
    "hf": ({"activate", "monitor"}, {"transformers"}),
    "__init__": ({"activate", "compat", "config", "export", "moe", "plan"}, set()),
    "run": (set(), set()),
    "cli": ({"run"}, set()),
    "__main__": ({"cli"}, set()),
    "report": (
        {"__init__", "compat", "kernels.reference"} | KERNELS,
        {"torch", "transformers", "triton", "deepspeed"},
    ),
}
KERNEL_OUTSIDE = {"numpy", "torch", "triton"}


def sources(folder: str) -> list[Path]:
    """The Python files under a folder of the repository, each once: symlinks are not followed."""
    found = []
    for directory, _, names in os.walk(ROOT / folder, followlinks=False):
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    assert found, f"no source files in {folder}"
    return sorted(found)


def imports(path: Path, package: str) -> set[str]:
    """Every module that a file imports, at its top or in a function, with its full name.

    Args:
        path: the file.
        package: the package that the file belongs to, which relative imports start from.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            # `from ds_llep.kernels import rows` imports a module, `from torch import nn` need not.
            ours = base in ("ds_llep", "ds_llep.kernels")
            submodules = {alias.name for alias in node.names if is_module(base, alias.name)}
            found |= {f"{base}.{name}" for name in submodules} if ours and submodules else {base}
    return found


def is_module(package: str, name: str) -> bool:
    folder = ROOT.joinpath(*package.split("."))
    return (folder / f"{name}.py").is_file() or (folder / name).is_dir()


def not_allowed(names: set[str], ours: set[str], outside: set[str]) -> set[str]:
    """The names that are neither the standard library, nor among ``ours``, nor in ``outside``."""
    bad = set()
    for name in names:
        if name.split(".")[0] in sys.stdlib_module_names:
            continue
        if name == "ds_llep" or name.startswith("ds_llep."):
            room = name.removeprefix("ds_llep").removeprefix(".") or "__init__"
            if room not in ours:
                bad.add(name)
        elif not any(name == root or name.startswith(f"{root}.") for root in outside):
            bad.add(name)
    return bad


@pytest.mark.parametrize("path", sources("ds_llep"), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_downward(path):
    """Each module imports what its row of ROOMS names, and a module without a row fails."""
    if path.parent.name == "bench":  # above everything: it may measure all of it
        return
    assert path.parent == ROOT / "ds_llep", f"{path}: a folder that this test does not know"
    assert path.stem in ROOMS, f"give {path.name} a row in ROOMS"
    ours, outside = ROOMS[path.stem]
    bad = not_allowed(imports(path, "ds_llep"), ours, outside)
    assert not bad, f"{path.name} may not import {bad}"


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: path.name)
def test_kernels_know_nothing_of_the_rest(path):
    kernels = {f"kernels.{source.stem}" for source in sources("kernels")}
    bad = not_allowed(imports(path, "ds_llep.kernels"), kernels, KERNEL_OUTSIDE)
    assert not bad, f"kernels/{path.name} may not import {bad}"


def test_table_has_no_cycle():
    """ "Downward" means something only if the table can be put in an order."""
    left = {room: ours & set(ROOMS) for room, (ours, _) in ROOMS.items()}
    while left:
        bottom = {room for room, ours in left.items() if not ours & set(left)}
        assert bottom, f"these import each other: {sorted(left)}"
        left = {room: ours for room, ours in left.items() if room not in bottom}


def test_who_touches_the_engine():
    for path in sources("ds_llep"):
        touches = "deepspeed.runtime.engine" in imports(path, "ds_llep")
        assert touches == (path.stem in ("activate", "compat")), path


@pytest.mark.parametrize("folder", ["ds_llep", "kernels"])
def test_no_environment_variables(folder):
    """No environment variable changes behaviour. A benchmark may ask which of its ranks it is."""
    for path in sources(folder):
        if path.parent.name == "bench":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, "attr", None), getattr(node, "id", None)}
            if isinstance(node, ast.ImportFrom):
                names |= {alias.name for alias in node.names}
            read = names & {"environ", "environb", "getenv", "putenv"}
            assert not read, f"{path}:{node.lineno} uses {read}"


@pytest.mark.parametrize("folder", ["ds_llep", "kernels"])
def test_files_are_short(folder):
    for path in sources(folder):
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_LINES, f"{path} has {lines} lines"


def test_top_level():
    required = {"ds_llep", "kernels", "examples", "ds_configs", "tests", "setup.py"}
    allowed = required | {"README.md", "LICENSE", "Makefile", "pyproject.toml", "docs"}
    allowed |= {".ci", ".gitignore", "MANIFEST.in"}
    missing = {name for name in required if not (ROOT / name).exists()}
    assert not missing
    # Only what git tracks: a user's own scripts and data may lie in a clone.
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files"]
        listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        extra = {name.split("/")[0] for name in listed} - allowed
        assert not extra, f"not part of the layout: {extra}"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with an sdist, and the wheel that was made from that sdist."""
    copy = tmp_path_factory.mktemp("copy") / "repo"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


def expected_files() -> dict[str, bytes]:
    """Each source file of the package, by its path in the wheel."""
    files = {path.relative_to(ROOT): path for path in sources("ds_llep")}
    files |= {Path("ds_llep", path.relative_to(ROOT)): path for path in sources("kernels")}
    return {name.as_posix(): path.read_bytes() for name, path in files.items()}


def test_wheel(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
        roots = {name.split("/")[0] for name in archive.namelist()}
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "ds-llep = ds_llep.cli:main" in archive.read(entry_points).decode()
        data = Path("ds_llep/bench/qwen3_30b_a3b_expert_share.npz")
        assert archive.read(data.as_posix()) == (ROOT / data).read_bytes()
    assert found == expected_files()
    assert {root for root in roots if not root.endswith(".dist-info")} == {"ds_llep"}


def test_sdist(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
    for name in expected_files():
        assert members[name].isreg(), f"{name} is no real file in the sdist"
    # Without these a wheel could not be built from it.
    assert {"setup.py", "pyproject.toml"} <= set(members)


CHECK = """
import importlib.metadata, importlib.util
import ds_llep, ds_llep.kernels.reference
import transformers.utils
spec = importlib.util.find_spec("kernels")
print("imported", ds_llep.__file__, ds_llep.kernels.reference.__file__)
installed = any(dist.name == "kernels" for dist in importlib.metadata.distributions())
print("kernels", spec and spec.origin)
print("fooled", transformers.utils.is_kernels_available() != installed)
"""


def test_import_from_elsewhere(built, tmp_path):
    """From an unpacked wheel and from a clone on the path, with the cwd in neither.

    A package `kernels`, as Hugging Face's, stands behind ours on the path: it must not be hidden.
    """
    (wheel,) = built.glob("*.whl")
    unpacked, elsewhere, theirs = (tmp_path / name for name in ("wheel", "elsewhere", "theirs"))
    zipfile.ZipFile(wheel).extractall(unpacked)
    elsewhere.mkdir()
    (theirs / "kernels").mkdir(parents=True)
    (theirs / "kernels" / "__init__.py").touch()

    # What else the environment puts on the path may be where DeepSpeed is; we must not be there.
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    given = [entry for entry in given if Path(entry).resolve() != ROOT.resolve()]

    def start(*path: Path) -> subprocess.Popen:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *given])}
        return subprocess.Popen(
            [sys.executable, "-c", CHECK],
            cwd=elsewhere,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    running = {unpacked: start(unpacked), ROOT: start(ROOT, theirs)}
    for base, process in running.items():
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-4000:]
        lines = dict(line.split(" ", 1) for line in out.splitlines() if " " in line)
        package, reference = map(Path, lines["imported"].split())
        assert package == base / "ds_llep" / "__init__.py"
        assert reference == base / "ds_llep" / "kernels" / "reference.py"
        assert not lines["kernels"].startswith((str(ROOT), str(unpacked))), lines["kernels"]
        assert lines["fooled"] == "False", "transformers takes ours for Hugging Face's kernels"
        if base == ROOT:
            assert Path(lines["kernels"]) == theirs / "kernels" / "__init__.py"

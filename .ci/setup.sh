#!/usr/bin/env bash
# Makes the virtual environment, once: a stamp in it says what it was made from and that it is whole.
source "$(dirname "$0")/env.sh"
TORCH=${TORCH:-torch==2.13.0} PIP_ARGS=${PIP_ARGS:-}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$PYTHON is older than 3.10. Name another one: make ... PYTHON=python3.11"

if [[ $VENV == none ]]; then
    missing=$("$PYTHON" - <<'PY'
from importlib.util import find_spec
names = "torch triton deepspeed mpi4py pydantic numpy packaging transformers accelerate tqdm"
print(*(name for name in names.split() if not find_spec(name)))
PY
    )
    [[ -z $missing ]] || fail "VENV=none installs nothing, and $PYTHON lacks: $missing"
    echo "set-up: none, $("$PYTHON" -V) as it is"
    exit
fi

# An environment belongs to one Python and one place: its scripts hold absolute paths.
identity="$("$PYTHON" -c 'import sys; print(sys.version.split()[0], sys.prefix)') $VENV"
contents=$(cat setup.py <(echo "$TORCH") | sha256sum)
stamp=$VENV/.ds_llep_setup
found=$(cat "$stamp" 2>/dev/null || true)
# A run that was killed while it loaded a compiled op left a lock that every later one waits for.
rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
if [[ $found == "$identity"$'\n'"$contents" ]]; then
    echo "set-up: $VENV is up to date"
    exit
fi

"$PYTHON" -c 'import ensurepip' 2>/dev/null ||
    fail "$PYTHON cannot make virtual environments. Install its venv package (Debian, Ubuntu:" \
        "apt install python3-venv), or name another one: make ... PYTHON=python3.11"
"$PYTHON" -c 'import os, sysconfig as s; open(os.path.join(s.get_path("include"), "Python.h"))' \
    2>/dev/null || fail "the C headers of $PYTHON are missing: DeepSpeed and Triton compile small" \
    "extensions when they run. Install them (Debian, Ubuntu: apt install python3-dev)"
command -v g++ c++ >/dev/null ||
    fail "no C++ compiler found, which DeepSpeed needs. Install one (Debian, Ubuntu: apt install g++)"

# Start over where an earlier set-up of ours broke off, or was for another Python or place; an
# environment without our stamp is somebody's own and only gets what it lacks.
clear=
[[ -n $found && ${found%%$'\n'*} != "$identity" ]] && clear=--clear
if [[ ! -e $VENV || -n $clear ]]; then
    echo "set-up 1/4: a virtual environment in $VENV, $("$PYTHON" -V)"
    "$PYTHON" -m venv $clear "$VENV"
    echo unfinished >"$stamp"
else
    echo "set-up 1/4: the virtual environment in $VENV is there"
fi
pip_install() {
    # PIP_ARGS holds several words
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --disable-pip-version-check $PIP_ARGS "$@"
}
echo "set-up 2/4: $TORCH (minutes where it is a CUDA build), build tools"
pip_install "$TORCH" 'setuptools>=77' wheel ninja packaging
echo "set-up 3/4: ds_llep, DeepSpeed and what they need"
# DeepSpeed's build imports the PyTorch that is installed: an isolated build would fetch another.
DS_BUILD_OPS=0 pip_install --no-build-isolation -e '.[dev]'
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if ((gpus < 2)); then
    echo "set-up 4/4: DeepSpeed's shared-memory op for CPU ranks, compiled once"
    DS_ACCELERATOR=cpu "$python" -c 'from deepspeed.accelerator import get_accelerator as accelerator
accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)'
fi

if command -v nvidia-smi >/dev/null && [[ -n $(nvidia-smi -L 2>/dev/null) ]]; then
    ((gpus)) ||
        echo "set-up: WARNING: this machine has GPUs, but $TORCH cannot use them: it is a CPU build," \
            "or made for a newer driver. Name another one: make ... TORCH=... PIP_ARGS=..."
fi
printf '%s\n' "$identity" "$contents" >"$stamp"
echo "set-up: done"

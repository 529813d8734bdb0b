# Sourced by the other scripts: which Python they use, and where they run.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "make: $*" >&2
    exit 1
}

PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv}
# Resolved now: with the environment on the PATH, "python3" would be the environment's own.
PYTHON=$(command -v "$PYTHON" || fail "$PYTHON not found. Name another one: make ... PYTHON=python3")

if [[ $VENV == none ]]; then
    python=$PYTHON
    # Not installed: the package is used from here, in the ranks that the launcher starts too.
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
else
    VENV=$(realpath -m "$VENV")
    python=$VENV/bin/python
    export PATH=$VENV/bin:$PATH # for ninja, which PyTorch starts by name to compile DeepSpeed's ops
    # Not the user's cache: there, runs with another PyTorch compile the same op over and over.
    export TORCH_EXTENSIONS_DIR=$VENV/torch_extensions
fi

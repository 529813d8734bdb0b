#!/usr/bin/env bash
# Style, then tests. With VENV=none and no ruff, the style is left out, and the last line says so.
source "$(dirname "$0")/env.sh"

style="style ok"
if "$python" -c 'import ruff' 2>/dev/null; then
    "$python" -m ruff check . || fail "FAILED in ruff check"
    "$python" -m ruff format --check . || fail "FAILED in ruff format --check; ruff format repairs it"
elif [[ $VENV == none ]]; then
    style="style not checked: no ruff"
else
    fail "FAILED: ruff is missing from $VENV"
fi
if [[ ${1:-} == --lint-only ]]; then
    echo "make lint: $style"
    exit
fi

# Three at a time on two cores, whole files in the order of conftest.py: cores idle while ranks start
# and wait for each other. Not on GPUs, which tests would have to share.
workers=()
if "$python" -c 'import torch, xdist, sys; sys.exit(torch.cuda.device_count() > 0)' 2>/dev/null; then
    workers=(-n 3 --dist loadfile --no-loadscope-reorder)
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$python" -m pytest tests -q "${workers[@]}" 2>&1 | tee "$log" || fail "test: FAILED: $(tail -n 1 "$log")"
echo "make test: ok: $(tail -n 1 "$log"), $style"

# `make demo` and `make test` set themselves up in a virtual environment the first time they run.
# Variables, each as `make demo NAME=value`:
#   PYTHON    the Python (3.10 or later) that the environment is made from
#   VENV      where the environment is; "none" uses PYTHON as it is and installs nothing
#   TORCH     the PyTorch to install, as pip names it
#   PIP_ARGS  more arguments for every `pip install`, such as another package index
#   DEMO_ARGS more arguments for examples/finetune.py

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_ARGS ?=
DEMO_ARGS ?=
export PYTHON VENV TORCH PIP_ARGS DEMO_ARGS

.DEFAULT_GOAL := help
.PHONY: help demo test lint venv clean

help:
	@echo "make demo    fine-tune a small Mixture-of-Experts model with llep on 4 ranks (GPUs or CPU)"
	@echo "make test    check the style, then run the tests"
	@echo "make lint    check the style only"
	@echo "make venv    only set up the virtual environment"
	@echo "make clean   remove the virtual environment and everything built"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) PIP_ARGS=$(PIP_ARGS)"

venv:
	@.ci/setup.sh

demo: venv
	@.ci/demo.sh

test: venv
	@.ci/test.sh

lint: venv
	@.ci/test.sh --lint-only

# .venv by name: never a directory that VENV points to somewhere else.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.git/*" -prune -exec rm -rf {} +
	@echo "make clean: ok"

# Every target sets itself up in .venv the first time. PYTHON=python3.12 picks another interpreter;
# TORCH_INDEX=https://... takes torch from another index (a CUDA or a CPU build).
PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Their metadata asks for torchvision, which what we compare with them does not need.
PEERS := curvlinops-for-pytorch backpack-for-pytorch einconv linear-operator opt-einsum kronfluence

# The shipped models are on this disk, and tests never ask the network for another.
report test test-full bench: export HF_HUB_OFFLINE = 1

.PHONY: help install report test test-full check lab bench docs

help:
	@echo "make report     compare the shipped pair and leave report.html here"
	@echo "make test       the tests (test-full: also the long ones)"
	@echo "make check      ruff and pyright"
	@echo "make lab        the notebooks in JupyterLab"
	@echo "make docs       docs/laboratory-animals.md from the models' cards"
	@echo "make bench      the benchmarks (heavy: minutes of an otherwise idle machine)"
	@echo "make install    only set up .venv (every other target does so when needed)"

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  f"interp needs Python 3.11 or newer, but {sys.executable} is {sys.version.split()[0]}; name another: make PYTHON=python3.12")'
	@echo 'setting up $(VENV): a few minutes, once'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(PEERS) || echo 'without $(PEERS): what is compared with them is skipped'
	@touch $@

report: $(READY)
	$(BIN)/interp compare

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not full'

test-full: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

lab: $(READY)
	$(BIN)/jupyter lab notebooks

docs: $(READY)
	$(BIN)/python -m interp.organisms.page > docs/laboratory-animals.md

# All of them, also when one misses its aim; the last line says which did.
bench: $(READY)
	@missed=; for b in "overhead --rounds 3" "capture --rounds 2" "tuco --rounds 3" patching dcm head_svd composition kfac staircase; do \
	  set -- $$b; name=$$1; shift; echo "== $$name"; $(BIN)/python benchmarks/$$name.py "$$@" || missed="$$missed $$name"; \
	done; test -z "$$missed" || { echo "missed an aim:$$missed"; exit 1; }

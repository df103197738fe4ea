# `make demo` and `make test` are the only commands a fresh machine needs (Python 3.11-3.13, make).
#
#   PYTHON=/path/to/python3.11    the interpreter that creates .venv
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                                 a further index for torch, for example of CPU-only builds
#   PYTHON312=python3.12          the interpreter of test-arviz1
#   WORKERS=2                     test processes
#   ARGS="..."                    further options of the demo or of pytest

PYTHON ?=
PYTHON312 ?= python3.12
TORCH_INDEX ?=
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_DOCS := $(VENV)/.installed-docs
EXECUTED := docs/_build/notebooks
# One thread per test process: two processes with two threads each are slower on two cores.
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-arviz1 notebooks docs lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       simulate, annotate, train and evaluate a screen (ten minutes on two cores)"
	@echo "make test       the test suite (twelve minutes on two cores at most)"
	@echo "make test-slow  the tests marked slow"
	@echo "make test-arviz1  the ArviZ export on ArviZ 1.x, in an environment of its own (Python 3.12)"
	@echo "make notebooks  run the notebooks at full size, into docs/_build/notebooks (half an hour)"
	@echo "make docs       the documentation, into docs/_build/html"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff mend what it can"
	@echo "make clean      remove caches and build products (keeps .venv; remove that by hand)"

demo: $(INSTALLED)
	@$(BIN)/cradle-pyro demo $(ARGS)

test: $(INSTALLED)
	@$(SINGLE) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-slow: $(INSTALLED)
	@$(SINGLE) $(BIN)/python -m pytest -n $(WORKERS) -m "slow and not perf" $(ARGS)

# ArviZ 1.x needs Python 3.12 and is tested by itself, without torch.
test-arviz1: $(INSTALLED)
	@$(PYTHON312) -m venv $(VENV)-arviz1
	@$(VENV)-arviz1/bin/python -m pip --disable-pip-version-check install -qq "arviz>=1,<2" matplotlib
	@CRADLE_ARVIZ1_PYTHON=$(abspath $(VENV)-arviz1/bin/python) $(BIN)/python -m pytest tests/test_inference_data.py

# In a copy: the committed notebooks carry no output.
notebooks: export CRADLE_SCREENS := $(or $(CRADLE_SCREENS),$(abspath ../shared/data))
notebooks: $(INSTALLED)
	@mkdir -p $(EXECUTED)
	@cp notebooks/*.ipynb $(EXECUTED)
	@cd $(EXECUTED) && $(abspath $(BIN))/jupyter execute --inplace --timeout=3600 *.ipynb

docs: $(INSTALLED_DOCS)
	@$(BIN)/sphinx-build -q -b html -W --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: $(INSTALLED_DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED_DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@rm -rf docs/_build docs/generated docs/notebooks
	@find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# Runs a candidate instead of asking whether it exists: version managers leave names that fail.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

$(BIN)/python:
	@python=; found=; \
	for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	    if "$$candidate" -c "$(SUPPORTED)" >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	    seen=$$("$$candidate" --version 2>/dev/null) && found="$$found ($$candidate is $$seen)"; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "cradle-pyro needs Python 3.11, 3.12 or 3.13; found$${found:- none}. Install one, or name it: make demo PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$python" --version) ..."; \
	if ! "$$python" -m venv $(VENV); then \
	    rm -rf $(VENV); \
	    echo "Could not create $(VENV) with $$python; on Debian or Ubuntu install its venv package (apt-get install python3-venv) and run make again." >&2; \
	    exit 1; \
	fi

# torch first and from the constraints: resolved with the rest it may be fetched as gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing cradle-pyro and what it needs into $(VENV) (some minutes, once) ..."
	@$(PIP) install -qq -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(PIP) install -qq -c constraints.txt -e ".[test]"
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@$(PIP) install -qq -c constraints.txt -e ".[dev]"
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@$(PIP) install -qq -c constraints.txt -e ".[docs]"
	@touch $@

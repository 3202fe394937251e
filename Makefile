# make demo      index real text and search it
# make test      run the tests
# make check     ruff and mypy
# make bench     measure text embedding and search against LanceDB
# make soak      the long forms of the tests
# make gpu       the tests that need a CUDA device
# make setup     only make .venv, with everything for development
#
# Each makes .venv first. PYTHON=python3.12 picks the interpreter, EXTRA=cpu|cuda12|cuda13 the
# libraries; without it the driver decides.

SHELL := /bin/bash

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# CUDA 13 needs a driver of 580 or newer; without a driver nothing is printed.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
	| head -n 1 | cut -d . -f 1 | grep -E '^[0-9]+$$')
EXTRA ?= $(shell if [ -z "$(DRIVER)" ]; then echo cpu; \
	elif [ "$(DRIVER)" -ge 580 ]; then echo cuda13; else echo cuda12; fi)

BIN := .venv/bin
LOG := .venv/install.log
# The name of a stamp holds the extra: another one starts from an empty .venv, since the FAISS
# wheels overwrite each other.
VENV := .venv/.made-$(EXTRA)
DEMO := .venv/.demo-$(EXTRA)
TEST := .venv/.test-$(EXTRA)
DEV := .venv/.dev-$(EXTRA)

.PHONY: setup check test bench demo soak gpu
# two installations into one .venv at a time would spoil it
.NOTPARALLEL:

demo: $(DEMO)
	@$(BIN)/gpu-lance demo

test: $(TEST)
	@$(BIN)/python -m pytest -q -m "not gpu and not soak"

check: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(TEST)
	@failed=0; for what in text providers search multivectors; do \
	$(BIN)/python benchmarks/bench_$$what.py || failed=1; done; exit $$failed

soak: $(TEST)
	@$(BIN)/python -m pytest -q -m "soak and not gpu" --timeout 3600

gpu: $(TEST)
	@$(BIN)/python -m pytest -q -m gpu

setup: $(DEV)

$(VENV):
	@if [ -z "$(PYTHON)" ] || \
	! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3"; exit 1; fi
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --upgrade pip
	@touch $@

# Shows the downloads of 100 MB or more; all of pip's output is in the log.
define install
	@echo "Installing gpu-lance[$(WITH)]: some minutes the first time"
	@set -o pipefail; $(BIN)/python -m pip install --progress-bar off --editable '.[$(WITH)]' 2>&1 \
	| tee $(LOG) \
	| awk '/^ *(Downloading|Using cached) .*\([0-9][0-9][0-9]+(\.[0-9]+)? MB\)/ \
		{ sub(/^ */, "  "); print; fflush() }' \
	|| { tail -n 30 $(LOG); echo "The installation failed; its log is $(LOG)"; exit 1; }
endef

$(DEMO): WITH := $(EXTRA),demo
$(DEMO): pyproject.toml $(VENV)
	$(install)
	@touch $@

$(TEST): WITH := $(EXTRA),demo,test
$(TEST): pyproject.toml $(VENV)
	$(install)
	@touch $(DEMO) $@

$(DEV): WITH := $(EXTRA),demo,dev
$(DEV): pyproject.toml $(VENV)
	$(install)
	@touch $(DEMO) $(TEST) $@

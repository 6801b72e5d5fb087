# condcomp: `make reproduce` and `make test` are all that a newcomer needs; `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
# Linux: take torch's CPU build (200 MB) instead of the CUDA one (gigabytes). TORCH_INDEX= keeps PyPI's.
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname -s)),https://download.pytorch.org/whl/cpu,)
BIN := .venv/bin
JOBS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup reproduce paper reference test lint unit notebooks browser lab explore site bench lock readme clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo "variables: PYTHON=python3.12, JOBS=2 (notebooks at a time), TORCH_INDEX= (PyPI's torch instead of the CPU build)"

setup: .venv/installed ## create .venv and install exactly what requirements.lock says

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "condcomp needs Python 3.11 or newer, not $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	@# An index that does not answer is no error: torch then comes from the usual place.
	@if [ -n "$(TORCH_INDEX)" ]; then $(BIN)/python -m pip install --quiet --no-deps --retries 0 --timeout 15 \
		--index-url $(TORCH_INDEX) "$$(grep '^torch==' requirements.lock)" 2>/dev/null \
		|| echo "no answer from $(TORCH_INDEX): torch comes from PyPI, on Linux with gigabytes of CUDA"; fi
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

reproduce: setup ## run all notebooks: quick profile from scratch, then the paper profile from the stored runs
	$(BIN)/condcomp reproduce --profile quick --jobs $(JOBS)
	$(BIN)/condcomp reproduce --profile paper --jobs $(JOBS)

paper: setup ## compute the runs of the paper profile that the store lacks (needs the data sets), then its notebooks
	$(BIN)/condcomp run all --profile paper
	$(BIN)/condcomp reproduce --profile paper --jobs $(JOBS)

reference: setup ## execute the paper profile and write the notebooks' executed references and README's numbers
	$(BIN)/condcomp reproduce --profile paper --reference
	$(BIN)/condcomp readme

test: lint unit notebooks browser ## pass every test

lint: setup ## style, layers, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

unit: setup ## the library's tests, warnings as errors; headless executions by papermill among them
	$(BIN)/pytest -n auto --doctest-modules condcomp_lib tests -m "not browser and not figures"

notebooks: setup ## execute the committed notebooks, compare their checked outputs (nbval) and their figures
	rm -rf build/nbval
	CONDCOMP_FIGURES=$(CURDIR)/build/nbval $(BIN)/pytest --nbval-lax notebooks
	$(BIN)/pytest -m figures tests/test_reproduce.py

browser: setup ## open JupyterLab in a real browser (skipped, with the reason, where there is none)
	$(BIN)/pytest -m browser tests/browser

lab: setup ## open JupyterLab on the start page
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

explore: setup ## open the sparsity explorer alone
	$(BIN)/condcomp explore

site: setup ## write the executed notebooks as HTML pages to build/site/
	$(BIN)/condcomp site

bench: setup ## measure speed on this machine (the training benchmark needs SVHN)
	$(BIN)/condcomp bench store
	$(BIN)/condcomp bench training

lock: setup ## write requirements.lock anew from pyproject.toml, for all platforms
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-annotate --no-header \
		-o requirements.lock pyproject.toml

readme: setup ## write README's generated parts
	$(BIN)/condcomp readme

clean: ## remove the environment and everything that can be made again
	rm -rf .venv build figures/quick *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each target sets up what it needs in .venv; a second run installs nothing.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint tools truth allocator bench docs dashboards pictures clean

IN_VENV := .venv/bin/
PYTHON := $(IN_VENV)python
PIP_INSTALL := $(PYTHON) -m pip install --quiet --disable-pip-version-check --editable

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'Arguments are given like this: make demo ARGS="--turns 3"'

demo: .venv/.demo-installed ## watch a real llama.cpp server with a tiny model in the terminal
	@$(PYTHON) -m kvscope demo $(ARGS)

test: lint ## run every test
	$(PYTHON) -m pytest $(ARGS)

lint: .venv/.dev-installed ## check style, types and which room imports which
	$(IN_VENV)ruff check exporter dashboards tests
	$(IN_VENV)ruff format --check exporter dashboards tests
	$(IN_VENV)mypy
	$(IN_VENV)lint-imports --no-logo

tools: .tools/grafana-client ## get what some tests ask: promtool, a C compiler, grafana-client
	@.ci/get-tools

# In a folder of its own: it replaces urllib3.
.tools/grafana-client: | $(PYTHON)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --target $@ 'grafana-client>=5.1,<6'

truth: .venv/.dev-installed ## compare the figures of real servers with what their driver knows
	$(PYTHON) -m tests.truth $(ARGS)

allocator: .venv/.dev-installed ## compare KV bytes of random models with what llama.cpp allocates
	$(PYTHON) -m tests.allocator $(ARGS)

bench: .venv/.dev-installed ## measure what watching costs
	$(PYTHON) -m tests.bench $(ARGS)
	$(PYTHON) -m tests.bench.header
	$(PYTHON) -m tests.bench.gpu
	$(PYTHON) -m tests.bench.amdgpu

docs: .venv/.dev-installed ## write docs/METRICS.md from the metric rows
	$(PYTHON) -m kvscope.metrics.document > docs/METRICS.new
	mv docs/METRICS.new docs/METRICS.md

dashboards: .venv/.dev-installed ## write dashboards/generated from the pages in dashboards/
	$(PYTHON) -m dashboards

pictures: .venv/.pictures-installed ## draw the pictures of docs/pictures that come from figures
	$(PYTHON) docs/pictures/growth.py

clean: ## remove everything that make made
	rm -rf .venv .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find exporter dashboards tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.dev-installed: pyproject.toml | $(PYTHON)
	@echo 'installing kvscope with what its tests need into .venv'
	@$(PIP_INSTALL) '.[dev]'
	@touch .venv/.demo-installed $@

.venv/.demo-installed: pyproject.toml | $(PYTHON)
	@echo 'installing kvscope with what its demo needs into .venv'
	@$(PIP_INSTALL) '.[demo]'
	@touch $@

.venv/.pictures-installed: pyproject.toml | $(PYTHON)
	@echo 'installing what draws the pictures into .venv'
	@$(PIP_INSTALL) '.[pictures]'
	@touch $@

# find-python answers "python PATH", or in one line what is missing.
$(PYTHON): FOUND = $(shell .ci/find-python)
$(PYTHON):
	@$(if $(filter python,$(firstword $(FOUND))),,$(error $(FOUND)))$(wordlist 2,99,$(FOUND)) -m venv --clear .venv

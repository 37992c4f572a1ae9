# Needs Python 3.11 or later with pip, and make. Everything else comes, by hash, from requirements.lock into .venv.
#
#   make demo    a whole migration on real data, in one command
#   make ui      Dagster on http://127.0.0.1:3000
#   make test    everything that a change must pass; CI runs the same
#   make quick   the tests that take seconds
#   make lint    style, types and import rules alone
#   make lock    requirements.lock anew from pyproject.toml (needs uv)
#   make clean   remove .venv and caches; keeps home/, which holds the history of migrations

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two makes at a time would write the same environment: the second waits, then finds it done.
ALONE := $(if $(shell command -v flock),flock .venv.lock)

export PIP_REQUIRE_VIRTUALENV := 1

.PHONY: demo ui test quick lint lock clean environment

demo: environment
	@$(BIN)/vector-migrate demo

ui: environment
	@$(BIN)/vector-migrate ui

test: lint
	@$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

quick: environment
	@$(BIN)/pytest -x -m "not slow"

lint: environment
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

lock:
	@uv --version >/dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 1; }
	@uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --all-extras --group dev --no-strip-extras \
		--generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		--output-file requirements.lock

clean:
	@rm -rf .venv .venv.lock .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	@find migration_pipelines migration_pipelines_tests -name __pycache__ -type d -prune -exec rm -rf {} +

environment:
	@$(ALONE) $(MAKE) --silent .venv/.project

.venv/.project: .venv/.packages pyproject.toml
	@echo "Installing the project into .venv"
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.packages: requirements.lock
	@$(MAKE) --silent .venv/bin/pip
	@echo "Installing the locked packages into .venv: a few minutes the first time"
	@$(PIP) install --quiet --require-hashes --requirement requirements.lock
	@touch $@

# Debian's Python comes without ensurepip unless python3-venv is there: then its own pip fills the environment.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@rm -rf .venv
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip .venv && \
		PIP_REQUIRE_VIRTUALENV=0 $(PYTHON) -m pip --python .venv/bin/python install --quiet pip; } || { \
		rm -rf .venv; \
		echo "$(PYTHON) can't make a virtual environment: apt install python3-venv (or python3-pip)" >&2; exit 1; }

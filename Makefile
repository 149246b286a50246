# The verbs of this repository. `make` alone lists them.
#
# Each verb sets up what it needs first. PYTHON=... picks the interpreter that .venv is made with;
# ARGS=... is handed on to pytest, `paycore demo`, `paycore serve` or the benchmarks.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUF_INSTALLED := node_modules/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A name on PATH may be a shim that does not run, a version that is not supported, or a Python
# without venv or C headers; the first candidate that passes this is taken.
SUITABLE := import ensurepip, os, sys, sysconfig, venv; sys.exit(not ((3, 11) <= sys.version_info[:2] < (3, 14) and os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h'))))
PYTHON ?= $(shell for candidate in python3.13 python3.12 python3.11 python3 python; do \
	if $$candidate -c "$(SUITABLE)" >/dev/null 2>&1; then echo $$candidate; break; fi; done)

# What an editable install compiles or generates; plain Python modules are read in place.
BUILD_INPUTS := pyproject.toml setup.py $(shell find protos -name '*.proto') $(wildcard src/paycore/*.pyx src/paycore/*.pxd)
CYTHON_SOURCES := $(wildcard src/paycore/*.pyx src/paycore/*.pxd)
TYPED := src tests $(wildcard benchmarks) $(wildcard examples)

.PHONY: help setup demo serve test test-versions check bench bench-docs mutants crash proto clean

help:
	@echo "make setup    create .venv and install paycore into it, with everything for development"
	@echo "make demo     watch an order being paid twice and the second payment go back by itself"
	@echo "make serve    run the server on loopback, over paycore.db here or PAYCORE_DB"
	@echo "make test     run all tests"
	@echo "make test-versions  run races, faults, notifications and histories on the older PostgreSQLs too"
	@echo "make check    lint, format, types, Cython and protobuf checks"
	@echo "make bench    a quick run of every benchmark"
	@echo "make bench-docs  measure and write docs/benchmarks.md: ARGS=--list, --long, \"--only CELL ...\""
	@echo "make mutants  break each money rule in turn and see its test go red"
	@echo "make crash    kill a server again and again under load: KILLS=500 STORE=sqlite|postgresql SEED=..."
	@echo "make proto    generate src/paycore/v1 from protos/"
	@echo "make clean    remove everything that the other verbs made"

setup: $(INSTALLED)

$(BIN)/python:
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c "$(SUITABLE)"; then \
		echo "paycore needs Python 3.11, 3.12 or 3.13 with venv and its C headers; name one with: make setup PYTHON=..." >&2; \
		exit 1; \
	fi
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(BIN)/python $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet --editable '.[dev,bench]'
	@touch $@

demo: setup
	$(BIN)/paycore demo $(ARGS)

serve: setup
	$(BIN)/paycore migrate
	$(BIN)/paycore serve $(ARGS)

# The serial tests come first, so that the last line tells of the many. Exit code 5 there says that
# none was selected. Both runs are made even if the first fails. A file stays on one worker (loadfile), so
# that what its module sets up, a server or a wheel, is made once.
test: setup
	@serial=0; \
	$(BIN)/python -m pytest -m serial $(ARGS) || serial=$$?; \
	if [ $$serial -eq 5 ]; then serial=0; fi; \
	$(BIN)/python -m pytest -m 'not serial' -n 2 --dist loadfile $(ARGS) && exit $$serial

VERSION_TESTS := $(addprefix tests/integration/,test_races.py test_notify.py test_histories.py test_postgresql_faults.py test_postgresql_full.py test_postgresql_cut.py test_postgresql_deadlock.py)

test-versions: setup
	@for version in $$($(BIN)/python -c "from tests.support.postgres import VERSIONS; print(*(one for one in VERSIONS if one < '18'))"); do \
		echo "PostgreSQL $$version"; \
		PAYCORE_TEST_POSTGRES_VERSION=$$version $(BIN)/python -m pytest -n 2 --dist loadfile -k 'not sqlite' $(VERSION_TESTS) $(ARGS) || exit 1; \
	done

check: setup check-protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(TYPED)
	$(if $(CYTHON_SOURCES),PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint $(CYTHON_SOURCES))

.PHONY: check-protos
check-protos:
	@if command -v npm >/dev/null 2>&1; then \
		$(MAKE) --no-print-directory $(BUF_INSTALLED) && \
		echo "buf lint" && node_modules/.bin/buf lint && \
		echo "buf format --diff --exit-code" && node_modules/.bin/buf format --diff --exit-code; \
	elif [ "$$CI" = true ]; then \
		echo "npm is missing: protos/ cannot be checked" >&2; exit 1; \
	else \
		echo "*** SKIPPED: npm is missing, protos/ is NOT checked. CI checks it." >&2; \
	fi

$(BUF_INSTALLED): package.json package-lock.json .npmrc
	npm ci
	@touch $@

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

bench-docs: setup
	$(BIN)/python -m benchmarks report $(ARGS)

mutants: setup
	$(BIN)/python tests/mutants/run.py $(ARGS)

KILLS ?= 200
STORE ?= all

crash: setup
	$(BIN)/python -m tests.crash --kills $(KILLS) --store $(STORE) $(if $(SEED),--seed $(SEED)) $(ARGS)

proto: setup
	$(BIN)/python setup.py --quiet generate_protos

clean:
	rm -rf $(VENV) node_modules build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f src/paycore/*.so src/paycore/*.c src/paycore/v1/*_pb2*
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Everything a fresh machine needs: `make demo` installs and runs the demo, `make test` installs and passes the tests.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml constraints.txt
SELECT := not full and not gpu
PYTEST = $(BIN)/python -m pytest -m "$(SELECT)"

.PHONY: demo test test-full build lint bench clean test-library test-models test-interpreted test-compiled
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/fastadapt demo --out out/demo

# Two processes at a time. Triton's two parts must be processes of their own: one process cannot both interpret and compile kernels.
test: .venv/.installed lint
	$(MAKE) --no-print-directory -j2 -Otarget test-models test-library test-interpreted test-compiled

test-full: .venv/.installed lint
	$(MAKE) --no-print-directory -j2 -Otarget SELECT="not gpu" test-models test-library test-interpreted test-compiled
	$(BIN)/python -m tests.triton.mutants
	$(BIN)/python -m tests.cpu_mutants
	$(BIN)/python -m tests.proof --write

MODELS := tests/hosts tests/hosts_vl tests/methods tests/nn tests/training tests/test_patching.py tests/test_checkpoint.py tests/test_packaging.py
test-models:
	$(PYTEST) $(MODELS)
test-library:
	$(PYTEST) tests --ignore=tests/triton $(MODELS:%=--ignore=%)
test-interpreted:
	TRITON_INTERPRET=1 $(PYTEST) tests/triton/interpret
test-compiled:
	$(PYTEST) tests/triton/compiled

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/python -m benchmarks.ops.bottleneck --rows 16 64 128 512 4096
	$(BIN)/python -m benchmarks.ops.gated_bottleneck --rows 16 64 128 512 4096

build: .venv/.installed

# torch is installed by itself first: its exact version is a build on this machine's disk or PyPI's, and the extension is built against it, without isolation.
.venv/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade pip setuptools ninja
	$(PIP) torch==2.13.0
	$(PIP) --no-build-isolation -e '.[demo,test]'
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info fastadapt/*.so fastadapt/_cpu_build.json

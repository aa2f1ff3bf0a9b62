# Everything a fresh machine needs: `make demo` installs and runs the demo, `make test` installs and passes the tests.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml constraints.txt

.PHONY: demo test test-full build lint bench clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/fastadapt demo --out out/demo

# The two triton runs are processes of their own: one process cannot both interpret and compile kernels.
test: .venv/.installed lint
	$(BIN)/python -m pytest tests -m "not full and not gpu" --ignore=tests/triton
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton/interpret -m "not full and not gpu"
	$(BIN)/python -m pytest tests/triton/compiled -m "not full and not gpu"

test-full: .venv/.installed lint
	$(BIN)/python -m pytest tests -m "not gpu" --ignore=tests/triton
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton/interpret -m "not gpu"
	$(BIN)/python -m pytest tests/triton/compiled -m "not gpu"
	$(BIN)/python -m tests.triton.mutants
	$(BIN)/python -m tests.cpu_mutants
	$(BIN)/python -m tests.proof --write

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/python -m benchmarks.ops.bottleneck
	$(BIN)/python -m benchmarks.ops.gated_bottleneck

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

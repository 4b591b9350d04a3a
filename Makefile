# make env     the virtual environment .venv: pinned versions, the extension built
# make demo    train the tiny tokenizer on real photographs; results in demo_output/
# make demo-mllm  train a tiny unified model on generated pictures and captions; results in demo_mllm_output/
# make test    format, lint, types, tests
# make bench   time the ops against PyTorch and other libraries (several minutes)
# make docs    the documentation as pages in site/; `python3 -m http.server -d site` serves them, with search
# make clean   remove what was built (.venv stays)
#
# PYTHON=python3.12 chooses the interpreter of a new .venv.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.semhitok
# What an installation depends on. Python files are used in place.
INPUTS := Makefile constraints.txt pyproject.toml setup.py CMakeLists.txt semhitok/__init__.py $(shell find csrc -type f)
CXX_FILES = $(shell find csrc benchmarks/cuda tests/cuda -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

# Threads that wait asleep: on a machine that is shared, spinning ones slow training several times over.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: env demo demo-mllm test bench docs clean

env: $(STAMP)

$(STAMP): $(INPUTS)
	@command -v $(PYTHON) >/dev/null || \
		{ echo "make: no $(PYTHON) found; name a Python >= 3.11: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python >= 3.11 is needed (by the pinned versions), $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
		"name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo "make: no C++ compiler found; install g++ or clang++, or set CXX" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "make: $(PYTHON) -m venv failed (on Debian: apt install python3-venv)" >&2; exit 1; }
	@# torch goes first: the build of the extension looks for it in .venv.
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: env
	$(BIN)/semhitok demo

demo-mllm: env
	$(BIN)/semhitok demo-mllm

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

bench: env
	$(BIN)/python benchmarks/quantize_bench.py

# The theme tells at every build, in colours, that its maintenance ends in 2027: no warning about these pages.
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build site demo_output demo_mllm_output explore_screenshots semhitok.egg-info semhitok/_C*.so $(STAMP)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find semhitok tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Each target does its own set-up on a fresh clone: a virtual environment in .venv, torch, the build.
#   make test                      the tests
#   make demo                      train a VAE on real data, its speed against eager, a picture
#   make TORCH=torch==2.14.1 test  against another torch
#   make dev                       an editable install instead: Python edits need no rebuild
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Several tests at once; their threads sleep where they wait, and leave the cores to one another.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc fastvae -name '*.py' -o -name '*.h' \
  -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test demo bench simt lint dev clean
test: .venv/installed
	$(PYTEST) --ignore=tests/test_simt.py

demo: .venv/installed
	$(BIN)/fastvae demo

bench: .venv/installed
	$(BIN)/python -m bench

# The CUDA kernels, unmodified, on the CPU under AddressSanitizer.
simt: .venv/installed
	$(BIN)/pytest tests/test_simt.py

lint: .venv/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh tests/simt/*.h \
	  tests/simt/*.cpp

.venv/torch:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(TORCH) numpy scikit-build-core pybind11 ninja
	touch $@

.venv/installed: .venv/torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation '.[test]'
	touch $@

.venv/linters: .venv/torch
	$(BIN)/python -m pip install -q '.[lint]' --no-build-isolation
	touch $@

dev: .venv/torch
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[test,lint]'
	touch .venv/installed .venv/linters

clean:
	rm -rf build .venv

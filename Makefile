# From a bare machine with python3 and a C++ compiler (and nvcc, for the CUDA kernels):
#
#   make demo     or     make test
#
# Both use a virtual environment in $(VENV), with the versions in constraints.txt. With VENV= (empty)
# they use the current environment and its torch, and install only this package into it.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

ifeq ($(strip $(VENV)),)
BIN :=
PY := $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
INSTALL := $(PY) -m pip install --no-deps .
else
BIN := $(abspath $(VENV))/bin/
PY := $(BIN)python
INSTALL := $(PY) -m pip install -c constraints.txt '.[dev]'
endif

CXX_FILES = find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'

.DEFAULT_GOAL := help
.PHONY: help venv install demo test lint format docs wheel bench clean
.PHONY: lint-ruff lint-mypy lint-format lint-tidy lint-yaml

help:  ## print this help
	@echo 'make TARGET [PYTHON=python3] [VENV=.venv, or empty: the current environment]'
	@sed -n 's/^\([a-z]*\): .*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)

# torch comes first: the build uses the installed torch and must not download another.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt torch
	touch $@

venv: $(if $(BIN),$(VENV)/.torch) ## make the virtual environment, with torch

install: venv ## build and install the package, and print what was built
	$(INSTALL)
	$(PY) -m vispruner_cuda

demo: install ## ask the embedded model with and without pruning, and draw the retained tokens
	$(PY) -m vispruner.cli ask --k 22 --compare --runs 3
	$(PY) -m vispruner.cli show --k 22 -o vispruner.png

# From within tests/, so that Python finds the installed package and not the source tree.
test: install ## run all tests (PYTEST_ARGS)
	cd tests && $(PY) -m pytest $(PYTEST_ARGS)

lint: lint-ruff lint-mypy lint-yaml lint-format lint-tidy ## check style, types and C++ (changes nothing)

lint-ruff: install
	$(BIN)ruff check .
	$(BIN)ruff format --check .

lint-mypy: install
	$(BIN)mypy

# Workflows, issue forms and CITATION.cff, with the schemas of check-jsonschema.
lint-yaml: install
	$(BIN)yamllint --strict .github .pre-commit-config.yaml .yamllint.yml CITATION.cff mkdocs.yml
	$(BIN)check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

lint-format: install
	$(CXX_FILES) | xargs $(BIN)clang-format --dry-run -Werror

lint-tidy: install
	PATH="$(BIN):$$PATH" $(PY) .ci/clang_tidy.py

format: install ## format all sources in place
	$(BIN)ruff check --fix-only .
	$(BIN)ruff format .
	$(CXX_FILES) | xargs $(BIN)clang-format -i

docs: install ## build the documentation in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

# auditwheel names the wheel after the glibc that the library needs.
wheel: install ## build a wheel in dist/ for other machines, whose glibc must be as new
	rm -rf dist
	$(PY) -m pip wheel --no-deps --wheel-dir dist/raw .
	PATH="$(BIN):$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist dist/raw/*.whl
	$(PY) -m auditwheel show dist/*.whl

bench: install ## run the benchmarks, JSON in .benchmarks/
	cd benchmarks && $(PY) -m pytest --benchmark-only --benchmark-autosave $(PYTEST_ARGS)

clean:  ## remove build outputs, but not the virtual environment
	rm -rf build dist python/*.egg-info *.egg-info vispruner_cuda/libvispruner.*

# make demo    train a small GPT with exact and with 8-bit attention, side by side
# make test    every test that needs no GPU
# make lint    ruff
# make clean   remove what these commands made
#
# Variables: PYTHON (interpreter), VENV (folder of the virtual environment), ARGS (options for the
# demo or for pytest).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

NEEDS := sage_jax needs python3 >= 3.11 (with venv and headers), a C++17 compiler and make
ifeq ($(origin CXX),default)
  CXX := c++
endif
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1)
INSTALLED := $(VENV)/installed-$(VERSION)
NATIVE := CMakeLists.txt $(shell find cpu cuda cmake -type f 2>/dev/null)
# Quiet twice: no progress and no warnings, errors all the same. Bytecode is compiled when first used.
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install -qq --no-compile

.PHONY: demo test lint clean check
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@$(VENV)/bin/python examples/train_gpt.py $(ARGS)

# A file stays with one process: its tests share what they have compiled.
test: $(INSTALLED)
	@$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: $(INSTALLED)
	@$(PIP) ruff
	@$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) build demo_output .pytest_cache .hypothesis .ruff_cache

# The package is installed in place: a changed Python file needs no new installation, a changed
# native one does.
$(INSTALLED): pyproject.toml tools/requirements.py $(NATIVE) | check
	@[ -e $@ ] || { echo "Creating $(VENV) with Python $(VERSION) and installing the dependencies" \
	    && $(PYTHON) -m venv --clear $(VENV); }
	@$(PYTHON) tools/requirements.py > $(VENV)/requirements.txt
	@$(PIP) --requirement $(VENV)/requirements.txt
	@echo "Building the native parts"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

check:
	@$(PYTHON) -c 'import sys, venv, ensurepip, sysconfig, pathlib; sys.exit(sys.version_info < (3, 11) \
	    or not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' 2>/dev/null \
	    && echo 'template <class... T> bool all(T... x) { return (x and ...); }' \
	    | $(CXX) -std=c++17 -fsyntax-only -x c++ - 2>/dev/null \
	    || { echo "$(NEEDS): not all of them were found (python: $(PYTHON), compiler: $(CXX))." >&2; exit 1; }

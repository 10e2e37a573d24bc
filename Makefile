# Every target makes its own environment in .venv when it is missing or out of date, and is safe to repeat.
#   make demo PYTHON=python3.12      chooses the Python that .venv is made with (3.11 or newer)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PINS := pyproject.toml constraints.txt

.PHONY: help demo test test-all lint types docs bench
.DEFAULT_GOAL := help

help:
	@echo "make demo      learn faces, then find and understand them in unseen pictures: runs/demo/report.html"
	@echo "make test      the tests, without the long statistical ones"
	@echo "make test-all  all tests"
	@echo "make lint      ruff"
	@echo "make types     pyright"
	@echo "make docs      the documentation, its tutorials executed: docs/_build/html/index.html"
	@echo "make bench     speed beside Pyro, NumPyro and BlackJAX: runs/bench/bench.json"

demo: $(VENV)/.installed
	$(BIN)/foveate demo --out runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow" tests

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .

# The folders are installed as foveate.* by a table that no static checker reads, hence the links.
types: $(VENV)/.installed
	@mkdir -p build/types/foveate
	@for room in model inference data experiments; do ln -sfn ../../../$$room build/types/foveate/$$room; done
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.installed-bench
	$(BIN)/foveate bench --out runs/bench/bench.json

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "no $(PYTHON) here: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "foveate needs Python 3.11 or newer and $(PYTHON) is %d.%d; name another: make PYTHON=/path/to/python" % sys.version_info[:2])'
	"$(PYTHON)" -m venv --clear $(VENV)

# torch by itself and first: whichever build pip's own configuration offers (a CPU one, say) is then kept by what follows.
$(VENV)/.installed: $(PINS) | $(BIN)/python
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PIP) torch
	$(PIP) -e '.[demo,test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[demo,test,docs]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) -e '.[demo,test,bench]'
	@touch $@

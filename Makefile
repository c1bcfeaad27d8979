# Everything a fresh machine needs: each target makes .venv if it is missing and installs what it uses.
#   make demo    train the paper's network with and without BN on real digits; table and page of plots
#   make test    the test suite
#   make lint    ruff, mypy, import-linter        make docs   the documentation site, strict
#   make bench   speed of the experiments beside plain PyTorch loops
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint docs bench clean

demo: .venv/.train
	$(BIN)/batchnorm reproduce activations --data digits --seeds 2 --steps 1500 --evaluate-every 50 \
		--rates 0.05 0.1 0.5 --out runs/demo

test: .venv/.test
	$(BIN)/pytest --numprocesses auto

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.docs
	$(BIN)/mkdocs build --strict --quiet

bench: .venv/.train
	$(BIN)/python benchmarks/activations.py

clean:
	rm -rf .venv site runs

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv .venv

# One stamp for each set of extras, renewed when the project or its pins change.
.venv/.train: EXTRAS = train
.venv/.test: EXTRAS = train,export,test
.venv/.lint: EXTRAS = train,test,lint
.venv/.docs: EXTRAS = train,docs
.venv/.%: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

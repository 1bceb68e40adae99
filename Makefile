# Needs nothing but Python 3.11 or newer: every target first makes .venv, once.
PYTHON ?= python3
BIN := .venv/bin
VENV := .venv/installed
CONSTRAINTS := --constraint requirements-dev.lock
BUNDLE := bundles/tiny

.DELETE_ON_ERROR:
.PHONY: demo test bench bench-export clean

demo: $(VENV)  ## tiny random weights, from export to mp4
	$(BIN)/ttt-video export --preset tiny --length 9s --output $(BUNDLE)
	$(BIN)/ttt-video sample storyboards/kitchen-9s.json --bundle $(BUNDLE) --output-dir output --overwrite

test: $(VENV)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

bench: $(VENV)
	$(BIN)/python benchmarks/run.py

bench-export: $(VENV)  ## a full-size transformer, 34 GB of disk for a few minutes
	$(BIN)/python benchmarks/export.py

clean:
	rm -rf .venv bundles output build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV): pyproject.toml requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is missing or older than 3.11; run: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
# By itself and from wherever pip looks first, so that a CPU build at hand is taken and the rest is content with it.
	$(BIN)/pip install --quiet torch==2.13.0
# Constraints do not reach into an isolated build, so the build uses the setuptools of the lock.
	$(BIN)/pip install --quiet $(CONSTRAINTS) setuptools
	$(BIN)/pip install --quiet $(CONSTRAINTS) --no-build-isolation --editable '.[all]'
	@touch $@

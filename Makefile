# Needs only Python 3.11 or newer. The first target creates .venv.
PYTHON ?= python3
BIN := .venv/bin
VENV := .venv/installed
CONSTRAINTS := --constraint requirements-dev.lock
BUNDLE := bundles/demo
EMBEDDED := ttt_video_engine/demo_bundle
LENGTHS := --length 3s --length 9s --length 18s --length 30s --length 63s

.DELETE_ON_ERROR:
.PHONY: demo wheel test bench bench-export clean

demo: $(VENV)  ## tiny preset with random weights: export and render
	$(BIN)/ttt-video export --preset tiny --length 9s --output $(BUNDLE)
	$(BIN)/ttt-video sample storyboards/kitchen-9s.json --bundle $(BUNDLE) --output-dir output --overwrite

wheel: $(VENV)  ## dist/*.whl, with the demo model's bundle in it
	$(BIN)/ttt-video export --config demo/demo.toml --checkpoint demo/checkpoint $(LENGTHS) --output $(EMBEDDED)
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

test: $(VENV)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

bench: $(VENV)
	$(BIN)/python benchmarks/run.py

bench-export: $(VENV)  ## exports a full-size transformer; needs 34 GB of disk for a few minutes
	$(BIN)/python benchmarks/export.py

clean:
	rm -rf .venv bundles output build dist *.egg-info $(EMBEDDED)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV): pyproject.toml requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is missing or older than 3.11; run: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
# Separately and without constraints, so that pip may choose a CPU build of the same version.
	$(BIN)/pip install --quiet torch==2.13.0
# Constraints do not apply to an isolated build, so the package is built with the setuptools of the lock.
	$(BIN)/pip install --quiet $(CONSTRAINTS) setuptools
	$(BIN)/pip install --quiet $(CONSTRAINTS) --no-build-isolation --editable '.[all]'
	@touch $@

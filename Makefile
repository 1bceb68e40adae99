# Needs only Python 3.11 or newer. The first target creates .venv.
PYTHON ?= python3
BIN := .venv/bin
VENV := .venv/installed
CONSTRAINTS := --constraint requirements-dev.lock
BUNDLE := bundles/demo
SHORT := bundles/tiny-3s
EMBEDDED := ttt_video_engine/demo_bundle
EXPORT := $(BIN)/ttt-video export --config demo/demo.toml --checkpoint
LENGTHS := $(foreach length,3s 9s 18s 30s 63s,--length $(length))
CASES ?= 100000
SEED ?= 1

.DELETE_ON_ERROR:
.PHONY: demo judge wheel test stress powercut diskfaults fuzz short bench bench-export gpu clean

demo: $(VENV)  ## exports the demo model and renders three scenes with it
	$(EXPORT) demo/checkpoint --length 9s --output $(BUNDLE)
	$(BIN)/ttt-video sample storyboards/demo-9s.json --bundle $(BUNDLE) --output-dir output --overwrite

wheel: $(VENV)  ## dist/*.whl, with the demo model's bundle in it
	$(EXPORT) demo/checkpoint $(LENGTHS) --output $(EMBEDDED)
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

judge: $(VENV)  ## renders 100 held-out storyboards with TTT and without, and measures what they show
	$(EXPORT) demo/checkpoint --length 9s --output $(BUNDLE)
	$(BIN)/python -m demo.without_ttt demo/checkpoint bundles/checkpoint-without-ttt
	$(EXPORT) bundles/checkpoint-without-ttt --length 9s --output $(BUNDLE)-without-ttt
	$(BIN)/python -m demo.held_out --scenes 3 --count 100 --output output/judge-3.jsonl
	$(BIN)/ttt-video sample output/judge-3.jsonl --bundle $(BUNDLE) --output-dir output/judge --fast
	$(BIN)/ttt-video sample output/judge-3.jsonl --bundle $(BUNDLE)-without-ttt --output-dir output/judge-without-ttt --fast
	$(BIN)/python -m demo.evaluate output/judge output/judge-without-ttt

test: $(VENV)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
# A file's tests run in one worker, so what its fixtures export is exported once.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

stress: short  ## 200 kills of renders; about 15 minutes
	$(BIN)/python tests/stress.py --bundle $(SHORT)

powercut: short  ## resumes a render from all that a power cut can leave; needs Linux and the right to mount
	$(BIN)/python tests/power_cuts.py --bundle $(SHORT)

diskfaults: short  ## fails every call that reaches the disk in turn; needs the same
	$(BIN)/python tests/disk_faults.py --bundle $(SHORT)

short: $(VENV)
	$(BIN)/ttt-video export --preset tiny --length 3s --output $(SHORT)

fuzz: $(VENV)  ## 100,000 files that are nearly right; SEED=2 makes others
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/fuzz.py --cases $(CASES) --seed $(SEED)

bench: $(VENV)
	$(BIN)/python benchmarks/run.py

bench-export: $(VENV)  ## exports a full-size transformer; needs 34 GB of disk for a few minutes
	$(BIN)/python benchmarks/export.py

gpu: $(VENV)  ## what an NVIDIA GPU says of this project, in a report; under eight minutes
	$(BIN)/python benchmarks/first_contact.py

clean:
	rm -rf .venv bundles output fuzz-failures build dist *.egg-info $(EMBEDDED)
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

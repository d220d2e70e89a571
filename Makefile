# `make demo` runs everything; `make check` is what CI runs. The environment is made from requirements.lock.
# The newest Python that runs and can make an environment; a name on the path may be a shim that does neither.
PYTHONS := python3.13 python3.12 python3.11
PYTHON ?= $(or $(shell for p in $(PYTHONS); do $$p -c 'import ensurepip' 2>/dev/null && echo $$p && break; done),\
	$(error PYTHON: none of $(PYTHONS) runs here with venv. Fix: install one, or type make PYTHON=/path/to/python3.12))
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: demo test check nightly chaos bench ablate evaluate-seeds lock clean

demo: $(VENV)/.stamp
	dvc repro
	crescendo promote --allow-candidate
	@printf '\n%s\n' 'Look at:'
	@printf '  %s\n' \
		'reports/evaluation/index.html    samples, metrics, copies, the verdict' \
		'reports/data_docs/index.html     what validation found in the data'
	@printf '%s\n' 'Type next:'
	@printf '  %s\n' \
		'. $(BIN)/activate' \
		'crescendo generate "grinning face" --num 16 --out grid.png' \
		'dvc metrics show' \
		'dvc exp run -S refine.anchor=2.0 && dvc metrics diff' \
		'mlflow ui --backend-store-uri sqlite:///mlflow.db'

# The quick loop, without tests that take more than five seconds: python -m pytest -m "not slow"
test: $(VENV)/.stamp
	python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.stamp
	ruff check .
	ruff format --check .
	mypy pipeline
	$(MAKE) test

# What takes too long for every run: ten thousand damaged images, and as many requests.
nightly: $(VENV)/.stamp
	CRESCENDO_MUTANTS=10000 python -m pytest tests/prepare/test_hostile_images.py
	CRESCENDO_REQUESTS=10000 python -m pytest tests/serving/test_fuzz.py

# Races, crashes, tampering, bad requests and kills, in batches with a seed each; some hours. What is done stays done, and
# docs/reliability.md has what was found. On PostgreSQL, too, where Debian's packages are installed.
chaos: $(VENV)/.stamp
	python -m benchmarks.chaos

# Tables of the benchmarks that take minutes; benchmarks/README.md names the others. Needs what `make demo` makes.
bench: $(VENV)/.stamp
	python -m benchmarks.data --images 64 --repeats 2
	python -m benchmarks.train --only parameters --dtype bfloat16 --repeats 3 --seconds 1
	python -m benchmarks.scale --presets small --top 512 --seconds 0
	python -m benchmarks.upscale --limit 32

# What each part of the core is worth, and growing it, into docs/ablations.md; some hours. What is done stays done.
ablate: $(VENV)/.stamp
	dvc repro prepare
	cd benchmarks/ablations && dvc repro
	python -m benchmarks.ablations.growth
	python -m benchmarks.ablations.table

# How much the verdict depends on the seed of training: refine and evaluate three times. Needs what `make demo` makes.
evaluate-seeds: $(VENV)/.stamp
	python -m benchmarks.seeds --seeds 3 --write

# Several steps: the locked pip first, as that of an old Python refuses the lock file; pip cannot check hashes of an
# editable install. pip would compile on one core, and take as long for that as for the rest. compileall fails for the
# few files that packages ship for other Pythons, as pip does, in silence.
$(VENV)/.locked: requirements.lock
	$(PYTHON) -m venv $(VENV)
	awk '/^[^ ]/ { pip = /^pip==/ } pip' requirements.lock | \
		$(BIN)/python -m pip install --quiet --require-hashes -r /dev/stdin
	$(BIN)/python -m pip install --quiet --no-compile --require-hashes -r requirements.lock
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

$(VENV)/.stamp: $(VENV)/.locked pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Pins everything below pyproject.toml's ranges, for all supported Pythons, with hashes and without index lines.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	.venv-lock/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links -o requirements.lock
	rm -rf .venv-lock

# Working state, unfinished runs included, caches and the environment; results (data, models, reports) and the tracking
# store stay. What nothing needs, and no more, goes with `crescendo clean`.
clean:
	rm -rf .venv .venv-* runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find pipeline stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

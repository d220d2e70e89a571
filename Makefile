# `make demo` runs everything; `make check` is what CI runs. The environment is made from requirements.lock.
PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: demo test check nightly ablate lock clean

demo: .venv/.stamp
	dvc repro
	crescendo promote --allow-candidate
	@printf '\n%s\n' 'Look at:'
	@printf '  %s\n' \
		'reports/evaluation/index.html    samples, metrics, copies, the verdict' \
		'reports/data_docs/index.html     what validation found in the data'
	@printf '%s\n' 'Type next:'
	@printf '  %s\n' \
		'. .venv/bin/activate' \
		'crescendo generate "grinning face" --num 16 --steps 4 --out grid.png' \
		'dvc metrics show' \
		'dvc exp run -S refine.anchor=2.0 && dvc metrics diff' \
		'mlflow ui --backend-store-uri sqlite:///mlflow.db'

test: .venv/.stamp
	python -m pytest

check: .venv/.stamp
	ruff check .
	ruff format --check .
	mypy pipeline
	$(MAKE) test

# What takes too long for every run: ten thousand damaged images.
nightly: .venv/.stamp
	CRESCENDO_MUTANTS=10000 python -m pytest tests/data/test_hostile_images.py

# What each part of the core is worth, and growing it, into docs/ablations.md; some hours. What is done stays done.
ablate: .venv/.stamp
	dvc repro prepare
	cd benchmarks/ablations && dvc repro
	python -m benchmarks.ablations.growth
	python -m benchmarks.ablations.table

# Two steps: pip cannot check hashes of an editable install.
.venv/.stamp: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Pins everything below pyproject.toml's ranges, with hashes and without index lines.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	.venv-lock/bin/uv pip compile pyproject.toml --all-extras --python-version 3.11 --generate-hashes \
		--no-annotate --no-header --no-emit-index-url --no-emit-find-links -o requirements.lock
	rm -rf .venv-lock

# Working state, caches and the environment; results (data, models, reports) and the tracking store stay.
clean:
	rm -rf .venv .venv-lock runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find pipeline stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything here sets itself up: the first target that needs it creates .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := demo-run

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help demo test test-slow lint format families clean
help:
	@echo "make demo       the whole path, offline, on a small model and the standard library's own documentation"
	@echo "make test       linters, types and the default test suite"
	@echo "make test-slow  the tests that take minutes"
	@echo "make format     format the code"
	@echo "make families   write the README's matrix of families anew"

# torch first and pinned: an open range would bring the registry's newest CUDA build.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo/text.py $(RUN)/text
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(BIN)/minitron-hf run examples/demo/recipe.yaml --set output_dir=$(RUN)/student

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

families: $(VENV)/installed
	$(BIN)/python -m minitron_hf.survey.matrix README.md

clean:
	rm -rf $(VENV) $(RUN) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

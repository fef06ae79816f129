# Everything here sets itself up: the first target that needs it creates .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := demo-run

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help demo test test-slow ranges lint format families survey reference docs dist clean
help:
	@echo "make demo       the whole path, offline, on a small model and the standard library's own documentation"
	@echo "make test       linters, types and the default test suite"
	@echo "make test-slow  the tests that take minutes"
	@echo "make ranges     a minute of tests with the oldest and the newest dependencies; Transformers 4.57 reads students"
	@echo "make format     format the code"
	@echo "make families   write the matrix of families in docs/families.md anew"
	@echo "make survey     what changed in the installed libraries since the tables were checked; CI can run it every week"
	@echo "make reference  write the reference of recipe and command line in docs/reference anew"
	@echo "make docs       build the documentation, warnings as errors, into docs/_build/html"
	@echo "make dist       build wheel and source archive, check them, try the wheel in a clean environment"

# torch first and pinned: an open range would bring the registry's newest CUDA build.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,quantize]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo/text.py $(RUN)/text
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(BIN)/minitron-hf run examples/demo/recipe.yaml --set output_dir=$(RUN)/student

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests of a file share a worker, and so its models. By default, files of few and long tests would come last.
test: lint
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow and not gpu"

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

ranges:
	$(PYTHON) tests/ranges.py

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

families: $(VENV)/installed
	$(BIN)/python -m minitron_hf.survey.matrix docs/families.md

survey: $(VENV)/installed
	$(BIN)/python -m minitron_hf.survey.changes tools/survey.json

reference: $(VENV)/installed
	$(BIN)/python docs/generate.py

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

dist: $(VENV)/installed
	rm -rf dist build/dist-check
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/dist-check
	build/dist-check/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	build/dist-check/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && dist-check/bin/python ../tools/smoke_test.py

clean:
	rm -rf $(VENV) .ranges $(RUN) build dist docs/_build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

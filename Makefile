# make search   set up everything, run the laptop campaign, export the winner (15 minutes on two cores)
# make test     set up everything, then lint, types, imports, tests, kernels interpreted, the documentation's examples
# make kernels  compile every kernel for every target, without a GPU, under both Triton versions (Linux)
# make oracle   compare with fla-core's recurrences and transformers' models, each in an environment of its own (Linux)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := runs/laptop
OLDER  := .venv-triton36
OLDER_CASES ?= --once
ORACLE := .venv-oracle
HF     := .venv-transformers

# What Python compiles it keeps, also where the environment says otherwise: some hundred processes load torch.
export PYTHONDONTWRITEBYTECODE :=

PYTEST := $(BIN)/python -m pytest
# Two steps of one process each beside one another, where make can keep what they print apart.
BESIDE := --no-print-directory $(if $(filter output-sync,$(.FEATURES)),--jobs 2 --output-sync=target)
# `make test BESIDE_TOO="older oracle"` does these among them, so that no core waits for the last of either lot.
BESIDE_TOO ?=
STEPS  := lint types imports examples tests interpreted compiled older fla transformers

.PHONY: search test kernels oracle setup bench clean $(STEPS)

search: $(VENV)/.ready
	$(BIN)/mixforge search examples/laptop.toml
	$(BIN)/mixforge report laptop $(RUN)/report.html --picture $(RUN)/front.svg
	rm -rf $(RUN)/winner
	$(BIN)/mixforge export best $(RUN)/winner --campaign laptop
	$(BIN)/python $(RUN)/winner/model.py --prompt "def "

test: $(VENV)/.ready-dev
	$(MAKE) $(BESIDE) lint imports examples interpreted $(BESIDE_TOO) types
	$(MAKE) --no-print-directory tests

kernels: older compiled

oracle: fla transformers

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

imports: $(VENV)/.ready-dev
	$(BIN)/lint-imports

tests: $(VENV)/.ready-dev
	$(PYTEST) -n 2 --dist worksteal --ignore tests/test_docs.py

# Where there is no Triton nothing is collected, which is status 5.
interpreted: $(VENV)/.ready-dev
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/interpreted || \
	  { [ $$? -eq 5 ] && ! $(BIN)/python -c 'import triton' 2> /dev/null; }

# One page after the other, for they tell of one campaign.
examples: $(VENV)/.ready-dev
	$(PYTEST) tests/test_docs.py

compiled: $(VENV)/.ready-dev
	$(BIN)/python -m mixforge.kernels.ahead_of_time

# Each kernel once for every target; in all cases with OLDER_CASES empty, which takes as long as `make compiled`.
older: $(VENV)/.ready-dev $(OLDER)/.ready
	$(OLDER)/bin/python -m mixforge.kernels.ahead_of_time $(OLDER_CASES)
	TRITON_INTERPRET=1 $(OLDER)/bin/python -m pytest tests/kernels/interpreted -k 13 \
	  -W 'ignore:Conversion of an array with ndim:DeprecationWarning'

fla: $(VENV)/.ready-dev $(ORACLE)/.ready
	$(ORACLE)/bin/python -m pytest tests/oracle
	TRITON_INTERPRET=1 $(ORACLE)/bin/python -m pytest tests/oracle

transformers: $(VENV)/.ready-dev $(HF)/.ready
	$(HF)/bin/python -m pytest tests/oracle_transformers

bench: $(VENV)/.ready-dev
	# Status 2: what it measures is not here, such as a GPU.
	for file in benchmarks/*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$file || [ $$? -eq 2 ] || exit 1; done
	# Once more where `make oracle` has brought transformers and fla-core.
	[ ! -x $(ORACLE)/bin/python ] || $(ORACLE)/bin/python benchmarks/traffic.py
	[ ! -x $(HF)/bin/python ] || OMP_NUM_THREADS=1 $(HF)/bin/python benchmarks/presets.py

setup: $(VENV)/.ready

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Mixforge needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.ready-dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.ready

# An environment with a few packages of its own, that finds all others in the main one.
define layer
	$(BIN)/python -m venv --without-pip --clear $(1)
	$(BIN)/python -m pip --python $(1)/bin/python install --quiet --no-compile --no-deps $(2)
	$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	  > "$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/layer.pth"
	@touch $(1)/.ready
endef

$(OLDER)/.ready: tests/kernels/triton36.txt | $(BIN)/python
	$(call layer,$(OLDER),--requirement tests/kernels/triton36.txt)

$(ORACLE)/.ready: tests/oracle/requirements.txt | $(BIN)/python
	$(call layer,$(ORACLE),--requirement tests/oracle/requirements.txt)

$(HF)/.ready: tests/oracle_transformers/requirements.txt | $(BIN)/python
	$(call layer,$(HF),--requirement tests/oracle_transformers/requirements.txt)

clean:
	rm -rf $(VENV) $(OLDER) $(ORACLE) $(HF) runs build *.egg-info

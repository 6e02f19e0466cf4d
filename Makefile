# make search   set up everything, run the laptop campaign, export the winner (15 minutes on two cores)
# make test     set up everything, then lint, types, imports, tests and the documentation's examples
# make kernels  compile every kernel for every target, without a GPU, under both Triton versions (Linux)
# make oracle   compare with fla-core's recurrences and transformers' models, each in an environment of its own (Linux)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := runs/laptop
OLDER  := .venv-triton36
ORACLE := .venv-oracle
HF     := .venv-transformers

.PHONY: search test kernels oracle setup bench clean

search: $(VENV)/.ready
	$(BIN)/mixforge search examples/laptop.toml
	$(BIN)/mixforge report laptop $(RUN)/report.html --picture $(RUN)/front.svg
	rm -rf $(RUN)/winner
	$(BIN)/mixforge export best $(RUN)/winner --campaign laptop
	$(BIN)/python $(RUN)/winner/model.py --prompt "def "

test: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile

kernels: $(VENV)/.ready-dev $(OLDER)/.ready
	$(BIN)/python -m mixforge.kernels.ahead_of_time
	$(OLDER)/bin/python -m mixforge.kernels.ahead_of_time --targets sm_90 --only delta
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(OLDER)/bin/python -m pytest tests/kernels/interpreted -k 13 \
	  -W 'ignore:Conversion of an array with ndim:DeprecationWarning'

oracle: $(VENV)/.ready-dev $(ORACLE)/.ready $(HF)/.ready
	$(ORACLE)/bin/python -m pytest tests/oracle
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(ORACLE)/bin/python -m pytest tests/oracle
	$(HF)/bin/python -m pytest -n 2 tests/oracle_transformers

bench: $(VENV)/.ready-dev
	# Status 2: what it measures is not here, such as a GPU.
	for file in benchmarks/*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$file || [ $$? -eq 2 ] || exit 1; done
	# Once more where `make oracle` has brought transformers.
	[ ! -x $(HF)/bin/python ] || OMP_NUM_THREADS=1 $(HF)/bin/python benchmarks/presets.py

setup: $(VENV)/.ready

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Mixforge needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.ready-dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.ready

# An environment with a few packages of its own, that finds all others in the main one.
define layer
	$(BIN)/python -m venv --clear $(1)
	$(1)/bin/python -m pip install --quiet --no-deps $(2)
	$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	  > "$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/layer.pth"
	@touch $(1)/.ready
endef

$(OLDER)/.ready: tests/kernels/triton36.txt | $(VENV)/.ready-dev
	$(call layer,$(OLDER),--requirement tests/kernels/triton36.txt)

$(ORACLE)/.ready: tests/oracle/requirements.txt | $(VENV)/.ready-dev
	$(call layer,$(ORACLE),--requirement tests/oracle/requirements.txt)

$(HF)/.ready: tests/oracle_transformers/requirements.txt | $(VENV)/.ready-dev
	$(call layer,$(HF),--requirement tests/oracle_transformers/requirements.txt)

clean:
	rm -rf $(VENV) $(OLDER) $(ORACLE) $(HF) runs build *.egg-info

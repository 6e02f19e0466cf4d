# make search   set up everything, run the laptop campaign, export the winner (15 minutes on two cores)
# make test     set up everything, then lint, types, imports, tests and the documentation's examples
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := runs/laptop

.PHONY: search test setup bench clean

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

bench: $(VENV)/.ready-dev
	for file in benchmarks/*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$file || exit 1; done

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

clean:
	rm -rf $(VENV) runs build *.egg-info

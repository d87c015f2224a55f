# Every target sets up what it needs: a virtual environment in .venv with the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RESULTS ?= benchmarks/results

.PHONY: setup demo test lint bench gpu clean

setup: $(READY)

$(READY): setup.py constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("genkd needs Python 3.10 or newer, $(PYTHON) is %d.%d; use make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -U "pip>=23.1"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[test]"
	@touch $@

demo: $(READY)
	$(BIN)/genkd demo

test: $(READY)
	@# A worker a core, but no more than four: many tests start processes of their own.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal --durations 15 \
	  -m "not gpu and not slow and not multihost"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy does not follow the editable install's mapping of the root to genkd, so it gets a link of that name.
	@mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/genkd
	MYPYPATH=$(VENV)/typing $(BIN)/mypy -p genkd

bench: $(READY)
	@mkdir -p $(RESULTS)
	for what in loader shard train kernels detect scaling; do $(BIN)/genkd bench $$what --out $(RESULTS)/bench-$$what.json || exit 1; done

# On a machine whose Python already has everything: make gpu PYTHON=python3. Results go to $OUT where that is set.
gpu:
	$(PYTHON) -m pytest -q -m gpu
	@where=$${OUT:-$(RESULTS)}; mkdir -p $$where; \
	name=$$($(PYTHON) -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') && \
	for what in loader shard train kernels detect scaling; do $(PYTHON) -m genkd bench $$what --out $$where/$$name-$$what.json || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Every target sets up what it needs: a virtual environment in .venv with the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RESULTS ?= benchmarks/results

# Without bytecode each of the processes that tests start would compile genkd anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q
# A worker a core, but no more than four, as many tests start processes of their own. A file stays with one worker, as
# its fixtures do, and the longest files come first.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
EVERY_CHANGE := not gpu and not slow and not multihost

.PHONY: setup demo test test-slow test-changed lint bench gpu clean

setup: $(READY)

$(READY): setup.py constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("genkd needs Python 3.10 or newer, $(PYTHON) is %d.%d; use make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -U "pip>=23.1"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[test]"
	@touch $@

demo: $(READY)
	$(BIN)/genkd demo

# What every change has to pass. OPTIONS="--shuffle-files 7": in another order.
test: $(READY)
	$(PYTEST) $(PARALLEL) --durations 15 -m "$(EVERY_CHANGE)" $(OPTIONS)

# The rest: soaks, fuzzing, longer variants; then, one after the other, what makes hosts of this machine, as root.
test-slow: $(READY)
	$(PYTEST) $(PARALLEL) --durations 30 -m "slow and not gpu and not multihost" $(OPTIONS)
	$(PYTEST) --durations 10 -m "multihost" $(OPTIONS)

# What a change since the last such run can break, by the code that each test ran in its own process; the first run is
# of all and writes .testmondata.
test-changed: $(READY)
	$(PYTEST) $(PARALLEL) --testmon --testmon-forceselect -m "$(EVERY_CHANGE)" $(OPTIONS)

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
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .testmondata*

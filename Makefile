PYTHON ?= python3
BIN := .venv/bin
SUITE := -m pytest -m "not slow" --numprocesses 2 --dist loadfile

.PHONY: install tools test test-slow test-oldest test-newest survival sharded fuzz lint demo docs site-test speed clean

# the package and what the demo needs
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

# and the tools of tests, pages and experiments
tools: .venv/tools

.venv/tools: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# in each of the two processes
test test-oldest test-newest: export OMP_NUM_THREADS = 1

test: tools lint
	$(BIN)/python $(SUITE)

test-slow: tools
	$(BIN)/python -m pytest -m slow

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python $(SUITE) -W default  # old versions warn of one another

test-newest: .venv-newest/installed
	.venv-newest/bin/python $(SUITE)

.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[dev]'
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	touch $@

survival: tools
	$(BIN)/python -m pytest tests/hard/test_survival.py tests/test_lightning_features.py tests/test_strangers.py \
		tests/test_zoo.py --tables benchmarks/results

sharded: tools
	$(BIN)/python -m pytest tests/test_sharded.py -k all_processes_end --tables benchmarks/results

fuzz: tools
	FUZZ=1 $(BIN)/python -m pytest tests/test_fuzz.py --tables benchmarks/results

lint: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: install
	$(BIN)/tying demo

docs: tools
	rm -rf build/doctrees build/site
	$(BIN)/python -m sphinx --fail-on-warning --quiet --jobs 2 --conf-dir docs --doctree-dir build/doctrees . build/site

site-test: docs
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser]'
	$(BIN)/python -m pytest tests/site_in_browser.py

speed: tools
	$(BIN)/python -m benchmarks speed

clean:
	rm -rf .venv runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

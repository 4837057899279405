PYTHON ?= python3
BIN := .venv/bin
SUITE := -m pytest -m "not slow" --numprocesses 2 --dist loadfile

.PHONY: install test test-slow test-oldest test-newest survival fuzz lint demo docs speed clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# in each of the two processes
test test-oldest test-newest: export OMP_NUM_THREADS = 1

test: install lint
	$(BIN)/python $(SUITE)

test-slow: install
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

survival: install
	$(BIN)/python -m pytest tests/hard/test_survival.py tests/test_lightning_features.py tests/test_strangers.py \
		tests/test_zoo.py --tables benchmarks/results

fuzz: install
	FUZZ=1 $(BIN)/python -m pytest tests/test_fuzz.py --tables benchmarks/results

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: install
	$(BIN)/tying demo

docs: install
	rm -rf build/pages build/site
	mkdir -p build/pages/benchmarks
	cp -r README.md CHANGELOG.md LICENSE docs configs build/pages
	cp -r benchmarks/*.md benchmarks/results benchmarks/suites build/pages/benchmarks
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # the theme's notice is no warning of these pages

speed: install
	$(BIN)/python -m benchmarks speed

clean:
	rm -rf .venv runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

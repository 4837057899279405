PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test test-slow survival lint demo speed clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: install lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

survival: install
	$(BIN)/python -m pytest tests/hard/test_survival.py --survival benchmarks/results/survival.md

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: install
	$(BIN)/python -W ignore -m benchmarks demo

speed: install
	$(BIN)/python -m benchmarks speed

clean:
	rm -rf .venv runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # reference.py, toys.py
sys.path.insert(0, str(Path(__file__).parent / "hard"))  # survival.py


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--survival", metavar="FILE", help="write the table of what shared weights survive to this file")


def pytest_configure(config):
    if config.getoption("--survival"):
        config.pluginmanager.register(Survival(Path(config.getoption("--survival"))))


class Survival:
    """Collects the cells of the survival table, and writes it."""

    def __init__(self, path):
        self.path, self.cells = path, {}

    def pytest_runtest_logreport(self, report):
        told = dict(report.user_properties)
        if report.when == "call" and "survival" in told:
            row, column = told["survival"]
            self.cells.setdefault(column, {})[row] = told["remark"] if report.passed else "**no**"

    def pytest_sessionfinish(self):
        from benchmarks.report import table, write

        rows = list(dict.fromkeys(row for cells in self.cells.values() for row in cells))
        lines = [[column, *(cells.get(row, "not run") for row in rows)] for column, cells in self.cells.items()]
        write(self.path, table(["", *rows], lines) + "\n\nCommand: `make survival`.\n")

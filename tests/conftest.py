import gc
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # reference.py, toys.py
sys.path.insert(0, str(Path(__file__).parent / "hard"))  # survival.py


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # plots go to the current folder where there is no logger


@cache
def _decoded_sample():
    return sys.modules["tying.data.sample"].load_sample()


@pytest.fixture(autouse=True)
def _sample_is_decoded_once(monkeypatch):
    """Decoding the embedded sample is a third of a short fit; every data module gets a copy of its own."""
    if module := sys.modules.get("tying.data.cifar10"):  # only where a test has imported Lightning anyhow
        monkeypatch.setattr(
            module,
            "load_sample",
            lambda: {split: (images.clone(), labels.clone()) for split, (images, labels) in _decoded_sample().items()},
        )


def pytest_addoption(parser):
    parser.addoption("--tables", metavar="FOLDER", help="write the tables whose cells are tests to this folder")


def pytest_configure(config):
    if config.getoption("--tables"):
        config.pluginmanager.register(Tables(Path(config.getoption("--tables"))))


MAKES = {
    "sharded": "sharded",
    **dict.fromkeys(["survival", "lightning_features", "strangers", "zoo"], "survival"),
    "fuzz": "fuzz",
}


class Tables:
    """Collects the cells of tables whose cells are tests, and writes them."""

    def __init__(self, folder):
        self.folder, self.tables, self.failed = folder, {}, set()

    def pytest_runtest_logreport(self, report):
        self.failed |= {report.nodeid} if report.failed else set()
        told = dict(report.user_properties)
        if report.when == "teardown" and "cell" in told:
            name, column, row = told["cell"]
            cells = self.tables.setdefault(name, {}).setdefault(row, {})
            remark = "**no**" if report.nodeid in self.failed else told.get("remark", "yes")
            cells.setdefault(column, {})[remark] = None  # several tests may be of one cell

    def pytest_sessionfinish(self):
        from benchmarks.report import table, write

        for name, rows in self.tables.items():
            columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
            lines = [
                [row, *(", ".join(cells.get(column, ["not run"])) for column in columns)] for row, cells in rows.items()
            ]
            write(self.folder / f"{name}.md", table(["", *columns], lines) + f"\n\nCommand: `make {MAKES[name]}`.\n")


def pytest_collection_finish():
    """Exempt what the collection made from garbage collection, which else takes most of the time of some tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # libraries in C++ report what is not collected at exit

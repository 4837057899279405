"""All kept runs in one table."""

import shutil
import tarfile
from importlib import util

import pandas as pd
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import evidence, report
from benchmarks.rows import final, read_rows

KEPT = report.RESULTS
SUITES = ("autoencoder", "clustering@mnist", "sentence")  # runs of a fit, with an axis of words, and of a program


@pytest.fixture(autouse=True)
def _few(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for suite in SUITES:
        shutil.copy(KEPT / "runs" / f"{suite}.tar.xz", tmp_path / "runs")
    monkeypatch.setattr(report, "RESULTS", tmp_path)


def of(suite, rows):
    return rows[rows["suite"] == suite].rename(columns={"setting": "run"})


def test_every_epoch_of_every_run_is_exported(tmp_path, capsys):
    path = tmp_path / "all.csv"
    assert benchmarks.main(["export", str(path)]) == 0
    kept = []
    for suite in SUITES:
        with tarfile.open(KEPT / "runs" / f"{suite}.tar.xz") as tar:
            files = {name: tar.extractfile(name).read() for name in tar.getnames()}
        kept.append({name: text.decode() for name, text in files.items() if name.endswith("metrics.csv")})
    assert capsys.readouterr().out == f"{sum(map(len, kept))} runs written to {path}\n"
    rows = read_rows(path)
    for suite, epochs in zip(SUITES, kept, strict=True):
        exported = of(suite, rows)
        assert len(exported) == sum(len(text.splitlines()) - 1 for text in epochs.values())
        table = read_rows(KEPT / f"{suite}.csv")
        pd.testing.assert_frame_equal(final(exported)[table.columns].reset_index(drop=True), table)
    assert {*of("clustering@mnist", rows)["init"].dropna()} == {"linear", "density", "forgy"}
    assert rows[["hardware", "threads", "version of torch", "version of Python"]].notna().all(axis=None)


def test_parquet_holds_the_same_as_numbers(tmp_path):
    for kind in ("csv", "parquet"):
        assert evidence.export(tmp_path / f"all.{kind}") > 0
    text, numbers = read_rows(tmp_path / "all.csv"), pd.read_parquet(tmp_path / "all.parquet")
    assert [*text] == [*numbers]
    assert numbers["test/accuracy"].dropna().tolist() == [float(value) for value in text["test/accuracy"].dropna()]
    words = {name for name in numbers if numbers[name].dtype != float}
    assert words == {"suite", "setting", "init", "hardware", *(name for name in text if name.startswith("version of "))}


def test_files_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    assert benchmarks.main(["export", "all.txt"]) == 2
    assert "cannot write all.txt: name a file that ends in .csv or .parquet" in capsys.readouterr().err
    monkeypatch.setattr(evidence, "find_spec", lambda name: None if name == "pyarrow" else util.find_spec(name))
    assert benchmarks.main(["export", "all.parquet"]) == 2
    assert "all.parquet needs pyarrow: pip install pyarrow, or write all.csv" in capsys.readouterr().err
    assert [*tmp_path.glob("all*")] == []

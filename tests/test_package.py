"""What is shipped: the archives."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tying import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [wheel], [source] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def test_the_wheel_trains_anywhere(archives, tmp_path):
    """``tying fit`` on the embedded sample, without the repository."""
    with zipfile.ZipFile(archives[0]) as wheel:
        wheel.extractall(tmp_path / "installed")
    code = "import tying, sys; from tying.cli import main; print(tying.__file__); main(sys.argv[1:])"
    options = [
        "--config=configs/base.yaml",
        "--config=configs/stochastic_depth.yaml",
        "--model.network.depth=8",
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1",
        "--trainer.callbacks+=tying.callbacks.HardTying",
        "--trainer.callbacks.ties=['network.layer1.*.branch.conv*.weight']",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "fit", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(str(tmp_path / "installed"))
    assert [*tmp_path.glob("runs/stochastic_depth/version_0/checkpoints/*.ckpt")]


def test_the_wheel_holds_every_configuration(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        packaged = {Path(name).name: wheel.read(name) for name in wheel.namelist() if name.startswith("tying/configs/")}
        shipped = {*wheel.namelist()}
    assert packaged == {path.name: path.read_bytes() for path in (ROOT / "configs").iterdir()}
    assert {"tying/cli/demo.py", "tying/data/cifar10_sample.tar.xz", "tying/data/SAMPLE.md"} <= shipped


def test_the_source_archive_holds_what_its_tests_need(archives):
    with tarfile.open(archives[1]) as source:
        names = {name.removeprefix(f"tying-{__version__}/") for name in source.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert tracked  # by git
    assert {*tracked} - names == set()

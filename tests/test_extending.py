"""What docs/extending.md adds, in at most 15 lines each, is used from YAML."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
ADDED, [CONFIG] = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("python", "yaml"))
OPTIONS = ["--config=configs/base.yaml", "--config=own.yaml", "--model.network.depth=8"]
SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.py").write_text("\n\n".join(ADDED))
    (tmp_path / "own.yaml").write_text(CONFIG)

    def run(subcommand, *arguments):
        command = [sys.executable, "-W", "ignore", "-m", "tying", subcommand, *OPTIONS, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_each_takes_at_most_fifteen_lines():
    assert [re.findall(r"class \w+\((\w+)", code)[-1] for code in ADDED] == [
        "Hash",
        "Penalty",
        "Merge",
        "ModelTransform",
        "PenaltyCallback",
    ]
    assert all(len(code.splitlines()) <= 15 for code in ADDED)


def test_a_hash_of_the_former_signature():
    former = ADDED[0].replace("table_size):", "table_size, drawn=None):")
    assert former != ADDED[0]
    exec(ADDED[0], now := {"__name__": "now"})
    exec(former, before := {"__name__": "before"})
    indices = [scope["Diagonal"]().index(count=40, table_size=7) for scope in (now, before)]
    assert torch.equal(*indices)


def test_inspect_shows_them(run):
    shown = run("inspect")
    assert "table of 231" in shown
    assert "SymmetricWeights" in shown


def test_training_uses_them(run, tmp_path):
    run("fit", *SMALL)
    [metrics] = tmp_path.rglob("metrics.csv")
    assert {"tying/SoftTying/penalty", "tying/PullToOne/penalty"} <= {*metrics.read_text().splitlines()[0].split(",")}
    [checkpoint] = tmp_path.rglob("*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    originals = [weight for name, weight in weights.items() if name.endswith("parametrizations.weight.original")]
    assert [weight.shape[0] for weight in originals if weight.ndim == 4] == [64, 64]

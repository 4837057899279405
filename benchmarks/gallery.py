"""The pictures of docs/gallery.md, in a few minutes: diagrams, and what callbacks and commands draw on the sample."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.diagrams import DIAGRAMS
from benchmarks.report import ROOT
from tying.errors import ConfigurationError, listed, nearest
from tying.files import save_figure

FOLDER = ROOT / "docs" / "gallery"
SHORT = {"SMALL": "--model.network.init_args.width=0.25 --model.lr=0.1", "SHORT": "--trainer.max_epochs=4"}
PICTURES = {  # the commands of `tying` that draw each, in turn, all on top of configs/base.yaml
    "tying_gap": ["fit --config=configs/soft.yaml {SMALL} {SHORT}"],
    "importance": ["fit --config=configs/ewc.yaml --trainer.max_epochs=2"],
    "mixture_end": [
        "fit --config=configs/mixture.yaml --model.network.init_args.sizes=[3072,64,10] --model.channels_last=false "
        "--trainer.max_epochs=12 --trainer.callbacks.start_epoch=4"
    ],
    "hash_loads": ["fit --config=configs/hashing.yaml {SMALL} --trainer.max_epochs=1 --trainer.limit_train_batches=2"],
    "layer_similarity": ["fit --config=configs/templates.yaml {SMALL} {SHORT}"],
    "unrolling": [
        "fit --config=configs/recurrent.yaml {SMALL} {SHORT}",
        "test --config=configs/recurrent.yaml {SMALL} --ckpt_path=last",
    ],
    "boundaries": [
        "fit --config=configs/hm_rnn.yaml --trainer.max_epochs=1 --trainer.limit_train_batches=300",
        "test --config=configs/hm_rnn.yaml --ckpt_path=last --trainer.limit_test_batches=4",
    ],
    "advice": ["fit {SMALL} {SHORT}", "advise {SMALL} --ckpt_path=last --budget=0.7 --batches=2 --out=runs"],
}
NAMES = (*DIAGRAMS, *PICTURES)


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Draw one of :data:`PICTURES` or of the diagrams; return its file.

    Args:
        name: name of the picture.
        folder: where to write it.

    Raises:
        ConfigurationError: there is no such picture, a command fails, or it draws no picture of this name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if name in DIAGRAMS:
        save_figure(DIAGRAMS[name](), folder / f"{name}.png")
        return folder / f"{name}.png"
    if name not in PICTURES:
        raise ConfigurationError(f"unknown picture {name!r}: there is {listed(NAMES, 20)}.{nearest(name, NAMES)}")
    with tempfile.TemporaryDirectory() as out:
        for line in PICTURES[name]:
            subcommand, *options = line.format(**SHORT).split()
            command = [sys.executable, "-m", "tying", subcommand, "--config=configs/base.yaml", *options]
            done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ConfigurationError(f"{' '.join(command)} fails: {done.stderr[-2000:]}")
        drawn = [*Path(out).rglob(f"{name}.png")]
        if len(drawn) != 1:
            raise ConfigurationError(f"{len(drawn)} pictures are called {name}.png, not 1")
        return Path(shutil.copyfile(drawn[0], folder / f"{name}.png"))

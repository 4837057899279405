"""What the README shows and says is run here."""

import re
import shlex
import subprocess
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml

from benchmarks import __main__ as benchmarks
from benchmarks import evidence
from benchmarks.report import PAGES, RESULTS, paste
from tying.cli import main, parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("python", "yaml", "console")}

COMMANDS = "".join(BLOCKS["console"]).strip().splitlines()


@pytest.fixture(autouse=True)
def _beside_the_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")


def test_python_runs(monkeypatch):
    code, hard, hashed, fabric = BLOCKS["python"]
    trainer = pl.Trainer
    quick = {"limit_train_batches": 1, "limit_val_batches": 1, "enable_progress_bar": False, "log_every_n_steps": 1}
    quick |= {"logger": False, "enable_checkpointing": False}
    monkeypatch.setattr(pl, "Trainer", lambda **arguments: trainer(**arguments | quick))
    scope = {}
    exec(code, scope)
    assert float(scope["trainer"].callback_metrics["tying/penalty"]) > 0
    exec(hard, scope := {})
    exec(hashed, layers := {})
    assert layers["layer"].table.numel() == 400_000
    exec(fabric, loop := {})
    before = float(loop["penalty"]().detach())
    for _ in range(3):
        loop["optimizer"].zero_grad()
        loop["penalty"].add_gradients_(1.0)
        loop["optimizer"].step()
    assert float(loop["penalty"]().detach()) < 0.1 * before
    assert loop["network"].module.layer3[1].branch.conv2.weight is loop["network"].module.layer3[2].branch.conv2.weight
    assert scope["encoder"].layers[5].linear1.weight is scope["encoder"].layers[0].linear1.weight
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 10


def test_yaml_runs(tmp_path):
    text, more, anchored, hard, hashed, clustered, merged = BLOCKS["yaml"]
    (tmp_path / "merged.yaml").write_text(merged)
    main(["fit", "--config=configs/base.yaml", "--config=merged.yaml", "--model.network.depth=8", *SMALL])
    (tmp_path / "anchored.yaml").write_text(anchored)
    main(["fit", "--config=configs/base.yaml", "--config=anchored.yaml", "--model.network.depth=8", *SMALL])
    (tmp_path / "hard.yaml").write_text(hard)
    main(["fit", "--config=configs/base.yaml", "--config=hard.yaml", "--model=Autoencoder", *SMALL])
    (tmp_path / "hashed.yaml").write_text(hashed)
    (tmp_path / "clustered.yaml").write_text(clustered)
    main(["fit", "--config=configs/base.yaml", "--config=hashed.yaml", "--model.network.depth=8", *SMALL])
    twice = ["--trainer.max_epochs=2", "--model.network.depth=8"]
    main(["fit", "--config=configs/base.yaml", "--config=clustered.yaml", *SMALL, *twice])
    (tmp_path / "readme.yaml").write_text(text)
    main(["fit", "--config=configs/base.yaml", "--config=readme.yaml", "--model=Autoencoder", *SMALL])
    assert len(text.splitlines()) <= 6
    (tmp_path / "more.yaml").write_text("trainer:\n  callbacks+:\n" + more)
    main(["fit", "--config=configs/base.yaml", "--config=more.yaml", "--model=Autoencoder", *SMALL])


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("tying")])
def test_console_commands_run(command, capsys):
    _, *args = shlex.split(command)
    if "configs/transfer.yaml" in args:
        main(["fit", "--config=configs/base.yaml", "--config=configs/pretraining.yaml", *SMALL])
    if args[0] == "test":  # what was trained before
        main(["fit", *args[1:-2], *SMALL])
    deep = (
        []
        if any(word in command for word in ("autoencoder", "coupling", "fractal", "tied_lm", "hm_rnn", "hyper_lstm"))
        else ["--model.network.depth=20"]
    )
    extra = {"fit": [*SMALL, *deep], "test": ["--trainer.limit_test_batches=1"]}.get(args[0], [])
    if "--print_config" in args:
        with pytest.raises(SystemExit):
            main(args)
    else:
        main([*args, *extra])
    assert capsys.readouterr().out


def test_experiments_run(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    commands = [line for line in COMMANDS if not line.startswith("tying")]
    assert commands.pop() == "python -m benchmarks speed"  # run by tests/test_benchmarks.py
    for command in commands:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "benchmarks"]
        small = [*SMALL, "--trainer.limit_test_batches=1", "--trainer.precision=32-true"]
        if words[3:] == ["report"]:  # run by tests/test_benchmarks.py
            continue
        few = "--only=gradient,strength=0.01,*" if "--only" in words else "--only=*ed,*"  # one setting of ten
        extra = {"list": [], "run": [*small, few, "--seeds=1"], "report": []}
        assert benchmarks.main([*words[3:], *extra[words[3]]]) == 0
        assert "soft" in capsys.readouterr().out


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", README)) <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    dry = subprocess.run(["make", "--dry-run", "test", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pytest" in dry.stdout
    assert "benchmarks demo" in dry.stdout


def test_results_are_up_to_date():
    for page in PAGES:
        assert paste(page.read_text()) == page.read_text()
    assert (RESULTS / "README.md").read_text() == evidence.markdown()


def test_configs_compose():
    deltas = sorted(path.name for path in (ROOT / "configs").iterdir() if path.name != "base.yaml")
    for name in deltas:
        assert yaml.safe_load((ROOT / "configs" / name).read_text()).keys() <= {"trainer", "model", "data"}
    deltas.remove("two_domains.yaml")  # whose network is too shallow to share blocks
    deltas.remove("swapout.yaml")  # which asks for sampled tests, of networks with merges
    deltas.remove("transfer.yaml")  # which needs what pretraining.yaml leaves
    cli = parse([f"--config=configs/{name}" for name in ["base.yaml", *deltas]])
    assert cli.trainer.precision == "bf16-mixed"
    assert "tying.callbacks.SoftTying" in {f"tying.callbacks.{type(c).__name__}" for c in cli.trainer.callbacks}

"""The recipes run as they stand, on little data."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tying.callbacks import SoftTying
from tying.cli import main, parse

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
SCRIPTS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--model.network.depth=20",
]
QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # "disabled" would disable every logger of this process
ARGUMENTS = {
    "hydra_sweep.py": [
        "--multirun",
        *QUIET,
        "+trainer.callbacks.strength=1e-3,1e-2",
        *(f"+{word[2:]}" for word in SMALL),
    ],
    "optuna_search.py": SMALL,
}
OPTIONAL = {"ray_search.py": "ray", "quantise.py": "torchao"}  # too large, or too restless, for our own environment


def strengths(folder):
    configs = [yaml.safe_load(path.read_text()) for path in folder.glob("runs/soft/*/config.yaml")]
    return sorted(config["trainer"]["callbacks"][-1]["init_args"]["strength"] for config in configs)


def strength_of(run):
    [callback] = [callback for callback in run.trainer.callbacks if isinstance(callback, SoftTying)]
    return callback.strength


def test_every_block_of_python_is_run():
    assert len(SCRIPTS) == PAGE.count("```python")


@pytest.mark.filterwarnings(
    "ignore:Choices for a categorical", "ignore:.*experimental", "ignore:.is_gradient_checkpointing"
)
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in OPTIONAL])
def test_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(SCRIPTS[name])
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, [])])
    if name == "optuna_search.py":
        import optuna

        optimize = optuna.Study.optimize
        monkeypatch.setattr(optuna.Study, "optimize", lambda study, objective, n_trials: optimize(study, objective, 2))
        second = type("Second", (optuna.pruners.BasePruner,), {"prune": lambda self, study, trial: trial.number == 1})
        monkeypatch.setattr(optuna.pruners, "MedianPruner", second)
    scope = runpy.run_path(name, run_name="__main__")
    if name in ("hydra_sweep.py", "optuna_search.py"):
        assert len({*strengths(tmp_path)}) == 2
    if name == "optuna_search.py":
        assert [trial.state.name for trial in scope["study"].trials] == ["COMPLETE", "PRUNED"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONAL)
def test_recipe_of_an_optional_package(name, tmp_path):
    """In a process of its own: these packages change the settings of others."""
    if importlib.util.find_spec(OPTIONAL[name]) is None:
        pytest.skip(f"{OPTIONAL[name]} is not installed")
    (tmp_path / name).write_text(
        SCRIPTS[name].replace("num_samples=20", "num_samples=2").replace('"cpu": 2', '"cpu": 1')
    )
    command = [sys.executable, name, *SMALL] if name == "ray_search.py" else [sys.executable, name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert name == "quantise.py" or "{'strength': " in done.stdout


def test_the_shell_sweep():
    [script] = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run(["bash", "-c", f'tying() {{ echo "$@"; }}\n{script}'], capture_output=True, text=True)
    commands = [line.split() for line in done.stdout.splitlines()]
    assert [strength_of(parse(words[1:])) for words in commands] == [1e-4, 1e-3, 1e-2]


def test_the_sweep_of_weights_and_biases(monkeypatch, tmp_path):
    """The agent puts ``--name=value`` for each parameter in the place of ``${args}``."""
    [text] = [block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "sweep.yaml" in block]
    sweep = yaml.safe_load(text)
    arguments = [f"--{name}={space['max']}" for name, space in sweep["parameters"].items()]
    words = [word for entry in sweep["command"] for word in (arguments if entry == "${args}" else [entry])]
    assert words.pop(0) == "tying"
    words.remove("--trainer.logger=WandbLogger")  # needs an account
    monkeypatch.chdir(tmp_path)
    main([*words, *SMALL])
    assert strengths(tmp_path) == [0.1]
    assert sweep["metric"]["name"] == "val/accuracy"

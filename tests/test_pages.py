"""What the README and the pages of docs/ show and say is run here."""

import re
import shlex
import subprocess
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from zoo import ZOO, build, loss_of, output_of

from benchmarks import __main__ as benchmarks
from benchmarks import evidence, report
from tying.cli import main, parse

ROOT = Path(__file__).parents[1]
SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]


def blocks(text, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


PAGES = {page.stem: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
COMMANDS = [line for text in PAGES.values() for block in blocks(text, "console") for line in block.splitlines()]


@pytest.fixture(autouse=True)
def _beside_the_configs(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")


def test_the_first_example(monkeypatch):
    code = blocks(PAGES["README"], "python")[0]
    trainer = pl.Trainer
    quick = {"limit_train_batches": 1, "limit_val_batches": 1, "enable_progress_bar": False, "log_every_n_steps": 1}
    quick |= {"logger": False, "enable_checkpointing": False}
    monkeypatch.setattr(pl, "Trainer", lambda **arguments: trainer(**arguments | quick))
    exec(code, scope := {})
    assert float(scope["trainer"].callback_metrics["tying/penalty"]) > 0
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 10


def test_the_example_of_gpt2():
    exec(blocks(PAGES["README"], "python")[1], scope := {})
    model = build("GPT2")
    size = sum(weight.numel() for weight in model.parameters())
    for callback in scope["callbacks"]:
        callback.apply(model)
    loss_of(output_of(model, ZOO["GPT2"].inputs())).backward()
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert sum(weight.numel() for weight in model.parameters()) < 0.2 * size


@pytest.mark.parametrize(
    ("page", "code"),
    [(name, code) for name, text in PAGES.items() if name != "README" for code in blocks(text, "python")],
)
def test_python_runs(page, code):
    exec(code, scope := {"__name__": page})
    if "Model" in scope:
        model = scope["Model"]()
        model.configure_model()
        assert model.decoder[0].bias is model.decoder[1].bias
        assert len(model.configure_callbacks()) == 4
    if page == "compatibility" and "fabric" in scope:  # the loop pulls, and what is one stays one
        before = float(scope["penalty"]().detach())
        for _ in range(3):
            scope["optimizer"].zero_grad()
            scope["penalty"].add_gradients_(1.0)
            scope["optimizer"].step()
        assert float(scope["penalty"]().detach()) < 0.1 * before
        layer3 = scope["network"].module.layer3
        assert layer3[1].branch.conv2.weight is layer3[2].branch.conv2.weight


@pytest.mark.parametrize(
    ("page", "text"),
    [(name, block) for name, text in PAGES.items() if name != "extending" for block in blocks(text, "yaml")],
)
def test_yaml_runs(page, text, tmp_path):
    whole = text if text.startswith("trainer:") else "trainer:\n  callbacks+:\n" + text
    (tmp_path / "own.yaml").write_text(whole)
    model = "--model=Autoencoder" if "encoder." in text else "--model.network.depth=8"
    epochs = ["--trainer.max_epochs=2"] * ("start_epoch" in text)
    main(["fit", "--config=configs/base.yaml", "--config=own.yaml", model, *SMALL, *epochs])
    if page == "README":
        assert len(text.splitlines()) <= 6


def test_pages_link_to_what_there_is():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # a further task writes where the first did
@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("tying")])
def test_console_commands_run(command, capsys):
    _, *args = shlex.split(command)
    if "configs/transfer.yaml" in args:
        main(["fit", "--config=configs/base.yaml", "--config=configs/pretraining.yaml", *SMALL])
    if "callbacks.anchor" in command:
        main(["fit", "--config=configs/base.yaml", "--config=configs/ewc.yaml", *SMALL])
    if args[0] == "advise":
        small = ["--model.network.depth=20", "--data.batch_size=8"]
        main(["fit", "--config=configs/base.yaml", *SMALL, *small])
        args += [*small, "--batches=1"]
    if args[0] == "test":  # what was trained before
        main(["fit", *args[1:-2], *SMALL])
    deep = (
        []
        if any(
            word in command for word in ("autoencoder", "coupling", "fractal", "tied_lm", "hm_rnn", "hyper_lstm", "ewc")
        )
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
        few = "--only=gradient,strength=0.01,*" if "--only" in words else "--only=*ed,*"  # one setting of ten
        extra = {"list": [], "run": [*small, few, "--seeds=1"], "report": []}
        assert benchmarks.main([*words[3:], *extra[words[3]]]) == 0
        assert "soft" in capsys.readouterr().out


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {target for text in PAGES.values() for target in re.findall(r"`make ([a-z-]+)`", text)} <= {*targets}
    assert "`make test docs`" in PAGES["README"]
    assert "\nmake test docs\n" in (ROOT / ".ci" / "run").read_text()
    dry = subprocess.run(
        ["make", "--dry-run", "test", "docs", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pytest" in dry.stdout
    [building] = [line for line in dry.stdout.splitlines() if "sphinx" in line]
    assert "--fail-on-warning" in building
    assert "tying demo" in dry.stdout


def test_results_are_up_to_date():
    for page in report.PAGES:
        assert report.paste(page.read_text()) == page.read_text()
    assert (report.RESULTS / "README.md").read_text() == evidence.markdown()


def test_configs_compose():
    deltas = sorted(path.name for path in (ROOT / "configs").iterdir() if path.name != "base.yaml")
    for name in deltas:
        assert yaml.safe_load((ROOT / "configs" / name).read_text()).keys() <= {"trainer", "model", "data"}
    deltas.remove("two_domains.yaml")  # whose network is too shallow to share blocks
    deltas.remove("swapout.yaml")  # which asks for sampled tests, of networks with merges
    deltas.remove("transfer.yaml")  # which needs what pretraining.yaml leaves
    deltas.remove("ewc.yaml")  # whose network is an MLP, as that of synaptic.yaml
    deltas.remove("synaptic.yaml")
    cli = parse([f"--config=configs/{name}" for name in ["base.yaml", *deltas]])
    assert cli.trainer.precision == "bf16-mixed"
    assert "tying.callbacks.SoftTying" in {f"tying.callbacks.{type(c).__name__}" for c in cli.trainer.callbacks}

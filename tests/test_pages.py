"""What the README and the pages of docs/ show and say is run here."""

import logging
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from zoo import ZOO, build, loss_of, output_of

import tying.callbacks
import tying.depth
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


NO_TENSORBOARD = pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")


def blocks(text, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def blocks_of_pages(kind, but=()):
    return [(name, block) for name, text in PAGES.items() if name not in but for block in blocks(text, kind)]


PAGES = {page.stem: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
COMMANDS = [line for _, block in blocks_of_pages("console", but=["start"]) for line in block.splitlines()]


@pytest.fixture(autouse=True)
def _beside_the_files_of_pages(tmp_path, monkeypatch):
    """Run beside the configurations, and the files that pages show: blocks whose first line names them."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, content in re.findall(r"```\w+\n# (\w+\.\w+)\n(.*?)```", PAGES["start"], re.DOTALL):
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_model", None)


def test_the_readme_is_short():
    assert len(PAGES["README"].splitlines()) <= 120
    assert f"{len(ZOO)} architectures" in PAGES["README"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = dict(re.findall(r"(Python|PyTorch|Lightning) (\d\.\d+) or newer", PAGES["README"]))
    assert f">={floors['Python']}" == project["requires-python"]
    assert {f"torch>={floors['PyTorch']}", f"lightning>={floors['Lightning']}"} <= {*project["dependencies"]}


def test_selection_prints_what_the_page_shows(capsys):
    code, output = blocks(PAGES["patterns"], "python")[0], blocks(PAGES["patterns"], "text")[0]
    exec(code, {})
    assert capsys.readouterr().out.endswith(output)


@NO_TENSORBOARD
def test_the_quickstart_prints_what_the_readme_shows(capsys, monkeypatch, tmp_path):
    """Every line that Lightning does not print without this package, in order, with three dots for the folder."""
    [code], [output] = blocks(PAGES["README"], "python"), blocks(PAGES["README"], "text")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [logging.StreamHandler(sys.stdout)])
    quiet = code.replace("max_epochs=2,", "max_epochs=2, enable_progress_bar=False,")
    plain = re.sub(r"callbacks=\[.*?\]", "callbacks=[]", quiet).replace("['tying/gap']", ".get('tying/gap', 0.0)")
    printed = []
    for program in (quiet, plain):
        exec(program, {})
        text = capsys.readouterr().out.replace(str(tmp_path), "...")
        printed.append([line.strip() for line in text.splitlines()])
    tied, untied = printed
    assert [line for line in tied if line not in untied] == output.splitlines()
    assert len(code.splitlines()) <= 25
    new = [line for line in code.splitlines() if re.search(r"\btying\b|\btie\b|callbacks", line)]
    assert len(new) <= 4  # the import, the tie, the Trainer, and the print


@pytest.mark.parametrize("line", re.findall(r"^\| \[\w+\]\(\S+\) \| `(.*?)`", PAGES["README"], re.MULTILINE))
def test_the_line_of_each_family_runs_on_gpt2(line):
    model = build("GPT2")
    size = sum(weight.numel() for weight in model.parameters())
    callback = eval(line, vars(tying.callbacks) | vars(tying.depth))
    trainer = pl.Trainer(max_steps=1, callbacks=[callback], logger=False, enable_checkpointing=False)
    trainer.fit(LanguageModel(model))
    smaller = sum(weight.numel() for weight in model.parameters()) < 0.6 * size
    assert smaller == line.startswith(("HardTying", "WeightHashing"))
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)  # as transformers tied them


class LanguageModel(pl.LightningModule):
    """A model of transformers, with data of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, inputs):
        return loss_of(output_of(self.model, inputs))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([ZOO["GPT2"].inputs()], batch_size=None)


@NO_TENSORBOARD
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("page", "code"), blocks_of_pages("python", but=["README", "recipes"]))  # of test_recipes.py
def test_python_runs(page, code):
    exec(code, scope := {"__name__": page})
    if "Model" in scope and page == "compatibility":
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


@pytest.mark.filterwarnings("ignore:RelaxedTying. anneal ends after")  # of training for one step
@pytest.mark.parametrize(("page", "text"), blocks_of_pages("yaml", but=["extending", "recipes", "start"]))
def test_yaml_runs(page, text, tmp_path):
    whole = text if text.startswith("trainer:") else "trainer:\n  callbacks+:\n" + text
    (tmp_path / "own.yaml").write_text(whole)
    network = "--model=Autoencoder" if "encoder." in text else "--model.network.depth=8"
    model = [] if "\nmodel:" in text else [network]
    epochs = ["--trainer.max_epochs=2"] * ("start_epoch" in text)
    main(["fit", "--config=configs/base.yaml", "--config=own.yaml", *model, *SMALL, "--data.batch_size=8", *epochs])


@NO_TENSORBOARD
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_commands_of_the_first_hour_run_in_their_order(caplog, tmp_path):
    for command in "".join(blocks(PAGES["start"], "console")).splitlines():
        main(shlex.split(command)[1:])
    assert "going on from" in caplog.text
    assert (tmp_path / "plain.pt").exists()


def test_the_page_on_strengths_says_what_inspect_prints(capsys):
    """Of the run whose results it shows, by its table."""
    main(["inspect", "--config=configs/base.yaml", "--config=configs/soft.yaml"])
    printed = re.findall(r"strength ([\d.]+) .* half in (\d+) steps", capsys.readouterr().out)
    strengths, steps = {strength for strength, _ in printed}, sorted(int(steps) for _, steps in printed)
    assert f"In the results below, for example, strength {strengths.pop()}\n" in PAGES["soft"]
    assert f"halves the gap in {steps[0]} to {steps[-1]} of 432 steps" in PAGES["soft"]


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
    if args[0] == "bake":  # as a whole run would leave it
        main(["fit", "--config=configs/base.yaml", "--config=configs/soft.yaml", *SMALL])
        [trained] = Path().glob("runs/soft/version_0/checkpoints/epoch*.ckpt")
        trained.rename(args[args.index("--ckpt") + 1])
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
    assert capsys.readouterr().out or "bake" in args


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
    deltas.remove("whitened.yaml")  # which takes images, and the others' last data are text
    deltas.remove("ewc.yaml")  # whose network is an MLP, as that of synaptic.yaml
    deltas.remove("synaptic.yaml")
    cli = parse([f"--config=configs/{name}" for name in ["base.yaml", *deltas]])
    assert cli.trainer.precision == "bf16-mixed"
    assert "tying.callbacks.SoftTying" in {f"tying.callbacks.{type(c).__name__}" for c in cli.trainer.callbacks}

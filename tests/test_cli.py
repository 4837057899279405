import errno
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file
from test_configs import CONFIGS, NAMES, layers
from toys import TIES, Toy, batches, same

import tying
from tying.callbacks import SoftTying
from tying.cli import main, parse
from tying.files import newest_intact
from tying.models import Autoencoder, Classifier, ResNet

ROOT = Path(__file__).parents[1]
BASE, SOFT, BF16 = (f"--config={ROOT / 'configs' / name}.yaml" for name in ("base", "soft", "bf16"))
SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--model.network.depth=8",
]
SMALL += ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
TIES8 = "--trainer.callbacks.ties=[network.layer1.*.branch.conv*.weight]"

FULL = """
import resource

import lightning.pytorch as pl


class FullAfter(pl.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""


def errors(capsys, *args):
    with pytest.raises(SystemExit) as exited:
        main(args)
    assert exited.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_test_and_resume(tmp_path, capsys):
    main(["fit", BASE, SOFT, *SMALL, TIES8])
    run = tmp_path / "runs" / "soft" / "version_0"
    [checkpoint] = (run / "checkpoints").iterdir()  # after two steps: only that of the epoch's end
    assert {"config.yaml", "metrics.csv", "tying_gap.png"} <= {path.name for path in run.iterdir()}
    assert "tying/gap" in (run / "metrics.csv").read_text()
    assert "Tied weights" in capsys.readouterr().out
    torch.load(checkpoint, weights_only=True)
    main(["inspect", f"--config={run}/config.yaml", f"--ckpt_path={checkpoint}"])
    assert re.search(r"16×16×3×3 .* 0\.[0-8]", capsys.readouterr().out)
    main(["test", BASE, SOFT, "--model.network.depth=8", "--trainer.limit_test_batches=1", f"--ckpt_path={checkpoint}"])
    assert "test/accuracy" in capsys.readouterr().out
    main(["fit", BASE, SOFT, *SMALL, TIES8, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"])
    assert (tmp_path / "runs" / "soft" / "version_1").exists()


def work(rank, world, port, step, dies, args):
    """Be one of the processes of a run, one of which is killed in the given step."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    main(
        [
            *args,
            f"--trainer.callbacks+={__name__}.Kill",
            f"--trainer.callbacks.step={step}",
            f"--trainer.callbacks.rank={dies}",
        ]
    )
    if world > 1:
        torch.distributed.barrier()


class Kill(pl.Callback):
    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def launch(args, world=1, step=-1, dies=0):
    """Do a run with several processes; return the exit code of the first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tying.cli"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [*args, f"--trainer.devices={world}", f"--trainer.strategy={'ddp' if world > 1 else 'auto'}"]
    processes = [context.Process(target=work, args=(rank, world, port, step, dies, given)) for rank in range(world)]
    for process in processes:
        process.start()
    processes[0].join(120)
    ended = processes[0].exitcode
    for process in processes:
        process.join(0 if ended else 120)
        process.kill()
        process.join()
    return ended


@pytest.mark.parametrize("callback", ["SoftTying", "HardTying"])
def test_a_process_that_dies_ends_the_others(callback, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    args = ["fit", BASE, *SMALL, "--trainer.limit_train_batches=8", f"--trainer.callbacks+={callback}", TIES8]
    assert launch(args, world=2, step=3, dies=1) not in (None, 0)


def test_last_is_the_newest_checkpoint_in_every_subcommand(capsys, caplog):
    main(["fit", BASE, *SMALL, "--ckpt_path=last"])  # there is none: it begins anew
    assert "training begins anew" in caplog.text
    few = ["--model.network.depth=8", "--trainer.enable_progress_bar=false"]
    for subcommand in ("test", "validate", "predict"):
        options = [*few, f"--trainer.limit_{'val' if subcommand == 'validate' else subcommand}_batches=1"]
        main([subcommand, BASE, *options, "--ckpt_path=last"])
        assert caplog.text.count("taking the weights of runs/untied/version_0/checkpoints/") == 1
        caplog.clear()
        with pytest.raises(SystemExit):
            main([subcommand, BASE, *options, "--ckpt_path=last", "--trainer.logger.name=other"])
        assert "ckpt_path: no run in runs/other has a checkpoint: give the path of one" in capsys.readouterr().err


class Elsewhere(Logger):
    """As that of Weights & Biases: without a directory for all runs."""

    name, version, save_dir = "project", "a1b2", "runs"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass


TINY = [
    "--seed_everything=0",
    "--model=Autoencoder",
    "--model.sizes=[3072, 2]",
    "--data=CIFAR10",
    "--trainer.enable_progress_bar=false",
]
TINY += ["--trainer.accelerator=cpu", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
TINY += ["--trainer.num_sanity_val_steps=0", "--trainer.log_every_n_steps=1", "--trainer.default_root_dir=runs"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The '.*' does not have many workers")
@pytest.mark.parametrize(
    ("where", "more"),
    [
        (
            "mine",
            ["--trainer.logger=false", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=mine"],
        ),
        ("runs/project/a1b2/checkpoints", [f"--trainer.logger={__name__}.Elsewhere"]),
        ("runs/checkpoints", ["--trainer.logger=false"]),
    ],
)
def test_last_is_found_wherever_runs_save(where, more, caplog, capsys):
    main(["fit", *TINY, *more, "--trainer.max_epochs=1", "--ckpt_path=last"])
    assert "training begins anew" in caplog.text
    [checkpoint] = Path(where).iterdir()
    main(["validate", *TINY, *more, "--ckpt_path=last"])
    assert re.search(f"taking the weights of .*{where}/{checkpoint.name}", caplog.text)
    main(["inspect", *TINY, *more, "--ckpt_path=last"])
    cli = parse([*TINY, *more])
    cli.trainer.inspect(cli.model, ckpt_path="last")
    assert "No tied weights" in capsys.readouterr().out
    main(["fit", *TINY, *more, "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert re.search(f"going on from .*{where}/{checkpoint.name}", caplog.text)


def test_last_never_begins_anew_for_what_it_does_not_see(capsys):
    more = [
        "--trainer.logger=false",
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.dirpath=memory://mine",
    ]
    told = errors(capsys, "fit", *TINY, *more, "--ckpt_path=last")
    assert "no run in runs or memory://mine has a checkpoint (only folders of this machine are searched): give" in told


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_leaves_the_model_as_it_is_configured(capsys):
    """Whatever arguments of the module it holds: from Python without, and from the command line with the class."""
    folder = "--trainer.default_root_dir=runs"
    model = [BASE, f"--config={ROOT / 'configs' / 'autoencoder.yaml'}", "--model.sizes=[3072, 2]", folder]
    few = [option for option in SMALL if "depth" not in option]
    main(["fit", *model, *few])
    [path] = Path("runs").glob("autoencoder/*/checkpoints/*.ckpt")
    main(["test", *model, "--trainer.limit_test_batches=1", f"--ckpt_path={path}"])
    main(["inspect", *model, f"--ckpt_path={path}"])
    assert "test/loss" in capsys.readouterr().out
    for written in (path, Path("python.ckpt")):
        content = torch.load(path, weights_only=True)
        content["hyper_parameters"] = {"num_classes": 10, "lr": 0.1}
        torch.save(content, "python.ckpt")
        main(["fit", *model, *few, "--model.lr=0.5", "--trainer.max_epochs=2", f"--ckpt_path={written}"])
        newest = max(Path("runs").glob("autoencoder/*/checkpoints/*.ckpt"), key=lambda one: one.stat().st_mtime_ns)
        assert torch.load(newest, weights_only=True)["hyper_parameters"]["lr"] == 0.5


TWENTY = sorted(random.Random(0).choices(range(1, 16), k=20))
SCHEDULED = ["schedule.start=0", "schedule.length=12"]


@pytest.mark.parametrize(
    ("soft", "world", "steps"),
    [
        pytest.param([], 1, [5, 9], id="soft"),
        pytest.param(SCHEDULED, 2, [14], id="scheduled, two processes", marks=pytest.mark.slow),
        *(
            pytest.param(soft, world, TWENTY, id=f"{name}, {world}, twenty times", marks=pytest.mark.slow)
            for world in (1, 2)
            for name, soft in {"plain": None, "soft": [], "scheduled": SCHEDULED}.items()
        ),
    ],
)
def test_killed_runs_go_on_from_last_bitwise(soft, world, steps, tmp_path, monkeypatch):
    """SIGKILL within an epoch, and continue with --ckpt_path last: the weights of the uninterrupted run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    often = "{class_path: ModelCheckpoint, init_args: {filename: often, every_n_train_steps: 3}}"
    (tmp_path / "often.yaml").write_text(f"trainer: {{callbacks+: [{often}]}}")
    args = ["fit", BASE, "--config=often.yaml", *SMALL, "--trainer.max_epochs=2", "--trainer.limit_train_batches=8"]
    if soft is not None:
        args += ["--trainer.callbacks+=SoftTying", TIES8, *(f"--trainer.callbacks.{value}" for value in soft)]

    def weights(folder):
        newest = max(
            (tmp_path / folder).glob("untied/*/checkpoints/epoch=1*.ckpt"), key=lambda path: path.stat().st_mtime_ns
        )
        return torch.load(newest, weights_only=True)["state_dict"]

    assert launch([*args, "--trainer.logger.save_dir=whole"], world) == 0
    for step in steps:
        resumed = [*args, "--trainer.logger.save_dir=parts", "--ckpt_path=last"]
        assert launch(resumed, world, step) == -signal.SIGKILL
    assert launch([*args, "--trainer.logger.save_dir=parts", "--ckpt_path=last"], world) == 0
    whole, parts = weights("whole"), weights("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_printed_config_runs_again_unchanged(tmp_path, capsys):
    def printed(*args):
        with pytest.raises(SystemExit) as exited:
            main(["fit", *args, "--print_config"])
        assert exited.value.code in (0, None)
        return capsys.readouterr().out

    extra = [
        "--trainer.callbacks.schedule.end=0.5",
        "--trainer.callbacks.schedule.length=7",
        "--trainer.callbacks.penalty=Huber",
    ]
    text = printed(BASE, SOFT, BF16, *SMALL, *extra)
    (tmp_path / "printed.yaml").write_text(text)
    assert printed("--config=printed.yaml") == text
    soft = yaml.safe_load(text)["trainer"]["callbacks"][-1]["init_args"]
    assert soft["schedule"]["end"] == 0.5
    assert soft["penalty"] == {"class_path": "tying.soft.Huber", "init_args": {"delta": 1.0}}
    text = printed(BASE, SOFT, *SMALL, TIES8)
    (tmp_path / "printed.yaml").write_text(text)
    main(["fit", "--config=printed.yaml"])


def test_structured_ties_from_yaml(tmp_path):
    (tmp_path / "ties.yaml").write_text(
        """
trainer:
  callbacks+:
    - class_path: SoftTying
      init_args:
        ties:
          - "encoder.0.bias ~ decoder.0.bias"
          - {source: "encoder.{i}.weight", target: "decoder.{-i}.weight", relation: "o i -> i o", exclude: ["**.4"]}
        strength: .inf
        update: proximal
"""
    )
    cli = parse([BASE, "--config=ties.yaml", "--model=Autoencoder"])
    [tying] = [callback for callback in cli.trainer.callbacks if isinstance(callback, SoftTying)]
    assert tying.strength == float("inf")
    assert str(tying.ties[1]) == TIES[0]
    assert tying.ties[1].exclude == ("**.4",)


def test_the_three_ways_give_bitwise_the_same_run(tmp_path):
    """The callback in Python, the mixin and the YAML line; SMALL data, real CLI."""
    from toys import train

    from tying.mixins import SoftTyingMixin

    class Inherits(SoftTyingMixin, Toy):
        soft_tying = {"ties": TIES, "strength": 0.05}  # noqa: RUF012  # the documented form

    (tmp_path / "soft.yaml").write_text(
        yaml.safe_dump(
            {
                "model": "toys.Toy",
                "trainer": {
                    "max_epochs": 5,
                    "accelerator": "cpu",
                    "logger": False,
                    "enable_checkpointing": False,
                    "enable_progress_bar": False,
                    "callbacks": [
                        {"class_path": "tying.callbacks.SoftTying", "init_args": {"ties": TIES, "strength": 0.05}}
                    ],
                },
            }
        )
    )
    python, inherited = Toy(), Inherits()
    train(python, [SoftTying(TIES, strength=0.05)])
    train(inherited)
    cli = parse(["--config=soft.yaml"])
    cli.trainer.fit(cli.model, batches())
    assert same(python, inherited)
    assert same(python, cli.model)
    assert not same(python, Toy())


def test_inspect(capsys):
    main(["inspect", BASE, SOFT])
    out = capsys.readouterr().out
    assert "'network.layer1.*.branch.conv*.weight' matches 6 weights in 1 group" in out
    assert re.search(r"16×16×3×3 .* 0\.9", out)
    assert "269,722 unique parameters" in out
    assert (
        "Not matched by any tie: 43: network.stem.conv.weight, network.stem.norm.weight, network.stem.norm.bias, "
        "network.layer*.*.branch.norm*.weight (18), network.layer*.*.branch.norm*.bias (18), "
        "network.layer2.0.branch.conv1.weight, network.layer3.0.branch.conv1.weight, network.head.weight, "
        "network.head.bias\n"
    ) in out
    assert not Path("runs").exists()


def test_inspect_as_json(capsys):
    main(["inspect", BASE, SOFT, "--json=true"])
    document = json.loads(capsys.readouterr().out)
    [entry] = document["callbacks"]
    assert entry["ties"][0] == {"tie": "network.layer1.*.branch.conv*.weight", "weights": 6, "groups": 1}
    assert entry["groups"][0]["shape"] == [16, 16, 3, 3]
    assert document["report"]["unique"] == 269722
    assert len(document["unmatched"]) == 43


def test_inspect_tells_what_a_hash_does(capsys):
    main(["inspect", BASE, f"--config={ROOT / 'configs' / 'arbnet.yaml'}", "--trainer.callbacks.hash=ModulusHash"])
    told = capsys.readouterr().out
    assert told.count("3 weights (198,800 values) share a table of 19,880 slots (ratio 0.1)") == 1
    assert "table of 19,880: entropy of loads 9.8975, of probabilities 9.8975, at most 9.8975 nats" in told
    assert "\n  network.1.weight (200, 784): 156,800 values from 19,880, structured" in told
    assert "\n  network.7.weight (10, 200): 2,000 values from 19,880, structured" in told


HASHED = """
seed_everything: 0
trainer: {logger: false}
model:
  class_path: tying.models.Classifier
  init_args:
    network:
      class_path: tying.hashing.HashedLinear
      init_args: {in_features: 8, out_features: 10, table_ratio: 0.25, hash: tying.hashing.ModulusHash}
data: {class_path: tying.data.MNIST, init_args: {root: data/mnist}}
"""


def test_inspect_tells_of_hashed_layers_and_plots_their_loads(capsys):
    Path("hashed.yaml").write_text(HASHED)
    main(["inspect", "--config=hashed.yaml", "--plot=loads.png"])
    told = capsys.readouterr().out
    assert "Hashed: 1 weight (80 values) has a table of 20 slots (ratio 0.25)" in told
    assert "table of 20: entropy of loads 2.9957, of probabilities 2.9957, at most 2.9957 nats" in told
    assert "  network.weight (10, 8): 80 values from 20, structured; only 5 of 10 units are distinct" in told
    assert Path("loads.png").read_bytes().startswith(b"\x89PNG")
    assert "plot: no weight of the model is hashed" in errors(capsys, "inspect", BASE, "--plot=loads.png")
    assert "plot: . is a folder; give a file's name" in errors(capsys, "inspect", "--config=hashed.yaml", "--plot=.")


def test_inspect_tells_every_tie_that_does_not_fit(capsys):
    with pytest.raises(SystemExit):
        main(
            [
                "inspect",
                BASE,
                SOFT,
                "--trainer.callbacks.ties=[network.stm.*, network.layer1.*.branch.conv1.weight, a.b]",
            ]
        )
    told = capsys.readouterr()
    assert "matches 3 weights in 1 group" in told.out
    assert "pattern 'network.stm.*' matches no parameter" in told.err
    assert "pattern 'a.b' matches no parameter" in told.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.callbacks.strength=-1"], "strength must be 0 or more, not -1.0"),
        (["--trainer.callbacks.strength=.nan"], "strength must be 0 or more, not nan"),
        (["--trainer.callbacks.strength=.inf"], "strength=inf needs update='proximal'"),
        (["--trainer.callbacks.strength=inf"], "infinity is written .inf"),
        (["--trainer.callbacks.strength=abc"], "strength: Expected a number. Got value: abc"),
        (["--trainer.callbacks.penalty=l3"], "penalty: Expected 'l2' or 'l1'. Got value: l3"),
        (["--trainer.callbacks.update=up"], "update: Expected 'gradient', 'decoupled' or 'proximal'"),
        (["--trainer.callbacks.ties=[a ~]"], "tie 'a ~' must have the form"),
        (["--trainer.callbacks.schedule.length=-3"], "a schedule's length must be 0 or more, not -3"),
        (["--trainer.callbacks.ties=[network.steem.conv.weight]"], "Nearest existing names: network.stem.conv.weight"),
        (["--model.network.depth=21"], "a ResNet's depth is 6n + 2"),
        (
            ["--data.source=foo"],
            "source: Expected 'auto', 'archive', 'folder' or 'sample'. Got value: foo",
        ),
        (["--data.source=archive"], "source='archive' needs root"),
        (["--data.root=nowhere"], "no CIFAR-10 under nowhere"),
        (["--data.validation=2"], "validation must be in [0, 1), not 2"),
        (["--data.batch_size=5000"], "batch_size=5000 is more than the 4500 training images"),
        (["--data.download=true"], "download needs root"),
        (["--data.root=afile", "--data.download=true"], "CIFAR-10 could not be"),
        (["--model.lr=-1"], "lr must be 0 or more, not -1.0"),
        (["--model.warmup=-1"], "warmup must be in [0, 1], not -1.0"),
        (["--model.network.width=0"], "width is a multiple of 1/16"),
        (["--trainer.max_epochs=-1", "--trainer.max_time=00:00:01:00"], "a learning rate's schedule needs an end"),
        (["--trainer.callbacks.penalty=Huber", "--trainer.callbacks.penalty.delta=-1"], "Huber's delta must be"),
        (["--trainer.callbacks.ties=['network.layer[z-a].**']"], "matches no parameter"),
        (
            ["--trainer.callbacks.ties=[network.stem.conv.weight ~ network.head.weight | tensor i -> i tensor]"],
            "axis 'tensor' needs another name",
        ),
        (["--modell=3"], "unrecognized arguments: --modell=3"),
        (["--trainer.callbacks.strenght=1"], "Option 'strenght' is not accepted. Nearest existing names: strength."),
        (["--model.netwrk=ResNet"], "Option 'netwrk' is not accepted. Nearest existing names: network."),
        (["--trainer.callbacks+=SoftTieing"], "no class is named SoftTieing. Nearest existing names: SoftTying"),
        (["--trainer.callbacks.ties=a ~ b"], "ties: Expected a list. Got value: a ~ b"),
        (["--config=alias.yaml"], "In YAML, a pattern needs quotes: asterisks"),
        (["--config=none.yaml"], "File does not exist"),
        (["--ckpt_path=none.ckpt"], "ckpt_path: there is no file none.ckpt"),
        (["--ckpt_path=afile"], "afile is not a checkpoint, or is truncated"),
        (["--trainer.devices=0"], "is not a valid input"),
    ],
)
def test_mistakes_are_told_in_a_paragraph(args, message, capsys):
    Path("afile").write_text("not a folder, nor a checkpoint")
    Path("alias.yaml").write_text("trainer: {callbacks+: [{class_path: SoftTying, init_args: {ties: [**.weight]}}]}")
    told = errors(capsys, "fit", BASE, SOFT, *SMALL, *args)
    assert told.startswith("tying: error: ")
    assert message in told


def test_weights_that_are_not_finite_are_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", BASE, SOFT, *SMALL, "--model.network.depth=20", "--model.lr=1e38", "--trainer.max_epochs=3"])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "tying: error: SoftTying: 'network.layer1" in told
    assert "Lower the learning rate" in told


def test_a_config_of_ones_own_is_never_overwritten(tmp_path):
    own = "# mine\ntrainer: {logger: false}\n"
    (tmp_path / "config.yaml").write_text(own)
    main(["fit", BASE, "--config=config.yaml", *SMALL])
    assert (tmp_path / "config.yaml").read_text() == own


def test_a_module_in_the_current_folder_can_be_named(tmp_path):
    (tmp_path / "mine_here.py").write_text(
        "from tying.models import Autoencoder\n\n\nclass AE(Autoencoder):\n    pass\n"
    )
    script = Path(sys.executable).with_name("tying")
    args = ["--model=mine_here.AE", "--model.sizes=[8, 4]", "--trainer.logger=false"]
    done = subprocess.run([script, "inspect", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No tied weights." in done.stdout


def test_what_is_wrong_with_a_penalty_of_ones_own_is_told(tmp_path, capsys):
    (tmp_path / "penalties_here.py").write_text("import nothing_of_this_name\n")
    told = errors(capsys, "inspect", BASE, SOFT, "--trainer.callbacks.penalty=penalties_here.Mine")
    assert "nothing_of_this_name" in told


def test_a_model_of_ones_own_keeps_its_defaults_on_top_of_base(capsys):
    with pytest.raises(SystemExit):
        main(["fit", BASE, "--model=Autoencoder", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["lr"] == 1e-3


def test_inspect_refuses_what_fit_refuses(capsys):
    told = errors(capsys, "inspect", BASE, SOFT, "--trainer.callbacks.penalty=Huber")
    assert "takes pairs" in told


def test_mistakes_elsewhere_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("tying.models.Classifier.training_step", lambda *_: (_ for _ in ()).throw(ValueError("user")))
    with pytest.raises(ValueError, match="user"):
        main(["fit", BASE, *SMALL])
    unfit = RuntimeError("Error(s) in loading state_dict for their own network: size mismatch")
    monkeypatch.setattr("tying.models.Classifier.training_step", lambda *_: (_ for _ in ()).throw(unfit))
    with pytest.raises(RuntimeError, match="their own network"):
        main(["fit", BASE, *SMALL])


def test_console_script_and_module():
    script = Path(sys.executable).with_name("tying")
    for command in ([script], [sys.executable, "-m", "tying"]):
        done = subprocess.run([*command, "fit", BASE, "--data.source=foo"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("tying: error: data: tying.data.CIFAR10: source")


def test_bake(tmp_path, capsys):
    tie = "--trainer.callbacks.ties=['encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o']"
    model = ["--model=Autoencoder", "--model.sizes=[3072, 4, 2]"]
    small = [argument for argument in SMALL if "depth" not in argument]
    main(["fit", BASE, *small, *model, "--trainer.callbacks+=HardTying", tie])
    [checkpoint] = Path("runs").glob("untied/*/checkpoints/*.ckpt")
    for out in ("plain.pt", "plain.safetensors"):
        capsys.readouterr()
        main(["bake", f"--ckpt={checkpoint}", f"--out={out}"])
        assert capsys.readouterr().out == f"8 tensors, 110,696 bytes: {out}\n"
    loaded = torch.load("plain.pt", weights_only=True)
    untied = Autoencoder([3072, 4, 2])
    untied.load_state_dict(loaded)
    assert torch.equal(untied.decoder[2].weight, untied.encoder[0].weight.T)
    assert all(torch.equal(value, loaded[name]) for name, value in load_file("plain.safetensors").items())
    main(["bake", "--ckpt=plain.pt", "--out=again.pt"])


def test_bake_what_the_model_computes(tmp_path, capsys):
    low = [
        "--trainer.callbacks+=LowRankWeights",
        "--trainer.callbacks.parameters=[network.layer3.0.branch.conv2.weight]",
    ]
    main(["fit", BASE, *SMALL, *low, "--trainer.callbacks.rank=2"])
    [checkpoint] = Path("runs").glob("untied/*/checkpoints/*.ckpt")
    assert "holds weights that the model computes: give the run's --config" in errors(
        capsys, "bake", f"--ckpt={checkpoint}", "--out=a.pt"
    )
    config = f"--config={checkpoint.parents[1] / 'config.yaml'}"
    capsys.readouterr()
    main(["inspect", config, f"--ckpt_path={checkpoint}"])
    assert "network.layer3.0.branch.conv2.weight: computed from other parameters" in capsys.readouterr().out
    told = errors(capsys, "inspect", BASE, "--model.network.depth=8", f"--ckpt_path={checkpoint}")
    assert "Unexpected key(s) in state_dict" in told
    main(["bake", f"--ckpt={checkpoint}", "--out=a.pt", config])
    kernel = torch.load("a.pt", weights_only=True)["network.layer3.0.branch.conv2.weight"]
    assert torch.linalg.matrix_rank(kernel.flatten(1), rtol=1e-4) == 2
    parse([BASE, "--model.network.depth=8"]).model.load_state_dict(torch.load("a.pt", weights_only=True))


def test_bake_and_inspect_what_is_clustered(capsys):
    clustering = [
        "--trainer.callbacks+=WeightClustering",
        "--trainer.callbacks.parameters=[network.*.*.branch.conv2.weight]",
    ]
    main(["fit", BASE, *SMALL, *clustering, "--trainer.callbacks.clusters=4"])
    [checkpoint] = Path("runs").glob("untied/*/checkpoints/*.ckpt")
    config = f"--config={checkpoint.parents[1] / 'config.yaml'}"
    main(["bake", f"--ckpt={checkpoint}", "--out=a.pt", config])
    weights = torch.load("a.pt", weights_only=True)
    assert len(weights["network.layer2.0.branch.conv2.weight"].unique()) <= 4
    parse([BASE, "--model.network.depth=8"]).model.load_state_dict(weights)
    capsys.readouterr()
    main(["inspect", config, "--ckpt_path=last"])
    assert "network.layer1.0.branch.conv2.weight" in capsys.readouterr().out
    assert "ckpt_path: no run in runs/other has a checkpoint: give the path of one" in errors(
        capsys, "inspect", BASE, "--trainer.logger.name=other", "--ckpt_path=last"
    )


def test_bake_is_a_subcommand_like_the_others(capsys):
    def printed(*args):
        with pytest.raises(SystemExit) as exited:
            main(args)
        assert exited.value.code in (0, None)
        return capsys.readouterr().out

    assert re.search(r"bake +Write the plain weights of a checkpoint", printed("--help"))
    assert all(option in printed("bake", "--help") for option in ("--ckpt CKPT", "--out OUT", "--config CONFIG"))
    assert printed("--version") == f"tying {tying.__version__}\n"
    assert "required: bake.ckpt" in errors(capsys, "bake", "--out=a.pt")


def test_bake_of_several_configurations(tmp_path, capsys):
    (tmp_path / "low.yaml").write_text(
        """
trainer:
  callbacks+:
    - class_path: LowRankWeights
      init_args: {parameters: [network.layer3.0.branch.conv2.weight], rank: 2}
"""
    )
    main(["fit", BASE, "--config=low.yaml", *SMALL, "--trainer.logger.name=low"])
    [checkpoint] = Path("runs").glob("low/*/checkpoints/*.ckpt")
    (tmp_path / "small.yaml").write_text("model: {init_args: {network: {init_args: {depth: 8}}}}")
    Path("of_a_test.yaml").write_text(Path("low.yaml").read_text() + "verbose: true\nreturn_predictions: true\n")
    main(["bake", f"--ckpt={checkpoint}", "--out=a.pt", BASE, "--config=of_a_test.yaml", "--config=small.yaml"])
    assert "network.layer3.0.branch.conv2.weight" in torch.load("a.pt", weights_only=True)


def test_bake_mistakes(tmp_path, capsys):
    assert "--ckpt: there is no file none.ckpt" in errors(capsys, "bake", "--ckpt=none.ckpt", "--out=a.pt")
    (tmp_path / "text.ckpt").write_text("text")
    assert "text.ckpt is not a checkpoint of tensors and plain types, or is truncated" in errors(
        capsys, "bake", "--ckpt=text.ckpt", "--out=a.pt"
    )
    torch.save({"epoch": 1}, tmp_path / "empty.ckpt")
    assert "empty.ckpt holds no state dict" in errors(capsys, "bake", "--ckpt=empty.ckpt", "--out=a.pt")


@pytest.fixture
def checkpoint():
    """Of a run of one step."""
    main(["fit", BASE, *SMALL])
    return next(Path("runs").glob("untied/*/checkpoints/*.ckpt"))


SUBCOMMANDS = ["fit", "validate", "test", "predict", "inspect"]
DEPTH20 = [option for option in SMALL if "depth" not in option]


def options_of(subcommand):
    return SMALL if subcommand == "fit" else [option for option in SMALL if "depth" in option]


def test_flipped_bits_are_never_loaded(checkpoint, capsys):
    content = bytearray(checkpoint.read_bytes())
    weight = torch.load(checkpoint, weights_only=True)["state_dict"]["network.head.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 64
    Path("flipped.ckpt").write_bytes(content)
    torch.load("flipped.ckpt", weights_only=True)  # torch does not look
    for subcommand in SUBCOMMANDS:
        told = errors(capsys, subcommand, BASE, *options_of(subcommand), "--ckpt_path=flipped.ckpt")
        assert "ckpt_path: flipped.ckpt is corrupted: its checksums are wrong" in told
    assert "--ckpt: flipped.ckpt is corrupted" in errors(capsys, "bake", "--ckpt=flipped.ckpt", "--out=a.pt")
    assert not Path("a.pt").exists()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched").resolve(),)


@pytest.mark.parametrize("subcommand", SUBCOMMANDS[:4])
def test_nothing_is_unpickled_wherever_it_comes_from(checkpoint, subcommand, capsys):
    torch.save({**torch.load(checkpoint, weights_only=True), "own": Evil()}, "evil.ckpt")
    handler = partial(SimpleHTTPRequestHandler, directory=str(Path.cwd()))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for place in ("evil.ckpt", f"http://127.0.0.1:{server.server_port}/evil.ckpt"):
            told = errors(capsys, subcommand, BASE, *options_of(subcommand), f"--ckpt_path={place}")
            assert "the checkpoint holds more than tensors and plain types" in told
        server.shutdown()
    assert not Path("touched").exists()


def test_what_is_no_checkpoint_of_lightning(capsys):
    torch.save({"hello": 1}, "other.ckpt")
    with zipfile.ZipFile("zip.ckpt", "w") as archive:
        archive.writestr("a", "b")
    for path in ("other.ckpt", "zip.ckpt"):
        for subcommand in ("fit", "validate", "inspect"):
            told = errors(capsys, subcommand, BASE, *options_of(subcommand), f"--ckpt_path={path}")
            assert told.startswith("tying: error: ckpt_path: ")
            assert re.search("not a checkpoint of (Lightning|tensors)", told)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_of_other_ties(capsys):
    main(["fit", BASE, f"--config={ROOT / 'configs' / 'hard.yaml'}", *DEPTH20])
    [checkpoint] = Path("runs").glob("*/*/checkpoints/*.ckpt")
    told = errors(capsys, "fit", BASE, *DEPTH20, f"--ckpt_path={checkpoint}")
    assert "ckpt_path: its optimizers hold other weights than this model has. Resume a run with the ties" in told


def test_two_callbacks_without_a_name(capsys):
    again = [
        "--trainer.callbacks+=SoftTying",
        "--trainer.callbacks.ties=['network.layer1.*.branch.conv1.weight']",
        "--trainer.callbacks.strength=0.1",
    ]
    told = errors(capsys, "fit", BASE, *SMALL, SOFT, *again)
    assert (
        "SoftTying: 2 callbacks are SoftTying with name=None: give each its own name, or leave all but one out" in told
    )
    told = errors(
        capsys, "fit", BASE, *SMALL, *["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=loss"] * 2
    )
    assert (
        "more than one stateful callback of type `EarlyStopping`: leave all but one out, or let their arguments differ"
        in told
    )


def test_folders_that_cannot_be_written(checkpoint, capsys):
    told = errors(capsys, "fit", BASE, *SMALL, "--trainer.logger.save_dir=/sys/runs")
    assert "'/sys/runs'. Choose a folder with free space that you may write to" in told
    assert "--out: /sys/a.pt cannot be written" in errors(capsys, "bake", f"--ckpt={checkpoint}", "--out=/sys/a.pt")


def test_a_disk_that_is_full(checkpoint, capsys, monkeypatch):
    Path("a.pt").write_text("what was there")

    def full(content, path):
        Path(path).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    assert "--out: a.pt cannot be written: [Errno 28]" in errors(capsys, "bake", f"--ckpt={checkpoint}", "--out=a.pt")
    assert Path("a.pt").read_text() == "what was there"
    assert not list(Path().glob(".a.pt*"))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_whose_disk_is_full_goes_on_where_there_is_room(capsys, caplog):
    run = ["fit", BASE, SOFT, TIES8, *SMALL, "--trainer.limit_train_batches=35", "--trainer.log_every_n_steps=35"]
    more = "--config=more.yaml"  # checkpoints after 20 steps and after 35, of which the second does not fit
    Path("more.yaml").write_text("trainer: {callbacks+: [{class_path: full_here.FullAfter, init_args: {step: 30}}]}")
    Path("full_here.py").write_text(FULL)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        told = errors(capsys, *run, more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Choose a folder with free space that you may write to" in told
    main([*run, "--ckpt_path=last"])
    assert "going on from runs/soft/version_0/checkpoints/interrupted.ckpt" in caplog.text


def test_configurations_that_are_no_text(checkpoint, capsys):
    Path("latin.yaml").write_bytes("model: é".encode("latin-1"))
    assert "latin.yaml: not UTF-8 text" in errors(capsys, "fit", "--config=latin.yaml")
    Path("empty.yaml").touch()
    torch.save({"a_extra_state": torch.zeros(1)}, "a.ckpt")
    assert "empty.yaml: the configuration is empty" in errors(
        capsys, "bake", "--ckpt=a.ckpt", "--out=a.pt", "--config=empty.yaml"
    )


def test_bake_says_what_weights_alone_do_not(capsys):
    main(["fit", BASE, f"--config={ROOT / 'configs' / 'stochastic_depth.yaml'}", *SMALL])
    [checkpoint] = Path("runs").glob("*/*/checkpoints/*.ckpt")
    capsys.readouterr()
    main(["bake", f"--ckpt={checkpoint}", "--out=a.pt"])
    assert "Note: the file holds only weights, trained with StochasticDepth(keep=0.5" in capsys.readouterr().out


def test_inspect_tells_what_is_computed(capsys):
    main(["inspect", BASE, f"--config={ROOT / 'configs' / 'templates.yaml'}"])
    told = capsys.readouterr().out
    assert "No tied weights" not in told
    assert re.search(
        r"TemplateWeights: \d+ weights from 2 templates a shape: network.layer1.0.branch.conv1.weight, ", told
    )
    [free] = [line for line in told.splitlines() if line.startswith("Not matched by any tie: ")]
    assert "network.stem.conv.weight" in free
    assert "network.layer1.0.branch.conv1.weight" not in free


@pytest.mark.parametrize("config", NAMES)
def test_every_config_fits_its_model(config, capsys, tmp_path):
    if config == "transfer":
        (tmp_path / "runs/pretrained").mkdir(parents=True)
        network = ResNet(depth=20, num_classes=5)
        torch.save(Classifier(network, num_classes=5).state_dict(), "runs/pretrained/five_classes.ckpt")
    main(["inspect", *(f"--config={CONFIGS / layer}.yaml" for layer in layers(config))])
    assert "unique parameters" in capsys.readouterr().out


def test_inspect_tells_what_is_merged(capsys):
    main(["inspect", BASE, f"--config={ROOT / 'configs' / 'stochastic_depth.yaml'}"])
    told = capsys.readouterr().out
    assert "ResidualMerging: 9 blocks, network.layer1.0: StochasticDepth(keep=0.944444" in told


def test_inspect_tells_what_is_used_again(capsys):
    main(["inspect", BASE, f"--config={ROOT / 'configs' / 'recurrent.yaml'}"])
    assert "Recurrent(steps=2): network.layer2.1, network.layer3.1\n" in capsys.readouterr().out
    main(["inspect", BASE, f"--config={ROOT / 'configs' / 'zoneout.yaml'}"])
    assert "ZoneoutLSTM(1, 100, zoneout_cell=0.15, zoneout_hidden=0.15): network\n" in capsys.readouterr().out


def test_a_checkpoint_of_another_size_is_told(capsys):
    main(["fit", BASE, *SMALL, "--model.network.depth=8"])
    path = next(Path("runs").rglob("epoch*.ckpt"))
    assert (
        "ckpt_path: the checkpoint does not fit the model: Error(s) in loading state_dict for Classifier: "
        in errors(capsys, "test", BASE, f"--ckpt_path={path}", "--model.network.depth=14")
    )


def test_a_configuration_that_changes_another_needs_it(capsys):
    told = errors(capsys, "fit", f"--config={ROOT / 'configs' / 'soft.yaml'}")
    assert (
        "trainer.logger: Not a valid subclass of Logger. Got value: {'init_args': {'name': 'soft'}}. These are" in told
    )
    assert told.endswith("Give that one before, such as --config configs/base.yaml")
    assert len(told.splitlines()) == 1


def test_the_newest_checkpoint_that_is_whole(tmp_path):
    """A kill may truncate one, where temporary files lie on another disk."""
    paths = [tmp_path / name for name in ("old.ckpt", "corrupted.ckpt", "truncated.ckpt", "empty.ckpt")]
    for age, path in enumerate(paths):
        torch.save({"a": torch.arange(1000.0)}, path)
        os.utime(path, (age, age))
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    for path, broken in zip(paths[1:], (content, paths[2].read_bytes()[:2000], b""), strict=True):
        path.write_bytes(broken)
    os.utime(paths[0], (0, 0))
    assert newest_intact(paths) == paths[0]
    assert newest_intact(paths[1:]) is None
    assert newest_intact([]) is None


def test_inspect_says_that_averaging_comes_too_early(capsys):
    averaging = "--trainer.callbacks+=EMAWeightAveraging"
    hard = "--trainer.callbacks+=HardTying"
    main(["inspect", BASE, "--model.network.depth=8", averaging, hard, TIES8])
    told = capsys.readouterr().out
    assert "Problem: EMAWeightAveraging comes before HardTying and would average the weights of a copy" in told
    assert "With HardTying: " in told

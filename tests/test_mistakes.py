"""Mistakes of users, each with the words that name what is wrong, where it is and what would be right."""

from pathlib import Path

import pytest
import torch
from torch import nn
from toys import Toy, train

from tying import Tie, resolve
from tying.advice import advise
from tying.callbacks import (
    AnchorTying,
    Coupling,
    HardTying,
    Looping,
    LowRankWeights,
    MixtureTying,
    RecurrentDepth,
    RelaxedTying,
    ResidualMerging,
    SoftTying,
    TemplateWeights,
    Unrolling,
    UntiedBiases,
    WeightClustering,
    WeightHashing,
)
from tying.callbacks.importance import Fisher
from tying.cli import main
from tying.depth import StochasticDepth, ZoneoutLSTM, apply_merge, extract, loop, recur
from tying.errors import ConfigurationError
from tying.hard import LowRankResidual, tie
from tying.hashing import HashedLinear, ModulusHash, UniformHash, load_packed
from tying.mixins import SoftTyingMixin
from tying.models import MLP, Autoencoder, Classifier, ResNet
from tying.soft import Huber, Schedule, coupling_strength

V, W = "encoder.0.weight", "decoder.2.weight"
TIE = f"{V} ~ {W} | o i -> i o"


def fit(*callbacks, model=None):
    train(model or Toy(), callbacks, max_steps=1)


def blocks():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def with_norms():
    model = Toy()
    model.norms = nn.ModuleList(nn.BatchNorm1d(2) for _ in range(2))
    return model


def mlps():
    """Two blocks of two layers of unequal shapes, and two stages of unequal widths."""
    blocks = [nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}) for _ in range(2)]
    stages = [nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for width in (4, 8)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "stages": nn.ModuleList(stages)})


class Misspelt(SoftTyingMixin, Toy):
    soft_tying = {"ties": [TIE], "strenght": 0.1}  # noqa: RUF012


class Unset(SoftTyingMixin, Toy):
    pass


IN_PYTHON = {
    "ties as a string": (lambda: SoftTying(TIE), "ties must be a list; write ['encoder.0.weight ~ decoder.2.weight | "),
    "ties as a Tie": (lambda: HardTying(Tie("a", "b")), "ties must be a list; write ['a ~ b']"),
    "no ties": (lambda: SoftTying([]), "ties must be a list of at least one Tie, string or mapping, not []"),
    "ties as pairs": (lambda: SoftTying([("a", "b")]), "at least one Tie, string or mapping, not [('a', 'b')]"),
    "an equals sign": (lambda: SoftTying(["a = b"]), "or the string 'source ~ target | relation'"),
    "a comma": (
        lambda: SoftTying(["a, b"]),
        "'a, b' is not a pattern of names. A tie is Tie(source, target, relation)",
    ),
    "a half tie": (lambda: SoftTying(["a ~"]), "tie 'a ~' must have the form 'source ~ target | relation'"),
    "a key of a tie": (
        lambda: SoftTying([{"source": "a", "tarrget": "b"}]),
        "not tarrget. Nearest existing names: target",
    ),
    "a tie without source": (lambda: SoftTying([{"target": "b"}]), "must have a source, and may have a target"),
    "a weight's name": (lambda: fit(SoftTying(["encoder.0.weigth"])), "Nearest existing names: encoder.0.weight"),
    "a name of nothing": (
        lambda: fit(SoftTying(["xyz ~ q"])),
        "Parameters are encoder.0.weight, encoder.0.bias, encoder",
    ),
    "slashes": (lambda: fit(SoftTying(["encoder/0/weight"])), "Nearest existing names: encoder.0.weight"),
    "a prefix": (lambda: fit(AnchorTying([f"model.{V}"], 0.1)), "Nearest existing names: encoder.0.weight"),
    "a buffer": (
        lambda: fit(SoftTying(["norms.*.running_mean"]), model=with_norms()),
        "'norms.0.running_mean' is a buffer",
    ),
    "one weight": (lambda: fit(SoftTying([V])), "only 'encoder.0.weight' is in it. Name two different tensors"),
    "no relation": (lambda: fit(HardTying([f"{V} ~ {W}"])), "the relation 'o i -> i o' would fit"),
    "unequal shapes": (
        lambda: resolve(mlps(), ["blocks.*.fc?.weight"]),
        "given; write 'blocks.*.fc{i}.weight': one group of equal shapes for each capture",
    ),
    "unequal shapes of a range": (
        lambda: resolve(mlps(), ["blocks.{0..1}.fc[12].weight"]),
        "write 'blocks.{0..1}.fc{i}.weight': one group",
    ),
    "unequal shapes of ranges": (
        lambda: resolve(mlps(), ["stages.{0..1}.*.weight"]),
        "write 'stages.{i:0..1}.*.weight': one group",
    ),
    "unequal shapes of two": (
        lambda: resolve(Toy(), ["[ed]*coder.[02].weight"]),
        "write one tie for each shape, or exclude one of them",
    ),
    "a transposed weight": (
        lambda: resolve(mlps(), ["blocks.0.fc?.weight"]),
        "a relation needs a target: write 'blocks.0.fc1.weight ~ blocks.0.fc2.weight | o i -> i o'",
    ),
    "unequal shapes on one side": (
        lambda: resolve(mlps(), ["blocks.0.fc?.weight ~ blocks.1.fc1.weight"]),
        "write one tie for each shape, or exclude one of them",
    ),
    "a relation alone": (
        lambda: resolve(Toy(), [f"{V} | o i -> i o"]),
        "needs a target: write 'encoder.0.weight ~ target | o i -> i o'",
    ),
    "a mirrored capture alone": (
        lambda: resolve(Toy(), ["encoder.{-i}.weight"]),
        "needs a target: write 'encoder.{-i}.weight ~ target'",
    ),
    "axes for kernels": (
        lambda: fit(HardTying([f"{V} ~ {W} | o i h w -> i o h w"])),
        "is for 4-dimensional weights, and the",
    ),
    "an arrow": (
        lambda: fit(HardTying([f"{V} ~ {W} | o i <- i o"])),
        "' is not an einops pattern: Unknown character '<'",
    ),
    "a lost axis": (
        lambda: fit(HardTying([f"{V} ~ {W} | o i -> o"])),
        "o': relation 'o i -> o' cannot be inverted: axes i",
    ),
    "a range in brackets": (lambda: fit(SoftTying(["encoder.[0-10].weight"])), "write {0..10}"),
    "a brace": (lambda: fit(SoftTying(["encoder.{i.weight"])), "a lone '{'; captures are written {i}"),
    "a capture": (
        lambda: fit(SoftTying(["encoder.0.bias ~ decoder.{i}.bias"])),
        "capture {i} is only in the target",
    ),
    "a model for ties": (
        lambda: tie([TIE], Toy()),
        "ties must be a list of at least one Tie, string or mapping, not Toy",
    ),
    "a state dict for a model": (
        lambda: resolve(Toy().state_dict(), [TIE]),
        "must be a torch.nn.Module, not OrderedDict",
    ),
    "a word for a strength": (lambda: SoftTying([TIE], "big"), "strength must be 0 or more, not 'big'"),
    "no strength": (lambda: SoftTying([TIE], None), "strength must be 0 or more, not None"),
    "strengths": (lambda: SoftTying([TIE], torch.ones(2)), "strength must be 0 or more, not tensor([1., 1.])"),
    "a penalty": (
        lambda: SoftTying([TIE], penalty="huber"),
        "Huber(delta) or a subclass of tying.soft.Penalty. Nearest exi",
    ),
    "a penalty's class": (lambda: SoftTying([TIE], penalty=Huber), "not the class Huber: write Huber(...)"),
    "an update": (
        lambda: SoftTying([TIE], update="prox"),
        "update must be 'gradient', 'decoupled' or 'proximal', not 'prox'",
    ),
    "a schedule's key": (lambda: SoftTying([TIE], schedule={"strat": 0}), "'strat'. Nearest existing names: start."),
    "a schedule's type": (
        lambda: SoftTying([TIE], schedule=(0, 1)),
        "must be a tying.soft.Schedule, or a mapping of its ar",
    ),
    "a schedule's length": (lambda: Schedule(0, 1), "a schedule that changes needs a length of 1 or more steps"),
    "an argument of a mixin": (lambda: fit(model=Misspelt()), "'strenght'. Nearest existing names: strength."),
    "a mixin's attribute": (lambda: fit(model=Unset()), "must set soft_tying to a dictionary of SoftTying's arguments"),
    "patterns as a string": (
        lambda: AnchorTying(V, 0.1),
        "parameters must be a list of patterns; write ['encoder.0.weight']",
    ),
    "an anchor's weights": (
        lambda: AnchorTying([V], 0.1, anchor={}),
        "anchor must be 'initial' or the path of a file, not",
    ),
    "an anchor's file": (
        lambda: fit(AnchorTying([V], 0.1, anchor="no.ckpt")),
        "AnchorTying: anchor (or 'initial', the we",
    ),
    "an importance": (
        lambda: AnchorTying([V], 0.1, importance="fisher"),
        "must be Fisher(batches=...), Synaptic() or None",
    ),
    "an importance's class": (
        lambda: AnchorTying([V], 0.1, importance=Fisher),
        "not the class Fisher: write Fisher(...)",
    ),
    "rates": (lambda: MixtureTying([V], rates=0.1), "rates are three learning rates of 0 or more, not 0.1"),
    "lists of a coupling": (lambda: Coupling(["a"], ["b"], 0.5), "first and second must each be one name or pattern"),
    "modules that differ": (
        lambda: fit(Coupling("encoder", "decoder", 0.5)),
        "cannot be paired: 'encoder.0.weight' is (5, 6)",
    ),
    "alpha": (lambda: coupling_strength(20), "alpha must be in [0, 1], not 20"),
    "a hash's name": (
        lambda: WeightHashing([V], 0.1, "uniform"),
        "not 'uniform'. Nearest existing names: UniformHash.",
    ),
    "a hash's class": (
        lambda: WeightHashing([V], 0.1, UniformHash),
        "not the class UniformHash: write UniformHash(...)",
    ),
    "a percentage": (lambda: WeightHashing([V], 10), "table_ratio must be in (0, 1], not 10"),
    "biases alone": (
        lambda: fit(WeightHashing(["**.bias"], 0.1)),
        "['**.bias'] match nothing of two dimensions or more",
    ),
    "an input's size": (
        lambda: HashedLinear(8, 8, table_ratio=0.5, hash=ModulusHash())(torch.ones(2, 7)),
        "this layer takes 8 features, not 7",
    ),
    "clusters": (
        lambda: fit(WeightClustering([V], clusters=99)),
        "'encoder.0.weight': clusters must be in [1, 30], not 99",
    ),
    "a packed file": (lambda: load_packed("no.pt"), "there is no file no.pt"),
    "a rank": (
        lambda: fit(LowRankWeights([V], rank=50)),
        "rank=50 is more than 5, the smaller side of a weight of shape (5, 6)",
    ),
    "a vector of templates": (
        lambda: fit(TemplateWeights(["encoder.0.bias"], 2)),
        "match nothing of two dimensions or more",
    ),
    "a residual": (
        lambda: RelaxedTying([TIE], 8),
        "residual must be a tying.hard.WeightResidual, such as LowRankResidual(rank",
    ),
    "a residual's class": (
        lambda: RelaxedTying([TIE], LowRankResidual),
        "not the class LowRankResidual: write LowRankResidu",
    ),
    "annealing upwards": (
        lambda: RelaxedTying([TIE], LowRankResidual(1), Schedule(0.0, 1.0, 9)),
        "anneal must end at 0 aft",
    ),
    "one size": (
        lambda: UntiedBiases(["**.bias"], 32),
        "input_size must be that of one sample, such as [3, 32, 32], not 32",
    ),
    "a merge": (
        lambda: ResidualMerging("*", 0.5),
        "must be a module such as tying.depth.StochasticDepth(keep=0.5), not 0.5",
    ),
    "a merge's class": (
        lambda: ResidualMerging("*", StochasticDepth),
        "not the class StochasticDepth: write StochasticDepth",
    ),
    "a keep of 50 %": (lambda: StochasticDepth(50), "keep must be in [0, 1], not 50"),
    "keeps": (lambda: apply_merge(blocks(), "*", StochasticDepth(0.5), keep=[0.5]), "1 keeps for 2 blocks: 0, 1"),
    "a block's name": (lambda: apply_merge(Toy(), "encodr", StochasticDepth(0.5)), "Nearest existing names: encoder"),
    "a block's shape": (
        lambda: fit(ResidualMerging("encoder.0", StochasticDepth(0.5), keep_schedule="uniform")),
        "maps (4, 6) to (4, 5): a merge needs a block that keeps the shape",
    ),
    "a gap in a loop": (
        lambda: loop(nn.Sequential(*blocks(), *blocks()), ["0", "2"], 2),
        "'1' between them would not be",
    ),
    "passes": (lambda: Looping("*", passes=1.5), "passes must be an integer, 1 or more, not 1.5"),
    "a stage of one": (lambda: recur(Toy(), "encoder.[02]"), "a stage needs two blocks or more"),
    "steps": (lambda: RecurrentDepth("*", steps=0), "steps must be an integer, 1 or more, not 0"),
    "an index": (lambda: extract(blocks(), "*", [5]), "keep has the indices 5, and the 2 blocks 0, 1 have 0 to 1"),
    "one extra": (lambda: Unrolling(3), "extra must be a list of numbers of steps, such as [-1, 0, 1, 2], not 3"),
    "zoneout": (lambda: ZoneoutLSTM(3, 4, zoneout_cell=2), "zoneout_cell must be in [0, 1], not 2"),
    "a budget in percent": (lambda: advise(Toy(), [], 50), "budget must be in (0, 1), not 50"),
    "one size of layers": (lambda: MLP(8), "sizes must hold the units of the input and of at least one layer, not 8"),
    "one size of a code": (lambda: Autoencoder(8), "sizes must hold the units of the input and of at least one layer"),
    "a depth as text": (lambda: ResNet("20"), "depth must be an integer, not '20'"),
    "a rate as text": (lambda: Classifier(blocks(), lr="fast"), "lr must be 0 or more, not 'fast'"),
}


@pytest.mark.parametrize("mistake", IN_PYTHON)
def test_a_mistake_in_python_is_named(mistake):
    call, message = IN_PYTHON[mistake]
    with pytest.raises(ConfigurationError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def callback(name, arguments):
    return f"trainer: {{callbacks: [{{class_path: {name}, init_args: {{{arguments}}}}}]}}"


OWN = "own.yaml: "  # the file of each text below
BELOW = "Option 'class_path' is not accepted. The arguments of a class belong under init_args"
IN_YAML = {
    "an empty file": ("", "the configuration is empty: write keys and values, such as trainer: {max_epochs: 3}"),
    "a comment": ("# nothing", "the configuration is empty"),
    "a list": ("- 1", "the configuration holds no keys"),
    "a key twice": (
        "trainer:\n  max_epochs: 1\n  max_epochs: 2",
        "duplicate key 'max_epochs', in lines 2 and 3",
    ),
    "a section twice": ("trainer: {}\nmodel: MLP\ntrainer: {}", "duplicate key 'trainer', in lines 1 and 3"),
    "a part in itself": (
        "trainer: &trainer {callbacks: [*trainer]}",
        "line 1: this part of the configuration contains its",
    ),
    "a tab": (
        "trainer:\n\tmax_epochs: 1",
        "line 2, 'max_epochs: 1': found character '\\t' that cannot start any token. Inden",
    ),
    "an indent": (
        "trainer:\n  max_epochs: 1\n   max_steps: 3",
        "line 3, 'max_steps: 3': mapping values are not allowed here",
    ),
    "no quotes": (callback("SoftTying", "ties: [**.weight]"), "In YAML, a pattern needs quotes: asterisks, braces"),
    "a variable": (
        "trainer: {default_root_dir: '${HOME}/runs'}",
        "line 1: '${HOME}' is not replaced: environment variables",
    ),
    "a set variable": ("trainer: {default_root_dir: $RUNS/mine}", "line 1: '$RUNS' is not replaced"),
    "a trainer's key": (
        "trainer: {max_epoch: 1}",
        "there is no option 'trainer.max_epoch'. Nearest existing names: trainer.max_e",
    ),
    "an optimizer": ("optimizer: Adam", "there is no option 'optimizer'. Models make their optimizers; those of"),
    "a section": ("callbacks: []", "there is no option 'callbacks'. Nearest existing names: trainer.callbacks."),
    "a number": ("trainer: {max_epochs: many}", "trainer.max_epochs: Expected an integer. Got value: many"),
    "a class": (callback("tying.callbacks.SoftTyin", ""), "Nearest existing names: tying.callbacks.SoftTying."),
    "a package": (callback("tying.callback.SoftTying", ""), "Nearest existing names: tying.callbacks.SoftTying."),
    "no path": (callback("SoftTieing", ""), "no class is named SoftTieing. Nearest existing names: SoftTying,"),
    "no init_args": ("trainer: {callbacks: [{class_path: SoftTying, ties: [a]}]}", BELOW),
    "one tie": (callback("SoftTying", "ties: a"), "ties: Expected a list. Got value: a. Write ['a']."),
    "a pair": (
        callback("SoftTying", "ties: [[a, b]]"),
        "A tie is 'source ~ target | relation', or a mapping with source",
    ),
    "a mapping of names": (
        callback("HardTying", "ties: [a: b]"),
        "'a' is not accepted. It takes source, target, relation, ex",
    ),
    "a penalty": (
        callback("SoftTying", "ties: [a], penalty: l3"),
        "no class is named l3. Its classes are Huber, L1, L2.",
    ),
    "a schedule": (callback("SoftTying", "ties: [a], schedule: cosine"), "named cosine. Its classes are Schedule."),
    "a hash": (
        callback("WeightHashing", "parameters: [a], hash: uniform"),
        "named uniform. Its classes are BlockHash, Codebook",
    ),
    "a per cent": (
        callback("WeightHashing", "parameters: [a], table_ratio: 10%"),
        "table_ratio: Expected a number. Got value: 10%",
    ),
    "a merge": (
        callback("ResidualMerging", "blocks: a, merge: 0.5"),
        "0.5. Write the name of a class, or class_path and init_a",
    ),
    "a residual": (
        callback("RelaxedTying", "ties: [a], residual: tying.hard.LowRank"),
        "Its classes are DiagonalResidual, Low",
    ),
    "an importance": (
        callback("AnchorTying", "parameters: [a], strength: 1, importance: ewc"),
        "Its classes are Fisher, Synapt",
    ),
}


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("tying: error: ")  # one paragraph, without a traceback
    return line.removeprefix("tying: error: ")


@pytest.mark.parametrize("mistake", IN_YAML)
def test_a_mistake_in_a_file_is_named_with_the_file(mistake, capsys, monkeypatch):
    monkeypatch.setenv("RUNS", "runs")
    text, message = IN_YAML[mistake]
    Path("own.yaml").write_text(text)
    line = error_of(capsys, "inspect", "--config=own.yaml")
    assert line.startswith(OWN)
    assert message in line


MODEL = ["--seed_everything=0", "--trainer.logger=false", "--model=Autoencoder", "--model.sizes=[8, 4]"]
IN_COMMANDS = {
    "a trainer's option": (["--trainer.max_epohcs=3"], "Nearest existing names: --trainer.max_epochs"),
    "an optimizer": (
        ["--optimizer=Adm"],
        "Models make their optimizers; those of tying.models take --model.optimizer=sgd or --model.optimizer=adamw.",
    ),
    "an optimizer's class": (["--optimizer=torch.optim.Adam"], "--optimizer=torch.optim.Adam. Models make their opt"),
    "a schedule": (
        ["--lr_scheduler.class_path=StepLR"],
        "StepLR. Models make their optimizers; those of tying.models",
    ),
    "an optimizer of the model": (
        ["--model=Classifier", "--model.network=tying.models.ResNet", "--model.optimizer=adm"],
        "optimizer: Expected 'sgd' or 'adamw'. Got value: adm",
    ),
    "an option": (["--confg=a.yaml"], "unrecognized arguments: --confg=a.yaml. Nearest existing names: --config"),
    "a file without an option": (["own.yaml"], "unrecognized arguments: own.yaml. Write --config own.yaml."),
    "a file's name": (["--config=onw.yaml"], "onw.yaml'. Nearest existing names: own.yaml."),
    "no callback": (
        ["--trainer.callbacks.strength=1"],
        "AnchorTying, MixtureTying, SoftTying have this argument: name one first, as in --trainer.callbacks+=SoftTying.",
    ),
    "a variable": (
        ["--trainer.default_root_dir=${HOME}"],
        "'${HOME}' is not replaced: environment variables are not read",
    ),
    "a URL": (
        ["--ckpt_path=https://host/a.ckpt"],
        "only fit and test read a URL such as https://host/a.ckpt: download it",
    ),
    "a URL of a configuration": (
        ["--config=https://host.invalid/a.yaml"],
        "config: Path does not exist: 'https://host.invalid/a.yaml'",
    ),
    "a range": (
        ["--trainer.callbacks+=Looping", "--trainer.callbacks.blocks=a", "--trainer.callbacks.passes=0"],
        "Looping: pas",
    ),
    "no argument": (["--trainer.callbacks+=SoftTying"], "SoftTying: the following arguments are required: ties"),
}


@pytest.mark.parametrize("mistake", IN_COMMANDS)
def test_a_mistake_on_the_command_line_is_named(mistake, capsys):
    Path("own.yaml").write_text("trainer: {logger: false}")
    arguments, message = IN_COMMANDS[mistake]
    assert message in error_of(capsys, "inspect", *MODEL, *arguments)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "http://127.0.0.1:1/a.ckpt",
            "ckpt_path: Checkpoint file not found: http://127.0.0.1:1/a.ckpt: check the address",
        ),
        ("nowhere://a.ckpt", "ckpt_path: Protocol not known: nowhere: check the address, or download the checkpoint"),
    ],
)
def test_an_address_that_cannot_be_read_is_named(path, message, capsys):
    with pytest.raises(SystemExit):
        main(["test", *MODEL, "--data=CIFAR10", f"--ckpt_path={path}"])
    assert message in capsys.readouterr().err


def test_an_address_to_bake_is_named(capsys):
    assert "is a URL: download it" in error_of(capsys, "bake", "--ckpt=https://host/a.ckpt", "--out=plain.pt")


def test_no_model_is_named(capsys):
    assert "required: fit.model. Name it, as in --model=Autoencoder, or give a" in error_of(capsys, "fit")

"""Advice on which weights may be tied, from what ties do to the outputs of a model."""

import copy
import json
import math
import warnings
import weakref
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from zoo import ZOO, build

from tying.advice import advise
from tying.advice.candidates import as_range, find_candidates, runs, tieable_weights
from tying.advice.distil import distil
from tying.advice.untrained import looks_untrained
from tying.cli import main, parse
from tying.errors import ConfigurationError
from tying.hard import audit, lower_rank, tie
from tying.models import MLP, ResNet

DEPTH, WIDTH = 4, 24


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth=DEPTH, width=WIDTH):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def net(**arguments):
    """A network whose weights are independent, and not as torch initialises them."""
    model = Net(**arguments)
    for weight in model.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model


def batches(count=2, rows=16):
    return [torch.randn(rows, WIDTH) for _ in range(count)]


def quiet(model, data, budget, **arguments):
    return advise(model, data, budget, progress=False, **arguments)


def duplicate(model):
    model.blocks[3].up.load_state_dict(model.blocks[1].up.state_dict())


def duplicate_thrice(model):
    for number in (2, 3):
        model.blocks[number].up.load_state_dict(model.blocks[0].up.state_dict())


def duplicate_transposed(model):
    model.blocks[3].down.weight.data.copy_(model.blocks[0].up.weight.T)


def duplicate_square(model):
    model.head = nn.Linear(WIDTH, WIDTH)
    model.tail = nn.Linear(WIDTH, WIDTH)
    model.tail.weight.data.copy_(model.head.weight.T)


PLANTED = {
    duplicate: ("blocks.1.up.weight", "blocks.3.up.weight"),
    duplicate_thrice: ("blocks.0.up.weight", "blocks.2.up.weight", "blocks.3.up.weight"),
    duplicate_transposed: ("blocks.0.up.weight", "blocks.3.down.weight"),
    duplicate_square: ("head.weight", "tail.weight"),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_duplicates_come_first_with_error_0(plant):
    model = net()
    plant(model)
    advice = quiet(model, batches(), 0.9)
    assert (advice.groups[0].names, advice.groups[0].error) == (PLANTED[plant], 0.0)
    assert advice.groups[0].verdict == "tie"
    assert all(row.error > 0 for row in advice.groups if not {*row.names} <= {*PLANTED[plant]})
    tied = copy.deepcopy(model)
    tie(tied, advice.groups[0].ties)
    assert all(torch.equal(tied(x), model(x)) for x in batches())


def test_independent_layers_are_not_to_be_tied():
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(48, 48), nn.Tanh())))
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=48**-0.5)
    advice = quiet(model, [torch.randn(64, 48)], 0.6)
    assert {row.verdict for row in advice.groups} == {"do not tie: low rank of this size errs less"}
    assert advice.best.kind == "low rank"
    assert advice.ties == []


def relative_error(changed, model, data):
    """Σ ‖y' − y‖² / Σ ‖y‖², batch by batch."""
    with torch.no_grad():
        pairs = [(changed.eval()(x).double(), model.eval()(x).double()) for x in data]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)


def test_errors_of_groups_are_those_of_tied_and_of_lowered_copies():
    model, data = net(depth=3), batches()
    for row in quiet(model, data, 0.7).groups:
        tied, lowered = copy.deepcopy(model), copy.deepcopy(model)
        tie(tied, row.ties, init="mean")
        for name, rank in zip(row.names, row.ranks, strict=True):
            lower_rank(lowered, [name], rank)
        size = model.get_parameter(row.names[0]).numel()
        saved = [
            sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in other.parameters())
            for other in (tied, lowered)
        ]
        assert row.saved_bytes == 4 * saved[0] == 4 * (len(row.names) - 1) * size
        assert 0 <= saved[1] - saved[0] < 3 * WIDTH  # less than a rank more
        assert row.error == pytest.approx(relative_error(tied, model, data), rel=1e-4)
        assert row.low_rank_error == pytest.approx(relative_error(lowered, model, data), rel=1e-4)
    ratios = [row.error / row.saved_bytes for row in quiet(model, data, 0.7).groups]
    assert ratios == sorted(ratios)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_plans_meet_the_budget_and_the_first_errs_least(budget, steps):
    model, data = net(), batches()
    advice = quiet(model, data, budget, steps=steps)
    assert {"hard", "relaxed", "low rank"} <= {row.plan.kind for row in advice.plans}
    errors = [row.error for row in advice.plans]
    assert errors == sorted(errors)
    for row in advice.plans:
        changed = copy.deepcopy(model)
        row.plan.apply(changed)
        assert row.error_before == pytest.approx(relative_error(changed, model, data), rel=1e-4)
        assert row.remaining == sum(p.numel() for p in changed.parameters()) <= budget * advice.parameters
        assert row.saved_bytes == 4 * (advice.parameters - row.remaining)
        assert (row.error == row.error_before) == (steps == 0)


def test_ties_that_win_are_combined_with_low_rank_elsewhere():
    model = net()
    for name in ("up", "down"):
        getattr(model.blocks[3], name).load_state_dict(getattr(model.blocks[1], name).state_dict())
    advice = quiet(model, batches(), 0.5, parameters=["blocks.**.weight"])
    rows = {row.plan.kind: row for row in advice.plans}
    mixed = rows["mixed"].plan
    assert {"blocks.1.up.weight ~ blocks.3.up.weight", "blocks.1.down.weight ~ blocks.3.down.weight"} <= {*mixed.ties}
    assert mixed.low_rank
    assert not {*mixed.low_rank} & {tie.split(" ~ ")[0] for tie in mixed.ties}
    assert rows["mixed"].error < rows["low rank"].error


def test_the_budget_counts_the_parameters_that_are_chosen():
    model = net()
    advice = quiet(model, batches(), 0.5, parameters=["blocks.*.up.**"])
    assert advice.parameters == DEPTH * (2 * WIDTH * WIDTH + 2 * WIDTH)
    assert {name.split(".")[2] for row in advice.groups for name in row.names} == {"up"}
    changed = copy.deepcopy(model)
    advice.best.apply(changed)
    rest = sum(p.numel() for p in changed.parameters()) - sum(p.numel() for p in model.parameters()) + advice.parameters
    assert advice.plans[0].remaining == rest <= 0.5 * advice.parameters


class Stopping(nn.Module):
    """A network whose forward is interrupted at a call."""

    def __init__(self, stop=math.inf):
        super().__init__()
        self.net, self.calls, self.stop = net(depth=3), 0, stop

    def forward(self, x):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return self.net(x)


@pytest.mark.parametrize("stop", [math.inf, 3, 15, 29])
def test_the_model_is_as_before(stop):
    model = Stopping(stop).train()
    model.net.blocks[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects, data = [*model.parameters()], batches(1)
    for parameter in objects:
        parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt) if stop < math.inf else warnings.catch_warnings():
        quiet(model, data, 0.5, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    assert all(p.grad is not None and bool((p.grad == 1).all()) and p.requires_grad for p in model.parameters())
    assert (model.training, model.net.blocks[0].training, model.net.blocks[1].up.training) == (True, False, True)


@pytest.mark.parametrize("stop", [10, 29])
def test_an_interrupted_run_goes_on(stop, tmp_path):
    data, model = batches(1), Stopping()
    whole = quiet(model, data, 0.5, steps=2)
    interrupted = Stopping(stop)
    interrupted.load_state_dict(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        quiet(interrupted, data, 0.5, steps=2, out=tmp_path)
    interrupted.calls, interrupted.stop = 0, math.inf
    assert quiet(interrupted, data, 0.5, steps=2, out=tmp_path) == whole
    assert interrupted.calls < model.calls
    interrupted.calls = 0
    assert quiet(interrupted, data, 0.5, steps=2, out=tmp_path) == whole
    assert interrupted.calls == 1  # the targets


def test_what_is_measured_is_known_by_model_batches_and_forward(tmp_path):
    model, data = Stopping(), batches(1)
    measured = {}
    quiet(model, data, 0.5, out=tmp_path)
    changes = {
        "budget": lambda: quiet(model, data, 0.6, out=tmp_path),
        "batches": lambda: quiet(model, batches(1), 0.5, out=tmp_path),
        "forward": lambda: quiet(model, data, 0.5, forward=lambda model, x: model(x).tanh(), out=tmp_path),
        "model": lambda: quiet(Stopping(), data, 0.5, out=tmp_path),
    }
    for name, change in changes.items():
        content = json.loads((tmp_path / "measured.json").read_text())
        change()
        measured[name] = len(json.loads((tmp_path / "measured.json").read_text())) - len(content)
    assert measured == {"budget": 0, "batches": 1, "forward": 1, "model": 1}


class Storages(TorchDispatchMode):
    """Measures the bytes of the storages that are alive at once, besides those of a model."""

    def __init__(self, model):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, weakref.WeakSet(p.untyped_storage() for p in model.parameters())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size):
        self.alive -= size


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = net(depth=5, width=32), net(depth=5, width=32)

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("large", ["weights", "outputs"])
def test_at_most_two_models_are_in_memory(large):
    """Also where the outputs are larger than the model: they are computed again, batch by batch."""
    model = Sum()
    data = [torch.randn({"weights": 2, "outputs": 128}[large], 32) for _ in range(2)]
    if large == "outputs":
        model.first.head, model.second.head = nn.Linear(32, 1024), nn.Linear(32, 1024)
    size = sum(p.nbytes for p in model.parameters())
    with Storages(model) as storages:
        quiet(model, data, 0.5, parameters=["*.blocks.**"])
    activations = 6 * 8 * model(data[0]).numel()  # outputs and their differences, in double precision
    assert storages.peak <= size + activations  # besides the model itself


BAD = {
    "budget of nothing": (lambda model: quiet(model, batches(), 0.0), r"budget must be in \(0, 1\), not 0.0"),
    "budget of all": (lambda model: quiet(model, batches(), 1.0), r"budget must be in \(0, 1\), not 1.0"),
    "steps": (lambda model: quiet(model, batches(), 0.5, steps=-1), "steps must be 0 or more, not -1"),
    "rate": (lambda model: quiet(model, batches(), 0.5, steps=1, rate=0.0), "rate must be above 0, not 0.0"),
    "no batches": (lambda model: quiet(model, [], 0.5), "there are no batches: give one or more"),
    "out of reach": (
        lambda model: quiet(model, batches(), 0.1),
        r"if all weights of equal or related shapes were tied, 2,717 of 9,629 parameters would remain\. Give a budget of 0.283",
    ),
    "alone": (
        lambda model: quiet(model, batches(), 0.5, parameters=["head.**"]),
        "no two weights of the model can be tied",
    ),
    "no such parameters": (
        lambda model: quiet(model, batches(), 0.5, parameters=["haed.*"]),
        "Nearest existing names: head",
    ),
    "no tensor": (
        lambda model: quiet(model, batches(), 0.5, forward=lambda *_: "text"),
        "the model returns str, which holds no",
    ),
    "zero": (
        lambda model: quiet(model, batches(), 0.5, forward=lambda model, x: 0 * model(x)),
        "the model's outputs on the batches are zero",
    ),
    "nan": (
        lambda model: quiet(model, [torch.full((2, WIDTH), torch.nan)], 0.5),
        "outputs on the batches are not finite",
    ),
    "too few": (
        lambda model: quiet(model, batches(), 0.5, steps=3, training=iter(batches())),
        "training has too few batches for the steps, and cannot be read again",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    call, message = BAD[case]
    model = net(depth=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        call(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def trained(model):
    """Take a few steps of a tiny training run."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = {p.ndim: p for p in model.parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        sum((p * torch.randn_like(p)).sum() for p in model.parameters()).backward()
        optimizer.step()
    return model, inputs


FRESH = {
    "MLP": lambda: MLP([20, 30, 5]),
    "ResNet": lambda: ResNet(depth=8),
    **{name: ZOO[name].make for name in ("GPT2", "BERT", "ViT", "test_vit2", "resnet18", "Llama")},
}


@pytest.mark.parametrize("kind", FRESH)
def test_untrained_models_are_recognised(kind):
    model = FRESH[kind]()
    assert looks_untrained(model)
    assert not looks_untrained(trained(model)[0])


def test_advice_on_an_untrained_model_is_warned():
    with pytest.warns(UserWarning, match="Net looks untrained: .* train it, or load a checkpoint, first"):
        quiet(Net(), batches(), 0.5)


@pytest.mark.parametrize("depth", [2, 8, 9, 48])
def test_the_number_of_runs_is_linear_in_the_depth(depth):
    stack = [*range(depth)]
    found = [*runs(stack)]
    assert all(run == [*range(run[0], run[-1] + 1)] for run in found)
    assert len({*map(tuple, found)}) == len(found)
    assert stack in found
    assert len(found) <= (6 * depth if depth > 8 else 28)
    assert sum(len(run) == 2 for run in found) == depth - 1


def test_ranges_match_the_given_names_and_no_others():
    names = [f"blocks.{number}.weight" for number in range(4)]
    assert as_range(names[1:3], names) == "blocks.{1..2}.weight"
    assert as_range([names[0], names[2]], names) is None
    assert as_range([names[0], names[2]], [names[0], names[2]]) == "blocks.{0..2}.weight"
    assert as_range([names[0], "head.weight"], [*names, "head.weight"]) is None


def test_neighbours_and_transposed_pairs_are_candidates():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Linear(4, 4))
    pairs = {(group.names, group.relation) for group in find_candidates(tieable_weights(model, ["**"]))}
    assert pairs == {(("0.weight", "1.weight"), "o i -> i o"), (("2.weight", "3.weight"), None)}


def test_weights_that_are_computed_or_no_real_numbers_are_left_out():
    model = net()
    lower_rank(model, ["blocks.0.up.weight"], 2)
    model.table = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    tie(model, ["blocks.1.down.weight ~ blocks.2.down.weight"])
    names = {name for group in find_candidates(tieable_weights(model, ["**"])) for name in group.names}
    assert "blocks.1.down.weight" in names
    assert names.isdisjoint({"blocks.0.up.weight", "blocks.2.down.weight", "table"})


@pytest.mark.parametrize("name", ["GPT2", "swin_t"])
def test_models_of_others(name):
    model, inputs = build(name), ZOO[name].inputs()
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    advice = quiet(model, [inputs], 0.9)
    for row in advice.plans:
        changed = copy.deepcopy(model)
        row.plan.apply(changed)
        assert row.remaining == sum(p.numel() for p in changed.parameters())
    assert math.isfinite(advice.plans[0].error)


def test_recurrent_layers():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LSTM(6, 6), nn.LSTM(6, 6)

        def forward(self, x):
            return self.second(self.first(x)[0])

    model = Recurrent()
    model.second.load_state_dict(model.first.state_dict())
    for weight in (model.first.weight_hh_l0, model.second.weight_hh_l0):
        weight.data.normal_()
    advice = quiet(model, [torch.randn(3, 2, 6)], 0.75)
    assert advice.groups[0].error == 0 < advice.groups[-1].error
    assert {*advice.groups[0].names} == {"first.weight_ih_l0", "second.weight_ih_l0"}


def test_distillation_lowers_the_error():
    model, data = net(), batches(4)
    advice = quiet(model, data, 0.5, steps=40, rate=5e-3)
    assert all(row.error < 0.7 * row.error_before for row in advice.plans)
    training = [torch.randn(16, WIDTH) for _ in range(40)]
    assert quiet(model, data, 0.5, steps=40, rate=5e-3, training=training).plans[0].error < advice.plans[0].error_before


@pytest.mark.parametrize("stop", [math.inf, 2, 7], ids=["never", "by the model", "by the caller"])
def test_distillation_leaves_the_modes(stop):
    teacher, student = net().train(), Stopping(2 if stop == 2 else math.inf).train()
    student.net.blocks[0].eval()
    modes = [module.training for model in (teacher, student) for module in model.modules()]
    steps = 0

    def advance():
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if stop < math.inf else warnings.catch_warnings():
        distil(teacher, student, batches(1), steps=8, rate=1e-3, advance=advance)
    assert [module.training for model in (teacher, student) for module in model.modules()] == modes


def test_the_tables_and_the_picture_say_what_the_rows_say(tmp_path):
    model = net()
    duplicate(model)
    advice = quiet(model, batches(), 0.5, steps=2, out=tmp_path)
    text = str(advice)
    assert (tmp_path / "advice.txt").read_text() == text
    lines = [line.split("  ")[0] for line in text.splitlines()]
    first = lines.index("weights") + 1
    assert lines[first : first + 20] == ["; ".join(row.ties) for row in advice.groups[:20]]
    assert (f"and {len(advice.groups) - 20} more groups" in text) == (len(advice.groups) > 20)
    assert lines[-len(advice.plans) :] == [row.plan.kind for row in advice.plans]
    assert f"at most 0.5 of {advice.parameters:,} parameters, by error after 2 steps of distillation" in text
    [axes] = advice.figure().axes
    tied, lowered, *plans = (points.get_offsets().tolist() for points in axes.collections)
    assert tied == [[row.saved_bytes, row.error] for row in advice.groups]
    assert lowered == [[row.saved_bytes, row.low_rank_error] for row in advice.groups]
    assert plans == [[[row.saved_bytes, row.error]] for row in advice.plans]
    assert (tmp_path / "advice.png").stat().st_size > 1000


class Tiny(pl.LightningModule):
    """A model with its own data, of which the validation data can be left out."""

    def __init__(self, validation: bool = True):
        super().__init__()
        self.network, self.validation = net(), validation

    def forward(self, x):
        return self.network(x)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return 2 * batch

    def train_dataloader(self):
        return DataLoader(torch.arange(4.0 * WIDTH).view(4, WIDTH).sin(), batch_size=2)

    def val_dataloader(self):
        return DataLoader(torch.arange(6.0 * WIDTH).view(6, WIDTH).cos(), batch_size=2) if self.validation else []

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


TINY = [
    f"--model={__name__}.Tiny",
    "--seed_everything=0",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
]
PATTERNS = "--parameters=['network.blocks.**']"


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Tiny().state_dict()}, "some.ckpt")
    return tmp_path / "some.ckpt"


@pytest.mark.parametrize("validation", [True, False])
def test_the_command_line_says_what_python_says(checkpoint, validation, capsys):
    arguments = [
        "--budget=0.5",
        "--steps=2",
        "--batches=2",
        PATTERNS,
        "--out=advice",
        f"--model.validation={validation}",
    ]
    main(["advise", *TINY, *arguments, f"--ckpt_path={checkpoint}"])
    shown = capsys.readouterr().out
    model = Tiny(validation)
    model.load_state_dict(torch.load(checkpoint)["state_dict"])
    training = [2 * batch for batch in model.train_dataloader()]
    compared = [2 * batch for batch in model.val_dataloader()][:2] if validation else training
    advice = quiet(model, compared, 0.5, steps=2, training=training, parameters=["network.blocks.**"])
    assert str(advice) in shown
    assert advice.yaml() in shown
    assert Path("advice/ties.yaml").read_text() == advice.yaml()


@pytest.mark.parametrize("kind", ["hard", "relaxed", "low rank", "mixed"])
def test_plans_reload_from_yaml(kind, checkpoint):
    model = Tiny()
    model.load_state_dict(torch.load(checkpoint)["state_dict"])
    for name in ("up", "down"):
        getattr(model.network.blocks[3], name).load_state_dict(getattr(model.network.blocks[1], name).state_dict())
    advice = quiet(model, [*model.train_dataloader()], 0.5, parameters=["network.blocks.*.*.weight"])
    [plan] = [row.plan for row in advice.plans if row.plan.kind == kind]
    Path("plan.yaml").write_text(plan.yaml())
    loaded = copy.deepcopy(model)
    cli = parse(["--config=plan.yaml", *TINY])
    names = {callback["class_path"].split(".")[-1] for callback in plan.callbacks()}
    callbacks = [callback for callback in cli.trainer.callbacks if type(callback).__name__ in names]
    assert len(callbacks) == len(plan.callbacks())
    for callback in callbacks:
        callback.apply(loaded)
    applied = copy.deepcopy(model)
    plan.apply(applied)
    assert loaded.state_dict().keys() == applied.state_dict().keys()
    assert all(torch.equal(value, applied.state_dict()[key]) for key, value in loaded.state_dict().items())
    if plan.ties:
        tied = copy.deepcopy(model)
        assert {*audit(applied).groups} == {group.names for group in tie(tied, plan.ties, init="mean")}


BAD_LINES = {
    "budget": (["--budget=2"], "budget must be in (0, 1), not 2.0"),
    "batches": (["--batches=0"], "batches must be 1 or more, not 0"),
    "out of reach": (["--budget=0.01"], "budget=0.01 is out of reach"),
    "no checkpoint": (["--ckpt_path=none.ckpt"], "there is no file none.ckpt"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_mistakes_on_the_command_line(case, checkpoint, capsys):
    options, message = BAD_LINES[case]
    with pytest.raises(SystemExit, match="2"):
        main(["advise", *TINY, *options])
    assert message in capsys.readouterr().err


def test_the_ties_of_a_configuration_are_made_first(checkpoint, capsys):
    ties = ["--trainer.callbacks+=HardTying", "--trainer.callbacks.ties=['network.blocks.{0..3}.up.weight']"]
    main(["advise", *TINY, *ties, PATTERNS, "--budget=0.8"])
    shown = capsys.readouterr().out
    assert "down.weight" in shown
    assert "blocks.1.up.weight" not in shown


class NoData(Tiny):
    def train_dataloader(self):
        return []

    val_dataloader = train_dataloader


def test_a_model_without_data_is_refused(checkpoint, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["advise", f"--model={__name__}.NoData", *TINY[1:]])
    assert "NoData has neither training nor validation data to advise on" in capsys.readouterr().err

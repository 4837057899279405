"""RelaxedTying: its limits, its schedule, and what checkpoints of each of its phases restore."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from families import Trained, inputs
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from toys import Toy, same, train
from zoo import ZOO, build, loss_of, output_of

from tying import ConfigurationError
from tying.callbacks import AnchorTying, HardTying, RandomState, RelaxedTying, Synaptic
from tying.cli.inspect import load_weights
from tying.data.resuming import ResumableLoader
from tying.hard import (
    DiagonalResidual,
    LowRankResidual,
    ScaleResidual,
    audit,
    bake,
    harden,
    relax,
    relaxed,
    set_residual_factor,
    tie,
    tied,
)
from tying.mixins import RelaxedTyingMixin
from tying.soft import Schedule

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")

TIES = ["net.first.weight ~ net.second.weight", "net.kernels.*"]
HARD_TIES = [TIES[0], "net.kernels.*.weight"]
RESIDUAL = LowRankResidual(rank=2)
STEPS, LENGTH = 10, 7  # of an epoch, and of the annealing


class Adam(Trained):
    """Has optimizer states of several tensors, and a dropout before the network."""

    def loss(self, batch):
        return super().loss([torch.dropout(batch[0], 0.2, self.training)])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Resumable(ResumableLoader):
    """Batches of two, in order."""

    def __len__(self):
        return STEPS

    def __iter__(self):
        for number in self._numbers(STEPS):
            yield [inputs()[2 * number : 2 * number + 2]]


class Mixed(RelaxedTyingMixin, Adam):
    relaxed_tying: ClassVar = {"ties": TIES, "residual": RESIDUAL, "anneal": Schedule(1.0, 0.0, LENGTH)}


def annealed(unit="step", length=LENGTH, **more):
    return RelaxedTying(TIES, RESIDUAL, anneal=Schedule(1.0, 0.0, length, unit=unit), **more)


def fit(model, callbacks, ckpt_path=None, **more):
    torch.manual_seed(0)
    options = {"max_epochs": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0} | more
    return train(model, callbacks, data=Resumable(), ckpt_path=ckpt_path, **options)


def states_of(trainer):
    """Return the tensors of optimizers' states, in the order of parameters."""
    [optimizer] = trainer.optimizers
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [value for parameter in parameters for value in optimizer.state[parameter].values()]


# Limits


@pytest.mark.parametrize("init", ["nearest", "source"])
def test_without_a_residual_it_is_a_hard_tie_bitwise(init):
    model, hard = Adam(), Adam()
    trainers = [
        fit(model, [RelaxedTying(TIES, init=init)]),
        fit(hard, [HardTying(TIES, init="mean" if init == "nearest" else "source")]),
    ]
    assert same(model, hard)
    assert [*model.state_dict()] == [*hard.state_dict()]
    assert all(map(torch.equal, *map(states_of, trainers)))


def test_with_full_rank_it_begins_as_the_untied_model_to_1e_6():
    model, free = Adam().double(), Adam().double()
    fit(model, [RelaxedTying(TIES, LowRankResidual(rank=6))], max_steps=0)
    assert len(relaxed(model)) == 2
    x = inputs().double()
    assert torch.allclose(model(x), free(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("residual", [RESIDUAL, LowRankResidual(rank=2, scale=True), ScaleResidual()])
def test_an_infinite_proximal_pull_makes_residuals_exactly_zero(residual):
    model, pulled = Adam(), ["net.kernels.*.parametrizations.weight.original*"]
    pull = AnchorTying(["net.first.bias"], 0.0, head_strength=math.inf, update="proximal", head=pulled)
    fit(model, [RelaxedTying(TIES[1:], residual), pull])
    [group] = relaxed(model)
    assert {*group.distances().values()} == {0.0}
    assert group.parameters[0].any()


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_annealed_to_the_end_it_is_a_hard_tie(unit):
    model, hard, length = Adam(), Adam(), LENGTH if unit == "step" else 1
    callback = annealed(unit, length)
    trainer = fit(model, [callback], max_epochs=2)
    hard_trainer = fit(hard, [HardTying(HARD_TIES)])
    assert relaxed(model) == []
    assert [group.names for group in callback.groups] == [group.names for group in tied(hard)]
    report = audit(model, trainer.optimizers)
    assert report.problems == ()
    assert report.counts() == audit(hard, hard_trainer.optimizers).counts()
    assert [(name, p.shape) for name, p in model.named_parameters()] == [
        (name, p.shape) for name, p in hard.named_parameters()
    ]
    [optimizer] = trainer.optimizers
    assert {p for group in optimizer.param_groups for p in group["params"]} == {*model.parameters()}
    assert {*optimizer.state} == {*model.parameters()}
    assert {state["step"].item() for state in optimizer.state.values()} == {2 * STEPS}  # also of the shared weight


@pytest.mark.parametrize(("unit", "length", "total"), [("step", STEPS + 1, STEPS), ("epoch", 2, 1)])
def test_residuals_that_training_ends_too_early_to_drop_are_told(unit, length, total):
    message = f"RelaxedTying: anneal ends after {length} {unit}s, and training after {total}: the residuals stay"
    with pytest.warns(UserWarning, match=message):
        fit(model := Adam(), [annealed(unit, length)])
    assert len(relaxed(model)) == 2


def test_the_residuals_are_annealed_as_a_loop_anneals_them():
    model, reference = Adam(), Adam()
    fit(model, [annealed()], max_epochs=1)
    torch.manual_seed(0)
    relax(reference, TIES, RESIDUAL)
    optimizer = reference.configure_optimizers()
    for step, batch in enumerate(Resumable()):
        if step < LENGTH:
            set_residual_factor(reference, 1 - step / LENGTH)
        elif step == LENGTH:
            residuals = [p for group in relaxed(reference) for values in group.residuals for p in values]
            harden(reference)
            for parameter in residuals:
                optimizer.state.pop(parameter)
            [group] = optimizer.param_groups
            group["params"] = [p for p in group["params"] if not any(p is residual for residual in residuals)]
        optimizer.zero_grad()
        reference.loss(batch).backward()
        optimizer.step()
    assert same(model, reference)


# Checkpoints


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """Return the checkpoints before, amid and after the annealing, of a callback and of a mixin, by name."""
    folder, points = tmp_path_factory.mktemp("phases"), {}
    for name, model, callbacks in (("callback", Adam(), [annealed()]), ("mixin", Mixed(), [])):
        every = ModelCheckpoint(folder / name, "{step}", save_top_k=-1, every_n_train_steps=1)
        fit(model, [RandomState(), *callbacks, every], max_epochs=2, enable_checkpointing=True)
        points |= {(name, step): folder / name / f"step={step}.ckpt" for step in (1, 3, LENGTH, 12)}
        points[name, "end"] = {key: value.clone() for key, value in model.state_dict().items()}
    return points


CASES = [(kind, step) for kind in ("callback", "mixin") for step in (1, 3, LENGTH, 12)]


def made(kind):
    return (Mixed(), []) if kind == "mixin" else (Adam(), [annealed()])


def is_hard(step):
    return step >= LENGTH


def expected(phases, kind, step):
    """Return the outputs of a model that is restored by hand."""
    model, state = Adam(), torch.load(phases[kind, step], weights_only=False)["state_dict"]
    if is_hard(step):
        tie(model, HARD_TIES)
    else:
        relax(model, TIES, RESIDUAL)
    model.load_state_dict({key: value for key, value in state.items() if key in model.state_dict()})
    return model.eval()(inputs())


@pytest.mark.parametrize(("kind", "step"), CASES)
def test_a_run_goes_on_bitwise_from_each_phase(phases, kind, step):
    model, callbacks = made(kind)
    fit(model, [RandomState(), *callbacks], phases[kind, step], max_epochs=2)
    state = model.state_dict()
    assert state.keys() == phases[kind, "end"].keys()
    assert all(torch.equal(value, phases[kind, "end"][key]) for key, value in state.items())


@pytest.mark.parametrize("kind", ["callback", "mixin"])
def test_a_hardened_model_goes_on_from_before_it_was(phases, kind):
    model, callbacks = made(kind)
    fit(model, callbacks, max_epochs=1)
    assert relaxed(model) == []
    fit(model, [RandomState(), *callbacks], phases[kind, 3], max_epochs=2)
    assert all(torch.equal(value, phases[kind, "end"][key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("was_hard", [False, True])
@pytest.mark.parametrize(("kind", "step"), CASES)
def test_a_model_computes_with_the_weights_of_each_phase(phases, kind, step, was_hard):
    model, callbacks = made(kind)
    if was_hard:
        fit(model, callbacks, max_epochs=1)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.validate(model, model.val_dataloader(), ckpt_path=phases[kind, step], verbose=False)
    assert (relaxed(model) == []) == is_hard(step)
    assert torch.equal(model.eval()(inputs()), expected(phases, kind, step))
    assert len(tied(model)) == 2 * is_hard(step)
    assert audit(model).problems == ()


@pytest.mark.parametrize(("kind", "step"), CASES)
def test_inspection_loads_each_phase(phases, kind, step):
    model, callbacks = made(kind)
    model.configure_model()
    weights = torch.load(phases[kind, step], weights_only=False)["state_dict"]
    load_weights(model, [*callbacks, *model.configure_callbacks()], weights, "a checkpoint")
    assert (relaxed(model) == []) == is_hard(step)
    assert torch.equal(model.eval()(inputs()), expected(phases, kind, step))


@pytest.mark.parametrize("step", [1, LENGTH, 12])
def test_load_from_checkpoint_takes_each_phase(phases, step):
    model = Mixed.load_from_checkpoint(phases["mixin", step], weights_only=False)
    assert (relaxed(model) == []) == is_hard(step)
    assert torch.equal(model.eval()(inputs()), expected(phases, "mixin", step))


class Aliased(Adam):
    """Uses one of the weights twice, in a module of its own."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(6, 6)
        self.again.weight = self.net.first.weight

    def forward(self, x):
        return self.net(self.again(x))


def test_a_weight_of_several_modules_goes_on_bitwise_too(tmp_path):
    whole = Aliased()
    every = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(whole, [RandomState(), annealed(), every], enable_checkpointing=True)
    assert whole.again.weight is whole.net.first.weight is whole.net.second.weight
    for step in (3, LENGTH):
        model = Aliased()
        fit(model, [RandomState(), annealed()], tmp_path / f"step={step}.ckpt")
        assert same(model, whole)
        assert model.again.weight is model.net.second.weight


ANCHORS = {
    "gradient": lambda: AnchorTying(["net.**"], 0.5),
    "decoupled": lambda: AnchorTying(["net.**"], 0.5, update="decoupled"),
    "proximal": lambda: AnchorTying(["net.**"], 0.5, update="proximal"),
    "Synaptic": lambda: AnchorTying(["net.**"], 0.5, importance=Synaptic()),
}


@pytest.mark.filterwarnings(
    "ignore:training stopped before the end of its last epoch", "ignore:AnchorTying. no checkpoint has the"
)
@pytest.mark.parametrize(("kind", "order"), [*((kind, 1) for kind in ANCHORS), ("gradient", -1), ("Synaptic", -1)])
def test_anchors_follow_the_weights_that_become_one(kind, order, tmp_path):
    def run(callbacks, *more, **options):
        fit(model := Adam(), [RandomState(), *callbacks[::order], *more], **options)
        return model

    def values(callback):
        state = callback.state_dict()
        return state["anchors"] | {
            f"importance of {name}": value for name, value in state.get("importances", {}).items()
        }

    every = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    anchor = ANCHORS[kind]()
    whole = run([annealed(), anchor], every, enable_checkpointing=True)
    assert {name.removeprefix("importance of ") for name in values(anchor)} == {n for n, _ in whole.named_parameters()}
    assert not any("original" in name for group in anchor.groups for name in group.names)
    for step in (LENGTH - 1, LENGTH):
        again = ANCHORS[kind]()
        assert same(run([annealed(), again], ckpt_path=tmp_path / f"step={step}.ckpt"), whole)
        assert all(torch.equal(value, values(anchor)[name]) for name, value in values(again).items())
    fit(whole, [annealed(), anchor][::order])  # the next task
    assert relaxed(whole) == []


# Calibration


class Shuffling(Adam):
    def train_dataloader(self):
        loader = super().train_dataloader()
        return DataLoader(loader.dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(3))


def note(steps, batch, batch_idx):
    """Take a step without training."""
    steps.append((batch[0], torch.rand(())))
    return torch.zeros((), requires_grad=True)


def test_calibration_reads_batches_and_moves_nothing():
    model, plain, reference = Shuffling(), Shuffling(), Shuffling()
    loader = model.train_dataloader()
    torch.manual_seed(0)
    batches = [batch for batch, _ in zip(plain.train_dataloader(), range(2), strict=False)]
    relax(reference, TIES, RESIDUAL, batches)
    callback = RelaxedTying(TIES, RESIDUAL, calibration=2)
    seen = []
    model.training_step = partial(note, seen)
    torch.manual_seed(0)
    train(model, [callback], data=loader, max_epochs=1)
    assert same(model, reference)
    relax(plain, TIES, RESIDUAL)
    assert not same(model, plain)
    expected = []
    plain.training_step = partial(note, expected)
    torch.manual_seed(0)
    train(plain, data=Shuffling().train_dataloader(), max_epochs=1)
    assert len(seen) == len(expected) == 5
    assert all(torch.equal(a, b) for pair in zip(seen, expected, strict=True) for a, b in zip(*pair, strict=True))


def test_calibration_reads_the_loaders_of_the_model():
    model, reference = Adam(), Adam()
    batches = [*reference.train_dataloader()][:3]
    relax(reference, TIES, RESIDUAL, batches)
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=0, logger=False, callbacks=[RelaxedTying(TIES, RESIDUAL, calibration=3)]
    )
    trainer.fit(model)
    assert same(model, reference)


# Logs, and other settings of training


def test_the_factor_and_the_largest_residual_are_logged():
    factors = []

    class Log(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx:
                factors.append(trainer.callback_metrics["tying/one/residual"].item())

    model = Adam()
    trainer = fit(model, [annealed(length=4, name="one"), RelaxedTying(["net.blocks.*"], ScaleResidual()), Log()])
    assert factors == [1.0, 0.75, 0.5, 0.25, *[0.0] * 5]
    [group] = relaxed(model)
    assert trainer.callback_metrics["tying/largest_residual"].item() == pytest.approx(max(group.distances().values()))
    assert trainer.callback_metrics["tying/one/largest_residual"].item() == 0.0


SETTINGS = {
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
    "bf16 weights": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_trains_and_hardens_with(setting):
    model, callback = Adam(), annealed(length=4)
    trainer = fit(model, [callback], max_epochs=2, **SETTINGS[setting])
    assert trainer.global_step > 4
    assert len(callback.groups) == 2
    assert audit(model, trainer.optimizers).problems == ()
    assert {p for group in trainer.optimizers[0].param_groups for p in group["params"]} == {*model.parameters()}


def test_residuals_in_a_parameter_group_of_their_own_leave_it():
    class Groups(Adam):
        def configure_optimizers(self):
            residuals = [p for name, p in self.named_parameters() if ".original" in name]
            rest = [p for name, p in self.named_parameters() if ".original" not in name]
            return torch.optim.AdamW([{"params": residuals, "lr": 0.1}, {"params": rest}], lr=0.01)

    model = Groups()
    [optimizer] = fit(model, [annealed()]).optimizers
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, len([*model.parameters()])]


# Transformers


class Stranger(pl.LightningModule):
    """Trains a network of the zoo on batches of keyword arguments."""

    def __init__(self, name):
        super().__init__()
        self.net = build(name)
        self.batches = DataLoader([ZOO[name].inputs() for _ in range(4)], batch_size=None)

    def forward(self, **inputs):
        return output_of(self.net, inputs)

    def training_step(self, batch, batch_idx):
        return loss_of(self(**batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("name", ["GPT2", "BERT", "ViT"])
def test_the_blocks_of_a_transformer_share_their_weights(name):
    torch.manual_seed(0)
    model, plain = Stranger(name), build(name)
    blocks = f"net.{ZOO[name].blocks.removesuffix('*')}{{0..2}}"
    callback = RelaxedTying([blocks], LowRankResidual(rank=2), calibration=2)
    matrices = sum(p.numel() for p in callback.affected(model).values())
    total = sum(p.numel() for p in model.parameters())
    train(model, [callback], data=model.batches, max_epochs=1)
    groups = relaxed(model)
    residuals = sum(2 * sum(p.flatten(1).shape) for group in groups for p in group.parameters)
    assert len(groups) >= 4
    assert sum(p.numel() for p in model.parameters()) == total - matrices + matrices // 3 + residuals
    assert all(distance > 0 for group in groups for distance in group.distances().values())
    plain.load_state_dict({key.removeprefix("net."): value for key, value in bake(model).items()})
    batch = ZOO[name].inputs()
    torch.testing.assert_close(output_of(plain.eval(), batch), model.eval()(**batch), rtol=0, atol=1e-6)
    annealing = RelaxedTying([blocks], LowRankResidual(rank=2), Schedule(1.0, 0.0, 3), name="annealed")
    again = Stranger(name)
    trainer = train(again, [annealing], data=model.batches, max_epochs=1)
    assert [group.names for group in annealing.groups] == [group.names for group in groups]
    assert audit(again, trainer.optimizers).problems == ()


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anneal": Schedule(1.0, 0.5, 10)}, r"anneal must end at 0 .*Schedule\(1\.0, 0\.0, length\) does, not"),
        ({"anneal": Schedule()}, r"anneal must end at 0"),
        ({"anneal": 1.0}, r"^anneal must be a tying\.soft\.Schedule, or a mapping of its arguments, not 1\.0"),
        ({"anneal": {"length": 3, "stop": 0.0}}, r"^anneal cannot be"),
        ({"anneal": {"start": 2.0, "end": 0.0, "length": 3}}, r"must be in \[0, 1\], not"),
        ({"residual": None, "anneal": Schedule(1.0, 0.0, 10)}, "anneal needs a residual"),
        ({"residual": None, "calibration": 2}, "calibration needs a residual"),
        ({"residual": 8}, "residual must be a tying.hard.WeightResidual"),
        ({"calibration": 0}, "calibration"),
        ({"init": "mean"}, "init"),
    ],
)
def test_bad_arguments_are_errors(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        RelaxedTying(TIES, **{"residual": RESIDUAL} | arguments)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (RelaxedTying(TIES, LowRankResidual(7)), r"^RelaxedTying: 'net.first.weight': rank=7 is more than 6"),
        (RelaxedTying(["net.first ~ net.kernels.0"], DiagonalResidual()), "^RelaxedTying: .*shape"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(callback, message):
    model, plain = Adam(), Adam()
    with pytest.raises(ConfigurationError, match=message):
        fit(model, [callback])
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert same(model, plain)


def test_anneal_does_not_go_with_averaged_weights():
    with pytest.raises(ConfigurationError, match=r"^RelaxedTying: anneal cannot be combined with EMAWeightAveraging"):
        fit(Adam(), [annealed(), EMAWeightAveraging()])
    fit(Adam(), [RelaxedTying(TIES, RESIDUAL), EMAWeightAveraging()])


def test_lbfgs_would_keep_the_residuals():
    class Line(Adam):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigurationError, match="LBFGS holds the residuals"):
        fit(Line(), [annealed()])


def test_calibration_needs_a_forward():
    with pytest.raises(ConfigurationError, match=r"^RelaxedTying: calibration calls the model .*, and Toy fails"):
        train(Toy(), [RelaxedTying(["encoder.0.weight ~ decoder.2.weight | o i -> i o"], RESIDUAL, calibration=2)])


def test_calibration_needs_one_loader():
    model = Adam()
    loaders = {"a": model.train_dataloader(), "b": model.train_dataloader()}
    with pytest.raises(ConfigurationError, match="calibration needs one loader of training data, and there is"):
        train(model, [RelaxedTying(TIES, RESIDUAL, calibration=2)], data=loaders)

"""Loops that begin and grow during training."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from toys import Toy, batches, same, train

from tying import ConfigurationError
from tying.callbacks import HardTying, Looping, LowRankWeights, RandomState, ResidualMerging, SoftTying, WeightHashing
from tying.cli.bake import export
from tying.data.resuming import ResumableLoader
from tying.depth import Residual, StochasticDepth, loop, loops_in, unloop
from tying.hard import audit
from tying.mixins import LoopingMixin

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")


class Blocks(Toy):
    def __init__(self, lazily=False, **options):
        super().__init__(**options)
        self.blocks = None if lazily else self.make_blocks()
        self.passes = []

    def make_blocks(self):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            branches = [nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Dropout(0.1)) for _ in range(4)]
        return nn.Sequential(*map(Residual, branches))

    def configure_model(self):
        if self.blocks is None:
            self.blocks = self.make_blocks()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def loss(self, batch):
        return super().loss([self.blocks(batch[0])])

    def note(self):
        self.passes.append([made.passes for made in loops_in(self)])

    def training_step(self, batch, batch_idx):
        self.note()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.note()
        return self.loss(batch)

    test_step = predict_step = validation_step

    def val_dataloader(self):
        return batches(1)

    test_dataloader = predict_dataloader = val_dataloader


class Stop(pl.Callback):
    """Stops training after three steps, far from the end that was planned."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 3


class Resumable(ResumableLoader):
    """Eight batches."""

    def __len__(self):
        return 8

    def __iter__(self):
        data = [*batches(8)]
        for number in self._numbers(8):
            yield data[number]


class Inherits(LoopingMixin, Blocks):
    looping = {"blocks": "blocks.[12]", "passes": 2, "per_pass": "norm"}  # noqa: RUF012


def callback(**arguments):
    return Looping("blocks.[12]", **{"passes": 2, **arguments})


def fit(model, *callbacks, **options):
    torch.manual_seed(0)
    return train(model, callbacks, **{"max_epochs": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0} | options)


def evaluator(*callbacks):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", callbacks=[*callbacks], **quiet)


@pytest.mark.parametrize("lazily", [False, True])
def test_callback_mixin_and_function_train_alike(lazily):
    by_callback, by_mixin, by_function = Blocks(lazily), Inherits(lazily), Blocks()
    loop(by_function, "blocks.[12]", 2, "norm")
    fit(by_callback, callback(per_pass="norm"))
    fit(by_mixin)
    fit(by_function)
    assert same(by_callback, by_function)
    assert same(by_mixin, by_function)
    assert len([*by_function.parameters()]) == len([*Blocks().parameters()]) + 4
    fit(plain := Blocks())
    assert [*plain.state_dict()] == [name for name in by_callback.state_dict() if ".passes." not in name]
    assert not same(plain.decoder, by_callback.decoder)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [2] * 20),
        ({"start": 0.35}, [1] * 7 + [2] * 13),
        ({"start": 0.35, "passes": 3}, [1] * 7 + [3] * 13),
        ({"start": 0.35, "passes": 3, "grow": 0.2}, [1] * 7 + [2] * 4 + [3] * 9),
        ({"passes": 4, "grow": 0.3}, [2] * 6 + [3] * 6 + [4] * 8),
        ({"start": 0.9, "passes": 2, "grow": 0.5}, [1] * 18 + [2] * 2),
        ({"passes": 1}, [1] * 20),
    ],
)
def test_passes_by_fractions_of_training(arguments, expected, accumulated):
    model = Blocks()
    fit(model, callback(**arguments), data=batches(10 * accumulated), accumulate_grad_batches=accumulated)
    assert model.passes == [[passes] for passes in expected for _ in range(accumulated)]


class Snapshots(pl.Callback):
    """Keeps the weights after each step, without those of further passes."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append({k: v.clone() for k, v in module.state_dict().items() if ".passes." not in k})


PER_PASS = [None, "norm", "scale"]


@pytest.mark.parametrize("per_pass", PER_PASS)
def test_before_the_start_the_steps_are_bitwise_plain(per_pass):
    looped, plain = Snapshots(), Snapshots()
    fit(Blocks(), callback(start=0.5, per_pass=per_pass), looped)
    fit(Blocks(), plain)
    equal = [
        all(torch.equal(weights[name], expected[name]) for name in expected)
        for weights, expected in zip(looped.weights, plain.weights, strict=True)
    ]
    assert equal == [True] * 10 + [False] * 10


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["", "clipped"])
@pytest.mark.parametrize("per_pass", PER_PASS)
def test_killed_after_any_step(per_pass, options, tmp_path):
    """Before the start, at each growth, and after."""

    def run(*callbacks, **more):
        model = Blocks()
        growing = callback(passes=4, start=0.25, grow=0.25, per_pass=per_pass)
        fit(model, growing, RandomState(), *callbacks, max_epochs=1, **options, **more)
        return model

    every = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = run(every, data=Resumable(), enable_checkpointing=True)
    points = sorted(tmp_path.glob("*.ckpt"))
    assert len(points) == 8 // options.get("accumulate_grad_batches", 1)
    for point in points:
        resumed = run(data=Resumable(), ckpt_path=point)
        assert same(resumed, whole), point
        assert [made.passes for made in loops_in(resumed)] == [4]


@pytest.mark.parametrize("per_pass", ["norm", "scale"])
def test_a_new_pass_begins_with_the_values_of_the_pass_before(per_pass):
    class Watched(Blocks):
        def on_before_optimizer_step(self, optimizer):
            [made] = loops_in(self)
            values = {name: value.clone() for name, value in self.state_dict().items() if value.ndim < 2}
            self.seen.append((made.passes, values))

    model = Watched()
    model.seen = []
    fit(model, callback(passes=3, start=0.4, grow=0.3, per_pass=per_pass))
    for number in (2, 3):
        values = next(values for passes, values in model.seen if passes == number)
        pairs = pass_pairs(per_pass, number, values)
        assert len(pairs) > 1
        assert all(torch.equal(new, former) for new, former in pairs)
    trained = model.seen[-1][1]
    assert not all(torch.equal(new, former) for new, former in pass_pairs(per_pass, 3, trained))


def pass_pairs(per_pass, number, values):
    """Return what a pass does not share, each with that of the pass before it."""
    pairs = []
    for name, value in values.items():
        if per_pass == "scale" and name.endswith("pass_scale"):
            pairs.append((value[number - 2], value[number - 3] if number > 2 else torch.tensor(1.0)))
        if per_pass == "norm" and f".passes.{number - 2}." in name:
            before = f".passes.{number - 3}." if number > 2 else "."
            pairs.append((value, values[name.replace(f".passes.{number - 2}.", before)]))
    return pairs


def test_validation_uses_the_current_passes_and_tests_those_of_the_checkpoint(tmp_path):
    def looping():
        return callback(passes=3, start=0.25, grow=0.5)

    model = Blocks()
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
    options = {"limit_val_batches": 1, "val_check_interval": 5, "enable_checkpointing": True}
    fit(model, looping(), save, **options)
    training = [[1]] * 5 + [[2]] * 10 + [[3]] * 5
    assert model.passes == [
        passes for place in range(0, 20, 5) for passes in (*training[place:][:5], training[place + 4])
    ]
    assert len([*tmp_path.glob("*.ckpt")]) == 4
    for path in tmp_path.glob("*.ckpt"):
        for evaluate in ("validate", "test", "predict"):
            tested = Blocks()
            getattr(evaluator(looping()), evaluate)(tested, ckpt_path=path, weights_only=True)
            assert tested.passes == [training[int(path.stem.removeprefix("step=")) - 1]], (path, evaluate)


def test_without_a_checkpoint_tests_use_the_passes_of_training_or_the_final_ones():
    model, looping = Blocks(), callback(passes=3, grow=0.5)
    fit(model, looping, max_epochs=1).test(model, verbose=False)
    assert model.passes == [[2]] * 5 + [[3]] * 5 + [[3]]
    stopped = Blocks()
    fit(stopped, looping, Stop(), max_epochs=1).test(stopped, verbose=False)
    assert stopped.passes == [[2]] * 3 + [[2]]
    fresh, trainer = Blocks(), evaluator(callback(passes=3, grow=0.5))
    trainer.test(fresh, verbose=False)
    trainer.save_checkpoint("untrained.ckpt")
    trainer.test(fresh, ckpt_path="untrained.ckpt", weights_only=True, verbose=False)
    assert fresh.passes == [[3]] * 2


def test_it_logs_the_passes():
    trainer = fit(Blocks(), callback(passes=3))
    assert trainer.logged_metrics["tying/passes"] == 3


def test_it_is_applied_once_and_to_each_run_of_blocks():
    model = Blocks()
    looping = Looping(["blocks.[01]", "encoder.0"], passes=2, start=0.25, grow=0.5)
    looping = Looping("blocks.[01]", passes=2, start=0.25, grow=0.5)
    assert not looping.is_applied(model)
    assert looping.apply(model) == Looping("blocks.[01]", passes=2, start=0.25, grow=0.5).apply(model) == 1
    assert looping.is_applied(model)
    assert looping.describe(model) == (
        "2 passes through blocks.0 to blocks.1, from 0.25 of training on, one more after each 0.5"
    )
    other = Looping("blocks.3", passes=4)
    assert not other.is_applied(model)
    assert other.apply(model) == 1
    assert other.describe(model) == "4 passes through blocks.3"
    fit(model, other, looping)
    assert [(made.names, made.passes) for made in loops_in(model)] == [
        (("blocks.0", "blocks.1"), 2),
        (("blocks.3",), 4),
    ]
    assert unloop(model) == 2
    assert not looping.is_applied(model)
    fit(model, callback(passes=3))
    assert [made.names for made in loops_in(model)] == [("blocks.1", "blocks.2")]


def test_checkpoints_of_the_mixin_load_with_the_passes_of_training(tmp_path):
    class Growing(LoopingMixin, Blocks):
        looping = {"blocks": "blocks.[12]", "passes": 4, "start": 0.25, "grow": 0.25, "per_pass": "norm"}  # noqa: RUF012

    model = Growing()
    fit(model, Stop(), max_epochs=1, data=Resumable()).save_checkpoint(tmp_path / "a.ckpt")
    loaded = Growing.load_from_checkpoint(tmp_path / "a.ckpt")
    x = torch.randn(3, 6)
    assert torch.equal(loaded.eval().blocks(x), model.eval().blocks(x))
    assert [made.passes for made in loops_in(loaded)] == [2]
    evaluator().test(loaded, verbose=False)
    assert loaded.passes == [[2]]
    with pytest.raises(RuntimeError, match=r"needs Looping of tying\.mixins\.LoopingMixin"):
        Blocks.load_from_checkpoint(tmp_path / "a.ckpt")
    export(tmp_path / "a.ckpt", tmp_path / "a.pt", [], lambda configs: None)
    assert [*torch.load(tmp_path / "a.pt", weights_only=True)] == [*model.state_dict()]


def test_bake_says_that_weights_alone_do_not_repeat_blocks(tmp_path, capsys):
    for looping, said in ((callback(), True), (callback(passes=1), False)):
        fit(Blocks(), looping, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
        export(tmp_path / "a.ckpt", tmp_path / "a.pt", [], lambda configs: None)
        note = "Note: the file holds only weights, trained with 2 passes (Looping{'blocks': 'blocks.[12]'}). A plain"
        assert (note in capsys.readouterr().out) == said


BRANCH = "blocks.1.branch.1.weight"
OTHERS = {
    "HardTying": lambda: HardTying([f"{BRANCH} ~ blocks.2.branch.1.weight"]),
    "WeightHashing": lambda: WeightHashing([BRANCH], 0.5),
    "LowRankWeights": lambda: LowRankWeights([BRANCH], 2),
    "ResidualMerging": lambda: ResidualMerging("blocks.*", StochasticDepth(0.5)),
    "SoftTying": lambda: SoftTying([f"{BRANCH} ~ blocks.2.branch.1.weight"], strength=0.1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_callbacks_act_on_the_blocks_in_any_order(name):
    ends = []
    for order in (1, -1):
        callbacks = [callback(start=0.25, per_pass="norm"), OTHERS[name]()]
        fit(model := Blocks(), *callbacks[::order], max_epochs=1)
        assert audit(model).problems == ()
        assert [made.passes for made in loops_in(model)] == [2]
        ends.append(dict(model.state_dict()))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    fit(alone := Blocks(), callback(start=0.25, per_pass="norm"), max_epochs=1)
    assert not torch.equal(alone.decoder[2].weight, model.decoder[2].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"passes": 0}, "passes must be an integer, 1 or more, not 0"),
        ({"passes": 2.5}, r"passes must be an integer, 1 or more, not 2\.5"),
        ({"start": 1.0}, r"start must be in \[0, 1\), not 1\.0"),
        ({"start": "late"}, r"start must be in \[0, 1\), not 'late'"),
        ({"per_pass": "norms"}, "per_pass, if given, must be 'norm' or 'scale', not 'norms'"),
        ({"grow": 0.0}, r"grow must be in \(0, 1\), not 0\.0"),
        (
            {"passes": 4, "start": 0.5, "grow": 0.3},
            r"pass 4 would begin at start \+ \(passes - 2\) \* grow = 1\.1 of training, not before its end: lower start, ",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        callback(**arguments)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("blocks.[02]", r"blocks: 'blocks\.0' and 'blocks\.2' are not consecutive: 'blocks\.1' between them"),
        ("block.*", r"blocks: pattern 'block\.\*' matches no module"),
        ("blocks.1.branch", r"blocks: the Sequential 'blocks\.1\.branch' is in a loop already, or overlaps with one"),
    ],
)
def test_blocks_that_are_no_loop(blocks, message):
    with pytest.raises(ConfigurationError, match=f"^Looping: {message}"):
        fit(Blocks(), callback(), Looping(blocks, passes=2))


def test_fractions_need_the_length_of_training():
    message = r"^Looping: start=0\.25 needs the length of training, which is unknown: set the trainer's max_steps$"
    with pytest.raises(ConfigurationError, match=message):
        fit(Blocks(), callback(start=0.25), max_epochs=-1)
    fit(Blocks(), callback(start=0.25), max_epochs=-1, max_steps=2)
    fit(model := Blocks(), callback(passes=3), Stop(), max_epochs=-1)  # from the first step on
    assert model.passes == [[3]] * 3

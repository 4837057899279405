"""Weights pulled to where earlier tasks need them."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from toys import same, train

from tying.callbacks import AnchorTying, Fisher, Importance, Synaptic
from tying.cli.inspect import inspect
from tying.data.resuming import ResumableLoader
from tying.errors import ConfigurationError, NonFiniteError
from tying.mixins import AnchorTyingMixin
from tying.soft import fisher_diagonal

S = ["body.**"]
COUNT, FEATURES, CLASSES = 24, 16, 4


class Net(pl.LightningModule):
    """A small classifier with dropout, in float64."""

    def __init__(self, optimizer=None, penalty=None, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 4))
            self.head = nn.Linear(4, CLASSES)
        self.double()
        self.make_optimizer = optimizer or (lambda parameters: SGD(parameters, lr=0.2, momentum=0.9))
        self.penalty = penalty

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss if self.penalty is None else loss + self.penalty(self)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Task(ResumableLoader):
    """Batches of classes around centers, in an order of each epoch's own; each task permutes the features."""

    def __init__(self, number, dtype=torch.float64, epoch=0):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.y = torch.arange(COUNT) % CLASSES
        noise = torch.randn(COUNT, FEATURES, generator=generator)
        x = 2 * torch.randn(CLASSES, FEATURES, generator=generator)[self.y] + noise
        self.x = x[:, torch.randperm(FEATURES, generator=generator.manual_seed(number))].to(dtype)
        self._place["epoch"] = epoch

    def __len__(self):
        return 6

    def __iter__(self):
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(self._place["epoch"])).view(6, 4)
        for batch in self._numbers(6):
            yield self.x[order[batch]], self.y[order[batch]]


def learn(model, callback, number, **arguments):
    callbacks = [callback] if isinstance(callback, pl.Callback) else callback
    return train(model, callbacks, data=Task(number, next(model.parameters()).dtype), **{"max_epochs": 2} | arguments)


@dataclass(frozen=True)
class Given(Importance):
    """Importances that a test chooses: one number for all weights."""

    value: float = 1.0
    decay: float = 0.0

    def measure(self, trainer, module, weights, path):
        return {name: torch.full_like(weight, self.value) for name, weight in weights.items()}


def anchors_file(model, importances, path="earlier.ckpt"):
    """A checkpoint as the callback writes it."""
    anchors = {name: w.detach().clone() for name, w in model.named_parameters() if name.startswith("body")}
    state = {"steps": {0: 12}, "anchors": anchors, "importances": importances, "tasks": 1, "path": {}}
    torch.save({"state_dict": model.state_dict(), "callbacks": {"AnchorTying{'name': None}": state}}, path)
    return path


def random_importances():
    torch.manual_seed(5)
    return {name: torch.rand_like(w) for name, w in Net().named_parameters() if name.startswith("body")}


@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
def test_importance_one_is_l2_sp_bitwise(update):
    """The first task is free, and the second begins at the anchor."""
    ours, free, anchored = Net(), Net(), Net()
    callback = AnchorTying(S, 0.3, update=update, importance=Given(1.0))
    learn(ours, callback, 0)
    learn(free, [], 0)
    assert same(ours, free)
    learn(ours, callback, 1)
    learn(anchored, [], 0)
    learn(anchored, AnchorTying(S, 0.3, update=update), 1)
    learn(free, [], 1)
    assert same(ours, anchored)
    assert not same(ours, free)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_equal_the_loss(accumulate, clip):
    importances, start = random_importances(), Net(seed=1)
    anchors = dict(start.named_parameters())

    def by_hand(model):
        weights = {name: w for name, w in model.named_parameters() if name in importances}
        return 0.7 / 2 * sum((importances[n] * (w - anchors[n].detach()).square()).sum() for n, w in weights.items())

    ours, reference = Net(), Net(penalty=by_hand)
    callback = AnchorTying(S, 0.7, anchor=anchors_file(start, importances), importance=Given())
    arguments = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer = learn(ours, callback, 0, **arguments)
    learn(reference, [], 0, **arguments)
    for weight, expected in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)
    logged = float(trainer.callback_metrics["tying/penalty"])
    assert logged == pytest.approx(float(by_hand(ours).detach()), rel=1e-5)


def test_no_importance_is_free_and_infinite_strength_freezes_the_rest():
    importances, start = random_importances(), Net(seed=1)
    importances["body.0.weight"][0] = 0
    callback = AnchorTying(S, math.inf, anchor=anchors_file(start, importances), update="proximal", importance=Given())
    model = Net()
    learn(model, callback, 0)
    anchored = {name: w for name, w in start.named_parameters() if name in importances}
    for name, weight in model.named_parameters():
        if name in importances:
            assert torch.equal(weight == anchored[name], importances[name] > 0)


@pytest.mark.parametrize(("labels", "decay"), [("sampled", 1.0), ("given", 0.25)])
def test_the_fisher_information_of_all_tasks_is_added(labels, decay):
    """``F ← γF + F_new``, measured on the first batches at the end of each fit; the weights become the anchor."""
    model, callback = Net(), AnchorTying(S, 1.0, importance=Fisher(3, labels, decay))
    expected = {}
    for number in (0, 1):
        trainer = learn(model, callback, number)
        batches = [batch for batch, _ in zip(Task(number, epoch=1), range(3), strict=False)]
        new = fisher_diagonal(model, batches, S, labels, seed=trainer.global_step)
        expected = {name: value + decay * expected.get(name, 0) for name, value in new.items()}
        state = callback.state_dict()
        assert state["tasks"] == number + 1
        assert all(torch.equal(state["anchors"][name], model.get_parameter(name)) for name in expected)
        for name, value in expected.items():
            assert torch.equal(state["importances"][name], value)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (4, 0.2)])
def test_the_path_is_that_of_the_loss_alone(update, accumulate, clip):
    """``ω = −Σ g Δw``, with the gradient of the loss without penalty and clipping, and the whole change."""
    importances, start = random_importances(), Net(seed=1)
    callback = AnchorTying(
        S, 0.7, anchor=anchors_file(start, importances), update=update, importance=Synaptic(damping=0.3, decay=0.5)
    )
    model = Net(lambda parameters: AdamW(parameters, lr=0.01))
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    path = {name: torch.zeros_like(w) for name, w in before.items()}
    moments = []

    class Watch(pl.Callback):
        """Computes gradients anew, of the mean over the window."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.window = [*self.window, batch] if batch_idx % accumulate else [batch]
            self.weights = {name: w.detach().clone() for name, w in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == len(moments):
                return
            moments.append(batch_idx)
            now = Net()
            now.load_state_dict(self.weights)
            for x, y in self.window:
                (F.cross_entropy(now(x), y) / accumulate).backward()
            for name, w in pl_module.named_parameters():
                path[name] -= now.get_parameter(name).grad * (w.detach() - self.weights[name])

    learn(model, [Watch(), callback], 0, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    assert len(moments) == 2 * math.ceil(6 / accumulate)
    for name, value in callback.state_dict()["importances"].items():
        change = model.get_parameter(name).detach() - before[name]
        expected = 0.5 * importances[name] + path[name].clamp(min=0) / (change.square() + 0.3)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def importance_of(kind):
    return Fisher(2) if kind == "Fisher" else Synaptic()


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks",
    "ignore:AnchorTying. training stopped before the end of its last epoch",  # from the last step, nothing of it is left
)
@pytest.mark.parametrize(("kind", "update"), [("Fisher", "gradient"), ("Synaptic", "proximal")])
def test_killed_within_and_between_tasks(kind, update, tmp_path):
    """A run that goes on from any checkpoint of two tasks ends with the same weights and importances, bitwise."""

    def callback(**anchor):
        return AnchorTying(S, 0.5, update=update, importance=importance_of(kind), **anchor)

    def every(number):
        return ModelCheckpoint(tmp_path / str(number), "{step}", save_top_k=-1, every_n_train_steps=1)

    def last(number):
        return ModelCheckpoint(tmp_path / f"last{number}", "last")

    whole, watched = Net(), callback()
    for number in (0, 1):
        learn(whole, [watched, every(number), last(number)], number, enable_checkpointing=True)
    ends = watched.state_dict()
    for number in (0, 1):
        points = sorted((tmp_path / str(number)).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        assert len(points) == 12
        for point in [points[3 + number], points[11 - 6 * number]]:  # within an epoch, and at its end
            model, resumed = Net(seed=7), callback()
            learn(model, resumed, number, ckpt_path=point)
            if number == 0:
                learn(model, resumed, 1)
            assert same(model, whole)
            assert all(torch.equal(w, ends["importances"][n]) for n, w in resumed.state_dict()["importances"].items())
    between = tmp_path / "last0" / "last.ckpt"
    model, resumed = Net(seed=7), callback(anchor=str(between))
    model.load_state_dict(torch.load(between, weights_only=True)["state_dict"])
    learn(model, resumed, 1)
    assert same(model, whole)
    final = torch.load(tmp_path / "last1" / "last.ckpt", weights_only=True)["callbacks"]["AnchorTying{'name': None}"]
    assert all(torch.equal(w, final["importances"][n]) for n, w in resumed.state_dict()["importances"].items())
    assert final["tasks"] == 2
    assert final["path"] == {}


@pytest.mark.parametrize(
    ("kind", "precision"), [("Fisher", "bf16-mixed"), ("Fisher", "bf16-true"), ("Synaptic", "bf16-true")]
)
def test_half_precision(kind, precision):
    """Importances are float32, and near those of full precision."""
    ends = []
    for chosen in ("32-true", precision):
        model, callback = Net().float(), AnchorTying(S, 0.5, importance=importance_of(kind))
        for number in (0, 1):
            learn(model, callback, number, precision=chosen)
        ends.append(callback.state_dict()["importances"])
    assert all(value.dtype == torch.float32 for value in ends[1].values())
    full, half = (torch.cat([value.flatten() for value in end.values()]) for end in ends)
    assert float(F.cosine_similarity(full, half, dim=0)) > 0.9


def test_forgetting():
    """EWC and SI keep more of the first task than plain training, and still learn the second."""

    def losses(callback):
        model = Net(lambda parameters: SGD(parameters, lr=0.2)).float()
        for number in (0, 1):
            learn(model, callback or [], number, max_epochs=8)
        tasks = (Task(number, torch.float32) for number in (0, 1))
        with torch.no_grad():
            return [float(F.cross_entropy(model(task.x), task.y)) for task in tasks]

    def anchoring(strength, importance):
        return AnchorTying(["**"], strength, update="proximal", importance=importance)

    plain, *others = (losses(c) for c in [None, anchoring(100.0, Fisher(6)), anchoring(3.0, Synaptic())])
    assert all(first < plain[0] / 3 and second < 0.1 for first, second in others), (plain, others)


def test_importances_are_shown(caplog, capsys, tmp_path):
    """The most important layers first: in the log, a picture, and what inspect prints, also of a checkpoint."""

    @dataclass(frozen=True)
    class Layers(Importance):
        def measure(self, trainer, module, weights, path):
            return {name: torch.full_like(w, 5.0 if "3" in name else 0.25) for name, w in weights.items()}

    model, text = Net(), "mean importance by layer: body.3 5, body.0 0.25"
    trainer = learn(model, AnchorTying(S, 1.0, name="x", importance=Layers()), 0)
    assert f"AnchorTying x: after 1 task: {text}" in caplog.text
    assert (tmp_path / "importance_x.png").stat().st_size > 5000
    trainer.save_checkpoint("a.ckpt")
    learn(Net(), AnchorTying(S, 1.0, name="x", anchor="a.ckpt", importance=Layers()), 1)
    assert f"strength 1, anchor a.ckpt; task 2: {text}" in caplog.text
    for anchor, checkpoint in [("a.ckpt", None), ("initial", tmp_path / "a.ckpt")]:
        callback = AnchorTying(S, 1.0, name="x", anchor=anchor, importance=Layers())
        capsys.readouterr()
        inspect(Net(), [callback], checkpoint)
        assert f"AnchorTying x: {text}" in capsys.readouterr().out.replace("\n", " ")
        inspect(Net(), [callback], checkpoint, json=True)
        assert json.loads(capsys.readouterr().out)["importances"] == {"AnchorTying x": {"body.0": 0.25, "body.3": 5.0}}


def test_the_head_is_what_its_patterns_match():
    model = Net()
    assert [*AnchorTying(S, 1.0, 0.1).affected(model)][4:] == ["head.weight", "head.bias"]
    ours = AnchorTying(["body.0.*"], 1.0, 0.5, head=["**.weight", "!body.3"])
    assert [*ours.affected(model)] == ["body.0.weight", "body.0.bias", "head.weight"]
    penalty = Net(penalty=lambda net: 0.25 * net.head.weight.square().sum())
    learn(model, AnchorTying(["body.0.*"], 0.0, 0.5, head=["head.weight"]), 0)
    learn(penalty, [], 0)
    for weight, expected in zip(model.parameters(), penalty.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)


def test_a_mixin_pulls_in_the_next_fit():
    class Anchored(AnchorTyingMixin, Net):
        anchor_tying: ClassVar = {"parameters": S, "strength": 0.5, "importance": {"class_path": "Fisher", "init_args": {"batches": 2}}}  # fmt: skip

    mixed, plain, callback = Anchored(), Net(), AnchorTying(S, 0.5, importance=Fisher(2))
    for number in (0, 1):
        learn(mixed, [], number)
        learn(plain, callback, number)
    assert same(mixed, plain)


def test_training_that_ends_early():
    """An epoch after which another callback stops training is not known to be the last when it ends."""

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    callback = AnchorTying(S, 1.0, importance=Fisher(2))
    with pytest.warns(
        UserWarning, match="AnchorTying: training stopped before the end of its last epoch: the importances are"
    ):
        learn(Net(), [callback, Stop()], 0)
    assert callback.state_dict()["tasks"] == 1
    learn(Net(), [Stop(), callback], 1)
    assert callback.state_dict()["tasks"] == 2


@pytest.mark.parametrize(
    ("saving", "said"),
    [
        ([{}], False),
        ([{"save_on_train_epoch_end": False}], True),
        ([{"every_n_train_steps": 6, "save_last": True}], True),
        ([{"every_n_train_steps": 6, "save_on_train_epoch_end": True}], True),  # Lightning saves a step once
        ([{"every_n_train_steps": 6}, {"save_on_train_epoch_end": True}], False),
    ],
)
def test_a_fit_whose_checkpoints_lack_its_importances(saving, said, tmp_path, recwarn):
    saves = [ModelCheckpoint(tmp_path / str(number), "{step}", **options) for number, options in enumerate(saving)]
    learn(Net(), [AnchorTying(S, 1.0, importance=Synaptic()), *saves], 0, enable_checkpointing=True)
    paths = [*tmp_path.rglob("*.ckpt")]
    states = [torch.load(path, weights_only=True)["callbacks"]["AnchorTying{'name': None}"] for path in paths]
    assert any(state["importances"] for state in states) != said
    message = "AnchorTying: no checkpoint has the importances of this fit"
    assert any(str(warning.message).startswith(message) for warning in recwarn) == said


class Detached(Net):
    """Its logits do not depend on its body."""

    def forward(self, x):
        return self.head(torch.ones_like(self.body(x)))


class Scalar(Net):
    """Its forward returns no logits."""

    def forward(self, x):
        return super().forward(x).sum()

    def training_step(self, batch, batch_idx):
        return self(batch[0])


class Blind(Net):
    """It has no labels."""

    def training_step(self, batch, batch_idx):
        return self(batch).square().sum()


def written(**state):
    torch.save({"state_dict": Net().state_dict(), "callbacks": {"AnchorTying{'name': None}": state}}, "w.ckpt")
    return "w.ckpt"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fisher(0), "Fisher's batches must be 1 or more, not 0"),
        (lambda: Fisher(1, "true"), "Fisher's labels must be 'sampled' or 'given', not 'true'"),
        (lambda: Fisher(1, decay=1.5), r"Fisher's decay must be in \[0, 1\], not 1.5"),
        (lambda: Synaptic(damping=0.0), "Synaptic's damping must be above 0, not 0.0"),
        (lambda: AnchorTying(S, 1.0, importance="fisher"), r"importance must be Fisher\(batches=...\), Synaptic\(\) or None, not 'fisher'"),
        (lambda: AnchorTying(S, 1.0, importance={"batches": 3}), "importance cannot be {'batches': 3}: .*; write class_path, such as Fisher, Synaptic"),
        (lambda: AnchorTying(S, 1.0, head=["head.*"]), r"head=\['head.\*'\] needs head_strength above 0"),
        (lambda: AnchorTying(S, 1.0, 0.1, head="head.*"), r"head must be a list of patterns; write \['head.\*'\]"),
        (lambda: learn(Net(), AnchorTying(S, 1.0, 0.1, head=["haed.*"]), 0), r"AnchorTying: .*'haed\.\*' matches no"),
        (lambda: learn(Detached(), AnchorTying(S, 1.0, importance=Fisher(2)), 0), r"AnchorTying: the importance of all of body.0.weight, .* is zero throughout, and would never pull"),
        (lambda: learn(Net(lambda w: SGD(w, lr=0.0)), AnchorTying(S, 1.0, importance=Synaptic()), 0), "is zero throughout"),
        (lambda: learn(Scalar(), AnchorTying(S, 1.0, importance=Fisher(2)), 0), r"AnchorTying: importances need log p\(y\|x\), and the model's forward returns a Tensor of shape \(\): it must return logits"),
        (lambda: train(Blind(), [AnchorTying(S, 1.0, importance=Fisher(2, "given"))], data=DataLoader(torch.zeros(4, FEATURES).double())), "AnchorTying: labels='given' needs integer labels of shape"),
        (lambda: learn(Net(), AnchorTying(S, 1.0, anchor=written(steps={}), importance=Fisher(2)), 0), "anchor: w.ckpt has no importances of AnchorTying: they are measured when a fit ends. Train the earlier task to its end"),
        (lambda: learn(Net(), AnchorTying(S, 1.0, anchor=written(anchors={}, importances={"a": torch.ones(1)}), importance=Fisher(2)), 0), "anchor: w.ckpt lacks body.0.weight"),
        (lambda: inspect(Net(), [AnchorTying(S, 1.0, anchor=written(steps={}), importance=Fisher(2))]), "has no importances of AnchorTying"),
        (lambda: learn(Net(), [AnchorTying(S, 1.0, importance=Fisher(2)), WeightAveraging()], 0), "AnchorTying with importance cannot be combined with WeightAveraging"),
        (lambda: learn(Net(), AnchorTying(S, 1.0, importance=Given(math.nan)), 0), "AnchorTying: the importance of some weight is NaN or infinite"),
        (lambda: learn(Net(lambda w: torch.optim.LBFGS(w)), AnchorTying(S, 1.0, importance=Synaptic()), 0), "Synaptic .* LBFGS"),
    ],
)  # fmt: skip
def test_mistakes(make, message):
    with pytest.raises((ConfigurationError, NonFiniteError), match=message):
        make()


def test_mistakes_of_the_model_are_found_by_the_first_batch():
    model = Scalar()
    with pytest.raises(ConfigurationError, match="it must return logits"):
        learn(model, AnchorTying(S, 1.0, importance=Fisher(2)), 0)
    assert same(model, Net())

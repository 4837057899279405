"""Weights pulled to where they once were."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch.optim import SGD
from toys import Toy, batches, largest_difference, same, train

from tying.callbacks import AnchorTying, HardTying

S = ["encoder.**"]


def sgd(parameters):
    return SGD(parameters, lr=0.1)


@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("head", [0.0, 0.3])
def test_gradients_equal_the_loss(accumulate, clip, head):
    start = [w.detach().clone() for w in Toy().double().encoder.parameters()]

    def by_hand(model):
        moved = zip(model.encoder.parameters(), start, strict=True)
        anchored = sum((w - fixed).square().sum() for w, fixed in moved)
        return 0.2 / 2 * anchored + head / 2 * sum(w.square().sum() for w in model.decoder.parameters())

    ours, reference = Toy().double(), Toy(penalty=by_hand).double()
    arguments = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "precision": "64-true"}
    trainer = train(ours, [AnchorTying(S, strength=0.2, head_strength=head)], **arguments)
    train(reference, **arguments)
    assert largest_difference(ours, reference) < 1e-12
    assert float(trainer.callback_metrics["tying/penalty"]) == pytest.approx(float(by_hand(ours).detach()), rel=1e-5)


def test_the_first_step_is_free():
    ours, untied = Toy(sgd), Toy(sgd)
    train(ours, [AnchorTying(S, strength=10.0)], data=batches(1), max_epochs=1)
    train(untied, data=batches(1), max_epochs=1)
    assert same(ours, untied)


@pytest.mark.parametrize("update", ["gradient", "decoupled"])
def test_an_anchor_at_zero_is_weight_decay(update):
    torch.save({name: torch.zeros_like(w) for name, w in Toy().state_dict().items()}, "zeros.pt")
    ours, decayed = Toy(sgd).double(), Toy(lambda p: SGD(p, lr=0.1, weight_decay=0.2)).double()
    train(ours, [AnchorTying(["**"], strength=0.2, anchor="zeros.pt", update=update)], precision="64-true")
    train(decayed, precision="64-true")
    if update == "gradient":
        assert largest_difference(ours, decayed) < 1e-12
    else:  # decay after the step, not at its beginning
        assert 0 < largest_difference(ours, decayed) < 0.02


def test_infinite_strength_freezes():
    ours, frozen = Toy(), Toy()
    frozen.encoder.requires_grad_(False)
    train(ours, [AnchorTying(S, strength=math.inf, update="proximal")])
    train(frozen)
    assert same(ours, frozen)


def test_the_proximal_step():
    model = Toy(lambda p: SGD(p, lr=0.0)).double()
    torch.save(Toy(seed=1).state_dict(), "other.pt")
    away = {name: w.detach().double() for name, w in Toy(seed=1).named_parameters()}
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    model.make_optimizer = lambda p: SGD(p, lr=0.1)
    model.loss = lambda batch: 0.0 * next(model.parameters()).sum()
    callback = AnchorTying(S, strength=3.0, anchor="other.pt", update="proximal")
    trainer = train(model, [callback], max_epochs=1)
    for name, weight in model.encoder.named_parameters(prefix="encoder"):
        expected = away[name] + (before[name] - away[name]) / (1 + 0.1 * 3.0) ** trainer.global_step
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
def test_the_initial_anchor_outlives_a_resume(update):
    def callback():
        return AnchorTying(S, strength=0.5, update=update)

    whole, resumed = Toy(), Toy()
    train(whole, [callback()], max_epochs=4)
    train(Toy(), [callback()], max_epochs=2).save_checkpoint("a.ckpt")
    train(resumed, [callback()], max_epochs=4, ckpt_path="a.ckpt")
    assert same(whole, resumed)
    torch.load("a.ckpt", weights_only=True)


def test_checkpoints_of_lightning_are_anchors_too():
    train(Toy(seed=1), max_epochs=1).save_checkpoint("a.ckpt")
    anchored = Toy(seed=1)
    anchored.load_state_dict(torch.load("a.ckpt")["state_dict"])
    ours = Toy()
    train(ours, [AnchorTying(S, strength=math.inf, anchor="a.ckpt", update="proximal")], max_epochs=1)
    assert same(ours.encoder, anchored.encoder)


def test_an_anchor_that_nothing_leaves_is_told():
    model = Toy(lambda p: SGD(p, lr=0.0))
    with pytest.warns(UserWarning, match="after 10 steps every anchored weight is still exactly its anchor"):
        train(model, [AnchorTying(S, strength=0.1)], max_epochs=2)


def test_the_stability_bound_of_an_anchor_is_twice_that_of_a_pair():
    train(Toy(sgd), [AnchorTying(S, strength=19.0, update="decoupled")], max_epochs=1)
    with pytest.warns(UserWarning, match=r"lr · strength = 2.1 is past the stability bound 2/\(m − 1\) = 2"):
        train(Toy(sgd), [AnchorTying(S, strength=21.0, update="decoupled")], max_epochs=1)


def file(content, path="a.pt"):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: AnchorTying(S, strength=-1.0), "strength must be 0 or more, not -1.0"),
        (lambda: AnchorTying(S, 1.0, head_strength=math.nan), "head_strength must be 0 or more, not nan"),
        (lambda: AnchorTying(S, 1.0, head_strength=math.inf), "head_strength=inf needs update='proximal'"),
        (lambda: AnchorTying(S, 1.0, update="gradeint"), "update must be 'gradient', 'decoupled' or 'proximal', not 'gradeint'"),
        (lambda: train(Toy(), [AnchorTying(["encodr.**"], 1.0)]), r"encodr\.\*\*' matches no parameter"),
        (lambda: train(Toy(), [AnchorTying(S, 1.0, anchor="none.pt")]), "'initial', the weights at the start\\): there is no file none.pt"),
        (lambda: train(Toy(), [AnchorTying(S, 1.0, anchor=file({"encoder.0.weight": torch.zeros(5, 6)}))]), r"a\.pt lacks encoder\.0\.bias, encoder\.2\.weight, encoder\.2\.bias"),
        (lambda: train(Toy(), [AnchorTying(["encoder.0.*"], 1.0, anchor=file({"encoder.0.weight": torch.zeros(6, 5), "encoder.0.bias": torch.zeros(4)}))]), r"'encoder\.0\.weight' is \(6, 5\) there and \(5, 6\) here, 'encoder\.0\.bias' is \(4,\) there and \(5,\) here"),
        (lambda: train(Toy(), [AnchorTying(S, 1.0, anchor=file([1]))]), "lacks encoder"),
    ],
)  # fmt: skip
def test_mistakes(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_a_text_is_no_checkpoint(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt is not a checkpoint"):
        train(Toy(), [AnchorTying(S, 1.0, anchor="a.txt")])


def test_an_anchor_through_a_relation_is_refused():
    tie = HardTying(["encoder.0.weight ~ decoder.2.weight | o i -> i o"])
    torch.save(Toy().state_dict(), "a.pt")
    with pytest.raises(ValueError, match=r"decoder\.2\.weight: tied through a relation: anchor the source of the tie"):
        train(Toy(), [tie, AnchorTying(["decoder.2.weight"], 1.0, anchor="a.pt")])
    train(Toy(), [tie, AnchorTying(["encoder.0.weight"], 1.0, anchor="a.pt")], max_epochs=1)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen")
def test_a_backbone_that_is_unfrozen_later():
    class Finetuned(Toy):
        def __init__(self):
            super().__init__()
            self.backbone = self.encoder

    def run(*callbacks):
        model = Finetuned()
        before = model.encoder[0].weight.detach().clone()
        model.make_optimizer = lambda _: SGD(model.decoder.parameters(), lr=0.1)
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.1, verbose=False)
        seen = []

        class Watch(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                seen.append(float((pl_module.encoder[0].weight - before).detach().norm()))

        train(model, [finetuning, *callbacks, Watch()], max_epochs=5)
        return seen

    free, held = run(), run(AnchorTying(["encoder.**"], 2.0))
    assert free[:2] == held[:2] == [0.0, 0.0]
    assert 0 < held[4] < free[4] / 2

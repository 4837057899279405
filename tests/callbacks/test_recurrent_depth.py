"""Stages of equal blocks that are trained as recurrent blocks."""

import pytest
import torch
from torch import nn
from toys import Toy, same, train

from tying import ConfigurationError
from tying.callbacks import (
    HardTying,
    LowRankWeights,
    RandomState,
    RecurrentDepth,
    ResidualMerging,
    SoftTying,
    WeightHashing,
)
from tying.depth import Recurrent, Residual, StochasticDepth, recur, unrecur
from tying.hard import audit
from tying.mixins import RecurrentDepthMixin


class Blocks(Toy):
    def __init__(self, lazily=False, **options):
        super().__init__(**options)
        self.blocks = None if lazily else self.make_blocks()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def make_blocks(self):
        torch.manual_seed(1)
        branches = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(4)]
        return nn.Sequential(*map(Residual, branches), nn.Linear(6, 6))

    def configure_model(self):
        if self.blocks is None:
            self.blocks = self.make_blocks()

    def loss(self, batch):
        return super().loss([self.blocks(batch[0])])


class Inherits(RecurrentDepthMixin, Blocks):
    recurrent_depth = {"blocks": "blocks.{0..3}"}  # noqa: RUF012


def callback(**arguments):
    return RecurrentDepth("blocks.{0..3}", **arguments)


@pytest.mark.parametrize("lazily", [False, True])
def test_callback_mixin_and_function_train_alike(lazily):
    by_callback, by_mixin, by_function = Blocks(lazily), Inherits(lazily), Blocks()
    recur(by_function, "blocks.{0..3}")
    train(by_callback, [callback()])
    train(by_mixin)
    train(by_function)
    assert same(by_callback, by_function)
    assert same(by_mixin, by_function)
    assert [type(module) for module in by_callback.blocks] == [Recurrent, nn.Linear]
    assert not same(by_callback.blocks, recurred().blocks)


def recurred():
    model = Blocks()
    callback().apply(model)
    return model


def test_it_is_applied_once_and_to_the_whole_of_its_pattern():
    model, transform = Blocks(), callback(steps=3)
    names = transform.apply(model)
    assert transform.apply(model) == callback(steps=3).apply(model) == names
    assert transform.describe(model) == "1 recurrent block: blocks.0 (3 steps)"
    assert {*transform.affected(model)} == {*names}
    assert [*transform.affected(Blocks())] == []
    assert callback().is_applied(model) is False
    unrecur(model)
    assert transform.is_applied(model) is False


def test_the_optimizer_has_each_weight_once_and_a_run_resumes_bitwise(tmp_path):
    once = Blocks()
    trainer = train(once, [callback(), RandomState()], max_epochs=2)
    parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(parameters) == len({*parameters}) == len([*Toy().parameters()]) + 2 + 4 * 2 + 2
    train(Blocks(), [callback(), RandomState()], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    resumed = Blocks()
    train(resumed, [callback(), RandomState()], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert same(resumed, once)
    assert len({id(block.branch[0].weight) for block in resumed.blocks[0].blocks}) == 1


def test_checkpoints_of_the_mixin_load(tmp_path):
    model = Inherits()
    train(model).save_checkpoint(tmp_path / "a.ckpt")
    assert same(Inherits.load_from_checkpoint(tmp_path / "a.ckpt"), model)
    with pytest.raises(RuntimeError, match=r"needs RecurrentDepth of tying\.mixins\.RecurrentDepthMixin"):
        Blocks.load_from_checkpoint(tmp_path / "a.ckpt")


FURTHER = {
    "HardTying": lambda: HardTying(["blocks.0.blocks.0.branch.0.weight ~ blocks.1.weight"]),
    "WeightHashing": lambda: WeightHashing(["blocks.0.blocks.*.branch.0.weight"], 0.5),
    "LowRankWeights": lambda: LowRankWeights(["blocks.0.blocks.0.branch.0.weight"], 2),
    "ResidualMerging": lambda: ResidualMerging("blocks.0", StochasticDepth(0.5)),
    "SoftTying": lambda: SoftTying(["blocks.0.blocks.0.branch.0.weight ~ blocks.1.weight"], strength=0.1),
}


@pytest.mark.parametrize("name", FURTHER)
def test_other_callbacks_act_on_the_recurrent_block(name):
    model, alone = Blocks(), Blocks()
    train(model, [callback(), FURTHER[name]()])
    train(alone, [callback()])
    weights = [block.branch[0].weight for block in model.blocks[0].blocks]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert not torch.equal(weights[0], alone.blocks[0].blocks[0].branch[0].weight)
    assert audit(model).problems == ()


def test_ties_come_after():
    ties = HardTying(["blocks.1.branch.0.weight ~ blocks.4.weight"])
    with pytest.raises(
        ConfigurationError, match=r"(?s)RecurrentDepth.*HardTying.*are tied, and their names would change"
    ):
        train(Blocks(), [ties, callback()])


def test_mistakes():
    with pytest.raises(ConfigurationError, match="steps must be an integer, 1 or more, not 0"):
        callback(steps=0)
    with pytest.raises(ConfigurationError, match=r"^RecurrentDepth: blocks: 'blocks\.3' is a Residual and 'blocks\.4'"):
        train(Blocks(), [RecurrentDepth("blocks.[34]")])
    with pytest.raises(ConfigurationError, match=r"^RecurrentDepth: blocks: 'blocks\.3' has no other block beside it"):
        train(Blocks(), [RecurrentDepth("blocks.3")])
    with pytest.raises(ConfigurationError, match=r"^RecurrentDepth: blocks: 'blocks\.0' is recurrent already"):
        train(recurred(), [RecurrentDepth("blocks.[01]")])


def test_two_callbacks_make_two_stages():
    model = Blocks()
    train(model, [RecurrentDepth("blocks.[23]"), RecurrentDepth("blocks.[01]")])
    assert [type(module) for module in model.blocks] == [Recurrent, Recurrent, nn.Linear]
    assert [RecurrentDepth(f"blocks.{pair}").describe(model) for pair in ("[01]", "[23]")] == [
        "1 recurrent block: blocks.0 (2 steps)",
        "1 recurrent block: blocks.1 (2 steps)",
    ]

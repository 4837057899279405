"""Merges in training runs: by depth, over time, in several forms."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlock
from toys import Toy, batches, same, train

from tying import ConfigurationError
from tying.callbacks import RandomState, ResidualMerging
from tying.depth import Merge, Residual, StochasticDepth, Sum, Swapout, remove_merge, sampled, sampling
from tying.depth.blocks import MergedBlock
from tying.mixins import ResidualMergingMixin
from tying.models import ResNet
from tying.soft import Schedule


class Blocks(Toy):
    def __init__(self, **options):
        super().__init__(**options)
        torch.manual_seed(1)
        self.blocks = nn.Sequential(*(Residual(nn.Linear(6, 6)) for _ in range(4)))

    def loss(self, batch):
        return super().loss([self.blocks(batch[0])])


class Inherits(ResidualMergingMixin, Blocks):
    residual_merging = {"blocks": "blocks.*", "merge": StochasticDepth(0.5)}  # noqa: RUF012


def keeps(model):
    return [block.merge.keep for block in model.blocks]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.875, 0.75, 0.625, 0.5]),
        ("uniform", [0.5] * 4),
        ([1.0, 0.9, 0.8, 0.1], [1.0, 0.9, 0.8, 0.1]),
    ],
)
def test_keeps_by_depth(schedule, expected):
    model = Blocks()
    callback = ResidualMerging("blocks.*", StochasticDepth(0.5), schedule)
    assert callback.apply(model) == 4
    assert callback.apply(model) == 4  # once
    assert keeps(model) == expected


def test_both_probabilities_of_swapout_go_with_depth():
    model = Blocks()
    ResidualMerging("blocks.*", Swapout(0.5, 0.6)).apply(model)
    assert [(block.merge.keep_skip, block.merge.keep_branch) for block in model.blocks] == [
        (0.875, 0.9), (0.75, 0.8), (0.625, 0.7), (0.5, 0.6)
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:the ResidualMerging of Inherits replaces the ResidualMerging of the Trainer")
def test_callback_mixin_and_function_train_alike():
    ends = []
    for model, callbacks in (
        (Blocks(), [ResidualMerging("blocks.*", StochasticDepth(0.5))]),
        (Inherits(), []),
        (Inherits(), [ResidualMerging("blocks.*", StochasticDepth(0.5))]),
    ):
        torch.manual_seed(0)
        train(model, callbacks, max_epochs=2)
        ends.append([p.detach() for p in model.parameters()])
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))
    plain = Blocks()
    torch.manual_seed(0)
    train(plain, max_epochs=2)
    assert not all(torch.equal(a, b) for a, b in zip(ends[0], plain.parameters(), strict=True))


def test_what_is_dropped_over_time(tmp_path):
    seen = []

    class Watches(Blocks):
        def training_step(self, batch, batch_idx):
            seen.append([block.merge.keep_prob("keep") for block in self.blocks])
            return super().training_step(batch, batch_idx)

    def merging():
        return ResidualMerging("blocks.*", StochasticDepth(0.5), "uniform", Schedule(0.0, 1.0, 20))

    model = Watches()
    trainer = train(model, [merging()], max_epochs=3)
    assert [one[0] for one in seen] == [1 - 0.5 * min(step / 20, 1) for step in range(30)]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    seen.clear()
    train(Watches(), [merging()], max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert {one[0] for one in seen} == {0.5}
    fading = ResidualMerging("blocks.*", StochasticDepth(0.5), "uniform", Schedule(1.0, 0.0, 4, unit="epoch"))
    seen.clear()
    trainer = train(model := Watches(), [fading], max_epochs=2)
    assert [one[0] for one in seen] == [0.5] * 10 + [0.625] * 10
    model.test_step = lambda batch, batch_idx: seen.append([block.merge.keep_prob("keep") for block in model.blocks])
    trainer.test(model, [torch.zeros(2, 6)], verbose=False)
    assert seen[-1] == [1.0] * 4


class Watched(Blocks):
    """Notes the factor on drop probabilities at each batch."""

    def __init__(self):
        super().__init__()
        self.scales = []

    def training_step(self, batch, batch_idx):
        self.scales.append(self.blocks[0].merge.drop_scale)
        return super().training_step(batch, batch_idx)


# with 12 steps: the factor at each, and at the end
PRESETS = {"early": [1.0, 0.5, *[0.0] * 10], "late": [*[0.0] * 10, 1.0, 1.0]}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_early_and_late_by_fractions_of_training(preset, accumulated, tmp_path):
    def merging():
        return ResidualMerging("blocks.*", StochasticDepth(0.5), schedule=preset)

    options = {"data": batches(4 * accumulated), "accumulate_grad_batches": accumulated}
    model, expected = Watched(), [scale for scale in PRESETS[preset] for _ in range(accumulated)]
    trainer = train(model, [merging()], max_epochs=3, **options)
    assert model.scales == expected
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    longer = Watched()
    train(longer, [merging()], max_epochs=6, ckpt_path=tmp_path / "a.ckpt", **options)  # of 24 steps
    assert longer.scales == [
        float(preset == "late" and step >= 20) for step in range(12, 24) for _ in range(accumulated)
    ]
    model.test_step = lambda batch, batch_idx: model.scales.append(model.blocks[0].merge.drop_scale)
    trainer.test(model, [torch.zeros(2, 6)], verbose=False)
    assert model.scales[-1] == float(preset == "late")
    loaded = Blocks()
    merging().apply(loaded)
    assert loaded.blocks[0].merge.drop_scale == float(preset == "late")


MERGES = [
    *(StochasticDepth(0.5, mode, scale) for mode in ("batch", "row", "subset", "auto") for scale in ("test", "train")),
    Swapout(0.5, 0.5),
]


@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks")
@pytest.mark.parametrize("merge", MERGES, ids=str)
def test_steps_after_early_stochastic_depth_are_bitwise_plain(merge, tmp_path):
    """They draw nothing, either: a dropout in the model has the same masks."""

    class Random(Blocks):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

        def loss(self, batch):
            return super().loss([nn.functional.dropout(batch[0], 0.25)])

    early = ResidualMerging("blocks.*", merge, schedule="early")
    first = train(Random(), [early, RandomState(), save := SaveAt(0, tmp_path / "a.ckpt")], max_epochs=6)
    ends = []
    for merging in ([ResidualMerging("blocks.*", merge, schedule="early")], []):
        train(model := Random(), [*merging, RandomState()], max_epochs=6, ckpt_path=save.path)  # from the cut-off on
        ends.append(model)
    assert same(*ends)
    assert same(ends[0], first.lightning_module)


def test_early_and_late_need_the_length_of_training():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from batches().dataset

    merging = ResidualMerging("blocks.*", StochasticDepth(0.5), schedule="early")
    message = (
        r"^ResidualMerging: schedule='early' needs the length of training, which is unknown: set the trainer's "
        r"max_steps, or give a tying\.soft\.Schedule with a length$"
    )
    stream = torch.utils.data.DataLoader(Stream(), batch_size=4)
    halving = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    for options in ({"max_epochs": -1}, {"data": stream}, {"callbacks": [merging, halving]}):
        with pytest.raises(ConfigurationError, match=message):
            train(Blocks(), **{"callbacks": [merging]} | options)
    train(Blocks(), [merging], data=stream, max_steps=6)
    assert merging.schedule == "early"


class SaveAt(pl.Callback):
    def __init__(self, epoch, path):
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def test_accumulation_clipping_and_a_resume_are_bitwise(tmp_path):
    def run(*callbacks, ckpt_path=None):
        model = Blocks()
        torch.manual_seed(0)
        own = [ResidualMerging("blocks.*", StochasticDepth(0.5)), RandomState(), *callbacks]
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 4}
        train(model, own, ckpt_path=ckpt_path, **options)
        return model

    whole, resumed = run(SaveAt(1, tmp_path / "a.ckpt")), run(ckpt_path=tmp_path / "a.ckpt")
    assert same(whole, resumed)


def test_sampled_predictions():
    torch.manual_seed(0)
    model = ResNet(depth=8)
    ResidualMerging("layer*.*", Swapout(0.5, 0.5)).apply(model)
    x = torch.randn(4, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    mean, spread = sampled(model, x, samples=8)
    assert model.training
    assert model.layer1[0].branch.norm1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # batch norms held still
    torch.testing.assert_close(mean.sum(dim=1), torch.ones(4))
    torch.manual_seed(5)
    several = sampled(model, x, samples=8)
    torch.manual_seed(5)
    with torch.no_grad(), sampling(model):
        passes = torch.stack([model(x).softmax(dim=-1) for _ in range(8)])
    torch.testing.assert_close(several.mean, passes.mean(dim=0))
    torch.testing.assert_close(several.std, passes.std(dim=0))
    assert float(spread.max()) > 0
    assert not sampled(model, x, samples=1).std.any()


def test_sampled_passes_in_half_precision_add_up():
    torch.manual_seed(0)
    net = nn.Sequential(Residual(nn.Linear(6, 6), merge=Swapout(0.5, 0.5)), nn.Linear(6, 3)).bfloat16()
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    torch.manual_seed(5)
    mean, spread = sampled(net, x, samples=300)
    torch.manual_seed(5)
    with torch.no_grad(), sampling(net):
        passes = torch.stack([net(x).double().softmax(dim=-1) for _ in range(300)])
    torch.testing.assert_close(mean.double(), passes.mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(spread.double(), passes.std(dim=0), rtol=1e-4, atol=1e-6)


def test_a_model_whose_merges_were_removed_is_merged_again():
    model = Blocks()
    for _ in range(2):
        train(model, [ResidualMerging("blocks.*", StochasticDepth(0.5))], max_epochs=1)
        assert keeps(model) == [0.875, 0.75, 0.625, 0.5]
        assert remove_merge(model) == 4
    train(model, [ResidualMerging("blocks.*", Swapout(0.5, 0.5))], max_epochs=1)
    assert model.blocks[3].merge.keep_skip == 0.5
    other = Blocks()
    other.blocks = model.blocks  # in another module
    train(other, [ResidualMerging("blocks.*", Swapout(0.5, 0.5))], max_epochs=1)


def test_merges_are_told_apart_by_what_they_are():
    class Scaled(Merge):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x, branch):
            return x + self.factor * branch()

    model = Blocks()
    ResidualMerging("blocks.*", Scaled(1.0)).apply(model)
    ResidualMerging("blocks.*", Scaled(1.0)).apply(model)
    for other in (Scaled(9.0), Sum()):
        with pytest.raises(ConfigurationError, match="merged already"):
            ResidualMerging("blocks.*", other).apply(model)


def test_a_loaded_model_drops_what_the_trained_one_did_at_last(tmp_path):
    class Faded(ResidualMergingMixin, Blocks):
        residual_merging = {  # noqa: RUF012
            "blocks": "blocks.*", "merge": StochasticDepth(0.5), "schedule": Schedule(1.0, 0.0, 10)
        }  # fmt: skip

    model = Faded()
    train(model, max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    loaded = Faded.load_from_checkpoint(tmp_path / "a.ckpt")
    x = torch.randn(3, 6)
    assert torch.equal(loaded.eval().blocks(x), model.eval().blocks(x))


def test_steps_are_those_of_each_optimizer():
    seen = []

    class Two(Blocks):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.blocks, self.encoder)]

        def training_step(self, batch, batch_idx):
            seen.append(self.blocks[0].merge.drop_scale)
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    merging = ResidualMerging("blocks.*", StochasticDepth(0.5), "uniform", Schedule(0.0, 1.0, 10))
    train(Two(), [merging], max_epochs=1)
    assert seen == pytest.approx([step / 10 for step in range(10)])


def test_sums_draw_nothing():
    with pytest.raises(ConfigurationError, match="has no merge that draws"):
        sampled(nn.Sequential(Residual(nn.Linear(2, 2), merge=Sum())), torch.zeros(1, 2), 3)
    with pytest.raises(ConfigurationError, match="samples must be 1 or more, not 0"):
        sampled(nn.Linear(2, 2), torch.zeros(1, 2), 0)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: ResidualMerging("a", StochasticDepth(0.5), "linera"),
            "keep_schedule, if not a list .*, must be 'linear', 'uniform' or 'model', not 'linera'",
        ),
        (
            lambda: ResidualMerging("a", StochasticDepth(0.5), schedule=Schedule(0.0, 3.0, 5)),
            r"schedule, a factor on drop probabilities, must be in \[0, 1\]",
        ),
        (
            lambda: ResidualMerging("a", StochasticDepth(0.5), schedule="erly"),
            r"schedule must be a tying\.soft\.Schedule, or a mapping of its arguments, or 'early' or 'late', not 'erly'",
        ),
        (lambda: ResidualMerging("a", nn.Identity()), "Identity is not a tying.depth.Merge"),
        (lambda: train(Blocks(), [ResidualMerging("block.*", StochasticDepth(0.5))]), r"'block\.\*' matches no module"),
        (
            lambda: train(Blocks(), [ResidualMerging("blocks.*", StochasticDepth(0.5), [0.5])]),
            r"1 keeps for 4 blocks: blocks\.0, blocks\.1",
        ),
        (
            lambda: train(Blocks(), [ResidualMerging(b, StochasticDepth(0.5)) for b in ("blocks.*", "blocks.1")]),
            "merged already",
        ),
    ],
)
def test_mistakes(make, told):
    with pytest.raises(ConfigurationError, match=told):
        make()


def test_a_checkpoint_of_other_merges_is_told(tmp_path):
    trainer = train(Blocks(), [ResidualMerging("blocks.*", StochasticDepth(0.5))])
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    class Tested(Blocks):
        def validation_step(self, batch, batch_idx):
            self.loss(batch)

    class TestedMixin(ResidualMergingMixin, Tested):
        residual_merging = Inherits.residual_merging

    def tested(*callbacks):
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        pl.Trainer(callbacks=[*callbacks], **options).validate(
            Tested(), batches(), str(tmp_path / "a.ckpt"), verbose=False, weights_only=True
        )

    tested(ResidualMerging("blocks.*", StochasticDepth(0.5)))
    pl.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False).validate(
        TestedMixin(), batches(), str(tmp_path / "a.ckpt"), verbose=False, weights_only=True
    )
    with pytest.warns(UserWarning, match=r"trained with Stoch.*keep=0.5.* now it is Stoch.*keep=0.25"):
        tested(ResidualMerging("blocks.*", StochasticDepth(0.25)))
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: .*ResidualMerging\{'blocks'"):
        tested()


def test_two_in_one_run():
    first, second = (ResidualMerging(f"blocks.{side}", StochasticDepth(0.5)) for side in ("[01]", "[23]"))
    model = Blocks()
    train(model, [first, second])
    assert keeps(model) == [0.75, 0.5, 0.75, 0.5]


def test_a_class_of_ones_own_with_other_arguments():
    class Mine(ResidualMerging):
        def __init__(self, blocks, keep):
            super().__init__(blocks, StochasticDepth(keep))

    model = nn.Sequential(Residual(nn.Linear(2, 2)), Residual(nn.Linear(2, 2)))
    assert Mine("*", 0.5).apply(model) == Mine("*", 0.5).apply(model) == 2


class Layers(Toy):
    """Has torch's encoder layers, whose branches are known, and convolutional blocks that drop their branch already."""

    def __init__(self, **options):
        super().__init__(**options)
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True) for _ in range(2))
        self.convolutions = nn.Sequential(*(CNBlock(6, 1.0, rate) for rate in (0.1, 0.3)))

    def loss(self, batch):
        x = batch[0].unsqueeze(1)
        for layer in self.layers:
            x = layer(x)
        return super().loss([self.convolutions(x.movedim(1, 2).unsqueeze(3)).flatten(1)])


class InheritsLayers(ResidualMergingMixin, Layers):
    residual_merging = {  # noqa: RUF012
        "blocks": "layers.*",
        "merge": StochasticDepth(0.5),
        "keep_schedule": "uniform",
        "whole": True,
    }


def test_whole_layers_are_dropped_by_callback_and_mixin():
    """LayerDrop: a schedule goes with it, and a resumed run ends with the same weights."""
    ends = []
    for model, callbacks in (
        (Layers(), [ResidualMerging("layers.*", StochasticDepth(0.5), "uniform", whole=True)]),
        (InheritsLayers(), []),
    ):
        torch.manual_seed(0)
        train(model, callbacks, max_epochs=2)
        assert [type(layer).__name__ for layer in model.layers] == ["MergedTransformerEncoderLayer"] * 2
        assert [isinstance(layer, MergedBlock) for layer in model.layers] == [True, True]
        ends.append(model)
    assert same(*ends)
    merging = ResidualMerging("layers.*", StochasticDepth(0.5), "uniform", Schedule(0.0, 0.0), whole=True)
    for model, callbacks in ((scheduled := Layers(), [merging]), (plain := Layers(), [])):
        torch.manual_seed(0)
        train(model, callbacks, max_epochs=2)
    assert same(scheduled, plain)


def test_the_model_keeps_its_drop_rates():
    model = Layers()
    merging = ResidualMerging("convolutions.*", StochasticDepth(0.5, "row"), "model")
    train(model, [merging], max_epochs=1)
    assert [block.merge.keep for block in model.convolutions] == [0.9, 0.7]
    assert merging.describe(model).startswith("2 blocks, convolutions.0: StochasticDepth(keep=0.9, mode='row'")


def test_a_checkpoint_names_another_whole(tmp_path):
    layers = ["layers.*"]
    trainer = train(Layers(), [ResidualMerging(layers, StochasticDepth(0.5), whole=True)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"the checkpoint was trained with .*schedule=None, whole; now it is .*None$"):
        train(Layers(), [ResidualMerging(layers, StochasticDepth(0.5))], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")

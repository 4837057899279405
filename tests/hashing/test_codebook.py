"""Trained quantisation."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning
from torch import nn
from torch.nn.utils import prune
from toys import Toy, same, train

from tying import ConfigurationError
from tying.callbacks import AnchorTying, BeforeEpoch, HardTying, SoftTying, WeightClustering, WeightHashing
from tying.hard import bake
from tying.hashing import (
    CodebookHash,
    HashedLinear,
    cluster,
    cluster_weight,
    compression_rate,
    loads,
)
from tying.hashing.codebook import starting_centroids

PAIR = ["encoder.0.weight ~ decoder.2.weight | o i -> i o"]
NAMES = ["encoder.0.weight", "encoder.2.weight", "decoder.0.weight", "decoder.2.weight"]


def within(weights, centroids, labels):
    return float((weights - centroids[labels]).square().sum())


def test_the_papers_example():
    assert compression_rate(16, 4) == 3.2


@pytest.mark.parametrize("init", ["linear", "density", "forgy"])
def test_kmeans(init):
    torch.manual_seed(0)
    weights = torch.randn(2000)
    start = starting_centroids(weights, 8, init)
    centroids, labels = cluster(weights, 8, init)
    nearest = (weights[:, None] - start).abs().argmin(1)
    assert within(weights, centroids, labels) <= within(weights, start, nearest)
    means = torch.stack([weights[labels == k].mean() for k in range(len(centroids))])
    torch.testing.assert_close(centroids, means)
    assert torch.equal(labels, (weights[:, None] - centroids).abs().argmin(1))  # a fixed point
    if init != "forgy":
        again = cluster(weights, 8, init)
        assert torch.equal(again[0], centroids)
        assert torch.equal(again[1], labels)


def test_starts():
    weights = torch.tensor([0.0, 1.0, 1.0, 1.0, 5.0])
    assert starting_centroids(weights, 2, "linear").tolist() == [0.0, 5.0]
    assert starting_centroids(weights, 5, "density").tolist() == weights.tolist()
    assert set(starting_centroids(weights, 3, "forgy").tolist()) <= {0.0, 1.0, 5.0}


def test_limits():
    weights = torch.tensor([3.0, 1.0, 1.0, 2.0])
    centroids, labels = cluster(weights, 4)
    assert torch.equal(centroids[labels], weights)  # no fewer clusters than distinct weights
    centroids, labels = cluster(weights, 1)
    assert torch.equal(centroids, weights.mean()[None])
    with pytest.raises(ValueError, match=r"clusters must be in \[1, 4\], not 5"):
        cluster(weights, 5)
    with pytest.raises(ValueError, match="init must be 'linear', 'density' or 'forgy', not 'random'"):
        cluster(weights, 2, "random")


def test_zeros_stay_zeros_and_gradients_are_sums():
    torch.manual_seed(0)
    layer = nn.Linear(20, 10).double()
    prune.l1_unstructured(layer, "weight", amount=0.6)
    pruned = layer.weight.detach().clone()
    dense = nn.Linear(20, 10).double()
    table = cluster_weight(layer, "weight", 4)
    assert type(layer) is HashedLinear
    assert isinstance(layer.virtual.hash, CodebookHash)
    assert table is layer.table
    assert torch.equal(layer.weight == 0, pruned == 0)
    assert len(layer.weight.unique()) == 5
    assert not prune.is_pruned(layer)
    dense.load_state_dict(bake(layer))
    x = torch.randn(3, 20, dtype=torch.float64)
    for one in (layer, dense):
        one(x).square().sum().backward()
    entries = layer.virtual.slots()
    expected = torch.stack([dense.weight.grad[entries == k].sum() for k in range(4)])
    torch.testing.assert_close(layer.table.grad, expected, rtol=0, atol=1e-12)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    optimizer.step()
    assert len(layer.weight.unique()) <= 5
    assert torch.equal(layer.weight == 0, pruned == 0)


@pytest.mark.filterwarnings("ignore:WeightClustering begins in epoch")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("stop", [1, 3])
def test_training_resumes_bitwise(kind, stop, tmp_path):
    def made():
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return Toy(lambda parameters: kind(parameters, lr=0.05, **options))

    def callback():
        return WeightClustering(["**.weight"], clusters=4, start_epoch=2)

    whole = made()
    trainer = train(whole, [callback()], max_epochs=5, gradient_clip_val=0.5)
    assert all(len(whole.get_submodule(name[:-7]).weight.unique()) <= 4 for name in NAMES)
    assert float(trainer.callback_metrics["tying/compression"]) > 1
    assert [p.numel() for p in whole.parameters()] == [4, 5, 4, 4, 4, 5, 4, 6]
    half = made()
    train(half, [callback()], max_epochs=stop, gradient_clip_val=0.5).save_checkpoint(tmp_path / "half.ckpt")
    resumed = made()
    train(resumed, [callback()], max_epochs=5, gradient_clip_val=0.5, ckpt_path=tmp_path / "half.ckpt")
    assert same(resumed, whole)
    assert torch.equal(resumed.encoder[0].weight, whole.encoder[0].weight)


def test_codebooks_are_trained_and_fit_is_repeatable():
    model = Toy()
    callback = WeightClustering(["**.weight"], clusters=4)
    train(model, [callback], max_epochs=1)
    before = copy.deepcopy(model.encoder[0])
    train(model, [callback], max_epochs=1)
    assert torch.equal(model.encoder[0].virtual.slots(), before.virtual.slots())
    assert not torch.equal(model.encoder[0].table, before.table)


@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_entry_moves_by_the_sum_or_the_mean_of_its_weights_gradients(gradient, accumulate):
    model, begun, dense = (Toy(lambda p: torch.optim.SGD(p, lr=0.1)).double() for _ in range(3))
    before = {name: cluster_weight(begun, name, 4).detach() for name in NAMES[:2]}
    dense.load_state_dict(bake(begun))
    callbacks = [WeightClustering([name], clusters=4, gradient=gradient) for name in NAMES[:2]]
    for one, attached in ((model, callbacks), (dense, [])):
        train(one, attached, max_steps=1, accumulate_grad_batches=accumulate, precision="64-true")
    for name in NAMES[:2]:
        layer, plain = model.get_submodule(name[:-7]), dense.get_submodule(name[:-7])
        entries = layer.virtual.slots().flatten().long()
        moved = torch.zeros(4, dtype=torch.float64)
        moved.index_add_(0, entries, plain.weight.detach().flatten() - before[name][entries])
        expected = moved if gradient == "sum" else moved / loads(entries, 4)
        torch.testing.assert_close(layer.table.detach() - before[name], expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*pruning.*")
def test_after_pruning():
    model = Toy()
    pruning = ModelPruning("l1_unstructured", amount=0.5, apply_pruning=BeforeEpoch(1), parameter_names=["weight"])
    train(model, [pruning, WeightClustering(["**.weight"], clusters=3, start_epoch=2)], max_epochs=4)
    zeros = [float((model.get_submodule(name[:-7]).weight == 0).double().mean()) for name in NAMES]
    assert sum(zeros) / 4 == pytest.approx(0.5, abs=0.05)
    assert all(len(model.get_submodule(name[:-7]).weight.unique()) <= 4 for name in NAMES)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: WeightClustering(["**"], clusters=0), "clusters must be 1 or more, not 0"),
        (lambda: WeightClustering(["**"], start_epoch=-1), "start_epoch must be 0 or more, not -1"),
        (lambda: WeightClustering(["**"], init="random"), "init must be 'linear', 'density' or 'forgy', not 'random'"),
        (lambda: WeightClustering(["**"], gradient="max"), "gradient must be 'sum' or 'mean', not 'max'"),
        (lambda: train(Toy(), [ModelPruning("l1_unstructured"), WeightClustering(["**.weight"], clusters=2)]), r"ModelPruning still prunes in epoch 0, .*apply_pruning=BeforeEpoch\(0\)"),
        (lambda: train(Toy(), [ModelPruning("l1_unstructured", apply_pruning=BeforeEpoch(4)), WeightClustering(["**.weight"], clusters=2, start_epoch=3)]), "ModelPruning still prunes in epoch 3"),
        (lambda: train(Toy(), [WeightClustering(["**.bias"])]), "match nothing of two dimensions or more"),
        (lambda: train(Toy(), [WeightClustering(["encoder.*.weight", "encoder.2.weight"], clusters=21)]), r"'encoder\.2\.weight': clusters must be in \[1, 20\], not 21"),
        (lambda: train(Toy(), [WeightClustering(["**.weight"], clusters=2), EMAWeightAveraging()]), "cannot be combined with EMAWeightAveraging"),
        (lambda: train(Toy(), [HardTying(PAIR), WeightClustering(["encoder.0.weight"], clusters=2)]), r"'encoder\.0\.weight' is (tied to|parametrized)"),
        (lambda: train(Toy(), [SoftTying(PAIR), WeightClustering(["encoder.0.weight"], clusters=2)]), r"SoftTying and WeightClustering both act on 'encoder\.0\.weight'"),
        (lambda: train(Toy(), [AnchorTying(["encoder.**"], 0.1), WeightClustering(["encoder.0.weight"], clusters=2)]), r"AnchorTying and WeightClustering both act on 'encoder\.0\.weight'"),
        (lambda: train(Toy(torch.optim.LBFGS), [WeightClustering(["encoder.0.weight"], clusters=2)]), "LBFGS holds encoder.0.weight, and"),
    ],
)  # fmt: skip
def test_mistakes(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_a_name_of_no_module_is_told():
    with pytest.raises(
        ConfigurationError, match=r"'nett\.weight' is not a parameter of the model, which has no module 'nett'"
    ):
        cluster_weight(Toy(), "nett.weight", 2)


def test_several_clusterings_of_one_model(tmp_path):
    def callbacks():
        return [
            WeightClustering(["encoder.**.weight"], clusters=8),
            WeightClustering(["decoder.0.weight"], clusters=2, start_epoch=1),
            WeightHashing(["decoder.2.weight"]),
        ]

    model = Toy()
    trainer = train(model, callbacks(), max_epochs=2)
    assert [len(model.get_submodule(n[:-7]).table) for n in NAMES[:3]] == [8, 8, 2]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    train(model, callbacks(), max_epochs=1)  # equal ones change nothing more
    resumed = Toy()
    train(resumed, callbacks(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(
        resumed.decoder[0].weight,
        torch.load(tmp_path / "a.ckpt")["state_dict"]["decoder.0.table"][resumed.decoder[0].virtual.slots()],
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_a_compiled_part_resumes_after_clustering(tmp_path):
    def compiled():
        model = Toy()
        model.decoder = torch.compile(model.decoder, backend="eager")
        return model

    def clustering():
        return [WeightClustering(["decoder.*.weight"], 4, start_epoch=1)]

    model = compiled()
    train(model, clustering(), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    whole, resumed = compiled(), compiled()
    train(whole, clustering(), max_epochs=4)
    train(resumed, clustering(), max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert same(resumed, whole)
    assert resumed.state_dict()["decoder._orig_mod.0.table"].shape == (4,)


class Owner(nn.Module):
    """A module with a table of its own."""

    def __init__(self):
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.randn(6, 6) / 6), nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return x @ self.weight + self.table.sum(dim=0)


@pytest.mark.filterwarnings("ignore:WeightClustering begins in epoch")
@pytest.mark.parametrize("stop", [1, 2])
def test_a_table_of_the_models_own_is_no_codebook(stop, tmp_path):
    def made():
        model = Toy()
        torch.manual_seed(0)
        model.decoder.append(Owner())
        return model

    def clustering():
        return [WeightClustering(["decoder.3.weight"], 4, start_epoch=1)]

    train(made(), clustering(), max_epochs=stop).save_checkpoint(tmp_path / "a.ckpt")
    whole, resumed = made(), made()
    train(whole, clustering(), max_epochs=3)
    train(resumed, clustering(), max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert same(resumed, whole)
    assert len(resumed.decoder[3].weight.unique()) == 4


def test_training_that_ends_before_clustering_begins_is_told():
    with pytest.warns(UserWarning, match="begins in epoch 9, and training ends before: max_epochs is 2"):
        train(Toy(), [WeightClustering(["encoder.*.weight"], 4, start_epoch=9)], max_epochs=2)


def test_few_weights_left_are_entries_of_their_own():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.zero_()[0, 1] = 2.0
    cluster_weight(layer, "weight", 5)
    assert layer.table.tolist() == [2.0]
    empty = nn.Linear(4, 3)
    nn.init.zeros_(empty.weight)
    cluster_weight(empty, "weight", 5)
    assert not empty.weight.any()
    with pytest.raises(ValueError, match=r"'weight': clusters must be in \[1, 12\], not 13"):
        cluster_weight(nn.Linear(4, 3), "weight", 13)


@pytest.mark.filterwarnings("ignore:.*pruning.*")
@pytest.mark.filterwarnings("ignore:WeightClustering begins in epoch")
def test_zeros_of_pruning_outlive_a_resume(tmp_path):
    def callbacks():
        pruning = ModelPruning("l1_unstructured", amount=0.5, apply_pruning=BeforeEpoch(1), parameter_names=["weight"])
        return [pruning, WeightClustering(["**.weight"], clusters=3, start_epoch=3)]

    whole = Toy()
    train(whole, callbacks(), max_epochs=5)
    train(Toy(), callbacks(), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    resumed = Toy()
    train(resumed, callbacks(), max_epochs=5, ckpt_path=tmp_path / "a.ckpt")
    assert (bake(resumed)["encoder.0.weight"] == 0).any()
    for name, weight in bake(whole).items():
        torch.testing.assert_close(bake(resumed)[name], weight)


def test_layers_that_configure_model_makes():
    class Late(Toy):
        def configure_model(self):
            if not hasattr(self, "late"):
                self.late = nn.Linear(6, 6)

    model = Late()
    train(model, [WeightClustering(["late.weight"], clusters=4)], max_epochs=1)
    assert len(model.late.weight.unique()) <= 4

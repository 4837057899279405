"""Every argument that counts something asks for an integer, and names itself."""

import pytest
import torch
from torch import nn

from tying.advice import advise
from tying.callbacks import (
    BeforeEpoch,
    BoundaryPlot,
    Coupling,
    Fisher,
    GeneratedWeights,
    Looping,
    LowRankWeights,
    MixtureTying,
    RecurrentDepth,
    RelaxedTying,
    TemplateWeights,
    TyingMonitor,
    TyingSummary,
    Unrolling,
    WeightClustering,
)
from tying.data import CIFAR10, MNIST, SequentialMNIST, Text, TwoDomains
from tying.data.batches import BatchLoader
from tying.depth import (
    HMLSTM,
    FractalBlock,
    HyperLSTM,
    HyperLSTMCell,
    PassthroughGRU,
    Recurrent,
    Residual,
    StateMatrix,
    Swapout,
    keep_schedule,
    loop,
    recur,
    sampled,
)
from tying.errors import ConfigurationError
from tying.hard import (
    HyperWeight,
    LowRankResidual,
    TemplateBank,
    generate_weights,
    lower_rank,
    relax,
    share_templates,
)
from tying.hashing import (
    BlockHash,
    NeighborhoodHash,
    RecurrentHash,
    ToeplitzHash,
    UniformHash,
    XXHash,
    cluster,
    cluster_weight,
    hash_weights,
    loads,
)
from tying.models import MLP, Autoencoder, Classifier, FractalNet, ResNet, SequenceModel, Transformer
from tying.soft import GaussianMixturePrior, Schedule


def stack():
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


RNN = nn.RNN(4, 4)
COUNTS = {
    "rank, of a residual": lambda model, count: relax(model, ["{0..2}"], LowRankResidual(rank=count)),
    "rank, of a weight": lambda model, count: lower_rank(model, ["0.weight"], rank=count),
    "rank, of a callback": lambda model, count: LowRankWeights(["0.weight"], rank=count),
    "rank, of a state matrix": lambda model, count: StateMatrix(4, rank=count),
    "rank, of a recurrent layer": lambda model, count: PassthroughGRU(1, 4, rank=count),
    "calibration": lambda model, count: RelaxedTying(["{0..2}"], LowRankResidual(1), calibration=count),
    "passes": lambda model, count: loop(model, "*", passes=count),
    "passes, of a callback": lambda model, count: Looping("*", passes=count),
    "steps, of a block": lambda model, count: Recurrent(nn.Linear(4, 4), steps=count),
    "steps, of blocks": lambda model, count: recur(model, "*", steps=count),
    "steps, of a callback": lambda model, count: RecurrentDepth("*", steps=count),
    "steps": lambda model, count: advise(model, [torch.ones(2, 4)], 0.5, steps=count, progress=False),
    "every entry of extra": lambda model, count: Unrolling([0, count]),
    "every entry of train_extra": lambda model, count: Unrolling([0], train_extra=[count]),
    "count": lambda model, count: keep_schedule(1.0, 0.5, count),
    "samples": lambda model, count: sampled(Residual(model, merge=Swapout(0.5, 0.5)), torch.ones(2, 4), count),
    "columns, of a block": lambda model, count: FractalBlock(count, nn.Linear, 4, 4),
    "columns, of a network": lambda model, count: FractalNet(columns=count),
    "num_layers, of a recurrent layer": lambda model, count: PassthroughGRU(1, 4, 2, num_layers=count),
    "num_layers, of a hypernetwork": lambda model, count: HyperLSTM(1, 4, num_layers=count),
    "hidden_size": lambda model, count: HyperLSTMCell(1, count, 2, 2),
    "hyper_size": lambda model, count: HyperLSTMCell(1, 4, count, 2),
    "embedding_size": lambda model, count: HyperLSTMCell(1, 4, 2, count),
    "hidden_size, of layers": lambda model, count: HMLSTM(1, count),
    "hidden_size, of low rank": lambda model, count: PassthroughGRU(1, count, 1),
    "layers, of scales": lambda model, count: HMLSTM(1, 4, layers=count),
    "characters, of a plot": lambda model, count: BoundaryPlot(characters=count),
    "Fisher's batches": lambda model, count: Fisher(batches=count),
    "examples, of a coupling": lambda model, count: Coupling("0", "1", 0.5, examples=count),
    "examples, of a mixture": lambda model, count: MixtureTying(["**"], examples=count),
    "start_epoch, of a mixture": lambda model, count: MixtureTying(["**"], start_epoch=count),
    "start_epoch, of codebooks": lambda model, count: WeightClustering(["**"], start_epoch=count),
    "epoch": lambda model, count: BeforeEpoch(count),
    "components, of a callback": lambda model, count: MixtureTying(["**"], components=count),
    "components, of a prior": lambda model, count: GaussianMixturePrior(components=count),
    "a schedule's length": lambda model, count: Schedule(0.0, 1.0, count),
    "max_rows": lambda model, count: TyingSummary(max_rows=count),
    "max_lines": lambda model, count: TyingMonitor(max_lines=count),
    "clusters, of a callback": lambda model, count: WeightClustering(["**"], clusters=count),
    "clusters, of a weight": lambda model, count: cluster_weight(model, "0.weight", count),
    "clusters, of values": lambda model, count: cluster(torch.arange(9.0), count),
    "templates, of a bank": lambda model, count: TemplateBank(count, (4, 4)),
    "templates, of weights": lambda model, count: share_templates(model, ["**"], count),
    "templates, of a callback": lambda model, count: TemplateWeights(["**"], templates=count),
    "embedding, of weights": lambda model, count: generate_weights(model, ["**"], count, 2, 2),
    "in_channels, of weights": lambda model, count: generate_weights(model, ["**"], 2, count, 2),
    "out_channels, of weights": lambda model, count: generate_weights(model, ["**"], 2, 2, count),
    "embedding, of a callback": lambda model, count: GeneratedWeights(["**"], count, 2, 2),
    "in_channels, of a callback": lambda model, count: GeneratedWeights(["**"], 2, count, 2),
    "in_channels, of kernels": lambda model, count: HyperWeight(count, 2, 3),
    "out_channels, of kernels": lambda model, count: HyperWeight(2, count, 3),
    "embedding, of kernels": lambda model, count: HyperWeight(2, 2, 3, embedding=count),
    "hidden, of kernels": lambda model, count: HyperWeight(2, 2, 3, hidden=count),
    "kernel_size, of kernels": lambda model, count: HyperWeight(2, 2, (3, count)),
    "seed, of a hash": lambda model, count: hash_weights(model, ["0.weight"], 0.5, UniformHash(seed=count)),
    "seed, of digests": lambda model, count: XXHash(seed=count),
    "radius": lambda model, count: NeighborhoodHash(radius=count),
    "block": lambda model, count: BlockHash(block=count),
    "layers, of a hash": lambda model, count: RecurrentHash(layers=count),
    "in_channels, of a hash": lambda model, count: ToeplitzHash(count, 1, 4, 2),
    "out_channels, of a hash": lambda model, count: ToeplitzHash(1, count, 4, 2),
    "input_size": lambda model, count: ToeplitzHash(1, 1, (4, count), 2),
    "kernel_size": lambda model, count: ToeplitzHash(1, 1, 4, count),
    "stride": lambda model, count: ToeplitzHash(1, 1, 4, 2, stride=count),
    "table_size": lambda model, count: loads(torch.zeros(2, dtype=torch.int64), count),
    "size": lambda model, count: Transformer(count, layers=1, heads=1, context=4),
    "layers": lambda model, count: Transformer(4, count, heads=1, context=4),
    "heads": lambda model, count: Transformer(4, layers=1, heads=count, context=4),
    "context": lambda model, count: Transformer(4, layers=1, heads=1, context=count),
    "every size, of a network": lambda model, count: MLP([4, count, 2]),
    "every size, of an autoencoder": lambda model, count: Autoencoder([4, count]),
    "depth": lambda model, count: ResNet(depth=8 * count),
    "num_classes": lambda model, count: Classifier(model, num_classes=count),
    "test_samples": lambda model, count: Classifier(model, test_samples=count),
    "size, of a sequence model": lambda model, count: SequenceModel(RNN, size=count),
    "embedding, of a sequence model": lambda model, count: SequenceModel(RNN, 4, "language", embedding=count),
    "batch_size, of images": lambda model, count: CIFAR10(batch_size=count),
    "labelled, of images": lambda model, count: CIFAR10(source="sample", labelled=10 * count).setup("fit"),
    "label_seed, of images": lambda model, count: CIFAR10(label_seed=count),
    "seed, of images": lambda model, count: CIFAR10(seed=count),
    "batch_size, of digits": lambda model, count: MNIST(".", batch_size=count),
    "grey": lambda model, count: TwoDomains(grey=10 * count),
    "shrink": lambda model, count: TwoDomains(shrink=count),
    "shrink, of digits": lambda model, count: SequentialMNIST(".", shrink=count),
    "batch_size, of a loader": lambda model, count: BatchLoader(
        torch.ones(4), torch.ones(4), batch_size=count, train=True
    ),
    "window": lambda model, count: Text(window=count),
    "batch_size, of text": lambda model, count: Text(batch_size=count),
    "vocabulary": lambda model, count: Text(vocabulary=count),
    "characters": lambda model, count: Text(characters=count),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts_are_integers(case):
    model = stack()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for count in (2.5, 3.0):
        with pytest.raises(ConfigurationError, match=rf"{case.split(', ')[0]} must be an integer.* not [\d.]+$"):
            COUNTS[case](model, count)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_truth_value_is_not_a_count():
    """As in ``PassthroughGRU(4, 6, 2, True, True)``, whose arguments do not stand in the order of torch's."""
    with pytest.raises(ConfigurationError, match=r"^num_layers must be an integer, not True$"):
        PassthroughGRU(4, 6, 2, True, True)

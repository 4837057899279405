"""Every family's callback, how to see that it held, and one small network in which each finds what to tie."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tying import resolve
from tying.callbacks import (
    AnchorTying,
    Coupling,
    GeneratedWeights,
    HardTying,
    Looping,
    LowRankWeights,
    MixtureTying,
    RecurrentDepth,
    RelaxedTying,
    ResidualMerging,
    SoftTying,
    TemplateWeights,
    WeightClustering,
    WeightHashing,
    ZoneoutStates,
)
from tying.depth import (
    Residual,
    StochasticDepth,
    apply_merge,
    loop,
    recur,
    remove_merge,
    remove_zoneout,
    unloop,
    unrecur,
    zone_out,
)
from tying.hard import LowRankResidual, generate_weights, lower_rank, relax, share_templates, tie
from tying.hashing import UniformHash, cluster_weight, hash_weights
from tying.lightning_namespace import pl
from tying.selection.patterns import Pattern
from tying.soft import GaussianMixturePrior, TyingPenalty, anchored, coupling_strength


class Net(nn.Module):
    """A network in which every family finds what to tie, except for LSTMs unless it is recurrent."""

    def __init__(self, recurrent=True):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.blocks = nn.Sequential(Residual(nn.Linear(6, 6)), Residual(nn.Linear(6, 6)))
        self.kernels = nn.Sequential(*(nn.Conv2d(6, 6, 1) for _ in range(3)))
        self.lstms = nn.ModuleList([nn.LSTM(6, 6, batch_first=True), nn.LSTMCell(6, 6)] if recurrent else [])

    def forward(self, x):
        x = self.second(self.first(x).tanh()).tanh()
        if self.lstms:
            x = x + self.lstms[0](torch.stack((x, x), dim=1))[0][:, -1]
            x = x + self.lstms[1](x)[0]
        return self.kernels(self.blocks(x)[:, :, None, None]).flatten(1)


def inputs(count=20):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


class Trained(pl.LightningModule):
    """Trains the network to predict sines of its inputs."""

    def __init__(self, batch_size=2, recurrent=True):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = Net(recurrent)
        self.initial = copy.deepcopy(self.state_dict())

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        predicted, target = self(batch[0].to(self.net.first.bias.dtype)), (3 * batch[0]).sin()
        wide = torch.promote_types(predicted.dtype, torch.float32)
        return F.mse_loss(predicted.to(wide), target.to(wide))

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0].to(self.net.first.bias.dtype))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.get("lr", 0.01), momentum=0.9)

    def train_dataloader(self):
        return DataLoader(TensorDataset(inputs()), batch_size=self.hparams.batch_size)

    def val_dataloader(self):
        return DataLoader(TensorDataset(inputs(6)), batch_size=2)

    predict_dataloader = val_dataloader


class Sites(NamedTuple):
    """What in a network belongs together.

    Attributes:
        pair: two weights of one shape.
        twins: two modules of one structure.
        alike: a pattern of two weights or more, of one shape.
        blocks: a pattern of residual blocks.
        lstms: a pattern of LSTMs.
        basic: channels of the kernels from which those alike can be tiled.
    """

    pair: tuple[str, str]
    twins: tuple[str, str]
    alike: str
    blocks: str
    basic: int = 8
    lstms: str = "net.lstms.*"


SITES = Sites(
    pair=("net.first.weight", "net.second.weight"),
    twins=("net.blocks.0", "net.blocks.1"),
    alike="net.kernels.*.weight",
    blocks="net.blocks.*",
    basic=3,
)


def weight(model, name):
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute).detach().float()


def distance(model, one, other):
    return float((weight(model, one) - weight(model, other)).norm())


def pulled_together(model, free, sites):
    assert distance(model, *sites.pair) < 0.8 * distance(free, *sites.pair)


def coupled(model, free, sites):
    names = [name for name, value in model.get_submodule(sites.twins[0]).named_parameters() if value.ndim > 1]
    for name in names:
        pair = [f"{twin}.{name}" for twin in sites.twins]
        assert distance(model, *pair) < 0.8 * distance(free, *pair)
    assert names


def held_near(model, free, sites):
    moved = [
        sum(float((p.detach().float() - one.initial[name]).square().sum()) for name, p in one.named_parameters())
        for one in (model, free)
    ]
    assert moved[0] < 0.8 * moved[1]


def of_few_values(model, free, sites):
    assert len(weight(model, sites.pair[0]).unique()) <= 4 < len(weight(free, sites.pair[0]).unique())


def of_a_table(model, free, sites):
    table = math.ceil(weight(model, sites.pair[0]).numel() / 4)
    assert len(weight(model, sites.pair[0]).unique()) <= table < len(weight(free, sites.pair[0]).unique())


def equal(model, free, sites):
    [one, other] = (model.get_submodule(name.rpartition(".")[0]) for name in sites.pair)
    assert getattr(one, sites.pair[0].rpartition(".")[2]) is getattr(other, sites.pair[1].rpartition(".")[2])
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in model.parameters()) in (
        0,  # the model had tied them itself
        weight(model, sites.pair[0]).numel(),
    )


def rank_of(matrix):
    return int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-5))


def of_rank_two(model, free, sites):
    assert rank_of(weight(model, sites.pair[0]).flatten(1)) == 2 < rank_of(weight(free, sites.pair[0]).flatten(1))


def apart_by_rank_one_each(model, free, sites):
    distances = [weight(one, sites.pair[0]) - weight(one, sites.pair[1]) for one in (model, free)]
    assert 0 < rank_of(distances[0].flatten(1)) <= 2 < rank_of(distances[1].flatten(1))


def alike(model, free, sites):
    names = [name for name, _ in free.named_parameters() if Pattern(sites.alike).match(name) is not None]
    assert len(names) > 1
    return [weight(model, name) for name in names]


def of_one_template(model, free, sites):
    assert rank_of(torch.stack([kernel.flatten() for kernel in alike(model, free, sites)])) == 1


def of_embeddings_of_two(model, free, sites):
    tiles = []
    for kernel in alike(model, free, sites):
        out, into, *size = kernel.shape
        tiled = kernel.view(out // sites.basic, sites.basic, into // sites.basic, sites.basic, *size)
        tiles.append(tiled.transpose(1, 2).flatten(2).flatten(0, 1))
    assert rank_of(torch.cat(tiles) - torch.cat(tiles).mean(0)) == 2


def merged(model, free, sites):
    blocks = [name for name, _ in free.named_modules() if Pattern(sites.blocks).match(name) is not None]
    assert remove_merge(model) == len(blocks) > 0


def recurrent(model, free, sites):
    names = [*free.state_dict()]
    shared = sum(p.numel() for p in model.parameters())
    assert unrecur(model) == 1
    assert [*model.state_dict()] == names
    assert shared < sum(p.numel() for p in model.parameters())


def looped(model, free, sites):
    names = [*free.state_dict()]
    assert [*model.state_dict()] == names
    assert unloop(model) > 0
    assert [type(module) for module in model.net.modules()] == [type(module) for module in free.net.modules()]


def zoned(model, free, sites):
    assert [*model.state_dict()] == [*free.state_dict()]
    assert remove_zoneout(model) == len([m for m in free.modules() if isinstance(m, nn.LSTM | nn.LSTMCell)]) > 0
    assert [type(module) for module in model.net.modules()] == [type(module) for module in free.net.modules()]


def nothing():
    """Do nothing at a step."""


def softly(model, sites, examples):
    penalty = TyingPenalty(resolve(model, [f"{sites.pair[0]} ~ {sites.pair[1]}"]))
    return lambda: penalty.add_gradients_(1.0), nothing, {}


def coupling(model, sites, examples):
    penalty = TyingPenalty(resolve(model, [f"{sites.twins[0]} ~ {sites.twins[1]}"]))
    return lambda: penalty.add_gradients_(coupling_strength(0.1) / examples), nothing, {}


def to_anchor(model, sites, examples):
    penalty = anchored(dict(model.named_parameters()), model.initial)
    return lambda: penalty.add_gradients_(10.0), nothing, {}


def mixed(model, sites, examples):
    prior, weight = GaussianMixturePrior(components=4), model.get_parameter(sites.pair[0])
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-3)

    def step():
        prior.zero_grad()
        prior.add_gradients_([weight], 0.01 / examples)
        optimizer.step()

    @torch.no_grad()
    def finish():
        prior.merge()
        weight.copy_(prior.quantize(weight))

    return step, finish, {"prior": prior, "optimizer of the prior": optimizer}


def at_once(change):
    """Return what is done before training alone."""

    def begin(model, sites, examples):
        change(model, sites)
        return nothing, nothing, {}

    return begin


class Family(NamedTuple):
    begin: Callable[
        [pl.LightningModule, Sites, int], tuple[Callable[[], object], Callable[[], object], dict]
    ]  # without
    # a trainer: ties a model, of as many examples; returns what is done between backward and step, and at the end, and
    # what is kept beside the model
    callback: Callable[[Sites], pl.Callback]
    holds: Callable[[pl.LightningModule, pl.LightningModule, Sites], None]  # fails unless a model is tied, beside one
    # that was trained alike, but free


FAMILIES = {
    "SoftTying": Family(softly, lambda s: SoftTying([f"{s.pair[0]} ~ {s.pair[1]}"], strength=1.0), pulled_together),
    "Coupling": Family(coupling, lambda s: Coupling(*s.twins, alpha=0.1, examples=20), coupled),
    "AnchorTying": Family(to_anchor, lambda s: AnchorTying(["net.**"], strength=10.0), held_near),
    "MixtureTying": Family(mixed, lambda s: MixtureTying([s.pair[0]], 0.01, components=4), of_few_values),
    "HardTying": Family(
        at_once(lambda model, s: tie(model, [f"{s.pair[0]} ~ {s.pair[1]}"])),
        lambda s: HardTying([f"{s.pair[0]} ~ {s.pair[1]}"]),
        equal,
    ),
    "RelaxedTying": Family(
        at_once(lambda model, s: relax(model, [f"{s.pair[0]} ~ {s.pair[1]}"], LowRankResidual(rank=1))),
        lambda s: RelaxedTying([f"{s.pair[0]} ~ {s.pair[1]}"], LowRankResidual(rank=1)),
        apart_by_rank_one_each,
    ),
    "LowRankWeights": Family(
        at_once(lambda model, s: lower_rank(model, [s.pair[0]], rank=2)),
        lambda s: LowRankWeights([s.pair[0]], rank=2),
        of_rank_two,
    ),
    "TemplateWeights": Family(
        at_once(lambda model, s: share_templates(model, [s.alike], templates=1)),
        lambda s: TemplateWeights([s.alike], templates=1),
        of_one_template,
    ),
    "GeneratedWeights": Family(
        at_once(lambda model, s: generate_weights(model, [s.alike], 2, s.basic, s.basic)),
        lambda s: GeneratedWeights([s.alike], 2, s.basic, s.basic),
        of_embeddings_of_two,
    ),
    "WeightHashing": Family(
        at_once(lambda model, s: hash_weights(model, [s.pair[0]], 0.25, UniformHash(seed=0))),
        lambda s: WeightHashing([s.pair[0]], 0.25, UniformHash(seed=0)),
        of_a_table,
    ),
    "WeightClustering": Family(
        at_once(lambda model, s: cluster_weight(model, s.pair[0], 4)),
        lambda s: WeightClustering([s.pair[0]], clusters=4),
        of_few_values,
    ),
    "ResidualMerging": Family(
        at_once(lambda model, s: apply_merge(model, s.blocks, StochasticDepth(0.75))),
        lambda s: ResidualMerging(s.blocks, StochasticDepth(0.75), keep_schedule="uniform"),
        merged,
    ),
    "Looping": Family(
        at_once(lambda model, s: loop(model, s.blocks, passes=2)), lambda s: Looping(s.blocks, passes=2), looped
    ),
    "RecurrentDepth": Family(
        at_once(lambda model, s: recur(model, s.blocks)), lambda s: RecurrentDepth(s.blocks), recurrent
    ),
    "ZoneoutStates": Family(
        at_once(lambda model, s: zone_out(model, s.lstms, cell=0.5, hidden=0.25)),
        lambda s: ZoneoutStates(s.lstms, cell=0.5, hidden=0.25),
        zoned,
    ),
}

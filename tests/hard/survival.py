"""The columns of the survival table: how a network ties or computes its weights, and whether it still does."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tying import Tie
from tying.hard import (
    LowRankResidual,
    generate_weights,
    lower_rank,
    relax,
    relaxed,
    share_templates,
    tie,
    tied,
    untie_biases,
)
from tying.hashing import cluster_weight, hash_weights

BY_HAND = "by hand"
TIES = {
    "plain tie": [Tie("first.weight", "second.weight")],
    "transposed tie": [Tie("encoder.weight", "decoder.weight", "o i -> i o")],
    "whole modules": [Tie("blocks.*", exclude=("**.norm",))],
}
RELAXED = ["first.weight ~ second.weight", "first.weight ~ blocks.*.linear.weight"]
SQUARES = ["first.weight", "second.weight", "blocks.*.linear.weight"]
CHANGES = {
    "low rank": lambda net: lower_rank(net, ["first.weight"], 2),
    "low rank + diagonal": lambda net: lower_rank(net, ["first.weight"], 2, diagonal=True),
    "relaxed": lambda net: relax(net, RELAXED, LowRankResidual(2)),
    "templates": lambda net: share_templates(net, SQUARES, 2),
    "generated": lambda net: generate_weights(net, ["kernels.*.weight"], 2, 3, 3),
    "hashed by layer": lambda net: hash_weights(net, SQUARES, 0.25),
    "hashed by network": lambda net: hash_weights(net, SQUARES, 0.25, scope="network"),
    "clustered": lambda net: cluster_weight(net, "first.weight", 4),
    "untied biases": lambda net: untie_biases(net, ["kernels.*.bias"], batch()),
}
ROWS = (BY_HAND, *TIES, *CHANGES)
DERIVED = {  # a weight of each network that is computed from others
    "transposed tie": "decoder.weight",
    **{row: "kernels.0.weight" if row == "generated" else "first.weight" for row in CHANGES if row != "untied biases"},
}
TIED = {  # a weight of each network that is the same parameter as another
    BY_HAND: "second.weight",
    "plain tie": "second.weight",
    "whole modules": "blocks.1.linear.weight",
}
CHANGED = {**DERIVED, **TIED, "untied biases": "kernels.0.bias"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        return x + self.norm(self.linear(x).tanh())


class Net(nn.Module):
    """A network in which every column finds something to share."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 6)
            self.blocks = nn.Sequential(Block(), Block())
            self.kernels = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))

    def forward(self, x):
        x = self.second(self.first(x).tanh())
        x = self.decoder(self.encoder(x).tanh())
        return self.kernels(self.blocks(x)[:, :, None, None]).flatten(1)


def share(net, row):
    """Let a network share weights as the row says; return it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if row == BY_HAND:
            net.second.weight = net.first.weight
        elif row in TIES:
            tie(net, TIES[row])
        else:
            CHANGES[row](net)
    return net


def made(row, seed=0):
    return share(Net(seed), row)


def untied(row):
    """Return a network with the names and shapes of the row's weights, each a parameter."""
    return share(Net(), row) if row == "untied biases" else Net()


def weight_of(net, row):
    """Return the module and the attribute name of a weight that the row shares."""
    path, _, name = CHANGED[row].rpartition(".")
    return net.get_submodule(path), name


def value_of(net, row):
    module, name = weight_of(net, row)
    return getattr(module, name).detach()


def assert_shared(net, row):
    """Fail unless the weights are still what the row says."""
    if row == BY_HAND:
        assert net.first.weight is net.second.weight
    elif row in TIES:
        assert tied(net)
        assert all(parameter is group.parameters[0] for group in tied(net) for parameter in group.parameters)
        assert torch.equal(net.first.weight, net.second.weight) or row != "plain tie"
        assert torch.equal(net.encoder.weight.T, net.decoder.weight) or row != "transposed tie"
        assert torch.equal(net.blocks[0].linear.weight, net.blocks[1].linear.weight) or row != "whole modules"
    else:
        assert_computed(net, row)


def assert_computed(net, row):
    """Fail unless the weights are computed from fewer numbers, or the biases are one for each position."""
    weight = value_of(net, row).double()
    if row == "low rank":
        assert torch.linalg.matrix_rank(weight, rtol=1e-5) <= 2
    elif row == "low rank + diagonal":
        diagonal = net.first.parametrizations.weight.original2.detach().double().diag()
        assert torch.linalg.matrix_rank(weight - diagonal, rtol=1e-5) <= 2
    elif row == "relaxed":
        [group] = relaxed(net)
        shared = group.parameters[0].detach().double()
        assert all(torch.linalg.matrix_rank(layer.weight.double() - shared, rtol=1e-4) <= 2 for layer in squares(net))
        assert len(group) == len(squares(net))
    elif row == "templates":
        assert len({id(layer.parametrizations.weight[0].bank) for layer in squares(net)}) == 1
    elif row == "generated":
        assert net.kernels[0].parametrizations.weight[0] is net.kernels[1].parametrizations.weight[0]
    elif row == "untied biases":
        assert net.kernels[0].bias.shape == (6, 1, 1)
    else:
        assert len(weight.unique()) <= {"clustered": 4, "hashed by layer": 9, "hashed by network": 36}[row]
        assert row != "hashed by network" or len({id(layer.table) for layer in squares(net)}) == 1


def squares(net):
    return [net.first, net.second, *(block.linear for block in net.blocks)]


def batch(count=8, dtype=torch.float32):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(2), dtype=dtype)


def loss_of(net, x):
    return F.mse_loss(net(x), x)


class Lit(pl.LightningModule):
    """Trains the network; shares its weights itself, or leaves that to a callback."""

    def __init__(self, row: str | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.net = Net()

    def configure_model(self):
        if self.hparams.row and not getattr(self, "shared", False):
            share(self.net, self.hparams.row)
            self.shared = True

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return loss_of(self.net, batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data():
    return DataLoader(TensorDataset(batch(24)), batch_size=4)

"""The rows of the survival table: how a network shares its weights, and whether it still does."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader, TensorDataset

from tying import Tie
from tying.hard import HyperWeight, LowRank, TemplateBank, TemplateMixture, tie, tied

TIES = {
    "plain tie": [Tie("first.weight", "second.weight")],
    "transposed tie": [Tie("encoder.weight", "decoder.weight", "o i -> i o")],
    "whole modules": [Tie("blocks.*", exclude=("**.norm",))],
}
ROWS = (*TIES, "low rank", "templates", "generated")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        return x + self.norm(self.linear(x).tanh())


class Net(nn.Module):
    """A network in which every row finds something to share."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
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
        if row in TIES:
            tie(net, TIES[row])
        elif row == "low rank":
            register_parametrization(net.first, "weight", LowRank(2))
        else:
            bank, hyper = TemplateBank(2, (6, 6, 1, 1)), HyperWeight(3, 3, 1, embedding=2)
            for layer in net.kernels:
                shared = TemplateMixture(bank) if row == "templates" else hyper
                register_parametrization(layer, "weight", shared)
                begin = layer.parametrizations.weight.original  # found by least squares, which rounds as memory lies
                begin.data = 0.3 * torch.randn(begin.shape, generator=torch.Generator().manual_seed(len(begin)))
    return net


def made(row):
    return share(Net(), row)


def assert_shared(net, row):
    """Fail unless the weights are still what the row says."""
    if row in TIES:
        assert tied(net)
        assert all(parameter is group.parameters[0] for group in tied(net) for parameter in group.parameters)
        assert torch.equal(net.first.weight, net.second.weight) or row != "plain tie"
        assert torch.equal(net.encoder.weight.T, net.decoder.weight) or row != "transposed tie"
        assert torch.equal(net.blocks[0].linear.weight, net.blocks[1].linear.weight) or row != "whole modules"
    elif row == "low rank":
        assert torch.linalg.matrix_rank(net.first.weight.double(), rtol=1e-5) <= 2
    else:
        one, other = (layer.parametrizations.weight[0] for layer in net.kernels)
        assert one.bank is other.bank if row == "templates" else one is other


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

    def training_step(self, batch, batch_idx):
        return loss_of(self.net, batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data():
    return DataLoader(TensorDataset(batch(24)), batch_size=4)

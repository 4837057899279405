"""The rows of the survival table: models, how each shares its weights, and whether it still does."""

from __future__ import annotations

import torch
from torch import nn

from tying import Tie

TIES = {
    "plain tie": ["0.weight ~ 2.weight"],
    "through a transpose": ["1.weight ~ 3.weight | o i -> i o"],
    "whole modules": [Tie("[45]", exclude=("**.norm",))],
}
ROWS = (*TIES, "low rank", "templates", "generated")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        return x + self.norm(self.linear(x).tanh())


class Image(nn.Module):
    def forward(self, x):
        return x.view(-1, 6, 1, 1)


def layers():
    """Return a network in which every row finds something to share."""
    torch.manual_seed(0)
    first = [nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6)]
    wide = [nn.Linear(6, 6), nn.Linear(6, 6)]
    kernels = [nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)]
    return nn.Sequential(
        wide[0], first[1], nn.Linear(4, 6), first[2], Block(), Block(), Image(), *kernels, nn.Flatten()
    )

"""Every way in which a model computes or shares its weights, on models of 32 features."""

from __future__ import annotations

import torch
from torch import nn

from tying.depth.rnn.hm_lstm import HMLSTM
from tying.depth.rnn.hyper_lstm import HyperLSTM
from tying.depth.rnn.passthrough import PassthroughGRU, PassthroughHighway
from tying.hard import (
    DiagonalResidual,
    LowRankResidual,
    ScaleResidual,
    generate_weights,
    lower_rank,
    relax,
    share_templates,
    tie,
    untie_biases,
)
from tying.hashing import (
    HashedConv2d,
    HashedEmbedding,
    HashedLinear,
    cluster_weight,
    hash_weights,
)

SIZE = 32


def linear(count=4):
    return nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(count)))


def convolutions(count=4):
    return nn.Sequential(*(nn.Conv2d(SIZE, SIZE, 3, padding=1) for _ in range(count)))


def recurrent():
    return nn.Sequential(nn.LSTM(SIZE, SIZE, num_layers=2))


def attention():
    return nn.Sequential(nn.MultiheadAttention(SIZE, 4))


def embedding():
    return nn.Sequential(nn.Embedding(64, SIZE))


def clustered(model, clusters=8):
    """Cluster the weights of a model."""
    for name in [name for name, weight in model.named_parameters() if weight.ndim > 1]:
        cluster_weight(model, name, clusters)


MADE = {  # a model, and the change
    "plain tie": (linear, lambda model: tie(model, ["0.weight ~ 1.weight"])),
    "transposed tie": (linear, lambda model: tie(model, ["0.weight ~ 1.weight | o i -> i o"])),
    "low rank": (linear, lambda model: lower_rank(model, ["*.weight"], 8)),
    "low rank, kernels": (convolutions, lambda model: lower_rank(model, ["*.weight"], 8)),
    "low rank, recurrent": (recurrent, lambda model: lower_rank(model, ["*.weight_*"], 8)),
    "low rank, attention": (attention, lambda model: lower_rank(model, ["*.in_proj_weight"], 8)),
    "low rank plus diagonal": (linear, lambda model: lower_rank(model, ["*.weight"], 8, diagonal=True)),
    "relaxed": (linear, lambda model: relax(model, ["*.weight"], LowRankResidual(4))),
    "relaxed, transposed": (
        linear,
        lambda m: relax(m, ["0.weight ~ 1.weight | o i -> i o"], LowRankResidual(4)),
    ),
    "relaxed, kernels": (convolutions, lambda model: relax(model, ["*.weight"], LowRankResidual(4))),
    "relaxed, recurrent": (recurrent, lambda model: relax(model, ["*.weight_*"], LowRankResidual(4))),
    "relaxed by scales": (linear, lambda model: relax(model, ["*.weight"], ScaleResidual())),
    "relaxed by diagonals": (linear, lambda model: relax(model, ["*.weight"], DiagonalResidual())),
    "templates": (linear, lambda model: share_templates(model, ["*.weight"], 2)),
    "templates, kernels": (convolutions, lambda model: share_templates(model, ["*.weight"], 2)),
    "generated": (convolutions, lambda model: generate_weights(model, ["*.weight"], 16)),
    "hashed by layer": (linear, lambda model: hash_weights(model, ["*.weight"], 0.1)),
    "hashed by layer, means": (linear, lambda model: hash_weights(model, ["*.weight"], 0.5, init="mean")),
    "hashed by network": (linear, lambda model: hash_weights(model, ["*.weight"], 0.1, scope="network")),
    "hashed, kernels": (convolutions, lambda model: hash_weights(model, ["*.weight"], 0.1)),
    "hashed, recurrent": (recurrent, lambda model: hash_weights(model, ["*.weight_*"], 0.1, scope="network")),
    "hashed, attention": (attention, lambda model: hash_weights(model, ["*.in_proj_weight"], 0.1)),
    "hashed, embedding": (embedding, lambda model: hash_weights(model, ["*.weight"], 0.1)),
    "clustered": (linear, clustered),
    "clustered, kernels": (convolutions, clustered),
    "clustered, recurrent": (recurrent, clustered),
    "clustered, embedding": (embedding, clustered),
    "untied biases": (convolutions, lambda m: untie_biases(m, ["*.bias"], torch.zeros(1, SIZE, 5, 5))),
}
BUILT = {  # networks of this package
    "HashedLinear": lambda: nn.Sequential(HashedLinear(SIZE, SIZE)),
    "HashedConv2d": lambda: nn.Sequential(HashedConv2d(SIZE, SIZE, 3)),
    "HashedEmbedding": lambda: nn.Sequential(HashedEmbedding(64, SIZE)),
    "PassthroughGRU": lambda: PassthroughGRU(SIZE, SIZE, rank=8, num_layers=2, shared_projection=True),
    "PassthroughHighway": lambda: PassthroughHighway(SIZE, rank=8),
    "HMLSTM": lambda: HMLSTM(SIZE, SIZE),
    "HyperLSTM": lambda: HyperLSTM(SIZE, SIZE, hyper_size=8, num_layers=2),
}


def made(way):
    """Return a model that shares weights in this way."""
    if way in BUILT:
        return BUILT[way]()
    make, change = MADE[way]
    model = make()
    change(model)
    return model

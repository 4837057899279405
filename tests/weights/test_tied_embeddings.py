"""A tied weight that is computed is one weight of all its names, however it was tied and in every way."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F

from tying import ConfigurationError
from tying.hard import audit, bake, generate_weights, load_plain, lower_rank, restore, share_templates, tie, tied, untie
from tying.hashing import ModulusHash, cluster_weight, hash_weights, load_packed, report, save_packed
from tying.weights.derived import count_parameters, derived_weights, names_by_weight, remove

SIZE = 16


class Network(nn.Module):
    """A language model whose head has the shape of its embedding."""

    def __init__(self, embedding=nn.Embedding):
        super().__init__()
        self.embedding, self.norm = embedding(SIZE, SIZE), nn.LayerNorm(SIZE)
        self.middle, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, ids):
        return self.head(self.norm(self.middle(self.embedding(ids)).tanh()))


class Scaled(nn.Embedding):
    """An embedding of another class, as of BART."""

    def forward(self, ids):
        return super().forward(ids) * 2


class Translator(Network):
    """A language model whose embedding has a third owner and a row of zeros."""

    def __init__(self):
        super().__init__(lambda *sizes: Scaled(*sizes, padding_idx=0))
        self.decoder = nn.Embedding(SIZE, SIZE, padding_idx=0)

    def forward(self, ids):
        return super().forward(ids) + self.decoder(ids)


class Recurrent(nn.Module):
    """A recurrent network of which one layer has two weights that are one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(SIZE, SIZE), nn.RNN(SIZE, SIZE)

    def forward(self, ids):
        return self.rnn(self.embedding(ids))[0]


def by_hand(model):
    model.head.weight = model.embedding.weight
    return model


def by_tie(model):
    tie(model, ["head.weight ~ embedding.weight"])
    return model


def three():
    model = by_hand(Translator())
    model.decoder.weight = model.embedding.weight
    return model


def within_a_module():
    model = Recurrent()
    model.rnn.weight_hh_l0 = model.rnn.weight_ih_l0
    return model


def whole_module():
    model = Network()
    model.head = model.middle
    return model


KINDS = {  # the model, and the names of its tied weight
    "by hand": (lambda: by_hand(Network()), ("embedding.weight", "head.weight")),
    "by tie": (lambda: by_tie(Network()), ("embedding.weight", "head.weight")),
    "three owners": (three, ("embedding.weight", "head.weight", "decoder.weight")),
    "one module of two names": (whole_module, ("middle.weight", "head.weight")),
    "two weights of a module": (within_a_module, ("rnn.weight_ih_l0", "rnn.weight_hh_l0")),
}


def clustered(model, patterns):
    for name in ["middle.weight", *patterns] if "**" not in patterns else []:
        cluster_weight(model, name, 8)


WAYS = {
    "hashed by layer": lambda m, p: hash_weights(m, p, 0.3),
    "hashed by layer, signed": lambda m, p: hash_weights(m, p, 0.3, sign=True, density=0.8),
    "hashed by layer, means": lambda m, p: hash_weights(m, p, 0.3, init="mean"),
    "hashed by network": lambda m, p: hash_weights(m, p, 0.3, scope="network"),
    "hashed by modulus": lambda m, p: hash_weights(m, p, 0.25, ModulusHash()),
    "low rank": lambda m, p: lower_rank(m, p, 4),
    "low rank + diagonal": lambda m, p: lower_rank(m, p, 4, diagonal=True),
    "templates": lambda m, p: share_templates(m, p, 2),
    "generated": lambda m, p: generate_weights(m, p, 4, 8, 8),
    "clustered": lambda m, p: [cluster_weight(m, name, 8) for name in p],
}

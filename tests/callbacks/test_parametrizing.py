"""Callbacks that let weights be computed, and subclasses of them."""

import torch
from toys import Toy, train

from tying.callbacks import LowRankWeights, WeightClustering, WeightHashing
from tying.callbacks.transform import arguments_of

NAME = "encoder.0.weight"


class Hashing(WeightHashing):
    def __init__(self, ratio=0.5):
        super().__init__([NAME], ratio)


class LowRank(LowRankWeights):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Clustering(WeightClustering):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


def test_subclasses_take_arguments_of_their_own():
    model = Toy()
    train(model, [Hashing(0.25), LowRank(["decoder.0.weight"], rank=1), Clustering(["decoder.2.weight"], clusters=2)])
    assert model.encoder[0].table.shape == (8,)
    assert torch.linalg.matrix_rank(model.decoder[0].weight) == 1
    assert len(model.decoder[2].weight.unique()) == 2


def test_subclasses_are_told_apart_by_all_arguments():
    assert arguments_of(Hashing(0.25)) != arguments_of(Hashing(0.5))
    assert arguments_of(LowRank([NAME], rank=1)) != arguments_of(LowRank([NAME], rank=2))
    assert arguments_of(LowRank([NAME], rank=1)) == arguments_of(LowRank([NAME], 1))

"""The cells of callbacks that pull weights, watch them or skip blocks."""

import torch
from sharded_models import TIES, Cell, Net

from tying.callbacks import AnchorTying, Coupling, MixtureTying, ResidualMerging, SoftTying, TyingMonitor, TyingSummary
from tying.depth import StochasticDepth
from tying.soft import Huber, Penalty

WEIGHTS = ["network.encoder.**", "network.decoder.**"]


class Cosine(Penalty):
    """Needs whole tensors."""

    def value(self, tensors):
        first, *others = tensors
        return sum(1 - torch.cosine_similarity(first.flatten(), other.flatten(), dim=0) for other in others)


def soft(update, penalty, ties=TIES):
    return Cell(lambda: [SoftTying(ties, strength=0.3, penalty=penalty, update=update), TyingMonitor(), TyingSummary()])


class Frozen(Net):
    """Has a tied weight that does not learn."""

    def change(self):
        self.network.encoder[0].requires_grad_(False)


class Twins(Net):
    """Has two submodules of one structure to couple."""

    def units(self):
        return [[block] for block in self.network.blocks]


CELLS: dict[str, Cell] = {
    **{f"soft, {update}, l2": soft(update, "l2") for update in ("gradient", "decoupled", "proximal")},
    **{f"soft, {update}, l1": soft(update, "l1") for update in ("gradient", "proximal")},
    "soft, decoupled, huber": soft("decoupled", Huber(0.1)),
    "soft, proximal, huber": soft("proximal", Huber(0.1)),
    "soft, gradient, whole": soft("gradient", Cosine()),
    "soft, groups of three": soft("proximal", "l1", ["network.blocks.*.branch.weight", "network.blocks.*.branch.bias"]),
    "soft, frozen": Cell(soft("gradient", "l2").callbacks, Frozen),
    "coupling": Cell(lambda: [Coupling("network.blocks.0", "network.blocks.2", alpha=0.3), TyingMonitor()]),
    "anchor": Cell(
        lambda: [AnchorTying(["network.encoder.**"], strength=0.3, head_strength=0.1, update="decoupled")],
    ),
    "mixture": Cell(lambda: [MixtureTying(WEIGHTS, strength=0.3, components=5, start_epoch=1)]),
    "merging": Cell(
        lambda: [ResidualMerging("network.blocks.*", StochasticDepth(keep=0.5), "uniform")], excluded=("DDP",)
    ),
}

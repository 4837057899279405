"""The cells of callbacks that pull weights, watch them or skip blocks."""

from functools import partial

import torch
from sharded_models import TIES, Cell, Net

from tying.callbacks import (
    AnchorTying,
    Coupling,
    Fisher,
    MixtureTying,
    RandomState,
    ResidualMerging,
    SoftTying,
    Synaptic,
    TyingMonitor,
    TyingSummary,
)
from tying.depth import StochasticDepth
from tying.soft import Huber, Penalty

WEIGHTS = ["network.encoder.**", "network.decoder.**"]


class Cosine(Penalty):
    """Needs whole tensors."""

    def value(self, tensors):
        first, *others = tensors
        return sum(1 - torch.cosine_similarity(first.flatten(), other.flatten(), dim=0) for other in others)


def soft(update, penalty, ties=TIES, short=False):
    def callbacks():
        return [SoftTying(ties, strength=0.3, penalty=penalty, update=update), TyingMonitor(), TyingSummary()]

    return Cell(callbacks, short=short)


class Frozen(Net):
    """Has a tied weight that does not learn."""

    def change(self):
        self.network.encoder[0].requires_grad_(False)


class Labelled(Net):
    """Learns the labels."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)


def important(importance):
    """Learn a task whose importances are measured at the end, given anchors and importances of an earlier one."""
    anchor = AnchorTying(WEIGHTS, strength=0.3, importance=importance)
    weights = dict(Net().named_parameters())
    chosen = {
        name: weight.detach() for name, weight in weights.items() if name.startswith(("network.enc", "network.dec"))
    }
    importances = {name: torch.rand_like(weight, generator=None) for name, weight in chosen.items()}
    state = {"steps": {}, "anchors": {n: w + 0.1 for n, w in chosen.items()}, "importances": importances, "tasks": 1}
    anchor.load_state_dict(state)
    return [anchor]


def anchors(trainer):
    """Return the anchors and importances that a checkpoint holds."""
    state = next(callback.state_dict() for callback in trainer.callbacks if isinstance(callback, AnchorTying))
    return {
        f"{part} {name}": value for part in ("anchors", "importances") for name, value in state.get(part, {}).items()
    }


CELLS: dict[str, Cell] = {
    "soft, gradient, l2": soft("gradient", "l2", short=True),
    "soft, decoupled, l2": soft("decoupled", "l2"),
    "soft, proximal, l2": soft("proximal", "l2"),
    "soft, gradient, l1": soft("gradient", "l1"),
    "soft, proximal, l1": soft("proximal", "l1", short=True),
    "soft, decoupled, huber": soft("decoupled", Huber(0.1)),
    "soft, proximal, huber": soft("proximal", Huber(0.1)),
    "soft, gradient, whole": soft("gradient", Cosine()),
    "soft, groups of three": soft("proximal", "l1", ["network.blocks.*.branch.weight", "network.blocks.*.branch.bias"]),
    "soft, frozen": Cell(soft("gradient", "l2").callbacks, Frozen),
    "coupling": Cell(lambda: [Coupling("network.blocks.0", "network.blocks.2", alpha=0.3), TyingMonitor()]),
    "anchor": Cell(
        lambda: [AnchorTying(["network.encoder.**"], strength=0.3, head_strength=0.1, update="decoupled")],
        ends=anchors,
    ),
    "anchor, fisher": Cell(partial(important, Fisher(3, "given")), Labelled, ends=anchors, short=True),
    "anchor, synaptic": Cell(partial(important, Synaptic()), Labelled, ends=anchors),
    "mixture": Cell(lambda: [MixtureTying(WEIGHTS, strength=0.3, components=5, start_epoch=1)], short=True),
    "merging": Cell(
        lambda: [ResidualMerging("network.blocks.*", StochasticDepth(keep=0.5), "uniform"), RandomState()],
        phases=("train", "resume"),  # other numbers of processes draw other numbers
        short=True,
    ),
}

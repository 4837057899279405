"""What a hard tie costs, against one written by hand, and what it saves; what a relaxed tie costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.perform import stored_bytes
from benchmarks.report import table
from benchmarks.speed.timing import Step, paired, passes
from tying.hard import LowRankResidual, lower_rank, relax, tie
from tying.models import Autoencoder

SIZES = (3072, 1024, 256)
BATCH = 128
PAIRS, ROUNDS = 400, 10
RELAXED_WIDTH, RANK = 2000, 8
LOW_RANK = 32


class ByHand(nn.Module):
    """The autoencoder, with the transposes written into its forward pass."""

    def __init__(self, other: Autoencoder) -> None:
        super().__init__()
        self.weights = nn.ParameterList(other.encoder[i].weight for i in (0, 2))
        self.biases = nn.ParameterList(layer.bias for part in (other.encoder, other.decoder) for layer in part[::2])

    @override
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x, self.weights[0], self.biases[0]))
        code = F.linear(hidden, self.weights[1], self.biases[1])
        hidden = F.relu(F.linear(code, self.weights[1].T, self.biases[2]))
        return F.linear(hidden, self.weights[0].T, self.biases[3])


def transposed() -> tuple[nn.Module, nn.Module]:
    """Return the autoencoder tied through transposes, by us and by hand."""
    ours = Autoencoder(SIZES)
    tie(ours, ["encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o"])
    return ours, ByHand(copy.deepcopy(ours))


def eight_layers() -> nn.Sequential:
    """Return a stack of layers."""
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))


def plain() -> tuple[nn.Module, nn.Module]:
    """Return a stack of layers with one weight, by us and by hand."""
    ours, by_hand = eight_layers(), eight_layers()
    tie(ours, ["*.weight"])
    for layer in by_hand:
        assert isinstance(layer, nn.Linear)
        layer.weight = by_hand[0].weight  # type: ignore[assignment]  # a parameter of the first layer
    return ours, by_hand


def relaxed(layers: int) -> tuple[Step, Step]:
    """Return passes of layers that share a weight up to a residual of low rank each, and of separate ones."""
    ours, dense = (nn.Sequential(*(nn.Linear(RELAXED_WIDTH, RELAXED_WIDTH) for _ in range(layers))) for _ in range(2))
    relax(ours, ["*.weight"], LowRankResidual(RANK), init="source")
    x = torch.randn(BATCH, RELAXED_WIDTH)
    return passes(ours, x), passes(dense, x)


def of_low_rank(by_hand: bool) -> tuple[Step, Step]:
    """Return passes of a layer with a weight of low rank, or of two layers in its place, and of a dense layer."""
    narrow: nn.Module
    narrow, dense = (nn.Linear(RELAXED_WIDTH, RELAXED_WIDTH) for _ in range(2))
    if by_hand:
        first = nn.Linear(RELAXED_WIDTH, LOW_RANK, bias=False)
        narrow = nn.Sequential(first, nn.Linear(LOW_RANK, RELAXED_WIDTH))
    else:
        lower_rank(narrow, ["weight"], LOW_RANK)
    x = torch.randn(BATCH, RELAXED_WIDTH, requires_grad=True)
    return passes(narrow, x), passes(dense, x)


def step(model: nn.Module, width: int) -> tuple[Step, torch.optim.Optimizer]:
    """Return a training step of a model on random input, and its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(BATCH, width)

    def run() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()

    return run, optimizer


def steps(make: Callable[[], tuple[nn.Module, nn.Module]], width: int) -> tuple[Step, Step]:
    """Return the training steps of two models."""
    ours, by_hand = make()
    return step(ours, width)[0], step(by_hand, width)[0]


def memory(model: nn.Module, width: int) -> int:
    """Return the bytes of gradients and of AdamW's state after a step."""
    run, optimizer = step(model, width)
    run()
    return stored_bytes([[parameter.grad for parameter in model.parameters()], optimizer.state_dict()])


def measure() -> Iterator[str]:
    """Run the measurements; yield their results as paragraphs of Markdown."""
    networks: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], int, nn.Module]] = {
        f"autoencoder {'–'.join(map(str, SIZES))}, transposed": (transposed, SIZES[0], Autoencoder(SIZES)),
        "8 linear layers of 1024, plain": (plain, 1024, eight_layers()),
    }
    saved = []
    for name, (make, width, untied) in networks.items():
        ours, _ = make()
        whole, tied = memory(untied, width), memory(ours, width)
        parameters = [sum(weight.numel() for weight in model.parameters()) for model in (untied, ours)]
        shares = [f"{1 - tied / whole:.4f}", f"{1 - parameters[1] / parameters[0]:.4f}"]
        saved.append([name, f"{whole / 2**20:.1f}", f"{tied / 2**20:.1f}", *shares])
    by_hand = {name: partial(steps, make, width) for name, (make, width, _) in networks.items()}
    separate = {f"{layers} layers": partial(relaxed, layers) for layers in (2, 4)}
    heading = ["median ratio", "95 % interval"]
    yield (
        f"A training step (AdamW, batch {BATCH}) with our tie over one with a tie written by hand; {PAIRS} pairs of "
        "steps, side by side:"
    )
    yield table(["network", "ms by hand", *heading], paired(by_hand, ROUNDS, PAIRS // ROUNDS))
    yield "Memory of gradients and optimizer, MiB:"
    yield table(["network", "untied", "tied", "saved", "share of parameters tied"], saved)
    yield (
        f"Forward and backward pass (batch {BATCH}) of linear layers of {RELAXED_WIDTH} that share a weight up to a "
        f"residual of rank {RANK}, over separate layers:"
    )
    yield table(["network", "ms separate", *heading], paired(separate, ROUNDS, PAIRS // ROUNDS))
    yield f"Forward and backward pass (batch {BATCH}) of a layer of low rank over those of a dense one:"
    low_rank = {
        f"rank {LOW_RANK} of {RELAXED_WIDTH}×{RELAXED_WIDTH}": partial(of_low_rank, by_hand=False),
        "two layers by hand": partial(of_low_rank, by_hand=True),
    }
    yield table(["layer", "ms dense", *heading], paired(low_rank, ROUNDS, PAIRS // ROUNDS))

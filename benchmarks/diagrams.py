"""The pictures of docs/gallery.md that need no training: what features store, skip and repeat, by their functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from tying.depth import FractalBlock, Merge, Residual, SkipForward, StochasticDepth, Swapout, loop
from tying.depth.stochastic_depth import Mode
from tying.figures import WIDTH, legend_below, line_style, new_figure
from tying.hard import generate_weights, lower_rank, untie_biases
from tying.models import ConvEncoder, ResNet

EMBEDDINGS = (2, 4, 8, 16, 32, 64)
SIDES = (8, 16, 32, 64)
RANKS = range(1, 65)


def count(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(weight.numel() for weight in model.parameters())


def low_rank() -> Figure:
    """Plot how many parameters weights of low rank have, against the rank."""
    figure = new_figure(WIDTH, 3.2, "Parameters of weights of low rank against the rank, beside those of the weights")
    axes = figure.subplots()
    layers: dict[str, Callable[[], nn.Module]] = {
        "64 × 64": lambda: nn.Linear(64, 64, bias=False),
        "64 × 64 kernels of 3 × 3": lambda: nn.Conv2d(64, 64, 3, bias=False),
    }
    for number, (name, layer) in enumerate(layers.items()):
        counts = []
        for rank in RANKS:
            model = nn.Sequential(layer())
            dense = count(model)
            lower_rank(model, ["0.weight"], rank=rank)
            counts.append(count(model) / dense)
        axes.plot([*RANKS], counts, label=name, markevery=8, **line_style(number))
    axes.axhline(1, color="grey", linewidth=0.8, label="the weight itself")
    axes.set(xlabel="rank (number)", ylabel="parameters (relative to the weight)", ylim=(0, 2.1))
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def generated() -> Figure:
    """Plot how many parameters a ResNet-20 with generated weights has, against the size of an embedding."""
    figure = new_figure(WIDTH, 3.2, "Parameters of a ResNet-20 of generated weights, by the size of an embedding")
    axes = figure.subplots()
    models = {size: ResNet(depth=20) for size in EMBEDDINGS}
    plain = count(models[EMBEDDINGS[0]])
    for size, model in models.items():
        generate_weights(model, ["**.branch.conv*.weight"], size)
    axes.plot([*models], [*map(count, models.values())], label="generated weights", **line_style(0))
    axes.axhline(plain, color="grey", linewidth=0.8, label="plain")
    axes.set(xlabel="size of an embedding (numbers)", ylabel="parameters of the network (number)", xscale="log")
    axes.set_xticks(EMBEDDINGS, [*map(str, EMBEDDINGS)])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def untied_biases() -> Figure:
    """Plot how many biases and weights the convolutions of an encoder have, against the side of the images."""
    figure = new_figure(WIDTH, 3.2, "Parameters of three convolutions with untied biases, by the side of images")
    axes = figure.subplots()
    encoder = ConvEncoder()
    plain = count(encoder)
    counts = []
    for side in SIDES:
        encoder = ConvEncoder()
        untie_biases(encoder, ["*.bias"], torch.zeros(1, 3, side, side))
        counts.append(count(encoder))
    axes.plot(SIDES, counts, label="a bias for each channel and position", **line_style(0))
    axes.axhline(plain, color="grey", linewidth=0.8, label="a bias for each channel")
    axes.set(xlabel="side of the images (pixels)", ylabel="parameters (number)")
    axes.set_xticks(SIDES)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def merges() -> Figure:
    """Draw which units of a batch take the shortcut, the branch, both or neither, for four merges."""
    modes: Sequence[Mode] = ("batch", "row")
    shown: dict[str, Merge] = {f"StochasticDepth, mode {mode!r}": StochasticDepth(0.5, mode) for mode in modes}
    shown |= {"Swapout": Swapout(0.5, 0.5), "SkipForward": SkipForward(0.5)}
    figure = new_figure(WIDTH, 4.4, "Units that take the shortcut, the branch, both or neither, for four merges")
    colors = colormaps["viridis"].resampled(4)
    for axes, (name, merge) in zip(figure.subplots(2, 2).flat, shown.items(), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            taken = Residual(_Doubled(), merge=merge)(
                torch.ones(8, 24)
            )  # 1 for the shortcut, 2 for the branch, 3 for both
        axes.imshow(taken.detach().numpy(), cmap=colors, vmin=-0.5, vmax=3.5, aspect="auto")
        axes.set(xlabel="units", ylabel="samples", xticks=[], yticks=[])
        axes.set_title(name, fontsize="small")
    kinds = ["neither", "the shortcut x", "the branch F(x)", "both"]
    legend_below(figure, [Patch(color=colors(number)) for number in range(4)], kinds)
    return figure


class _Doubled(nn.Module):
    """A branch that doubles its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``2 x``."""
        return 2 * x


def fractal() -> Figure:
    """Draw the layers of a fractal block of four columns, each as long as those of the deepest one beside it."""
    lengths = [len([*column.children()]) for column in FractalBlock(4, nn.Linear, 2, 2).columns]
    depth = lengths[-1]
    figure = new_figure(WIDTH, 2.6, "Layers of a fractal block of four columns, whose outputs meet in joins")
    axes = figure.subplots()
    for column, length in enumerate(lengths, start=1):
        span = depth / length
        bars = [(span * layer + 0.05, span - 0.1) for layer in range(length)]
        axes.broken_barh(bars, (column - 0.25, 0.5), facecolor="0.7")
    for step in range(1, depth + 1):
        ending = [column for column, length in enumerate(lengths, start=1) if step * length % depth == 0]
        if len(ending) > 1:
            axes.plot([step, step], [ending[0] - 0.25, ending[-1] + 0.25], color="black", linewidth=2)
    axes.set(xlabel="depth (layers of the deepest column)", ylabel="column (number)", yticks=range(1, len(lengths) + 1))
    axes.set_title("grey: a layer; black: a join, the mean of the columns that end there", fontsize="small")
    axes.invert_yaxis()
    return figure


def passes() -> Figure:
    """Plot which of six blocks a model calls in turn, without a loop and with loops of two and of three passes."""
    figure = new_figure(WIDTH, 3.2, "Blocks in the order of their calls, for one, two and three passes of a loop")
    axes = figure.subplots()
    for number in range(1, 4):
        model, calls = nn.Sequential(*(nn.Linear(1, 1) for _ in range(6))), list[int]()
        for position, block in enumerate(model):
            block.register_forward_hook(_recorder(calls, position))
        loop(model, "{2..3}", passes=number)
        model(torch.zeros(1, 1))
        axes.plot(range(1, len(calls) + 1), calls, label=f"passes={number}", **line_style(number - 1))
    axes.set(xlabel="call (number)", ylabel="block (index)", yticks=range(6))
    axes.locator_params(axis="x", integer=True)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def _recorder(calls: list[int], position: int) -> Callable[..., None]:
    def record(*_: Any) -> None:
        calls.append(position)

    return record


DIAGRAMS: dict[str, Callable[[], Figure]] = {
    "low_rank": low_rank,
    "generated": generated,
    "untied_biases": untied_biases,
    "merges": merges,
    "fractal": fractal,
    "passes": passes,
}

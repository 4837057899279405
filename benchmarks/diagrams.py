"""The pictures of docs/gallery.md that need no training: what features store, skip and repeat, by their functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
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


def parameter_figure(
    title: str, x: str, y: str, sizes: Sequence[float], lines: Mapping[str, Sequence[float]], base: str, at: float
) -> tuple[Figure, Axes]:
    """Plot numbers of parameters against sizes, beside the number ``at`` of what ``base`` names."""
    figure = new_figure(WIDTH, 3.2, title)
    axes = figure.subplots()
    for number, (name, counts) in enumerate(lines.items()):
        axes.plot([*sizes], [*counts], label=name, markevery=max(1, len(sizes) // 8), **line_style(number))
    axes.axhline(at, color="grey", linewidth=0.8, label=base)
    axes.set(xlabel=x, ylabel=y)
    axes.set_ylim(bottom=0)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure, axes


def low_rank() -> Figure:
    """Plot how many parameters weights of low rank have, against the rank."""
    layers: dict[str, Callable[[], nn.Module]] = {
        "64 × 64": lambda: nn.Linear(64, 64, bias=False),
        "64 × 64 kernels of 3 × 3": lambda: nn.Conv2d(64, 64, 3, bias=False),
    }

    def share(layer: nn.Module, rank: int) -> float:
        model, dense = nn.Sequential(layer), count(layer)
        lower_rank(model, ["0.weight"], rank=rank)
        return count(model) / dense

    title = "Parameters of weights of low rank against the rank, beside those of the weights"
    lines = {name: [share(layer(), rank) for rank in RANKS] for name, layer in layers.items()}
    words = "rank (number)", "parameters (relative to the weight)"
    return parameter_figure(title, *words, RANKS, lines, "the weight itself", 1)[0]


def generated() -> Figure:
    """Plot how many parameters a ResNet-20 with generated weights has, against the size of an embedding."""
    counts = []
    for size in EMBEDDINGS:
        model = ResNet(depth=20)
        generate_weights(model, ["**.branch.conv*.weight"], size)
        counts.append(count(model))
    title = "Parameters of a ResNet-20 of generated weights, by the size of an embedding"
    words = "size of an embedding (numbers)", "parameters of the network (number)"
    plain = count(ResNet(depth=20))
    figure, axes = parameter_figure(title, *words, EMBEDDINGS, {"generated weights": counts}, "plain", plain)
    axes.set_xscale("log")
    axes.set_xticks(EMBEDDINGS, [*map(str, EMBEDDINGS)])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return figure


def untied_biases() -> Figure:
    """Plot how many biases and weights the convolutions of an encoder have, against the side of the images."""
    counts = []
    for side in SIDES:
        encoder = ConvEncoder()
        untie_biases(encoder, ["*.bias"], torch.zeros(1, 3, side, side))
        counts.append(count(encoder))
    title = "Parameters of three convolutions with untied biases, by the side of images"
    words, lines = (
        ("side of the images (pixels)", "parameters (number)"),
        {"a bias for each channel and position": counts},
    )
    figure, axes = parameter_figure(title, *words, SIDES, lines, "a bias for each channel", count(ConvEncoder()))
    axes.set_xticks(SIDES)
    axes.yaxis.set_major_formatter("{x:,.0f}")
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
            block.register_forward_hook(lambda *_, calls=calls, position=position: calls.append(position))
        loop(model, "{2..3}", passes=number)
        model(torch.zeros(1, 1))
        axes.plot(range(1, len(calls) + 1), calls, label=f"passes={number}", **line_style(number - 1))
    axes.set(xlabel="call (number)", ylabel="block (index)", yticks=range(6))
    axes.locator_params(axis="x", integer=True)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


DRAWN: tuple[Callable[[], Figure], ...] = (low_rank, generated, untied_biases, merges, fractal, passes)
DIAGRAMS = {draw.__name__: draw for draw in DRAWN}

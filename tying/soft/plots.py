"""Plot how far apart tied weights are, and the mixture that is the prior of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tying.figures import SMALL, WIDTH, legend_below, line_style, new_figure
from tying.soft.mixture import GaussianMixturePrior

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an optional package

BINS = 200
MARKED = 20  # points of a line that bear a marker, at most


def gap_figure(gaps: Mapping[str, Sequence[tuple[int, float]]], max_lines: int) -> Figure:
    """Plot the gaps of the groups that are furthest apart at the end, below the largest of all groups at each step.

    Args:
        gaps: pairs of step and gap, by the name of the group.
        max_lines: how many groups to show.
    """
    largest: dict[int, float] = {}
    for step, value in (pair for pairs in gaps.values() for pair in pairs):
        largest[step] = max(value, largest.get(step, 0.0))
    furthest = sorted(gaps, key=lambda name: -gaps[name][-1][1])[:max_lines]
    title = "Distance of tied weights from their mean"
    if len(furthest) < len(gaps):
        title += f": the {len(furthest)} of {len(gaps)} groups that end furthest apart"
    figure = new_figure(WIDTH, 3.6, f"{title}, by optimizer step")
    axes = figure.add_subplot(xlabel="training time (optimizer steps)", ylabel="gap (relative to the weights' norm)")
    axes.set_title(title, fontsize="small")
    axes.plot(*zip(*sorted(largest.items()), strict=True), color="0.8", linewidth=4, label="largest of all groups")
    for number, name in enumerate(furthest):
        every = max(1, len(gaps[name]) // MARKED)
        axes.plot(*zip(*gaps[name], strict=True), label=name, markevery=every, **line_style(number))
    axes.set_ylim(bottom=0)
    legend_below(figure, *axes.get_legend_handles_labels())  # over the lines, long names would hide them
    return figure


def importance_figure(means: Mapping[str, float], title: str = "") -> Figure:
    """Plot the mean importance of each layer as a bar, in the order of the layers.

    Args:
        means: mean importance of a layer's weights, by the name of the layer.
        title: title of the figure.
    """
    figure = new_figure(WIDTH, 1.4 + 0.2 * len(means), f"Mean importance of each layer's weights {title}".rstrip())
    axes = figure.add_subplot(xlabel="mean importance of the layer's weights", ylabel="layer", title=title)
    axes.barh(range(len(means)), [*means.values()], color="C0")
    axes.set_yticks(range(len(means)), [*means], fontsize=SMALL)
    axes.invert_yaxis()
    if any(means.values()):
        axes.set_xscale("log")  # layers differ by orders of magnitude
    return figure


@torch.no_grad()
def mixture_figure(weights: Tensor, prior: GaussianMixturePrior, title: str = "") -> Figure:
    """Plot a histogram of weights, and the number of weights that the mixture predicts for each bin.

    Args:
        weights: weights of any shape.
        prior: the mixture prior of the weights.
        title: title of the figure.
    """
    flat = weights.flatten().double().cpu()
    means, log_stds, log_proportions = (part.double().cpu() for part in prior.mixture())
    low, high = (float(bound) for bound in torch.cat([flat, means]).aminmax())
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    below = torch.special.ndtr((edges - means[:, None]) / log_stds.exp()[:, None])  # cumulative distributions
    expected = len(flat) * log_proportions.exp()[:, None] * below.diff(dim=1)
    middle = (edges[1:] + edges[:-1]) / 2
    figure = new_figure(WIDTH, 4, f"Histogram of weights, and the mixture that is their prior: {title}".rstrip(": "))
    axes = figure.add_subplot(xlabel="value of a weight", ylabel="number of weights", title=title)
    axes.set(yscale="log", ylim=(0.5, 2.0 * len(flat)))
    axes.hist(flat.numpy(), bins=edges.tolist(), color="0.75", label="weights")
    axes.plot(middle, expected.sum(dim=0), color="C3", label="mixture")
    components = axes.plot(middle, expected.T, color="C0", linewidth=0.6, linestyle="--")
    components[0].set_label("components of the mixture")
    axes.plot(means, torch.full_like(means, 0.7), "k|", label="means of the components")
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure

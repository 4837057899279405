"""Plot a histogram of weights and the mixture that is their prior."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tying.soft.mixture import GaussianMixturePrior

BINS = 200


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
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="weight", ylabel="weights", title=title, yscale="log", ylim=(0.5, 2.0 * len(flat)))
    axes.hist(flat.numpy(), bins=edges.tolist(), color="0.75", label="weights")
    axes.plot(middle, expected.sum(dim=0), color="C3", label="mixture")
    axes.plot(middle, expected.T, color="C0", linewidth=0.6)  # each component
    axes.plot(means, torch.full_like(means, 0.7), "k|", label="means")
    axes.legend(loc="best", fontsize="x-small")
    return figure

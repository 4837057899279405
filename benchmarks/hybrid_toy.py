"""The synthetic experiment of Lasserre, Bishop and Minka (2006): when does a hybrid beat both of its limits?

Two classes, each drawn from a Gaussian elongated horizontally, are modelled by one isotropic Gaussian each, which is
deliberately wrong. Few points have labels, all count in the density. The two copies of the parameters, θ of the class
posterior and θ̃ of the density, are coupled with ``coupling_strength(alpha)``; all problems, of every draw, number of
labels and α, are solved at once.

The paper's constants are not known here; these are ours. The classes are apart along a diagonal: were they apart only
vertically, the density would part them the wrong way, left from right, and the discriminative limit would be best.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks.inference import interval
from benchmarks.report import table
from tying.figures import WIDTH, legend_below, line_style, new_figure
from tying.soft import coupling_strength

ALPHAS = (0, 0.005, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.985, 0.995, 1)
LABELS = (2, 4, 6)
DRAWS = 60
POINTS, TESTS = 200, 1000  # of a class
SPREAD = (1.2, 0.4)  # standard deviations of a class, horizontally and vertically
CENTRE = (0.75, 0.75)  # of the first class; the other one's is opposite
PRIOR = 10.0  # standard deviation of a weak prior on every parameter: without it few labels drive θ to infinity
STEPS, RATE = 800, 0.05


def sample(count: int, draws: int, generator: torch.Generator) -> Tensor:
    """Return points of both classes, (draws, 2 · count, 2), those of the first class first."""
    noise = torch.randn(draws, 2, count, 2, generator=generator, dtype=torch.float64)
    centre = torch.tensor(CENTRE, dtype=torch.float64)
    return (noise * torch.tensor(SPREAD, dtype=torch.float64) + torch.stack([centre, -centre])[:, None]).flatten(1, 2)


def log_joint(points: Tensor, parameters: Tensor) -> Tensor:
    """Return ``log ½ N(x; μ_c, s_c² I)`` for both classes.

    Args:
        points: (..., n, 2).
        parameters: (..., 2, 3): of each class the mean and log s.

    Returns:
        (..., n, 2).
    """
    means, log_stds = parameters[..., :2], parameters[..., 2]
    away = (points[..., :, None, :] - means[..., None, :, :]).square().sum(dim=-1)
    normal = -away / (2 * (2 * log_stds).exp())[..., None, :] - 2 * log_stds[..., None, :] - math.log(2 * math.pi)
    return normal - math.log(2)


def solve(points: Tensor, labelled: int, alphas: Sequence[float]) -> Tensor:
    """Return θ of every draw and α, (draws, alphas, 2, 3): the mode of the hybrid's posterior.

    Args:
        points: (draws, 2 n, 2), the first n of the first class.
        labelled: how many points have labels, as many of either class.
        alphas: α.
    """
    draws, both = points.shape[:2]
    each, half = labelled // 2, both // 2
    known = torch.cat([points[:, :each], points[:, half : half + each]], dim=1)
    classes = torch.arange(2).repeat_interleave(each).expand(draws, len(alphas), -1)
    start = torch.zeros(draws, 2, 3, dtype=torch.float64)
    start[..., :2] = known.view(draws, 2, each, 2).mean(dim=2)
    strengths = torch.tensor([coupling_strength(alpha) for alpha in alphas], dtype=torch.float64)[:, None, None]
    # Adam goes by coordinates: θ and θ̃ themselves where they hardly know of each other, else θ̃ and their difference
    loose, one = strengths < 1, strengths.isinf()
    density = start[:, None].repeat(1, len(alphas), 1, 1).requires_grad_()
    other = torch.where(loose, density.detach(), 0.0).requires_grad_()
    optimizer = torch.optim.Adam([density, other], lr=RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        posterior = torch.where(loose, other, density + torch.where(one, 0.0, other))
        logits = log_joint(known[:, None], posterior)
        likelihood = -F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="sum")
        likelihood = likelihood + log_joint(points[:, None], density).logsumexp(dim=-1).sum()
        coupling = (torch.where(one, 0.0, strengths) * (posterior - density).square() / 2).sum()
        prior = (posterior.square() + density.square()).sum() / (2 * PRIOR**2)
        (coupling + prior - likelihood).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        decay.step()
    return torch.where(loose, other, density + torch.where(one, 0.0, other)).detach()


def accuracies(draws: int) -> Tensor:
    """Return the test accuracy of every number of labels, draw and α, (labels, draws, alphas)."""
    generator = torch.Generator().manual_seed(0)
    points, tests = sample(POINTS, draws, generator), sample(TESTS, draws, generator)
    truth = torch.arange(2).repeat_interleave(TESTS)
    found = []
    for count in LABELS:
        solved = solve(points, count, ALPHAS)
        guesses = [log_joint(tests, solved[:, i]).argmax(dim=-1) for i in range(len(ALPHAS))]
        found.append(torch.stack([(guess == truth).double().mean(dim=-1) for guess in guesses], dim=-1))
    return torch.stack(found)


def verdict(values: Tensor, alphas: Sequence[float] = ALPHAS) -> tuple[float, str]:
    """Return the best α, and whether it beats both limits.

    α is chosen on the first half of the draws, and compared with the limits on the other half, draw by draw.

    Args:
        values: accuracies, (draws, alphas).
        alphas: α, from 0 to 1.
    """
    half = len(values) // 2
    best = int(values[:half].mean(dim=0).argmax())
    if best in (0, len(alphas) - 1):
        return alphas[best], "not reproduced: the best α is a limit"
    others = {"generative": 0, "discriminative": len(alphas) - 1}
    told, sure = [], True
    for name, other in others.items():
        gains = (values[half:, best] - values[half:, other]).tolist()
        low, high = interval(gains)
        told.append(f"{fmean(gains):+.4f} over the {name} limit ({low:+.4f} to {high:+.4f})")
        sure &= low > 0
    return alphas[best], f"{'reproduced' if sure else 'undecided'}: {', '.join(told)}"


def report(draws: int = DRAWS) -> Iterator[str | Figure]:
    """Run the experiment; yield its results as paragraphs of Markdown, and its figure."""
    head, columns, judged = ["α"], [], []
    figure = new_figure(WIDTH, 3.8, "Test accuracy against α: a line for each number of labels")
    axes = figure.add_subplot(xlabel="α: 0 generative, 1 discriminative", ylabel="test accuracy (fraction correct)")
    bars = []
    for number, (count, values) in enumerate(zip(LABELS, accuracies(draws), strict=True)):
        means = values.mean(dim=0).tolist()
        errors = [stdev(column) / math.sqrt(draws) for column in values.T.tolist()]
        head.append(f"{count} labels")
        columns.append([f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True)])
        bars.append(axes.errorbar(ALPHAS, means, yerr=errors, label=head[-1], capsize=2, **line_style(number)))
        best, said = verdict(values)
        judged.append(f"{count} labels: the best α is {best}; an inner maximum is {said}.")
    legend_below(figure, bars, head[1:])
    rows = [[f"{alpha}", *cells] for alpha, *cells in zip(ALPHAS, *columns, strict=True)]
    yield (
        f"Lasserre, Bishop and Minka's synthetic task: mean accuracy ± its standard error over {draws} draws of "
        f"2 × {POINTS} points; classes of standard deviations {SPREAD} around ±{CENTRE}, under isotropic Gaussians; "
        "α is chosen on half of the draws, and compared with the limits on the others:"
    )
    yield table(head, rows)
    yield "\n".join(judged)
    yield figure

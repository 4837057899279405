"""What every figure of the package and of the benchmarks shows is what was measured: its artists hold the data."""

import math
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import train

from benchmarks import hybrid_toy
from benchmarks.declared import load, suites
from benchmarks.figures import Plot, draw
from benchmarks.speed import growth
from benchmarks.summary import plot
from tying.callbacks import Unrolling
from tying.callbacks.hm_lstm import boundary_figure
from tying.depth import Recurrent, Residual
from tying.figures import DASHES, LEGEND
from tying.hard import layer_similarity, plot_similarity, share_templates
from tying.hashing import ModulusHash, hash_weights, plot_loads
from tying.models import MLP, Classifier
from tying.soft import GaussianMixturePrior
from tying.soft.plots import gap_figure, mixture_figure

MANY = 24


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure) or path.touch())
    return figures


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def result(run, seed, epoch, **metrics):
    """A row of results, as the harness writes it."""
    values = {name.replace("_", "/"): str(value) for name, value in metrics.items()}
    return {"run": run, "seed": str(seed), "epoch": str(epoch), **values}


def test_gaps():
    """The groups that end furthest apart, however they began, and the largest of all, which is logged."""
    gaps = {"a": [(1, 0.9), (2, 0.1)], "b": [(1, 0.2), (2, 0.5)], "c": [(1, 0.3), (2, 0.4)]}
    figure = gap_figure(gaps, max_lines=2)
    [axes] = figure.axes
    assert lines(axes) == {
        "largest of all groups": ([1, 2], [0.9, 0.5]),
        "b": ([1, 2], [0.2, 0.5]),
        "c": ([1, 2], [0.3, 0.4]),
    }
    assert axes.get_title() == "Distance of tied weights from their mean: the 2 of 3 groups that end furthest apart"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["largest of all groups", "b", "c"]
    low, high = axes.get_ylim()
    assert low == 0 < 0.9 <= high
    [whole] = gap_figure(gaps, max_lines=3).axes
    assert whole.get_title() == "Distance of tied weights from their mean"


def test_a_mixture():
    weights = torch.cat([torch.zeros(300), torch.linspace(-1, 1, 100)])
    prior = GaussianMixturePrior(components=3, low=-0.5, high=0.5)
    figure = mixture_figure(weights, prior, title="prior of 400 weights")
    [axes] = figure.axes
    heights = np.array([bar.get_height() for bar in axes.patches])
    lefts = np.array([bar.get_x() for bar in axes.patches])
    assert heights.sum() == 400
    assert heights[np.searchsorted(lefts, 1e-9) - 1] >= 300
    whole, *components, means = axes.lines
    assert whole.get_ydata() == pytest.approx(sum(line.get_ydata() for line in components))
    assert whole.get_ydata().sum() <= 400
    assert sorted(means.get_xdata()) == pytest.approx([-0.5, 0.0, 0.5])
    assert axes.get_title() == "prior of 400 weights"
    assert axes.get_ylim()[0] < 1 < 300 < axes.get_ylim()[1]


def test_boundaries():
    marks = torch.zeros(5, 2)
    marks[[1, 4], [0, 1]] = 1
    [axes] = boundary_figure("hallo", marks).axes
    assert "".join(letter.get_text() for letter in axes.texts) == "hallo"
    assert {label: xs for label, (xs, _) in lines(axes).items()} == {"layer 1": [1], "layer 2": [4]}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_steps(saved):
    x = torch.randn(32, 5)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    model = Classifier(nn.Sequential(Recurrent(Residual(nn.Linear(5, 5)), steps=2), MLP([5, 2])), num_classes=2)
    trainer = train(model, [Unrolling([-1, 0, 2])], data=data, max_epochs=1)
    [tested] = trainer.test(model, data, verbose=False)
    [[axes]] = [figure.axes for figure in saved]
    drawn, _ = axes.lines
    assert list(drawn.get_xdata()) == [-1, 0, 2]
    assert drawn.get_ydata() == pytest.approx([tested[f"test/steps{extra:+d}/accuracy"] for extra in (-1, 0, 2)])


def test_similarity(saved, tmp_path):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), *(nn.Linear(3, 3) for _ in range(2)))
    share_templates(model, ["[012].weight"], 2)
    share_templates(model, ["[34].weight"], 2)
    plot_similarity(model, tmp_path / "similarity.png")
    first, second, colors = saved[0].axes
    for axes, numbers in ((first, (0, 1, 2)), (second, (3, 4))):
        coefficients = [model[number].parametrizations.weight.original for number in numbers]
        assert np.allclose(axes.images[0].get_array(), layer_similarity(coefficients).detach())
        assert axes.images[0].get_clim() == (0, 1)  # those of the one color bar
        assert axes.get_title() == f"{numbers[0]}.weight … {numbers[-1]}.weight"
    assert colors.get_ylabel() == "similarity"


def test_loads(saved, tmp_path):
    model = nn.Linear(6, 5)
    hash_weights(model, ["weight"], table_ratio=0.2, hash=ModulusHash())  # 30 weights of 6 entries
    plot_loads(model, tmp_path / "loads.png")
    heat, bars, *_ = saved[0].axes
    shown = heat.images[0].get_array().compressed()
    assert shown[np.isfinite(shown)].tolist() == [5.0] * 6
    assert sum(bar.get_height() for bar in bars.patches) == 6
    [filled] = [bar for bar in bars.patches if bar.get_height()]
    assert filled.get_x() <= 5 <= filled.get_x() + filled.get_width()


def test_curves(saved, tmp_path):
    """Means over the seeds of each epoch, in order of epochs also where the first seed has not logged them all."""
    rows = [
        result("a", 0, 2, val_loss=0.4),
        result("a", 0, 3, val_loss=0.2),
        *(result("a", 1, epoch, val_loss=0.6, val_gap=epoch) for epoch in (1, 2, 3)),
        *(result("b", 0, epoch, val_loss=epoch) for epoch in (1, 2)),
    ]
    plot(rows, ["val/loss", "val/gap"], tmp_path / "p.png")
    loss, gap = saved[0].axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2, 3], [1, 2]]
    assert loss.lines[0].get_ydata() == pytest.approx([0.6, 0.5, 0.4])
    assert list(loss.lines[1].get_ydata()) == [1, 2]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in gap.lines] == [([1, 2, 3], [1, 2, 3])]
    assert [axes.get_ylabel() for axes in (loss, gap)] == ["val/loss", "val/gap"]
    [legend] = [axes.get_legend() for axes in (loss, gap) if axes.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    handles = [handle.get_color() for handle in legend.get_lines()]
    assert handles == [line.get_color() for line in loss.lines]


@pytest.mark.parametrize("log", [False, True])
def test_lines_over_an_axis(saved, tmp_path, log):
    """In order of x, with the spread of seeds, and without the points that are not finite."""
    rows = [
        result(f"{ratio},{x}", seed, 1, ratio=ratio, alpha=x, test_accuracy=y + seed / 4)
        for ratio, ys in (("0.1", {3.0: 0.2, 1.0: 0.1, 2.0: math.nan}), ("0.5", {1.0: 0.3, 0.0: 0.4}))
        for x, y in ys.items()
        for seed in (0, 1)
    ]
    rows.append(result("0.1,nan", 0, 1, ratio="0.1", alpha=math.nan, test_accuracy=0.9))
    draw(Plot("p", "alpha", "test/accuracy", "ratio", log=log), rows, tmp_path / "p.png")
    [axes] = saved[0].axes
    drawn = {container.get_label(): container for container in axes.containers}
    assert [*drawn] == ["ratio 0.1", "ratio 0.5"]
    first, second = (container.lines[0].get_xydata() for container in drawn.values())
    assert np.allclose(first, [(1.0, 0.225), (3.0, 0.325)])
    assert np.allclose(second, [(0.0, 0.525), (1.0, 0.425)])
    for container in drawn.values():
        bars = container.lines[2][0].get_segments()
        assert [high - low for (_, low), (_, high) in bars] == pytest.approx([2 * 0.03125**0.5] * 2)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("alpha", "test/accuracy")
    assert axes.get_xscale() == ("symlog" if log else "linear")


def test_points_bear_the_names_of_their_settings(saved, tmp_path):
    rows = [
        result(run, seed, 1, bytes=size, test_accuracy=y + seed / 10)
        for run, (size, y) in {"plain": (4096, 0.5), "tied": (1024, 0.4), "clustered": (1100, 0.4)}.items()
        for seed in (0, 1)
    ]
    draw(Plot("p", "bytes", "test/accuracy", log=True), rows, tmp_path / "p.png")
    [axes] = saved[0].axes
    at = {note.get_text(): note.xy for note in axes.texts}
    assert at == {"plain": (4096, 0.55), "tied": (1024, pytest.approx(0.45)), "clustered": (1100, pytest.approx(0.45))}
    drawn = {container.get_label(): container.lines[0].get_xydata()[0].tolist() for container in axes.containers}
    assert drawn == {name: pytest.approx([*xy]) for name, xy in at.items()}
    assert axes.get_xscale() == "log"


def test_the_synthetic_task(monkeypatch):
    monkeypatch.setattr(hybrid_toy, "STEPS", 3)
    text, figure = hybrid_toy.report(draws=3)
    [axes] = figure.axes
    cells = [re.findall(r"(\d\.\d{3}) ±", row) for row in text.splitlines() if "±" in row and row.startswith("|")]
    columns = [[float(cell) for cell in column] for column in zip(*cells, strict=True)]
    for container, count, column in zip(axes.containers, hybrid_toy.LABELS, columns, strict=True):
        assert container.get_label() == f"{count} labels"
        assert list(container.lines[0].get_xdata()) == [*hybrid_toy.ALPHAS]
        assert container.lines[0].get_ydata() == pytest.approx(column, abs=6e-4)


def test_growth(monkeypatch):
    """Also of an odd number of costs."""
    for name, value in {"RACES": 1, "ROUNDS": 1, "BATCH": 2}.items():
        monkeypatch.setattr(growth, name, value)
    costs = [growth.Growth(f"cost {number}", "size", 1, (1, 2, 4), lambda _: lambda: None) for number in range(3)]
    monkeypatch.setattr(growth, "growths", lambda: costs)
    text, figure = growth.measure()
    spans = re.findall(r"\| +([\d.e-]+) to ([\d.e-]+) +\| +[-\d.]+ \(", text)
    assert len(spans) == len(costs)
    for cost, (first, last), axes in zip(costs, spans, figure.axes, strict=False):
        measured, expected = axes.lines
        assert list(measured.get_xdata()) == [*cost.sizes]
        assert [measured.get_ydata()[0], measured.get_ydata()[-1]] == pytest.approx(
            [float(first), float(last)], rel=1e-2
        )
        assert expected.get_ydata()[-1] == measured.get_ydata()[-1]
        assert expected.get_ydata()[0] == pytest.approx(measured.get_ydata()[-1] / 4)
        assert (axes.get_title(), axes.get_xscale(), axes.get_yscale()) == (cost.cost, "log", "log")
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]


def many_gaps(saved, path):
    return gap_figure({f"group {n:02}": [(1, 1 / (1 + n)), (2, 1 / (2 + n))] for n in range(MANY)}, MANY)


def many_curves(saved, path):
    plot([result(f"s{n}", 0, epoch, val_loss=n) for n in range(MANY) for epoch in (1, 2)], ["val/loss"], path)
    return saved[-1]


def many_lines(saved, path):
    rows = [result(f"{n},{x}", 0, 1, ratio=n, alpha=x, test_loss=n + x) for n in range(MANY) for x in (1, 2)]
    draw(Plot("p", "alpha", "test/loss", "ratio"), rows, path)
    return saved[-1]


def many_points(saved, path):
    draw(Plot("p", "bytes", "test/loss"), [result(f"s{n}", 0, 1, bytes=n, test_loss=n) for n in range(MANY)], path)
    return saved[-1]


@pytest.mark.parametrize("build", [many_gaps, many_curves, many_lines, many_points])
def test_lines_can_be_told_apart(build, saved, tmp_path):
    figure = build(saved, tmp_path / "p.png")
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) == (1 if build is many_points else 2)]
    drawn = [line for line in drawn if line.get_marker() in "os^x"]  # not the caps of error bars
    assert len(drawn) == MANY
    assert len({(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in drawn}) == MANY
    if build is many_points:
        return  # their names stand beside them
    [legend] = [*figure.legends, *filter(None, [figure.axes[0].get_legend()])]
    handle = legend.handlelength * legend.get_texts()[0].get_fontsize()
    longest = max(sum(dash[1]) for dash in DASHES if dash != "-") * max(line.get_linewidth() for line in drawn)
    assert handle >= 2 * longest  # shows each dash twice
    assert legend.handlelength == LEGEND["handlelength"]


@pytest.mark.parametrize("suite", suites())
def test_bytes_are_shown_before_parameters(suite):
    """A clustered network has few parameters, and an index for each weight beside them."""
    shown = [plot.x for plot in load(suite).plots]
    assert "parameters" not in shown or shown.index("bytes") < shown.index("parameters")

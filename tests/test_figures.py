"""What every figure of the package and of the benchmarks shows is what was measured: its artists hold the data."""

import ast
import math
import re
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from pandas import DataFrame
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import train

from benchmarks import evidence, experiment, gallery, hybrid_toy, report
from benchmarks.declared import load, suites
from benchmarks.diagrams import DIAGRAMS
from benchmarks.figures import Plot, draw, draw_curves, draw_outcomes, draw_overview
from benchmarks.speed import growth
from tying.advice.plans import Plan
from tying.advice.report import Advice, GroupRow, PlanRow
from tying.callbacks import Unrolling
from tying.callbacks.hm_lstm import boundary_figure
from tying.callbacks.observers.unrolling import unrolling_figure
from tying.cli import demo
from tying.depth import Recurrent, Residual
from tying.errors import ConfigurationError
from tying.figures import SMALL, WIDTH, new_figure
from tying.files import save_figure
from tying.hard import layer_similarity, plot_similarity, share_templates
from tying.hard.templates import similarity_figure
from tying.hashing import ModulusHash, hash_weights, plot_loads
from tying.hashing.report import loads_figure
from tying.models import MLP, Classifier
from tying.soft import GaussianMixturePrior
from tying.soft.plots import gap_figure, importance_figure, mixture_figure

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
    assert {label: xs for label, (xs, _) in lines(axes).items()} == {
        "boundaries of layer 1": [1],
        "boundaries of layer 2": [4],
    }


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
        assert axes.get_title() == f"{numbers[0]}.weight …\n{numbers[-1]}.weight"
    assert colors.get_ylabel() == "similarity (1: proportional, 0: orthogonal)"


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
    draw_overview(DataFrame(rows), ["val/loss", "val/gap"], ["val/loss"], tmp_path / "p.png")
    loss, gap = saved[0].axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2, 3], [1, 2]]
    assert loss.lines[0].get_ydata() == pytest.approx([0.6, 0.5, 0.4])
    assert list(loss.lines[1].get_ydata()) == [1, 2]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in gap.lines] == [([1, 2, 3], [1, 2, 3])]
    assert [axes.get_title() for axes in (loss, gap)] == ["Validation loss", "Validation gap"]
    assert [axes.get_ylabel() for axes in (loss, gap)] == ["mean per example", "validation gap"]
    assert {axes.get_xlabel() for axes in (loss, gap)} == {"training time (epochs)"}
    [legend] = saved[0].legends
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
    draw(Plot("p", "alpha", "test/accuracy", "ratio", log=log), DataFrame(rows), tmp_path / "p.png")
    [axes] = saved[0].axes
    drawn = {container.get_label(): container for container in axes.containers}
    assert [*drawn] == ["ratio 0.1", "ratio 0.5"]
    first, second = (container.lines[0].get_xydata() for container in drawn.values())
    assert np.allclose(first, [(1.0, 0.225), (3.0, 0.325)])
    assert np.allclose(second, [(0.0, 0.525), (1.0, 0.425)])
    for container in drawn.values():
        bars = container.lines[2][0].get_segments()
        assert [high - low for (_, low), (_, high) in bars] == pytest.approx([2 * 0.03125**0.5] * 2)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("alpha", "test accuracy (fraction correct)")
    assert axes.get_xscale() == ("symlog" if log else "linear")


def test_points_bear_the_names_of_their_settings(saved, tmp_path):
    rows = [
        result(run, seed, 1, bytes=size, test_accuracy=y + seed / 10)
        for run, (size, y) in {"plain": (4096, 0.5), "tied": (1024, 0.4), "clustered": (1100, 0.4)}.items()
        for seed in (0, 1)
    ]
    draw(Plot("p", "bytes", "test/accuracy", log=True), DataFrame(rows), tmp_path / "p.png")
    [axes] = saved[0].axes
    at = {note.get_text(): note.xy for note in axes.texts}
    assert at == {"plain": (4096, 0.55), "tied": (1024, pytest.approx(0.45)), "clustered": (1100, pytest.approx(0.45))}
    drawn = {container.get_label(): container.lines[0].get_xydata()[0].tolist() for container in axes.containers}
    assert drawn == {name: pytest.approx([*xy]) for name, xy in at.items()}
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "size of the model's state (KiB)"
    axes.set_xlim(1024, 4096)
    assert [tick.get_text() for tick in axes.get_xticklabels() if tick.get_position()[0] in (1024, 4096)] == ["1", "4"]


def test_plain_networks_are_a_line_among_families(saved, tmp_path):
    """In order of x, under the name of their family; what no family names is left out."""
    rows = [
        result(run, seed, 1, bytes=size, test_accuracy=y + seed / 10)
        for run, (size, y) in {"wide": (4096, 0.5), "tied": (1024, 0.4), "narrow": (512, 0.3), "other": (9, 9)}.items()
        for seed in (0, 1)
    ]
    families = {"plain": ["wide", "narrow"], "hard": ["tied"], "soft": ["not done yet"]}
    draw(Plot("p", "bytes", "test/accuracy", log=True, families=families), DataFrame(rows), tmp_path / "p.png")
    [axes] = saved[0].axes
    plain, hard = axes.containers
    assert (plain.get_label(), hard.get_label()) == ("plain", "hard")
    assert plain.lines[0].get_xydata().tolist() == [[512, pytest.approx(0.35)], [4096, pytest.approx(0.55)]]
    assert hard.lines[0].get_xydata().tolist() == [[1024, pytest.approx(0.45)]]
    assert [container.lines[0].get_linestyle() for container in (plain, hard)] == ["-", "None"]
    assert [note.get_text() for note in axes.texts] == ["wide", "tied", "narrow"]


def test_outcomes(saved, tmp_path):
    """Of rows of one epoch: mean and standard deviation of each setting, and a line through the first."""
    rows = [result(run, seed, 3, test_loss=y + seed) for run, y in (("a", 1), ("b,x=2", 3)) for seed in (0, 1)]
    rows += [result("c", 0, 3, test_loss=math.nan, val_loss=1)]
    draw_overview(DataFrame(rows), ["val/loss"], ["test/loss", "val/loss"], tmp_path / "p.png")
    [axes] = saved[0].axes  # few settings have the other metric
    assert [container.lines[0].get_xydata().tolist() for container in axes.containers] == [[[1.5, 0]], [[3.5, 1]]]
    widths = [np.ptp(container.lines[2][0].get_segments()[0][:, 0]) for container in axes.containers]
    assert widths == pytest.approx([2 * 0.5**0.5] * 2)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b, x=2", "c"]
    [baseline] = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert list(baseline.get_xdata()) == [1.5, 1.5]


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
    for name, value in {"RACES": 1, "ROUNDS": 1, "BATCH": 2, "PAIRS": (2, 4)}.items():
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


def many_curves(path):
    rows = [result(f"s{n}", 0, epoch, val_loss=n, val_accuracy=n) for n in range(MANY) for epoch in (1, 2)]
    draw_curves(DataFrame(rows), ["val/loss", "val/accuracy"], path)


def many_outcomes(path):
    rows = [result(f"s,x={n}", 0, 1, val_loss=n, val_accuracy=n) for n in range(MANY)]
    draw_outcomes(DataFrame(rows), ["val/loss", "val/accuracy"], path)


def many_lines(path):
    rows = [result(f"{n},{x}", 0, 1, ratio=n, alpha=x, test_loss=n + x) for n in range(MANY) for x in (1, 2)]
    draw(Plot("p", "alpha", "test/loss", "ratio", log=True), DataFrame(rows), path)


def many_points(path):
    """In a crowd, as at the size of the untied network."""
    crowd = [result(f"setting {n}", 0, 1, parameters=1000 + n % 3, test_accuracy=n / 100) for n in range(MANY)]
    draw(Plot("p", "parameters", "test/accuracy", log=True), DataFrame([*crowd, {**crowd[0], "parameters": "9"}]), path)


def families(path):
    rows = [
        result(f"s{n}", seed, 1, bytes=1024 * 2 ** (n // 3), test_accuracy=n + seed)
        for n in range(MANY)
        for seed in (0, 1)
    ]
    groups = {f"family {n}": [f"s{m}" for m in range(n, MANY, 4)] for n in range(4)}
    draw(Plot("p", "bytes", "test/accuracy", log=True, families=groups), DataFrame(rows), path)


def synthetic(monkeypatch):
    monkeypatch.setattr(hybrid_toy, "STEPS", 1)
    return hybrid_toy.report(draws=2)[1]


def grown(monkeypatch):
    monkeypatch.setattr(growth, "RACES", 1)
    monkeypatch.setattr(growth, "ROUNDS", 1)
    monkeypatch.setattr(growth, "tying_table", str)
    costs = [growth.Growth(f"cost {n}", "width", 1, growth.WIDTHS, lambda _: lambda: None) for n in range(8)]
    monkeypatch.setattr(growth, "growths", lambda: costs)
    return growth.measure()[1]


def advice():
    groups = [GroupRow((f"{n}",), (f"{n}",), 1000 * n, n / 9, (2,), n / 10) for n in range(1, 9)]
    plans = [PlanRow(Plan(kind), 1, 1000 * n, n / 10, n / 9) for n, kind in enumerate(("hard", "low rank"), start=1)]
    return Advice((*groups,), (*plans,), 9999, 0.5).figure()


def demo_figure():
    epochs = [{"epoch": epoch, "validation accuracy": epoch / 9, "seconds": 1.5} for epoch in range(1, 7)]
    names = ("untied", "soft", "narrow", "hard", "shallow", "stochastic depth")
    return demo.figure({name: demo.Result(0.5, 9999, 9999, 9.0, epochs) for name in names})


def templates():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    for banks in range(3):
        share_templates(model, [f"{{{3 * banks}..{3 * banks + 2}}}.weight"], 2)
    return similarity_figure(model)


FIGURES = {  # by the function that draws
    "tying.soft.plots.gap_figure": lambda _: gap_figure(
        {f"Soft: a.{n} ~ b.{n}": [(1, 1), (2, 1 / (2 + n))] for n in range(MANY)}, MANY
    ),
    "tying.soft.plots.importance_figure": lambda _: importance_figure(
        {f"layer.{n}": 10.0**n for n in range(MANY)}, "after 1 task"
    ),
    "tying.soft.plots.mixture_figure": lambda _: mixture_figure(
        torch.linspace(-1, 1, 99), GaussianMixturePrior(4), "epoch 1"
    ),
    "tying.hashing.report.loads_figure": lambda _: loads_figure(
        {"some layer.weight": torch.arange(99), "other.weight": torch.arange(50)}
    ),
    "tying.hard.templates.similarity_figure": lambda _: templates(),
    "tying.callbacks.observers.unrolling.unrolling_figure": lambda _: unrolling_figure(
        {-1: 0.1, 0: 0.2, 4: 0.3}, "passes", "bits"
    ),
    "tying.callbacks.hm_lstm.boundary_figure": lambda _: boundary_figure("many letters " * 20, torch.ones(260, 3)),
    "tying.advice.report.figure": lambda _: advice(),
    "tying.cli.demo.figure": lambda _: demo_figure(),
    **{f"benchmarks.diagrams.{name}": lambda _, draw=draw: draw() for name, draw in DIAGRAMS.items()},
    "benchmarks.hybrid_toy.report": synthetic,
    "benchmarks.speed.growth.measure": grown,
}
SAVED = {
    "benchmarks.figures.draw_curves": [many_curves],
    "benchmarks.figures.draw_outcomes": [many_outcomes],
    "benchmarks.figures.draw": [many_lines, many_points, families],
}


def test_every_function_that_draws_is_below():
    drawing = set()
    for path in (path for folder in ("tying", "benchmarks") for path in (report.ROOT / folder).rglob("*.py")):
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            names = {
                node.func.id for node in ast.walk(function) if isinstance(node, ast.Call) and hasattr(node.func, "id")
            }
            module = ".".join(path.relative_to(report.ROOT).with_suffix("").parts)
            drawing |= {f"{module}.{function.name}"} if names & {"new_figure", "Figure", "parameter_figure"} else set()
    assert drawing == {
        *FIGURES,
        *SAVED,
        "tying.figures.new_figure",
        "tying.cli.demo.demo",
        "benchmarks.diagrams.parameter_figure",
    }


@pytest.mark.parametrize("name", [*FIGURES, *(build.__name__ for builds in SAVED.values() for build in builds)])
def test_every_figure_can_be_read(name, saved, monkeypatch, tmp_path):
    """At the width of a page, and in grey: labelled axes, no words on top of each other, series that differ."""
    if name in FIGURES:
        figure = FIGURES[name](monkeypatch)
    else:
        globals()[name](tmp_path / "p.png")
        figure = saved[-1]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert figure.get_figwidth() <= WIDTH
    assert len(str(figure.get_label()).split()) > 3
    panels = [axes for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]
    for axes in panels:
        assert len(panels) == 1 or any(axes.get_title(loc=side) for side in ("left", "center", "right"))
        assert axes.get_xlabel()
        assert (
            axes.get_ylabel()
            or [tick.get_text() for tick in axes.get_yticklabels() if tick.get_text()]
            or (axes.get_shared_y_axes().joined(axes, panels[0]))
        )
    words = visible_words(figure)
    assert not [text.get_text() for text in words if re.search(r"\w/\w|_", text.get_text())]
    assert min(text.get_fontsize() for text in words) >= SMALL - 0.1
    boxes = [(text.get_text(), Text.get_window_extent(text, canvas.get_renderer()).padded(-1)) for text in words]
    page = figure.bbox.padded(1)
    assert not [
        word
        for word, box in boxes
        if not (page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1)
    ]
    assert not [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    for axes in figure.axes:
        series = [looks for artist in [*axes.lines, *axes.containers, *axes.collections] if (looks := in_grey(artist))]
        if len(series) in (1, len(axes.texts)):  # their names stand beside them
            continue
        assert len(series) == len({*series})
        if series:
            assert len([*figure.legends, *filter(None, [axes.get_legend()])]) == 1


def visible_words(figure):
    """The texts of a figure, of ticks only those within the axes."""
    ticks, unseen = [], set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
            unseen |= {
                *map(id, labels),
                *(id(text) for tick in axis.get_major_ticks() for text in (tick.label1, tick.label2)),
            }
            low, high = sorted(axis.get_view_interval())
            at = 0 if axis is axes.xaxis else 1
            ticks += [label for label in labels if axes.axison and low <= label.get_position()[at] <= high]
    others = [text for text in figure.findobj(Text) if id(text) not in unseen]
    return [text for text in [*ticks, *others] if text.get_visible() and text.get_text().strip()]


def in_grey(artist):
    """What a series that bears a name looks like without color; None of what is no such series."""
    label = artist.get_label()
    if not label or label.startswith("_"):
        return None
    if isinstance(artist, ErrorbarContainer):
        artist = artist.lines[0]
    if isinstance(artist, Line2D):
        return str(artist._unscaled_dash_pattern), artist.get_marker(), artist.get_linewidth()
    if isinstance(artist, PathCollection):
        return artist.get_paths()[0].vertices.tobytes(), float(artist.get_sizes()[0])
    return type(artist).__name__


def test_kept_results_are_drawn_again(tmp_path, saved):
    """Of all epochs where an archive has them, else of the last; not of an archive with other results."""
    (tmp_path / "runs").mkdir()
    for kept in ("autoencoder.csv", "runs/autoencoder.tar.xz"):
        shutil.copy(report.RESULTS / kept, tmp_path / kept)
    assert experiment.redraw("autoencoder", tmp_path) == [tmp_path / "autoencoder.png"]
    assert {len(line.get_xdata()) for line in saved[0].axes[0].lines} == {12}
    table = (tmp_path / "autoencoder.csv").read_text()
    (tmp_path / "autoencoder.csv").write_text(table.replace("0.1", "0.2", 1))
    with pytest.raises(ConfigurationError, match=r"autoencoder\.tar\.xz has other results than .*autoencoder\.csv"):
        experiment.redraw("autoencoder", tmp_path)
    (tmp_path / "runs" / "autoencoder.tar.xz").unlink()
    experiment.redraw("autoencoder", tmp_path)
    assert len(saved[1].axes[0].containers) == 2
    with pytest.raises(ConfigurationError, match=r"there is no .*soft\.csv"):
        experiment.redraw("soft", tmp_path)


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.stem)
def test_pictures_of_pages_have_alternative_text(page):
    for words, target in re.findall(r"!\[(.*?)\]\((.+?)\)", page.read_text()):
        assert len(words.split()) > 3, target
        assert (page.parent / target).is_file(), target


def test_the_gallery_shows_what_every_callback_draws():
    """And nothing else, each picture in a file that says what it shows."""
    sources = "".join(path.read_text() for path in (report.ROOT / "tying" / "callbacks").rglob("*.py"))
    drawn = {*re.findall(r'log_figure\(trainer.*"(\w+)"', sources), "mixture_end"} - {"_"}
    assert drawn == {*gallery.PICTURES} - {"advice"}
    shown = re.findall(r"!\[.+?\]\(gallery/(.+?)\.png\)", (report.ROOT / "docs" / "gallery.md").read_text())
    assert sorted(shown) == sorted(gallery.NAMES)
    assert {path.stem for path in gallery.FOLDER.iterdir()} == {*gallery.NAMES}
    assert all(len(evidence.description(path).split()) > 3 for path in gallery.FOLDER.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", gallery.PICTURES)
def test_the_gallery_is_drawn_by_its_commands(name, tmp_path):
    picture = gallery.draw(name, tmp_path)
    assert evidence.description(picture) == evidence.description(gallery.FOLDER / picture.name)


def test_a_file_says_what_its_figure_shows(tmp_path):
    """For the alternative text of pages: the words of every figure that is kept."""
    save_figure(new_figure(1, 1, "Gap by step"), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.info["Title"] == "Gap by step"
    for picture in report.RESULTS.glob("*.png"):
        assert len(evidence.description(picture).split()) > 3, picture


@pytest.mark.parametrize("suite", suites())
def test_bytes_are_shown_before_parameters(suite):
    """A clustered network has few parameters, and an index for each weight beside them."""
    shown = [plot.x for plot in load(suite).plots]
    assert "parameters" not in shown or shown.index("bytes") < shown.index("parameters")

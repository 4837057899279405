"""What the diagrams of the gallery show: by hand, and as in the kept results."""

import numpy as np
import pytest

from benchmarks import report
from docs import pictures


def lines(figure):
    [axes] = figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_parameters_of_low_rank():
    shown = lines(pictures.low_rank())
    assert shown["64 × 64"][1][8 - 1] == 8 * (64 + 64) / 64**2
    assert shown["64 × 64 kernels of 3 × 3"][1][8 - 1] == 8 * (64 + 9 * 64) / (9 * 64**2)


def test_parameters_of_generated_weights():
    """Of the embedding of the kept experiment as many as there, and fewer of smaller ones."""
    shown, table = lines(pictures.generated()), (report.RESULTS / "hard.md").read_text()
    sizes, counts = shown["generated weights"]
    assert counts == sorted(counts)
    assert f" {counts[sizes.index(64)]:,} |" in table.split("| generated")[1].split("\n")[0]
    assert f" {shown['plain'][1][0]:,} |" in table.split("| untied")[1].split("\n")[0]


def test_parameters_of_untied_biases():
    shown = lines(pictures.untied_biases())
    plain = shown["a bias for each channel"][1][0]
    assert shown["a bias for each channel and position"][1][0] == plain + 32 * (16 - 1) + 64 * (4 - 1) + 128 * (1 - 1)


@pytest.mark.parametrize(
    ("panel", "by_row", "kinds"), [(0, True, {1, 3}), (1, True, {1, 3}), (2, False, {0, 1, 2, 3}), (3, False, {1, 2})]
)
def test_units_that_merges_take(panel, by_row, kinds):
    """Stochastic depth keeps the shortcut and drops whole rows of the branch; other merges draw for each unit."""
    taken = np.asarray(pictures.merges().axes[panel].images[0].get_array())
    assert ({*taken.flatten()} == kinds) if panel else ({*taken.flatten()} < kinds)
    assert (taken == taken[:, :1]).all() == by_row


def test_layers_of_a_fractal_block():
    [axes] = pictures.fractal().axes
    widths = [[np.ptp(path.vertices[:, 0]) for path in bars.get_paths()] for bars in axes.collections]
    assert [len(column) for column in widths] == [1, 2, 4, 8]
    assert [sum(column) + 0.1 * len(column) for column in widths] == pytest.approx([8] * 4)
    joins = {line.get_xdata()[0]: list(line.get_ydata()) for line in axes.lines}
    assert joins == {2: [2.75, 4.25], 4: [1.75, 4.25], 6: [2.75, 4.25], 8: [0.75, 4.25]}


def test_calls_in_a_loop():
    shown = lines(pictures.passes())
    assert shown["passes=1"][1] == [0, 1, 2, 3, 4, 5]
    assert shown["passes=3"][1] == [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]

"""What the figures of hashed weights hold, compared with the data."""

import math
import sys

import pytest
import torch
from torch import nn
from toys import Toy, train

from tying.callbacks import WeightHashing
from tying.hashing import DirichletHash, ModulusHash, UniformHash, hash_weights, plot_loads, table_loads
from tying.hashing.report import loads_figure, titled_loads


def panels(figure):
    """Return the heat map and the histogram of each row."""
    axes = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    return [*zip(axes[::2], axes[1::2], strict=True)]


def model_of(scope, hash, count=2):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(count)))
    hash_weights(model, ["*.weight"], 0.05, hash, scope=scope)
    return model


@pytest.mark.parametrize("hash", [ModulusHash(), UniformHash(), DirichletHash(0.2), DirichletHash(0.02)])
@pytest.mark.parametrize("scope", ["layer", "network"])
def test_bars_count_entries_and_pixels_are_loads(scope, hash):
    model = model_of(scope, hash)
    counts = [*table_loads(model).values()]
    rows = panels(loads_figure(titled_loads(model)))
    assert len(rows) == len(counts)
    for (heat, bars), loads in zip(rows, counts, strict=True):
        widths = {round(bar.get_width(), 9) for bar in bars.patches}
        assert len(widths) == 1
        [width] = widths
        assert width == int(width) >= 1  # each bar stands for as many loads
        assert len(bars.patches) <= 50
        total = 0
        for bar in bars.patches:
            left = bar.get_x()
            assert left % 1 == 0.5
            inside = sum(left < load < left + width for load in loads.tolist())
            assert bar.get_height() == inside
            total += inside
        assert total == len(loads)
        [image] = heat.images
        pixels = image.get_array().compressed() if hasattr(image.get_array(), "compressed") else image.get_array()
        assert [pixel for pixel in pixels.flatten().tolist() if not math.isnan(pixel)] == loads.tolist()


@pytest.mark.parametrize(
    "loads",
    [[5, 5, 5], [7, 8, 9, 9], [100, 101], [0, 49], [0, 50], [3, 1000], [*range(60)]],
    ids=lambda loads: f"{loads[0]} to {loads[-1]}",
)
def test_the_first_and_last_bars_are_not_empty(loads):
    [(_, bars)] = panels(loads_figure({"table": torch.tensor(loads)}))
    heights = [bar.get_height() for bar in bars.patches]
    assert heights[0] > 0
    assert heights[-1] > 0
    assert sum(heights) == len(loads)
    if max(loads) - min(loads) < 50:  # one bar for each load between
        assert heights == [loads.count(load) for load in range(min(loads), max(loads) + 1)]


def test_titles_name_all_weights_of_a_table():
    titles = [
        heat.get_title(loc="left") for heat, _ in panels(loads_figure(titled_loads(model_of("layer", ModulusHash()))))
    ]
    assert titles == ["0.weight", "1.weight"]
    [(heat, _)] = panels(loads_figure(titled_loads(model_of("network", UniformHash()))))
    assert heat.get_title(loc="left") == "0.weight, 1.weight"
    [(heat, _)] = panels(loads_figure(titled_loads(model_of("network", UniformHash(), count=5))))
    assert heat.get_title(loc="left") == "5 weights, 0.weight first"


def test_plots_and_callback_write_this_figure(tmp_path, monkeypatch):
    drawn, hashing_report = [], sys.modules["tying.hashing.report"]  # the function hides the module
    figure_of = hashing_report.loads_figure
    monkeypatch.setattr(hashing_report, "loads_figure", lambda counts: drawn.append(counts) or figure_of(counts))
    monkeypatch.setattr("tying.callbacks.derived.loads_figure", hashing_report.loads_figure)
    model = Toy()
    train(model, [WeightHashing(["*.*.weight"], 0.3, scope="network")], max_epochs=1, default_root_dir=tmp_path)
    plot_loads(model, tmp_path / "loads.png")
    assert [[*counts] for counts in drawn] == 2 * [["4 weights, encoder.0.weight first"]]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("hash_loads.png", "loads.png"))

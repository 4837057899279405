"""Figures that a reader can read at the width of a page, and lines in them that differ also in grey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tying.extras import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.0  # inches, at most: a wider figure is shrunk, with its letters
DPI = 120
SMALL = 7.5  # points, the smallest letters
COLORS = 10  # of matplotlib's own cycle
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (4, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "x", "D", "v", "P", "*")  # 8 markers and 5 dashes: 40 pairs, whatever the colors
LEGEND: dict[str, Any] = {"fontsize": SMALL, "handlelength": 5.0}  # long enough for two dashes


def new_figure(width: float, height: float, description: str) -> Figure:
    """Return an empty figure without a window, which needs no display.

    Args:
        width: width in inches.
        height: height in inches.
        description: what the figure shows, for readers who do not see it; :func:`tying.files.save_figure` writes it
            into the file.

    Raises:
        ConfigurationError: matplotlib is not installed.

    Example:
        >>> new_figure(7, 4, "Loss by epoch").get_label()
        'Loss by epoch'
    """
    with extra("plots"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.set_label(description)
    return figure


def line_style(number: int) -> dict[str, Any]:
    """Return matplotlib's arguments for one of several lines: 40 pairs of dash and marker that differ without color.

    Args:
        number: position of the line among those of the figure, from 0.

    Example:
        >>> line_style(13)
        {'color': 'C3', 'linestyle': (0, (6, 2, 1.5, 2)), 'marker': 'v', 'markersize': 4.0}
    """
    dash, marker = DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)]
    return {"color": f"C{number % COLORS}", "linestyle": dash, "marker": marker, "markersize": 4.0}


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend below everything else, in as many columns as fit, and make the figure taller by its rows.

    Args:
        figure: a figure of :func:`new_figure`.
        handles: what the legend explains.
        labels: the words for it.

    Example:
        >>> figure = new_figure(7, 4, "Gap by step")
        >>> legend_below(figure, figure.subplots().plot([1, 2]), ["largest gap"])
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['largest gap']
    """
    handle, letter, line = 0.85, 0.058, 0.17  # inches: width of a handle with its margins, and of a letter; height
    columns = int(figure.get_figwidth() / (handle + letter * max(map(len, labels), default=1)))
    columns = min(max(1, columns), max(1, len(labels)))
    figure.set_figheight(figure.get_figheight() + line * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, **LEGEND)

"""Figures, and lines in them that a reader can tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tying.extras import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = 10  # of matplotlib's own cycle
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "x")
LEGEND: dict[str, Any] = {"fontsize": "x-small", "handlelength": 5.0}  # long enough for two dashes


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure without a window, which needs no display.

    Args:
        width: width in inches.
        height: height in inches.

    Raises:
        ConfigurationError: matplotlib is not installed.

    Example:
        >>> new_figure(7, 4).axes
        []
    """
    with extra("plots"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def line_style(number: int) -> dict[str, Any]:
    """Return matplotlib's arguments for one of several lines: 40 different pairs of color, dash and marker.

    Args:
        number: position of the line among those of the figure, from 0.

    Example:
        >>> line_style(13)
        {'color': 'C3', 'linestyle': (0, (5, 2)), 'marker': 's', 'markersize': 3.0}
    """
    turn = number // COLORS % len(DASHES)
    return {"color": f"C{number % COLORS}", "linestyle": DASHES[turn], "marker": MARKERS[turn], "markersize": 3.0}

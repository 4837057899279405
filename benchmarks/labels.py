"""Names beside the points of a figure, where they cover neither each other nor what is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tying.figures import SMALL

NEAR, STEP, STEPS = 7.0, 6.0, 24  # points from a point to its name, at first, and how they grow
ANGLES = (0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90)  # degrees
RADIUS = 4.0  # pixels that a marker and a line take on either side
LEADER = {"arrowstyle": "-", "color": "0.6", "shrinkA": 0, "shrinkB": 3}
SIDES = {1: "left", 0: "center", -1: "right"}
Offset = tuple[float, float]


def name_points(figure: Figure, axes: Axes, names: Sequence[tuple[str, float, float]]) -> None:
    """Write names beside points, from the top to the bottom; a line leads to a name that is not next to its point.

    Args:
        figure: the figure of the axes.
        axes: axes on which everything else is drawn.
        names: name, x and y of each point.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # only now it is known where the points are
    figure.set_layout_engine("none")  # and they stay there
    taken = [*_drawn(axes)]
    for name, x, y in sorted(names, key=lambda point: -point[2]):
        label = axes.annotate(
            name, (x, y), (0, 0), textcoords="offset points", fontsize=SMALL, va="center", arrowprops=LEADER
        )
        label.set_in_layout(False)
        size = Text.get_window_extent(label, renderer).size
        point = axes.transData.transform((x, y))
        boxes = {offset: _box(point, offset, size, figure.dpi / 72) for offset in _offsets()}
        free = (offset for offset, box in boxes.items() if _is_free(box, taken, axes.bbox))
        offset = next(free, (NEAR, 0.0))
        taken.append(boxes[offset])
        label.set(position=offset, horizontalalignment=SIDES[int(np.sign(offset[0]))])
        if label.arrow_patch is not None:
            label.arrow_patch.set_linewidth(0.5 if np.hypot(*offset) > NEAR + 1 else 0.0)


def _offsets() -> Iterator[Offset]:
    """Yield places for a name, in points from its point, the nearest first."""
    for step in range(STEPS):
        for angle in np.radians(ANGLES):
            away = NEAR + STEP * step
            yield round(float(away * np.cos(angle)), 3), round(float(away * np.sin(angle)), 3)


def _box(point: np.ndarray, offset: Offset, size: np.ndarray, scale: float) -> Bbox:
    """Return the box of a name at a place, in pixels; ``scale`` is that of points."""
    x, y = point + np.multiply(offset, scale)
    left = x - size[0] * (1 - np.sign(offset[0])) / 2
    return Bbox.from_bounds(left, y - size[1] / 2, *size)


def _is_free(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> bool:
    """Return whether a box covers no other, and is inside the frame."""
    inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
    return inside and not box.count_overlaps(taken)


def _drawn(axes: Axes) -> Iterator[Bbox]:
    """Yield boxes of the points, their error bars and the lines between them."""
    for container in axes.containers:
        if not isinstance(container, ErrorbarContainer):
            continue
        line, _, bars = container.lines
        points = [] if line is None else [*axes.transData.transform(line.get_xydata())]
        yield from (_around(point, point) for point in points)
        if line is not None and line.get_linestyle() != "None":
            for first, second in pairwise(points):
                yield from (_around(point, point) for point in np.linspace(first, second, 40))
        for segment in (segment for bar in bars for segment in bar.get_segments()):
            yield _around(*axes.transData.transform(segment))


def _around(first: np.ndarray, second: np.ndarray) -> Bbox:
    return Bbox([np.minimum(first, second) - RADIUS, np.maximum(first, second) + RADIUS])

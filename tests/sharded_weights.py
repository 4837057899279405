"""The cells of callbacks that change weights: shared, relaxed and computed ones."""

from sharded_models import Cell

CELLS: dict[str, Cell] = {}

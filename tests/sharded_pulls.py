"""The cells of callbacks that pull weights, watch them or skip blocks."""

from sharded_models import TIES, Cell

from tying.callbacks import SoftTying, TyingMonitor

CELLS: dict[str, Cell] = {
    "soft, gradient": Cell(lambda: [SoftTying(TIES, strength=0.3), TyingMonitor()]),
}

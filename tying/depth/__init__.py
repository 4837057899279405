"""Layers that are shared or skipped."""

from tying.depth.residual import Residual, Sum

__all__ = ["Residual", "Sum"]

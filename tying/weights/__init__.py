"""Weights that are shared or computed, in any module."""

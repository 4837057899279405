"""Callbacks that show what is tied: in tables, logs and plots."""

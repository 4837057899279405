"""Callbacks that show what is tied."""

"""Recurrent networks that skip, share or generate over time."""

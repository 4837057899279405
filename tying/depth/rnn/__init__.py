"""Recurrent networks that skip updates, share weights or generate weights over time."""

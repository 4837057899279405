"""Data modules, with the embedded sample."""

from tying.data.cifar10 import CIFAR10

__all__ = ["CIFAR10"]

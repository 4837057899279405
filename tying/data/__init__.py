"""Data modules, with the embedded sample."""

from tying.data.cifar10 import CIFAR10
from tying.data.domains import TwoDomains
from tying.data.mnist import MNIST

__all__ = ["CIFAR10", "MNIST", "TwoDomains"]

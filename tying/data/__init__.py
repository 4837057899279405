"""Data modules, with the embedded sample."""

from tying.data.cifar10 import CIFAR10, TwoDomains
from tying.data.mnist import MNIST, SequentialMNIST
from tying.data.text import Text

__all__ = ["CIFAR10", "MNIST", "SequentialMNIST", "Text", "TwoDomains"]

"""Reference networks and the LightningModules that train them."""

from tying.models.autoencoder import Autoencoder
from tying.models.classifier import Classifier
from tying.models.convolutional import ConvDecoder, ConvEncoder
from tying.models.domains import DomainClassifiers
from tying.models.fractal import FractalNet
from tying.models.hybrid import HybridClassifier
from tying.models.networks import GRU, MLP, sequential
from tying.models.resnet import ResNet
from tying.models.sequence import HMNetwork, SequenceModel
from tying.models.transformer import Transformer
from tying.models.whitened import WhitenedClassifier, WhitenedConvNet

__all__ = [
    "GRU",
    "MLP",
    "Autoencoder",
    "Classifier",
    "ConvDecoder",
    "ConvEncoder",
    "DomainClassifiers",
    "FractalNet",
    "HMNetwork",
    "HybridClassifier",
    "ResNet",
    "SequenceModel",
    "Transformer",
    "WhitenedClassifier",
    "WhitenedConvNet",
    "sequential",
]

"""Lightning callbacks: the families, attached to a training run."""

from tying.callbacks.anchor import AnchorTying
from tying.callbacks.base import TyingCallback
from tying.callbacks.boundaries import BoundaryPlot
from tying.callbacks.clustering import BeforeEpoch, WeightClustering
from tying.callbacks.coupling import Coupling
from tying.callbacks.hard import HardTying
from tying.callbacks.hashing import WeightHashing
from tying.callbacks.merging import ResidualMerging
from tying.callbacks.mixture import MixtureTying
from tying.callbacks.monitor import TyingMonitor
from tying.callbacks.parametrizing import GeneratedWeights, LowRankWeights, TemplateWeights, UntiedBiases
from tying.callbacks.random_state import RandomState
from tying.callbacks.slope import SlopeAnnealing
from tying.callbacks.soft import SoftTying
from tying.callbacks.summary import TyingSummary
from tying.callbacks.unrolling import Unrolling

__all__ = [
    "AnchorTying",
    "BeforeEpoch",
    "BoundaryPlot",
    "Coupling",
    "GeneratedWeights",
    "HardTying",
    "LowRankWeights",
    "MixtureTying",
    "RandomState",
    "ResidualMerging",
    "SlopeAnnealing",
    "SoftTying",
    "TemplateWeights",
    "TyingCallback",
    "TyingMonitor",
    "TyingSummary",
    "Unrolling",
    "UntiedBiases",
    "WeightClustering",
    "WeightHashing",
]

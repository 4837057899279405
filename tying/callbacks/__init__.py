"""Lightning callbacks that tie weights during training."""

from tying.callbacks.anchor import AnchorTying
from tying.callbacks.base import TyingCallback
from tying.callbacks.clustering import BeforeEpoch, WeightClustering
from tying.callbacks.derived import (
    GeneratedWeights,
    HardTying,
    LowRankWeights,
    TemplateWeights,
    UntiedBiases,
    WeightHashing,
)
from tying.callbacks.hm_lstm import BoundaryPlot, SlopeAnnealing
from tying.callbacks.importance import Fisher, Importance, Synaptic
from tying.callbacks.looping import Looping
from tying.callbacks.merging import ResidualMerging
from tying.callbacks.mixture import MixtureTying
from tying.callbacks.observers.monitor import TyingMonitor
from tying.callbacks.observers.summary import TyingSummary
from tying.callbacks.observers.unrolling import Unrolling
from tying.callbacks.random_state import RandomState
from tying.callbacks.recurrent_depth import RecurrentDepth
from tying.callbacks.relaxed import RelaxedTying
from tying.callbacks.soft import Coupling, SoftTying
from tying.callbacks.zoneout import ZoneoutStates

__all__ = [
    "AnchorTying",
    "BeforeEpoch",
    "BoundaryPlot",
    "Coupling",
    "Fisher",
    "GeneratedWeights",
    "HardTying",
    "Importance",
    "Looping",
    "LowRankWeights",
    "MixtureTying",
    "RandomState",
    "RecurrentDepth",
    "RelaxedTying",
    "ResidualMerging",
    "SlopeAnnealing",
    "SoftTying",
    "Synaptic",
    "TemplateWeights",
    "TyingCallback",
    "TyingMonitor",
    "TyingSummary",
    "Unrolling",
    "UntiedBiases",
    "WeightClustering",
    "WeightHashing",
    "ZoneoutStates",
]

"""Layers that are shared or skipped."""

from tying.depth.fractal import FractalBlock, fractal_join
from tying.depth.hypernetwork import HyperLSTM, HyperLSTMCell, HyperState
from tying.depth.merging import apply_merge, keep_schedule, remove_merge
from tying.depth.multiscale import HMLSTM, HMOutput, HMState, hm_update
from tying.depth.passthrough import PassthroughGRU, PassthroughHighway, StateMatrix
from tying.depth.recurrent import Recurrent
from tying.depth.residual import FeedForward, Merge, Residual, Sum
from tying.depth.sampling import Sampled, sampled, sampling
from tying.depth.stochastic import StochasticDepth, stochastic_depth
from tying.depth.units import SkipForward, Swapout, skip_forward, swapout
from tying.depth.zoned import zoned_lstm
from tying.depth.zoneout import ZoneoutLSTM, ZoneoutLSTMCell

__all__ = [
    "HMLSTM",
    "FeedForward",
    "FractalBlock",
    "HMOutput",
    "HMState",
    "HyperLSTM",
    "HyperLSTMCell",
    "HyperState",
    "Merge",
    "PassthroughGRU",
    "PassthroughHighway",
    "Recurrent",
    "Residual",
    "Sampled",
    "SkipForward",
    "StateMatrix",
    "StochasticDepth",
    "Sum",
    "Swapout",
    "ZoneoutLSTM",
    "ZoneoutLSTMCell",
    "apply_merge",
    "fractal_join",
    "hm_update",
    "keep_schedule",
    "remove_merge",
    "sampled",
    "sampling",
    "skip_forward",
    "stochastic_depth",
    "swapout",
    "zoned_lstm",
]

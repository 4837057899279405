"""Layers that are shared or skipped."""

from tying.depth.apply import apply_merge, drop_scale, keep_schedule, remove_merge
from tying.depth.extract import extract
from tying.depth.fractal import FractalBlock, fractal_join
from tying.depth.loop import Loop, loop, loops_in, scheduled_passes, unloop
from tying.depth.merge import FeedForward, Merge, Residual, Sum
from tying.depth.recur import recur, unrecur
from tying.depth.recurrent import Recurrent
from tying.depth.rnn.convert import remove_zoneout, zone_out
from tying.depth.rnn.hm_lstm import HMLSTM, HMOutput, HMState, hm_update
from tying.depth.rnn.hyper_lstm import HyperLSTM, HyperLSTMCell, HyperState
from tying.depth.rnn.passthrough import PassthroughGRU, PassthroughHighway, StateMatrix
from tying.depth.rnn.zoneout import ZoneoutLSTM, ZoneoutLSTMCell, zoned_lstm
from tying.depth.sampling import Sampled, sampled, sampling
from tying.depth.stochastic_depth import StochasticDepth, stochastic_depth
from tying.depth.swapout import SkipForward, Swapout, skip_forward, swapout

__all__ = [
    "HMLSTM",
    "FeedForward",
    "FractalBlock",
    "HMOutput",
    "HMState",
    "HyperLSTM",
    "HyperLSTMCell",
    "HyperState",
    "Loop",
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
    "drop_scale",
    "extract",
    "fractal_join",
    "hm_update",
    "keep_schedule",
    "loop",
    "loops_in",
    "recur",
    "remove_merge",
    "remove_zoneout",
    "sampled",
    "sampling",
    "scheduled_passes",
    "skip_forward",
    "stochastic_depth",
    "swapout",
    "unloop",
    "unrecur",
    "zone_out",
    "zoned_lstm",
]

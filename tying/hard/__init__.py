"""Weights that are equal, of low rank, mixed from templates, or generated: fewer parameters than entries."""

from tying.hard.hypernetwork import HyperWeight, generate_weights
from tying.hard.low_rank import LowRank, LowRankPlusDiagonal, lower_rank
from tying.hard.relaxed import RelaxedGroup, RelaxedWeight, SharedWeight, harden, relax, relaxed, set_residual_factor
from tying.hard.residuals import DiagonalResidual, LowRankResidual, ScaleResidual, WeightResidual
from tying.hard.templates import TemplateBank, TemplateMixture, fold, layer_similarity, plot_similarity, share_templates
from tying.hard.untied_bias import untie_biases
from tying.weights.report import TieReport, audit
from tying.weights.shard_groups import shard_groups
from tying.weights.state_dict import bake, load_plain
from tying.weights.tie import restore, tie, tied, untie

__all__ = [
    "DiagonalResidual",
    "HyperWeight",
    "LowRank",
    "LowRankPlusDiagonal",
    "LowRankResidual",
    "RelaxedGroup",
    "RelaxedWeight",
    "ScaleResidual",
    "SharedWeight",
    "TemplateBank",
    "TemplateMixture",
    "TieReport",
    "WeightResidual",
    "audit",
    "bake",
    "fold",
    "generate_weights",
    "harden",
    "layer_similarity",
    "load_plain",
    "lower_rank",
    "plot_similarity",
    "relax",
    "relaxed",
    "restore",
    "set_residual_factor",
    "shard_groups",
    "share_templates",
    "tie",
    "tied",
    "untie",
    "untie_biases",
]

"""Weights that are equal, of low rank, mixed from templates, or generated: fewer parameters than entries."""

from tying.hard.audit import TieReport, audit
from tying.hard.biases import untie_biases
from tying.hard.generated import HyperWeight, generate_weights
from tying.hard.low_rank import LowRank, LowRankPlusDiagonal, lower_rank
from tying.hard.plain import bake, load_plain
from tying.hard.sharing import tie, tied, untie
from tying.hard.templates import TemplateBank, TemplateMixture, fold, layer_similarity, plot_similarity, share_templates

__all__ = [
    "HyperWeight",
    "LowRank",
    "LowRankPlusDiagonal",
    "TemplateBank",
    "TemplateMixture",
    "TieReport",
    "audit",
    "bake",
    "fold",
    "generate_weights",
    "layer_similarity",
    "load_plain",
    "lower_rank",
    "plot_similarity",
    "share_templates",
    "tie",
    "tied",
    "untie",
    "untie_biases",
]

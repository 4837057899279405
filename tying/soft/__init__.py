"""Penalties and priors that pull weights towards each other or towards constants."""

from tying.soft.coupling import coupling_strength
from tying.soft.group_penalty import TyingPenalty, anchored, gap
from tying.soft.importance import fisher_diagonal, path_importance, path_integral
from tying.soft.mixture import GaussianMixturePrior, mixture_nll, responsibilities
from tying.soft.penalties import L1, L2, Huber, Penalty, huber, l1, l2
from tying.soft.schedule import Schedule

__all__ = [
    "L1",
    "L2",
    "GaussianMixturePrior",
    "Huber",
    "Penalty",
    "Schedule",
    "TyingPenalty",
    "anchored",
    "coupling_strength",
    "fisher_diagonal",
    "gap",
    "huber",
    "l1",
    "l2",
    "mixture_nll",
    "path_importance",
    "path_integral",
    "responsibilities",
]

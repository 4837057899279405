"""Two models coupled by a prior on the difference of their weights."""

from __future__ import annotations

import math

from tying.errors import ConfigurationError


def coupling_strength(alpha: float, exponent: float = 2.0) -> float:
    """Return ``1/σ² = ((1 − α)/α)^exponent``, the strength of the prior ``exp(−‖θ − θ̃‖² / (2σ²))`` on two models.

    Args:
        alpha: in [0, 1]: 1 leaves the discriminative model alone (0), 0 makes both one, generative model (inf).
        exponent: above 0; the limits are the same for all.

    Raises:
        ConfigurationError: α is not in [0, 1], or the exponent not above 0.

    Example:
        >>> [coupling_strength(alpha) for alpha in (0.0, 0.2, 0.5, 1.0)]
        [inf, 16.0, 1.0, 0.0]

    Source: J. A. Lasserre, C. M. Bishop and T. P. Minka, Principled hybrids of generative and discriminative models,
    2006.
    """
    if not 0 <= alpha <= 1:
        raise ConfigurationError(f"alpha is from 0, one model, to 1, two that know nothing of each other; not {alpha}")
    if not 0 < exponent < math.inf:
        raise ConfigurationError(f"exponent must be above 0 and finite, not {exponent}")
    return math.inf if alpha == 0 else ((1 - alpha) / alpha) ** exponent

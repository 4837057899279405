"""The strength of a prior that couples the weights of two models."""

import math

from tying.errors import check_range


def coupling_strength(alpha: float, exponent: float = 2.0) -> float:
    """Return ``1/σ² = ((1 − α)/α)^exponent``, the strength of the prior ``exp(−‖θ − θ̃‖² / (2σ²))`` on two models.

    Args:
        alpha: in [0, 1]. 0 shares all weights (strength inf, the generative model); 1 leaves the models uncoupled
            (strength 0, the discriminative model).
        exponent: above 0; it does not change the strengths for α = 0 and α = 1.

    Raises:
        ConfigurationError: α is not in [0, 1], or the exponent is not above 0.

    Example:
        >>> [coupling_strength(alpha) for alpha in (0.0, 0.2, 0.5, 1.0)]
        [inf, 16.0, 1.0, 0.0]

    Source: J. A. Lasserre, C. M. Bishop and T. P. Minka, Principled hybrids of generative and discriminative models,
    2006.
    """
    check_range("alpha", alpha, "[0, 1]")
    check_range("exponent", exponent, "(0, inf)")
    return math.inf if alpha == 0 else ((1 - alpha) / alpha) ** exponent

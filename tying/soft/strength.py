"""How fast a penalty alone closes the gap of a group: the choice of a strength."""

import cmath
import math

from tying.errors import check_range


def gap_factor(product: float, update: str, momentum: float = 0.0, nesterov: bool = False) -> float:
    """Return the factor on the gap of an L2 group in each step, in the long run and without a loss.

    A step multiplies deviations from the mean by ``1 − x`` if it is explicit, and by ``1 / (1 + x)`` if it is proximal.
    With momentum μ, the factor is the larger root, in modulus, of ``z² − (1 + μ − x) z + μ``, and with Nesterov's of
    ``z² − (1 + μ)(1 − x) z + μ (1 − x)``. The step diverges if the factor is above 1.

    Args:
        product: x = learning rate · strength · m, for a group of m members.
        update: ``"gradient"``, by SGD, ``"decoupled"`` or ``"proximal"``.
        momentum: μ of SGD; decoupled and proximal steps have none.
        nesterov: whether SGD's momentum is Nesterov's.

    Raises:
        ConfigurationError: the product is negative, or the momentum is not in [0, 1).

    Example:
        >>> gap_factor(0.1, "decoupled"), gap_factor(3.0, "proximal"), gap_factor(2.5, "gradient")
        (0.9, 0.25, 1.5)
        >>> round(gap_factor(0.001, "gradient", momentum=0.9), 4)
        0.9889

    Source: B. T. Polyak, Some methods of speeding up the convergence of iteration methods, 1964.
    """
    check_range("product", product, "[0, inf]")
    check_range("momentum", momentum, "[0, 1)")
    if update == "proximal":
        return 1 / (1 + product)
    if update == "decoupled" or not momentum:
        return abs(1 - product)
    total, constant = 1 + momentum - product, momentum  # the sum and the product of the roots
    if nesterov:
        total, constant = (1 + momentum) * (1 - product), momentum * (1 - product)
    root = cmath.sqrt(total**2 - 4 * constant)
    return max(abs(total + root), abs(total - root)) / 2


def describe_factor(factor: float) -> str:
    """Describe what a factor on the gap in each step does.

    Example:
        >>> describe_factor(1 - 2e-4), describe_factor(1.5)
        ('shrinks the gap by 0.02 % a step, half in 3,466 steps', 'diverges: it multiplies the gap by 1.5 a step')
        >>> describe_factor(1.0)
        'leaves the gap as it is'
    """
    if factor == 0:
        return "closes the gap in one step"
    if factor == 1:
        return "leaves the gap as it is"
    if factor > 1:
        return f"diverges: it multiplies the gap by {factor:.3g} a step"
    steps = math.ceil(math.log(0.5) / math.log(factor))
    return f"shrinks the gap by {100 * (1 - factor):.2g} % a step, half in {steps:,} step{'s' * (steps > 1)}"

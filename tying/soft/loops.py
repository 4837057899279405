"""The mixture prior on the CPU, compiled by numba: all steps for a block of weights, which stays in the cache."""

import math
from collections.abc import Sequence
from typing import Any

import numba  # type: ignore[import-not-found, import-untyped, unused-ignore]  # an optional package without types
import numpy as np
import torch
from torch import Tensor

from tying.compiled import in_halves
from tying.soft.mixture import NEGLIGIBLE

BLOCK = 1024  # number of weights at a time
FACTORS = 64  # sums of 64 densities, each at most the number of components, whose product is a finite double

f32, f64, i32 = np.float32, np.float64, np.int32
SMALLEST = f32(NEGLIGIBLE)
LOG2_E, LN_2 = f32(math.log2(math.e)), f32(math.log(2))
TAYLOR = tuple(f32(1 / math.factorial(power)) for power in range(7, -1, -1))
compiled: Any = numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})


def evaluate(weights: Tensor, mixture: Sequence[Tensor], into: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return Ω and, for each component, the sums of r, r w and r w², (J, 3); add ``scale · ∂Ω/∂w`` to ``into``.

    Args:
        weights: (N,), float32.
        mixture: means, log standard deviations and log proportions of all components, (J,), float32.
        into: (N,), float32.
        scale: factor on the gradient.
    """
    means, log_stds, log_proportions = mixture
    narrow, precisions = (-log_stds).exp() / math.sqrt(2), (-2 * log_stds).exp()
    peaks = log_proportions - log_stds - 0.5 * math.log(2 * math.pi)
    constants = [part.numpy() for part in (narrow, narrow * means, peaks, precisions, precisions * means)]
    source, target = weights.resolve_neg().numpy(), into.numpy()
    values, sums = np.zeros(2), np.zeros((2, len(means), 3))

    def evaluate_half(half: int, begin: int, end: int) -> None:
        values[half] = _evaluate(source[begin:end], target[begin:end], f32(scale), *constants, sums[half])

    in_halves(evaluate_half, len(source))
    return torch.tensor(values.sum(), device="cpu"), torch.from_numpy(sums.sum(axis=0))


@numba.njit(inline="always")
def _exponentiate(values):  # type: ignore[no-untyped-def]  # compiled by the types of arguments
    """Replace numbers in [−80, 0] by their exponentials: 2ⁿ eʳ with |r| ≤ ln(2)/2, and a Taylor series for eʳ."""
    bits = values.view(i32)
    for i in range(len(values)):
        exponent = values[i] * LOG2_E
        whole = np.floor(exponent + f32(0.5))
        rest = (exponent - whole) * LN_2
        series = TAYLOR[0]
        for power in range(1, len(TAYLOR)):
            series = series * rest + TAYLOR[power]
        values[i] = series
        bits[i] += i32(whole) << i32(23)  # the exponent of a float32


@compiled
def _evaluate(weights, into, scale, narrow, shift, peak, precision, target, sums):  # type: ignore[no-untyped-def]
    density = np.empty((len(narrow), BLOCK), f32)
    largest, shares, inverse, steepness, pull = np.empty((5, BLOCK), f32)
    total = f64(0)
    for begin in range(0, len(weights), BLOCK):
        w, received = weights[begin : begin + BLOCK], into[begin : begin + BLOCK]
        count = len(w)
        largest[:] = f32(-np.inf)
        shares[:], steepness[:], pull[:] = f32(0), f32(0), f32(0)
        for j in range(len(narrow)):
            row = density[j]
            for i in range(count):
                scaled = narrow[j] * w[i] - shift[j]
                row[i] = peak[j] - scaled * scaled
                largest[i] = max(largest[i], row[i])
        for j in range(len(narrow)):
            row = density[j, :count]
            for i in range(count):
                row[i] = max(row[i] - largest[i], SMALLEST)
            _exponentiate(row)
            for i in range(count):
                shares[i] += row[i]
                steepness[i] += precision[j] * row[i]
                pull[i] += target[j] * row[i]
        for i in range(count):
            inverse[i] = f32(1) / shares[i]
            received[i] += scale * ((steepness[i] * w[i] - pull[i]) * inverse[i])
        for j in range(len(narrow)):
            row = density[j]
            zeroth, first, second = f32(0), f32(0), f32(0)
            for i in range(count):
                responsibility = row[i] * inverse[i]
                zeroth += responsibility
                first += responsibility * w[i]
                second += responsibility * w[i] * w[i]
            sums[j, 0] += zeroth
            sums[j, 1] += first
            sums[j, 2] += second
        for first_factor in range(0, count, FACTORS):
            product = f64(1)
            for i in range(first_factor, min(count, first_factor + FACTORS)):
                product *= f64(shares[i])
                total -= f64(largest[i])
            total -= math.log(product)
    return total

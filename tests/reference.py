"""Slow, obvious loops that the library is compared with."""

from __future__ import annotations

import copy
import itertools
import math
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from tying.depth.recur import replace_layers
from tying.depth.recurrent import norms_in
from tying.depth.stages import children, find_stages
from tying.hard import tie


def pairwise(tensors: list[Tensor], rho) -> Tensor:
    """Ω = Σ_{i<j} ρ(w_i − w_j), entry by entry."""
    total = torch.zeros((), dtype=tensors[0].dtype)
    for a, b in combinations(tensors, 2):
        for x, y in zip(a.flatten(), b.flatten(), strict=True):
            total = total + rho(x - y)
    return total


def rho_l2(d):
    return d * d / 2


def rho_l1(d):
    return abs(d)


def rho_huber(delta: float):
    return lambda d: d * d / 2 if abs(d) <= delta else delta * (abs(d) - delta / 2)


def prox_by_search(w: list[float], rates: list[float], strength: float, rho, sweeps: int = 60) -> list[float]:
    """argmin_v Σ (v_i − w_i)² / (2 r_i) + s Ω(v) for scalars, by subgradient-free nested ternary search.

    The objective is strictly convex. Coordinates can lock together under L1, so whole-block moves are tried as well.
    """
    moving = [i for i, rate in enumerate(rates) if rate > 0]
    v = list(w)

    def objective(values: list[float]) -> float:
        fit = sum((values[i] - w[i]) ** 2 / (2 * rates[i]) for i in moving)
        return fit + strength * sum(rho(values[i] - values[j]) for i, j in combinations(range(len(w)), 2))

    blocks = [list(block) for size in range(1, len(moving) + 1) for block in combinations(moving, size)]
    span = max(w) - min(w) + 1.0
    for _ in range(sweeps):
        for block in blocks:
            low, high = -span, span
            for _ in range(100):
                left, right = low + (high - low) / 3, high - (high - low) / 3

                def moved(shift: float, block: list[int] = block, v: list[float] = v) -> list[float]:
                    return [value + shift if i in block else value for i, value in enumerate(v)]

                if objective(moved(left)) < objective(moved(right)):
                    high = right
                else:
                    low = left
            shift = (low + high) / 2
            if objective(moved(shift)) < objective(v):
                v = moved(shift)
    assert all(math.isfinite(value) for value in v)
    return v


def toeplitz_by_loops(hash: Any) -> Tensor:
    """The kernel entry of every pair of an output and an input of a convolution, −1 where there is none."""
    (p, q), (stride_j, stride_k), (pad_r, pad_c), (d_r, d_c), (height, width) = (
        (value, value) if isinstance(value, int) else value
        for value in (hash.kernel_size, hash.stride, hash.padding, hash.dilation, hash.input_size)
    )
    out_height, out_width = hash.output_size
    index = torch.full(hash.features, -1)
    for out, into in itertools.product(range(hash.out_channels), range(hash.in_channels)):
        for j, k, a, b in itertools.product(range(out_height), range(out_width), range(p), range(q)):
            r, c = stride_j * j + d_r * a - pad_r, stride_k * k + d_c * b - pad_c
            if 0 <= r < height and 0 <= c < width:
                row, column = (out * out_height + j) * out_width + k, (into * height + r) * width + c
                index[row, column] = ((out * hash.in_channels + into) * p + a) * q + b
    return index


def hashed_by_loops(layer: Any) -> tuple[Tensor, list[int], list[int]]:
    """A hashed layer's weight, and the slot and the sign of each of its weights, one identifier at a time."""
    virtual = layer.virtual
    slots, signs, values = [], [], []
    kept = virtual.slots().flatten().tolist() if virtual.density < 1 else None
    for i in range(virtual.shape.numel()):
        identifier = torch.tensor([virtual.first + i])
        slot = int(virtual.hash.slot(identifier, virtual.table_size, virtual.drawn))
        slots.append(slot if kept is None or kept[i] >= 0 else -1)
        signs.append(int(virtual.hash.sign(identifier)) if virtual.sign else 1)
        values.append(signs[i] * layer.table[slots[i]] if slots[i] >= 0 else layer.table.new_zeros(()))
    return torch.stack(values).view(virtual.shape).detach(), slots, signs


def written_out(model, patterns, passes: int, shares_norms: bool = True) -> None:
    """Write the repeats of a model's blocks out, in place: copies whose weights are tied, and whose buffers are shared.

    Args:
        model: changed in place.
        patterns: patterns of the names of blocks; those of each stage follow each other ``passes`` times.
        passes: number of passes.
        shares_norms: whether passes share their normalisation layers.
    """
    stages, sources = find_stages(model, patterns, any_parent=True), {}
    for stage in reversed(stages):
        entries, end = children(stage.container), stage.start + len(stage.blocks)
        repeats = [(copy.deepcopy(block), block) for _ in range(passes - 1) for block in stage.blocks]
        sources |= dict(repeats)
        entries[end:end] = [(f"again{number}", repeat) for number, (repeat, _) in enumerate(repeats)]
        replace_layers(model, stage.path, stage.container, entries, dict(repeats))
    names = {module: name for name, module in model.named_modules()}
    ties = []
    for repeat, block in sources.items():
        unshared = () if shares_norms else norms_in(block)
        for (path, module), source in zip(repeat.named_modules(), block.modules(), strict=True):
            if path not in unshared:
                module._buffers.update(source._buffers)
                keys = [key for key, _ in module.named_parameters(recurse=False)]
                ties += [f"{names[source]}.{key} ~ {names[module]}.{key}" for key in keys]
    if ties:
        tie(model, ties)

"""Triton kernels for hashed linear layers on a GPU: the whole weight and its gradient are never in memory.

The matrix product computes the slots of a tile of the weight, and reads the table, only when it needs the tile.
Triton's interpreter (``TRITON_INTERPRET=1``) runs the same kernels on the CPU, for tests.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]  # it has no types
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from tying.hashing.hashes import splitmix64

TILE = 32  # number of rows and of columns of a tile, of the weight or the batch


@triton.jit
def _slot(ids, low_key, high_key, size):  # type: ignore[no-untyped-def]  # Triton's language
    """Compute the slots of a UniformHash: hash32 and reduce_range in unsigned arithmetic."""
    wide = ids.to(tl.uint64)
    x = (((wide ^ ((wide >> 32) * 0x9E3779B1)) + low_key) & 0xFFFFFFFF).to(tl.uint32)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ high_key.to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return ((x.to(tl.uint64) * size) >> 32).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]  # Triton's
def _product(  # type: ignore[no-untyped-def]  # Triton's language
    x, table, y, batch, inner, outer, inner_stride, outer_stride, first, low_key, high_key, size, tile: tl.constexpr
):
    """Compute y[b, o] = Σ_i x[b, i] · t[h(first + i · inner_stride + o · outer_stride)]: output, or input gradient."""
    b = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)  # products exceed 2³¹
    o = tl.program_id(1) * tile + tl.arange(0, tile)
    total = tl.zeros((tile, tile), dtype=tl.float32)
    for begin in range(0, inner, tile):
        i = begin + tl.arange(0, tile)
        left = tl.load(x + b[:, None] * inner + i[None, :], (b[:, None] < batch) & (i[None, :] < inner), 0.0)
        ids = first + i[:, None].to(tl.int64) * inner_stride + o[None, :].to(tl.int64) * outer_stride
        inside = (i[:, None] < inner) & (o[None, :] < outer)
        right = tl.load(table + _slot(ids, low_key, high_key, size), inside, 0.0)
        total += tl.dot(left, right.to(left.dtype), input_precision="ieee")
    tl.store(y + b[:, None] * outer + o[None, :], total, (b[:, None] < batch) & (o[None, :] < outer))


@triton.jit  # type: ignore[untyped-decorator]  # Triton's
def _gradient(  # type: ignore[no-untyped-def]  # Triton's language
    x, upstream, sums, batch, inputs, outputs, first, low_key, high_key, size, tile: tl.constexpr
):
    """Add the table's gradient: sums[h(first + o · inputs + i)] += Σ_b upstream[b, o] · x[b, i]."""
    o = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)  # products exceed 2³¹
    i = tl.program_id(1) * tile + tl.arange(0, tile)
    total = tl.zeros((tile, tile), dtype=tl.float32)
    for begin in range(0, batch, tile):
        b = begin + tl.arange(0, tile)
        left = tl.load(upstream + b[None, :] * outputs + o[:, None], (b[None, :] < batch) & (o[:, None] < outputs), 0.0)
        right = tl.load(x + b[:, None] * inputs + i[None, :], (b[:, None] < batch) & (i[None, :] < inputs), 0.0)
        total += tl.dot(left, right, input_precision="ieee")
    ids = first + o[:, None].to(tl.int64) * inputs + i[None, :].to(tl.int64)
    inside = (o[:, None] < outputs) & (i[None, :] < inputs)
    tl.atomic_add(sums + _slot(ids, low_key, high_key, size), total, inside)


class FusedLinear(torch.autograd.Function):
    """``x Wᵀ`` with ``w_i = t[h(i)]`` for a uniform hash h, x (batch, inputs) and t (n,) on the same device."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, table: Tensor, outputs: int, first: int, seed: int) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.layer = outputs, first, seed
        return _multiply(x, table, x.shape[1], outputs, (1, x.shape[1]), first, seed)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, table = ctx.saved_tensors
        outputs, first, seed = ctx.layer
        (batch, inputs), upstream = x.shape, upstream.contiguous()
        input_grad = table_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = _multiply(upstream, table, outputs, inputs, (inputs, 1), first, seed)
        if ctx.needs_input_grad[1]:
            sums = torch.zeros(len(table), dtype=torch.float32, device=table.device)
            _gradient[triton.cdiv(outputs, TILE), triton.cdiv(inputs, TILE)](
                x, upstream, sums, batch, inputs, outputs, first, *splitmix64(seed), len(table), TILE
            )
            table_grad = sums.to(table.dtype)
        return input_grad, table_grad, None, None, None


def fused_linear(x: Tensor, table: Tensor, outputs: int, first: int, seed: int) -> Tensor:
    """Return ``x Wᵀ`` for a weight with a uniform hash. There are no second derivatives.

    Args:
        x: (..., inputs).
        table: (n,).
        outputs: number of rows of W.
        first: identifier of the first weight.
        seed: seed of the hash.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    result: Tensor = FusedLinear.apply(x.reshape(-1, x.shape[-1]).contiguous(), table, outputs, first, seed)
    return result.view(*x.shape[:-1], outputs)


def _multiply(
    x: Tensor, table: Tensor, inner: int, outer: int, strides: tuple[int, int], first: int, seed: int
) -> Tensor:
    y = x.new_empty(len(x), outer)
    _product[triton.cdiv(len(x), TILE), triton.cdiv(outer, TILE)](
        x, table, y, len(x), inner, outer, *strides, first, *splitmix64(seed), len(table), TILE
    )
    return y

"""The equations of an LSTM whose units may keep their old values, and their gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tying.errors import ConfigurationError

Keep = Tensor | float  # probability of the new value; or a mask of it, true for the new value


def zoned_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    keep_cell: Keep = 1.0,
    keep_hidden: Keep = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of an LSTM, and its last hidden state and cell, where units may keep their old values.

    With gates ``(i, f, g, o) = W_ih x_t + W_hh h_{t−1} + b``: ``c̃ = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(g)``,
    ``h̃ = σ(o) ⊙ tanh(c̃)``, ``c_t = k_c ⊙ c̃ + (1 − k_c) ⊙ c_{t−1}``, ``h_t = k_h ⊙ h̃ + (1 − k_h) ⊙ h_{t−1}``.

    Args:
        x: inputs, (steps, batch, inputs).
        h: the first hidden state, (batch, size).
        c: the first cell, (batch, size).
        weight_ih: (4 · size, inputs).
        weight_hh: (4 · size, size).
        bias: (4 · size).
        keep_cell: k_c: a number, or a mask of (steps, batch, size) or (steps, batch, 1).
        keep_hidden: k_h, likewise.

    Shape: outputs (steps, batch, size), hidden state and cell (batch, size). Under autocast all are of its dtype.

    Its gradients have none themselves (no double backward), and ``torch.func`` does not take it.

    Raises:
        ConfigurationError: k_c or k_h asks for a gradient.

    Example:
        >>> x, state = torch.zeros(5, 2, 4), torch.ones(2, 3)
        >>> outputs, h, c = zoned_lstm(x, state, state, torch.ones(12, 4), torch.ones(12, 3), None, 0.0, 0.0)
        >>> outputs.shape, torch.equal(h, state)
        (torch.Size([5, 2, 3]), True)

    Source: D. Krueger et al., Zoneout: regularizing RNNs by randomly preserving hidden activations, 2017.
    """
    tensors = [x, h, c, weight_ih, weight_hh, *([] if bias is None else [bias])]
    device = x.device.type
    if torch.is_autocast_enabled(device):  # as torch's LSTM, in the lower precision throughout
        tensors = [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
    keeps = [_fitting(keep, tensors[0].dtype) for keep in (keep_cell, keep_hidden)]
    with torch.autocast(device, enabled=False):
        found = _ZonedLSTM.apply(*tensors, *([None] if bias is None else []), *keeps)
    return cast(tuple[Tensor, Tensor, Tensor], found)


class _ZonedLSTM(torch.autograd.Function):
    """The loop over steps, and backwards: what inputs and weights need is one product each for all steps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        keep_cell: Keep,
        keep_hidden: Keep,
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, batch, size = len(x), *h.shape
        gates = F.linear(x, _g_and_o_swapped(weight_ih), None if bias is None else _g_and_o_swapped(bias))
        across = _g_and_o_swapped(weight_hh)
        hidden, cells = (gates.new_empty(steps + 1, batch, size) for _ in range(2))
        tanhs = gates.new_empty(steps, batch, size)
        hidden[0], cells[0] = h, c
        for t in range(steps):
            gate = gates[t].addmm_(hidden[t], across.t())
            gate[:, : 3 * size].sigmoid_()
            gate[:, 3 * size :].tanh_()
            i, f, o, g = gate.chunk(4, dim=1)
            new = torch.addcmul(f * cells[t], i, g)
            torch.tanh(new, out=tanhs[t])
            _keep(cells[t], new, _at(keep_cell, t), cells[t + 1])
            _keep(hidden[t], o * tanhs[t], _at(keep_hidden, t), hidden[t + 1])
        ctx.save_for_backward(x, weight_ih, gates, hidden, cells, tanhs, across)
        ctx.keep_cell, ctx.keep_hidden, ctx.biased = keep_cell, keep_hidden, bias is not None
        return hidden[1:], hidden[-1].clone(), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outputs: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_ih, gates, hidden, cells, tanhs, across = ctx.saved_tensors
        into = torch.empty_like(gates)
        for t in reversed(range(len(tanhs))):
            i, f, o, g = gates[t].chunk(4, dim=1)
            d_i, d_f, d_o, d_g = into[t].chunk(4, dim=1)
            h = h + outputs[t]
            new_h, new_c = h * _at(ctx.keep_hidden, t), c * _at(ctx.keep_cell, t)
            old_h, old_c = h - new_h, c - new_c
            torch.mul(new_h, tanhs[t], out=d_o).mul_(o).mul_(1 - o)
            new_c = torch.addcmul(new_c, new_h * o, 1 - tanhs[t].square())
            torch.mul(new_c, g, out=d_i).mul_(i).mul_(1 - i)
            torch.mul(new_c, cells[t], out=d_f).mul_(f).mul_(1 - f)
            torch.mul(new_c, i, out=d_g).mul_(1 - g.square())
            h = torch.addmm(old_h, into[t], across)
            c = torch.addcmul(old_c, new_c, f)
        flat = into.flatten(0, 1)
        d_x = into @ _g_and_o_swapped(weight_ih) if ctx.needs_input_grad[0] else None
        d_ih = _g_and_o_swapped(flat.t() @ x.flatten(0, 1))
        d_hh = _g_and_o_swapped(flat.t() @ hidden[:-1].flatten(0, 1))
        return d_x, h, c, d_ih, d_hh, _g_and_o_swapped(flat.sum(0)) if ctx.biased else None, None, None


def _g_and_o_swapped(gates: Tensor) -> Tensor:
    """Return a copy of what belongs to gates i, f, g, o in the order i, f, o, g, the sigmoids first; or back again."""
    i, f, third, fourth = gates.chunk(4)
    return torch.cat([i, f, fourth, third])


def _fitting(keep: Keep, dtype: torch.dtype) -> Keep:
    if not isinstance(keep, Tensor) or keep.dtype == torch.bool:
        return keep
    if keep.requires_grad:
        raise ConfigurationError("keep_cell and keep_hidden take no gradient: give them detached")
    return keep.to(dtype)


def _at(keep: Keep, t: int) -> Keep:
    return keep[t] if isinstance(keep, Tensor) else keep


def _keep(old: Tensor, new: Tensor, keep: Keep, out: Tensor) -> None:
    if isinstance(keep, Tensor) and keep.dtype == torch.bool:
        torch.where(keep, new, old, out=out)
    elif isinstance(keep, Tensor):
        torch.lerp(old, new, keep.expand_as(new), out=out)
    elif keep in (0.0, 1.0):  # whatever the other one is, infinite or not a number
        out.copy_(new if keep else old)
    else:
        torch.lerp(old, new, keep, out=out)

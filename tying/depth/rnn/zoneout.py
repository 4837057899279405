"""Zoneout: units of a recurrent network keep their previous value at random."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from typing_extensions import override

from tying.depth.draws import keep_mask
from tying.depth.rnn.sequences import check_state, steps_first
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


State = tuple[Tensor, Tensor]


class _Zoned(nn.Module):
    """What both have in common: the probabilities that units keep their old values."""

    zoneout_cell: float
    zoneout_hidden: float

    def _set_rates(self, **rates: float) -> None:
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise ConfigurationError(f"{name} is the probability of keeping the old value, from 0 to 1, not {rate}")
            setattr(self, name, float(rate))

    def _draw(self, shape: tuple[int, ...], device: torch.device) -> list[Keep]:
        """Return masks of new values; in evaluation, or where nothing is random, their probabilities."""
        news = [1 - rate for rate in (self.zoneout_cell, self.zoneout_hidden)]
        return [keep_mask(new, shape, device) if self.training and 0 < new < 1 else new for new in news]

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, zoneout_cell={self.zoneout_cell:g}, zoneout_hidden={self.zoneout_hidden:g}"


class ZoneoutLSTMCell(_Zoned, nn.LSTMCell):
    """One step of :class:`ZoneoutLSTM`, with the interface and the parameters of ``nn.LSTMCell``.

    Args:
        input_size: of the input.
        hidden_size: of the state.
        bias: whether there are biases.
        device: of the parameters.
        dtype: of the parameters.
        zoneout_cell: probability that a unit of the cell keeps its old value.
        zoneout_hidden: probability that a unit of the hidden state does.

    Raises:
        ConfigurationError: a probability is none.

    Example:
        >>> h, c = ZoneoutLSTMCell(4, 3, zoneout_cell=0.5)(torch.zeros(2, 4))
        >>> h.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        zoneout_cell: float = 0.0,
        zoneout_hidden: float = 0.0,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self._set_rates(zoneout_cell=zoneout_cell, zoneout_hidden=zoneout_hidden)

    @override
    def forward(self, input: Tensor, hx: State | None = None) -> State:
        if input.ndim not in (1, 2) or input.shape[-1] != self.input_size:
            size = self.input_size
            raise ConfigurationError(f"inputs are (batch, {size}) or ({size},), not {tuple(input.shape)}")
        batch = input if input.ndim == 2 else input.unsqueeze(0)
        if hx is None:
            h = c = batch.new_zeros(len(batch), self.hidden_size)
        else:
            check_state(hx, ((*input.shape[:-1], self.hidden_size),) * 2)
            h, c = (one if input.ndim == 2 else one.unsqueeze(0) for one in hx)
        biases = self.bias_ih + self.bias_hh if self.bias else None
        keeps = self._draw((1, *h.shape), h.device)
        _, h, c = zoned_lstm(batch.unsqueeze(0), h, c, self.weight_ih, self.weight_hh, biases, *keeps)
        return (h, c) if input.ndim == 2 else (h.squeeze(0), c.squeeze(0))


class ZoneoutLSTM(_Zoned, nn.LSTM):
    """``nn.LSTM``, its interface and its parameters' names, where units keep their old values at random.

    All of it but projections (``proj_size``). In evaluation, old and new values are mixed by these probabilities. The
    outputs are hidden states after that. Its gradients have none themselves: no double backward, no ``torch.func``; and
    ``torch.compile`` breaks its graph here.

    Args:
        input_size: of the input.
        hidden_size: of the state.
        num_layers: layers, each on the outputs of the one below.
        bias: whether there are biases.
        batch_first: inputs and outputs are (batch, steps, …) instead of (steps, batch, …).
        dropout: of the outputs of all layers but the last.
        bidirectional: also run from the end to the beginning.
        device: of the parameters.
        dtype: of the parameters.
        zoneout_cell: probability that a unit of the cell keeps its old value, at each step.
        zoneout_hidden: probability that a unit of the hidden state does.

    Shape: as of ``nn.LSTM``, packed sequences and single ones included.

    Raises:
        ConfigurationError: a probability is none; a sequence is empty.

    Example:
        >>> outputs, (h, c) = ZoneoutLSTM(4, 3, zoneout_cell=0.15, zoneout_hidden=0.15)(torch.zeros(5, 2, 4))
        >>> outputs.shape, h.shape
        (torch.Size([5, 2, 3]), torch.Size([1, 2, 3]))

    Source: D. Krueger et al., Zoneout: regularizing RNNs by randomly preserving hidden activations, 2017.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        zoneout_cell: float = 0.0,
        zoneout_hidden: float = 0.0,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, **factory)
        self._set_rates(zoneout_cell=zoneout_cell, zoneout_hidden=zoneout_hidden)

    @override
    def forward(self, input: Any, hx: State | None = None) -> tuple[Any, State]:
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        if alone := input.ndim == 2:
            input, hx = input.unsqueeze(1), None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        x = steps_first(input, self.input_size, self.batch_first and not alone)
        outputs, (h, c) = self._run(x, hx, None)
        if alone:
            return outputs.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return outputs.transpose(0, 1) if self.batch_first else outputs, (h, c)

    def _packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        padded, lengths = pad_packed_sequence(packed)
        there = torch.arange(len(padded)).unsqueeze(1) < lengths
        outputs, state = self._run(steps_first(padded, self.input_size), hx, there.unsqueeze(2).to(padded.device))
        if packed.sorted_indices is not None:  # packed as the input was
            outputs, lengths = outputs.index_select(1, packed.sorted_indices), lengths[packed.sorted_indices.cpu()]
        found = pack_padded_sequence(outputs, lengths)
        return PackedSequence(found.data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), state

    def _run(self, x: Tensor, hx: State | None, there: Tensor | None) -> tuple[Tensor, State]:
        """Return outputs and states; steps that are not there, of shorter sequences, keep the state entirely."""
        directions = 2 if self.bidirectional else 1
        rows = self.num_layers * directions
        h, c = (x.new_zeros(rows, x.shape[1], self.hidden_size) for _ in range(2)) if hx is None else hx
        check_state((h, c), ((rows, x.shape[1], self.hidden_size),) * 2)
        last = []
        for layer in range(self.num_layers):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            ways = []
            for way in range(directions):
                row = layer * directions + way
                own, present = (x, there) if way == 0 else (x.flip(0), None if there is None else there.flip(0))
                outputs, *state = self._layer(own, h[row], c[row], f"l{layer}" + "_reverse" * way, present)
                ways.append(outputs if way == 0 else outputs.flip(0))
                last.append(state)
            x = torch.cat(ways, dim=2) if len(ways) > 1 else ways[0]
        return x, (torch.stack([state[0] for state in last]), torch.stack([state[1] for state in last]))

    def _layer(self, x: Tensor, h: Tensor, c: Tensor, name: str, there: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        biases = getattr(self, f"bias_ih_{name}") + getattr(self, f"bias_hh_{name}") if self.bias else None
        keeps = self._draw((len(x), *h.shape), h.device)
        if there is not None:
            keeps = [_where_there(there, keep) for keep in keeps]
        into, across = (getattr(self, f"weight_{kind}_{name}") for kind in ("ih", "hh"))
        return zoned_lstm(x, h, c, into, across, biases, *keeps)


def _where_there(there: Tensor, keep: Keep) -> Tensor:
    if isinstance(keep, Tensor):
        return there & keep
    return there & bool(keep) if keep in (0.0, 1.0) else there * keep

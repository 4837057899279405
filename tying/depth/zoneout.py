"""Zoneout: units of a recurrent network that keep their old value; skip-forward over time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from typing_extensions import override

from tying.depth.draws import keep_mask
from tying.depth.steps import check_state, steps_first
from tying.depth.zoned import Keep, zoned_lstm
from tying.errors import ConfigurationError

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

"""Zoneout: units of a recurrent network randomly keep their previous value."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from typing_extensions import override

from tying.depth.draws import keep_mask
from tying.depth.rnn.sequences import (
    SequenceLayer,
    autocasts,
    check_cell_input,
    check_dtype,
    initial_state,
    without_autocast,
)
from tying.depth.tracing import LeafModule, leaf_function
from tying.errors import ConfigurationError, check_range
from tying.torch_workarounds import is_recorded

Keep = Tensor | float  # probability of taking the new value, or a mask of the units that take it
State = tuple[Tensor, Tensor]


@leaf_function
def zoned_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    keep_cell: Keep = 1.0,
    keep_hidden: Keep = 1.0,
    weight_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs, the last hidden state and the last cell of an LSTM whose units may keep their old values.

    With gates ``(i, f, g, o) = W_ih x_t + W_hh h_{t−1} + b``: ``c̃ = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(g)``,
    ``h̃ = W_hr (σ(o) ⊙ tanh(c̃))``, ``c_t = k_c ⊙ c̃ + (1 − k_c) ⊙ c_{t−1}``, ``h_t = k_h ⊙ h̃ + (1 − k_h) ⊙ h_{t−1}``.

    Args:
        x: inputs, (steps, batch, inputs).
        h: initial hidden state, (batch, size).
        c: initial cell, (batch, size).
        weight_ih: (4 · size, inputs).
        weight_hh: (4 · size, size); with W_hr, (4 · size, projection).
        bias: (4 · size).
        keep_cell: k_c, a number or a mask of shape (steps, batch, size) or (steps, batch, 1).
        keep_hidden: k_h, see ``keep_cell``.
        weight_hr: W_hr, (projection, size); default: the identity.

    Shape: outputs (steps, batch, size), hidden state and cell (batch, size); outputs and hidden state as W_hr projects
    them. Under autocast they have its dtype. Export, ``torch.func`` and ``create_graph=True`` use a slower loop.

    Raises:
        ConfigurationError: k_c or k_h requires a gradient.

    Example:
        >>> x, state = torch.zeros(5, 2, 4), torch.ones(2, 3)
        >>> outputs, h, c = zoned_lstm(x, state, state, torch.ones(12, 4), torch.ones(12, 3), None, 0.0, 0.0)
        >>> outputs.shape, torch.equal(h, state)
        (torch.Size([5, 2, 3]), True)

    Source: D. Krueger et al., Zoneout: regularizing RNNs by randomly preserving hidden activations, 2017.
    """
    tensors: list[Any] = [x, h, c, weight_ih, weight_hh, bias, weight_hr]
    dtype = x.dtype
    if autocasts(x):  # the lower precision throughout, as in torch's LSTM
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    keeps = [_per_step(keep, len(x), dtype) for keep in (keep_cell, keep_hidden)]
    with without_autocast(x):
        compute = _zoned_loop if torch.compiler.is_compiling() or is_recorded() else _ZonedLSTM.apply
        return cast(tuple[Tensor, Tensor, Tensor], compute(*tensors, *keeps))


def _per_step(keep: Keep, steps: int, dtype: torch.dtype) -> Tensor | list[float]:
    """Return values to index by step: a bool mask unchanged, another tensor in ``dtype``, or a number repeated."""
    if not isinstance(keep, Tensor):
        return [keep] * steps
    if keep.requires_grad:
        raise ConfigurationError("keep_cell and keep_hidden must not require gradients: detach them")
    return keep if keep.dtype == torch.bool else keep.to(dtype)


def _zoned_loop(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    weight_hr: Tensor | None,
    keep_cell: Tensor | list[float],
    keep_hidden: Tensor | list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute zoneout without in-place writes or autograd functions, for graphs, transforms and higher derivatives."""
    outputs = []
    for inputs, k_c, k_h in zip(F.linear(x, weight_ih, bias), keep_cell, keep_hidden, strict=True):
        i, f, g, o = (inputs + F.linear(h, weight_hh)).chunk(4, dim=1)
        new_c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        new_h = o.sigmoid() * new_c.tanh()
        if weight_hr is not None:
            new_h = F.linear(new_h, weight_hr)
        c, h = _combine(c, new_c, k_c), _combine(h, new_h, k_h)
        outputs.append(h)
    return torch.stack(outputs), h, c


class _ZonedLSTM(torch.autograd.Function):
    """The loop over steps; gradients of inputs and weights are one matrix product each for all steps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        weight_hr: Tensor | None,
        keep_cell: Tensor | list[float],
        keep_hidden: Tensor | list[float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, size = len(x), c.shape[1]
        gates = F.linear(x, _swap_g_and_o(weight_ih), None if bias is None else _swap_g_and_o(bias))
        across = _swap_g_and_o(weight_hh)
        hidden, cells = (gates.new_empty(steps + 1, *state.shape) for state in (h, c))
        tanhs = gates.new_empty(steps, *c.shape)
        hidden[0], cells[0] = h, c
        for t in range(steps):
            gate = gates[t].addmm_(hidden[t], across.t())
            gate[:, : 3 * size].sigmoid_()
            gate[:, 3 * size :].tanh_()
            i, f, o, g = gate.chunk(4, dim=1)
            new = torch.addcmul(f * cells[t], i, g)
            torch.tanh(new, out=tanhs[t])
            _combine(cells[t], new, keep_cell[t], cells[t + 1])
            new = o * tanhs[t]
            if weight_hr is not None:
                new = F.linear(new, weight_hr)
            _combine(hidden[t], new, keep_hidden[t], hidden[t + 1])
        ctx.save_for_backward(x, h, c, weight_ih, weight_hh, bias, weight_hr, gates, hidden, cells, tanhs)
        ctx.keep_cell, ctx.keep_hidden = keep_cell, keep_hidden
        return hidden[1:], hidden[-1].clone(), cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True
            return _differentiable_gradients(ctx, gradients)
        x, _, _, weight_ih, weight_hh, bias, weight_hr, gates, hidden, cells, tanhs = ctx.saved_tensors
        outputs, h, c = gradients
        across, d_gates = _swap_g_and_o(weight_hh), torch.empty_like(gates)
        d_hidden = torch.empty_like(outputs) if weight_hr is not None else None
        for t in reversed(range(len(tanhs))):
            i, f, o, g = gates[t].chunk(4, dim=1)
            d_i, d_f, d_o, d_g = d_gates[t].chunk(4, dim=1)
            h = h + outputs[t]
            new_h, new_c = h * ctx.keep_hidden[t], c * ctx.keep_cell[t]
            old_h, old_c = h - new_h, c - new_c
            if d_hidden is not None:
                d_hidden[t] = new_h
                new_h = new_h @ weight_hr
            torch.mul(new_h, tanhs[t], out=d_o).mul_(o).mul_(1 - o)
            new_c = torch.addcmul(new_c, new_h * o, 1 - tanhs[t].square())
            torch.mul(new_c, g, out=d_i).mul_(i).mul_(1 - i)
            torch.mul(new_c, cells[t], out=d_f).mul_(f).mul_(1 - f)
            torch.mul(new_c, i, out=d_g).mul_(1 - g.square())
            h = torch.addmm(old_h, d_gates[t], across)
            c = torch.addcmul(old_c, new_c, f)
        flat = d_gates.flatten(0, 1)
        d_projection = None
        if d_hidden is not None:
            o = gates.chunk(4, dim=2)[2]
            d_projection = d_hidden.flatten(0, 1).t() @ (o * tanhs).flatten(0, 1)
        return (
            d_gates @ _swap_g_and_o(weight_ih) if ctx.needs_input_grad[0] else None,
            h,
            c,
            _swap_g_and_o(flat.t() @ x.flatten(0, 1)),
            _swap_g_and_o(flat.t() @ hidden[:-1].flatten(0, 1)),
            None if bias is None else _swap_g_and_o(flat.sum(0)),
            d_projection,
            None,
            None,
        )


def _differentiable_gradients(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of :class:`_ZonedLSTM`, with a graph, by a loop that autograd records."""
    inputs: list[Tensor | None] = [*ctx.saved_tensors[:7]]
    # views, since an input may depend on another
    views = {place: t.view_as(t) for place, t in enumerate(inputs) if t is not None and t.requires_grad}
    arguments: list[Any] = [*(views.get(place, t) for place, t in enumerate(inputs)), ctx.keep_cell, ctx.keep_hidden]
    with without_autocast(gradients[0]):
        outputs = _zoned_loop(*arguments)
        pairs = [(output, d) for output, d in zip(outputs, gradients, strict=True) if output.requires_grad]
        computed = torch.autograd.grad(
            [output for output, _ in pairs],
            [*views.values()],
            [d for _, d in pairs],
            create_graph=True,
            materialize_grads=True,  # full zoneout uses no weights
        )
    by_place = dict(zip(views, computed, strict=True))
    return (*map(by_place.get, range(len(inputs))), None, None)


def _swap_g_and_o(gates: Tensor) -> Tensor:
    """Return a copy with gates (i, f, g, o) reordered to (i, f, o, g), sigmoids first, or back."""
    i, f, third, fourth = gates.chunk(4)
    return torch.cat([i, f, fourth, third])


def _combine(old: Tensor, new: Tensor, keep: Keep, out: Tensor | None = None) -> Tensor:
    """Return the mean ``keep ⊙ new + (1 − keep) ⊙ old``, written into ``out`` if it is given."""
    if isinstance(keep, Tensor) and keep.dtype == torch.bool:
        return torch.where(keep, new, old, out=out)
    if not isinstance(keep, Tensor) and keep in (0.0, 1.0):  # without the other value, which may be NaN
        taken = new if keep else old
        return taken if out is None else out.copy_(taken)
    return torch.lerp(old, new, keep.expand_as(new) if isinstance(keep, Tensor) else keep, out=out)


class ZoneoutRates(LeafModule):
    """Base class of :class:`ZoneoutLSTMCell` and :class:`ZoneoutLSTM`: the zoneout probabilities and their masks."""

    def set_rates(self, zoneout_cell: float, zoneout_hidden: float) -> None:
        """Set the zoneout probabilities of the cell and of the hidden state."""
        check_range("zoneout_cell", zoneout_cell, "[0, 1]")
        check_range("zoneout_hidden", zoneout_hidden, "[0, 1]")
        self.zoneout_cell, self.zoneout_hidden = float(zoneout_cell), float(zoneout_hidden)

    def _draw_keeps(self, steps: int, h: Tensor, c: Tensor, present: Tensor | None = None) -> tuple[Keep, Keep]:
        """Return k_c and k_h: random masks in training, their probabilities in evaluation or if they are 0 or 1.

        Args:
            steps: number of steps.
            h: hidden state, (batch, size or projection).
            c: cell, (batch, size).
            present: bool, (steps, batch, 1): false at padded steps, which keep the state.
        """

        def draw(rate: float, state: Tensor) -> Keep:
            keep = 1 - rate
            drawn = keep_mask(keep, (steps, *state.shape), state.device) if self.training and 0 < keep < 1 else keep
            if present is None:
                return drawn
            if isinstance(drawn, Tensor) or drawn in (0.0, 1.0):
                return present & (drawn if isinstance(drawn, Tensor) else bool(drawn))
            return present.to(state.dtype) * drawn

        return draw(self.zoneout_cell, c), draw(self.zoneout_hidden, h)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, zoneout_cell={self.zoneout_cell:g}, zoneout_hidden={self.zoneout_hidden:g}"


class ZoneoutLSTMCell(ZoneoutRates, nn.LSTMCell):
    """One step of :class:`ZoneoutLSTM`, with the interface and the parameters of ``nn.LSTMCell``.

    Args:
        input_size: size of the input.
        hidden_size: size of the state.
        bias: whether there are biases.
        device: device of the parameters.
        dtype: dtype of the parameters.
        zoneout_cell: probability that a unit of the cell keeps its old value.
        zoneout_hidden: probability that a unit of the hidden state keeps its old value.

    Raises:
        ConfigurationError: a probability is not in [0, 1].

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
        self.set_rates(zoneout_cell, zoneout_hidden)

    @override
    def forward(self, input: Tensor, hx: State | None = None) -> State:
        check_cell_input(self, input)
        shape = (*input.shape[:-1], self.hidden_size)
        h, c = (part.reshape(-1, self.hidden_size) for part in initial_state(input, hx, shape, shape))
        bias = self.bias_ih + self.bias_hh if self.bias else None
        keep_cell, keep_hidden = self._draw_keeps(1, h, c)
        x = input.reshape(1, -1, self.input_size)
        _, h, c = zoned_lstm(x, h, c, self.weight_ih, self.weight_hh, bias, keep_cell, keep_hidden)
        return h.view(shape), c.view(shape)


class ZoneoutLSTM(ZoneoutRates, SequenceLayer, nn.LSTM):
    """``nn.LSTM`` whose units randomly keep their old values, with its interface and parameter names.

    In evaluation, states are averages of old and new values with the zoneout probabilities as weights. The outputs are
    the hidden states after zoneout; with ``proj_size``, zoneout acts on the projected hidden state. ``torch.compile``
    breaks its graph at this layer, as at ``nn.LSTM``. :func:`zone_out` turns the ``nn.LSTM`` layers of a model into
    this class. The order of the arguments is that of ``nn.LSTM``, except that ``proj_size`` is the last.

    Args:
        input_size: size of the input.
        hidden_size: size of the state.
        num_layers: number of layers; each reads the outputs of the layer below.
        bias: whether there are biases.
        batch_first: inputs and outputs are (batch, steps, …) instead of (steps, batch, …).
        dropout: dropout probability for the outputs of all layers but the last.
        bidirectional: whether each layer also runs from the last step to the first.
        device: device of the parameters.
        dtype: dtype of the parameters.
        zoneout_cell: probability that a unit of the cell keeps its old value, at each step.
        zoneout_hidden: probability that a unit of the hidden state keeps its old value.

    Shape: see ``nn.LSTM``; packed sequences and unbatched inputs are supported.

    Raises:
        ConfigurationError: a probability is not in [0, 1]; an input or state has another size or dtype, or no steps.

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
        proj_size: int = 0,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        )
        self.set_rates(zoneout_cell, zoneout_hidden)

    @override
    def forward(self, input: Any, hx: State | None = None) -> tuple[Any, State]:
        x, layout = self.enter(input)
        rows = len(self.all_weights)
        states = layout.enter_state(x, hx, (rows, self.proj_size or self.hidden_size), (rows, self.hidden_size))
        present = lengths = None
        if layout.packed is not None:  # padded, for masks of (steps, batch, size)
            x, lengths = pad_packed_sequence(PackedSequence(x, layout.packed.batch_sizes))  # the longest first
            present = (torch.arange(len(x)).unsqueeze(1) < lengths).unsqueeze(2).to(x.device)
        layers = [partial(self._run_layer, weights, present) for weights in self.all_weights]
        outputs, states = self.run_layers(layers, x, states, None)
        if lengths is not None:
            outputs = pack_padded_sequence(outputs, lengths).data
        h, c = layout.leave_state(states)
        return layout.leave(outputs), (h, c)

    def _run_layer(
        self,
        weights: Sequence[Tensor],
        present: Tensor | None,
        x: Tensor,
        state: Sequence[Tensor],
        batch_sizes: None,
        reverse: bool,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Run one layer in one direction; ``present``, (steps, batch, 1), is false at padded steps."""
        (h, c), (weight_ih, weight_hh, *others) = state, weights
        if reverse:
            x, present = x.flip(0), None if present is None else present.flip(0)
        check_dtype(self, x)
        keep_cell, keep_hidden = self._draw_keeps(len(x), h, c, present)
        weight_hr = others.pop() if self.proj_size else None
        bias = others[0] + others[1] if self.bias else None
        outputs, *last = zoned_lstm(x, h, c, weight_ih, weight_hh, bias, keep_cell, keep_hidden, weight_hr)
        return outputs.flip(0) if reverse else outputs, last

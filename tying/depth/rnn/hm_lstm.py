"""Hierarchical multiscale LSTMs: layers detect boundaries, and copy their state between boundaries."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.depth.rnn.sequences import Input, RecurrentLayer, check_dtype, check_size, unroll
from tying.errors import check_choice, check_count, check_range

Boundary = Literal["step", "sample"]
Outputs = Literal["all", "top"]


class HMState(NamedTuple):
    """The state of an :class:`HMLSTM`.

    Attributes:
        h: hidden states, (layers, batch, size).
        c: cells, (layers, batch, size).
        z: boundaries of the last step, 0 or 1, of all layers but the top one, (layers − 1, batch, 1).
    """

    h: Tensor
    c: Tensor
    z: Tensor


class HMOutput(NamedTuple):
    """The output of an :class:`HMLSTM`; for packed input, its hidden states and boundaries are packed, too.

    Attributes:
        hidden: hidden states of all layers, (steps, batch, layers, size).
        boundaries: 0 or 1, of all layers but the top one, (steps, batch, layers − 1).
        state: the state after the last step.
    """

    hidden: Tensor
    boundaries: Tensor
    state: HMState


def hm_update(
    h: Tensor, c: Tensor, gates: tuple[Tensor, Tensor, Tensor, Tensor], z_before: Tensor, z_below: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a layer's next hidden state and cell.

    If the layer had a boundary in the previous step, FLUSH: ``c = i ⊙ g``. Otherwise, if the layer below has a
    boundary, UPDATE: ``c = f ⊙ c + i ⊙ g``. In both cases ``h = o ⊙ tanh(c)``. Otherwise COPY: h and c stay the same.

    Args:
        h: hidden state, (batch, size).
        c: cell, (batch, size).
        gates: f, i, o and g, after their nonlinearities, each (batch, size).
        z_before: 1 if this layer had a boundary in the previous step, else 0, (batch, 1).
        z_below: 1 if the layer below has a boundary in this step, else 0, (batch, 1).

    Example:
        >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        >>> gates = (one / 2, one, one, one)
        >>> [hm_update(one, 4 * one, gates, *z)[1].item() for z in ((one, zero), (zero, one), (zero, zero))]
        [1.0, 3.0, 4.0]

    Source: J. Chung, S. Ahn and Y. Bengio, Hierarchical multiscale recurrent neural networks, 2017.
    """
    f, i, o, g = gates
    flush, update, copied = z_before, (1 - z_before) * z_below, (1 - z_before) * (1 - z_below)
    fresh = i * g
    cell = flush * fresh + update * (f * c + fresh) + copied * c
    return copied * h + (1 - copied) * (o * torch.tanh(cell)), cell


def detect_boundary(x: Tensor, slope: float, sample: bool) -> Tensor:
    """Return 1 at boundaries and 0 elsewhere, with the gradient of the hard sigmoid ``clamp((a x + 1) / 2, 0, 1)``.

    Args:
        x: the detector, any shape; positive at a boundary.
        slope: a.
        sample: draw each boundary with the probability that the hard sigmoid gives.

    Example:
        >>> detect_boundary(torch.tensor([-3.0, 0.4]), slope=2.0, sample=False)
        tensor([0., 1.])
    """
    probability = (slope * x + 1) / 2  # clamped by the comparison
    boundary = (torch.rand_like(x) < probability if sample else x > 0).to(x.dtype)
    # straight-through estimator: the added value is zero
    return boundary + torch.where((slope * x).abs() < 1, probability - probability.detach(), 0)


class HMLSTM(RecurrentLayer):
    """The hierarchical multiscale LSTM: every layer but the top one detects boundaries in its input.

    A layer reads the layer below if that layer has a boundary, reads the layer above if it had a boundary in the
    previous step, and otherwise copies its state; see :func:`hm_update`. The gradient of a boundary is that of a hard
    sigmoid (straight-through estimator). The slope changes outputs only if boundaries are sampled.

    With ``outputs="top"`` it can stand where an ``nn.LSTM`` stands, but its state has three parts:
    ``outputs, (h, c, *_) = net(x)``. It runs in one direction, and its argument ``layers`` is ``num_layers`` of
    ``nn.LSTM``. Give the arguments after the sizes by name: their order is another.

    Args:
        input_size: size of the input.
        hidden_size: size of the state of each layer.
        layers: number of layers, two or more.
        batch_first: inputs and outputs are (batch, steps, …) instead of (steps, batch, …).
        boundary: ``"step"``: a boundary is where the detector is above zero; ``"sample"``: in training it is drawn with
            the probability that the hard sigmoid gives.
        slope: slope a of the hard sigmoid; :class:`tying.callbacks.SlopeAnnealing` raises it.
        outputs: ``"all"``: return :class:`HMOutput`, with the hidden states of all layers and their boundaries;
            ``"top"``: return the hidden states of the top layer and the state, as ``nn.LSTM``.
        bias: whether there are biases.
        dropout: dropout probability for what a layer reads from the layer below.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape: (steps, batch, inputs) to :class:`HMOutput`, or to outputs (steps, batch, size) and :class:`HMState`; packed
    sequences and unbatched inputs are supported. A state may also be ``(h, c)``, without boundaries.

    Raises:
        ConfigurationError: ``layers`` is below 2, ``slope`` is not above 0 and finite, or ``dropout`` not in [0, 1];
            inputs, states or boundaries have another size or dtype, or no steps.

    Example:
        >>> out = HMLSTM(4, 8)(torch.zeros(5, 2, 4))
        >>> out.hidden.shape, out.boundaries.shape
        (torch.Size([5, 2, 3, 8]), torch.Size([5, 2, 2]))
        >>> outputs, (h, c, z) = HMLSTM(4, 8, outputs="top")(torch.zeros(5, 2, 4))
        >>> outputs.shape, h.shape
        (torch.Size([5, 2, 8]), torch.Size([3, 2, 8]))

    Source: J. Chung, S. Ahn and Y. Bengio, Hierarchical multiscale recurrent neural networks, 2017.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        layers: int = 3,
        batch_first: bool = False,
        boundary: Boundary = "step",
        slope: float = 1.0,
        outputs: Outputs = "all",
        bias: bool = True,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_count("layers", layers, "[2, inf)")  # all but the top one detect boundaries
        super().__init__(input_size, hidden_size, layers, bias, batch_first, dropout)
        check_choice("boundary", boundary, get_args(Boundary))
        check_range("slope", slope, "(0, inf)")
        check_choice("outputs", outputs, get_args(Outputs))
        self.boundary, self.slope, self.outputs = boundary, slope, outputs
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [4 * hidden_size + (layer < layers - 1) for layer in range(layers)]  # the last unit is the detector
        self.below = nn.ModuleList(
            nn.Linear(hidden_size if layer else input_size, width, bias=False, **factory)
            for layer, width in enumerate(widths)
        )
        self.across = nn.ModuleList(nn.Linear(hidden_size, width, bias, **factory) for width in widths)
        self.above = nn.ModuleList(nn.Linear(hidden_size, width, bias=False, **factory) for width in widths[:-1])

    @override
    def forward(
        self, input: Input, hx: Sequence[Tensor] | None = None, boundaries: Input | None = None
    ) -> HMOutput | tuple[Any, HMState]:
        """Return hidden states and boundaries, or outputs of the top layer.

        Args:
            input: the input.
            hx: the initial state; ``None`` for zeros.
            boundaries: given boundaries, (steps, batch, layers − 1), laid out as the input, to use instead of detected
                ones.
        """
        return self.run(input, hx, boundaries, self.outputs)

    def run(
        self,
        input: Input,
        hx: Sequence[Tensor] | None = None,
        boundaries: Input | None = None,
        outputs: Outputs = "all",
    ) -> HMOutput | tuple[Any, HMState]:
        """Do what ``forward`` does, with the ``outputs`` of this call instead of those of the layer."""
        x, layout = self.enter(input)
        check_dtype(self, x)
        layers, size = self.num_layers, self.hidden_size
        h, c, z = layout.enter_state(x, hx, (layers, size), (layers, size), (layers - 1, 1), optional=1)
        inputs = [self.below[0](x)]  # of all steps at once
        if boundaries is not None:
            inputs.append(layout.enter(boundaries))
            check_size("boundaries", inputs[-1], (*x.shape[:-1], layers - 1))
        step = partial(self.step, x.new_ones(1, 1), x.new_zeros(1, 1))
        record = self._record_all if outputs == "all" else self._record_top
        records, last = unroll(step, inputs, [*h, *c, *z], layout.batch_sizes, record=record)
        state = HMState(*layout.leave_state([torch.stack(parts) for parts in self._by_kind(last)]))
        left = [layout.leave(part) for part in records]
        return HMOutput(left[0], left[1], state) if outputs == "all" else (left[0], state)

    def _record_all(self, state: Sequence[Tensor]) -> list[Tensor]:
        h, _, z = self._by_kind(state)
        return [torch.stack(h, dim=1), torch.cat(z, dim=1)]

    def _record_top(self, state: Sequence[Tensor]) -> list[Tensor]:
        return [state[self.num_layers - 1]]

    def _by_kind(self, state: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the hidden states, cells and boundaries of all layers, which a state lists in this order."""
        layers = self.num_layers
        return [*state[:layers]], [*state[layers : 2 * layers]], [*state[2 * layers :]]

    def step(
        self,
        always: Tensor,
        never: Tensor,
        state: Sequence[Tensor],
        projected: Tensor,
        boundaries: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the next state.

        Args:
            always: 1, the boundary below the first layer, which reads every input.
            never: 0, the boundary of the top layer, which detects none.
            state: hidden states of all layers, their cells, and boundaries of all but the top one.
            projected: the product of the input and its weight.
            boundaries: given boundaries, (batch, layers − 1).
        """
        (h, c, z), top = self._by_kind(state), self.num_layers - 1
        for layer in range(top + 1):
            z_below = z[layer - 1] if layer else always
            z_before = z[layer] if layer < top else never
            total = self.across[layer](h[layer])
            if layer:
                total = total + z_below * self.below[layer](F.dropout(h[layer - 1], self.dropout, self.training))
            else:
                total = total + projected
            if layer < top:
                total = total + z_before * self.above[layer](h[layer + 1])
            f, i, o, g = total[:, : 4 * self.hidden_size].chunk(4, dim=1)
            gates = torch.sigmoid(f), torch.sigmoid(i), torch.sigmoid(o), torch.tanh(g)
            h[layer], c[layer] = hm_update(h[layer], c[layer], gates, z_before, z_below)
            if layer < top:
                sample = self.boundary == "sample" and self.training
                z[layer] = (
                    detect_boundary(total[:, -1:], self.slope, sample)
                    if boundaries is None
                    else boundaries[:, layer : layer + 1]
                )
        return [*h, *c, *z]

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, boundary={self.boundary!r}, slope={self.slope:g}, outputs={self.outputs!r}"

"""Hierarchical multiscale LSTMs: layers detect boundaries and copy their state between them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.rnn.sequences import check_state, steps_first
from tying.errors import ConfigurationError

Boundary = Literal["step", "sample"]


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
    """What an :class:`HMLSTM` returns.

    Attributes:
        hidden: hidden states of all layers, (steps, batch, layers, size).
        boundaries: 0 or 1, of all layers but the top one, (steps, batch, layers − 1).
        state: after the last step.
    """

    hidden: Tensor
    boundaries: Tensor
    state: HMState


def hm_update(
    h: Tensor, c: Tensor, gates: tuple[Tensor, Tensor, Tensor, Tensor], z_before: Tensor, z_below: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a layer's next hidden state and cell.

    After a boundary of its own, FLUSH: ``c = i ⊙ g``. Else, at a boundary of the layer below, UPDATE:
    ``c = f ⊙ c + i ⊙ g``. In both, ``h = o ⊙ tanh(c)``. Else COPY: both stay.

    Args:
        h: hidden state, (batch, size).
        c: cell, (batch, size).
        gates: f, i, o and g, after their nonlinearities, each (batch, size).
        z_before: whether the layer itself had a boundary one step before, 0 or 1, (batch, 1).
        z_below: whether the layer below has one in this step, likewise.

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


class _Boundary(torch.autograd.Function):
    """1 where a draw, or zero, is below; its gradient is that of the hard sigmoid ``clamp((a x + 1) / 2, 0, 1)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slope: float, sample: bool) -> Tensor:
        if sample:
            return (torch.rand_like(x) < ((slope * x + 1) / 2)).to(x.dtype)
        return (x > 0).to(x.dtype)  # where the hard sigmoid is above 1/2, at every slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.slope = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [x] = ctx.saved_tensors
        inside = (ctx.slope * x).abs() < 1
        return gradients[0] * inside * (ctx.slope / 2), None, None


class HMLSTM(nn.Module):
    """The hierarchical multiscale LSTM: each layer but the top one detects boundaries of what it reads.

    A layer takes in what is below at a boundary below, is told by the layer above after a boundary of its own, and
    copies its state otherwise; see :func:`hm_update`. The step function's gradient is that of a hard sigmoid of
    ``slope`` (straight-through), which changes no value, unless boundaries are sampled.

    Args:
        input_size: of the input.
        hidden_size: of the state of each layer.
        layers: number of layers, two or more.
        batch_first: inputs and outputs are (batch, steps, …) instead of (steps, batch, …).
        boundary: ``"step"``: there is one where its detector is above zero; ``"sample"``: in training, with the hard
            sigmoid's probability.
        slope: of the hard sigmoid, a; :class:`tying.callbacks.SlopeAnnealing` raises it.

    Shape: (steps, batch, inputs) to :class:`HMOutput`.

    Raises:
        ConfigurationError: fewer than two layers, a slope of 0 or less; inputs, states or boundaries of other shapes;
            an empty sequence.

    Example:
        >>> out = HMLSTM(4, 8)(torch.zeros(5, 2, 4))
        >>> out.hidden.shape, out.boundaries.shape
        (torch.Size([5, 2, 3, 8]), torch.Size([5, 2, 2]))

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
    ) -> None:
        super().__init__()
        if layers < 2:
            raise ConfigurationError(
                f"layers must be 2 or more, of which all but the top find boundaries, not {layers}"
            )
        if boundary not in ("step", "sample"):
            raise ConfigurationError(f"boundary is 'step' or 'sample', not {boundary!r}")
        if not 0 < slope < float("inf"):
            raise ConfigurationError(f"slope must be above 0, and finite, not {slope}")
        self.input_size = input_size
        self.hidden_size, self.batch_first, self.boundary, self.slope = hidden_size, batch_first, boundary, slope
        widths = [4 * hidden_size + (layer < layers - 1) for layer in range(layers)]  # a detector, but at the top
        self.below = nn.ModuleList(
            nn.Linear(hidden_size if layer else input_size, width, bias=False) for layer, width in enumerate(widths)
        )
        self.across = nn.ModuleList(nn.Linear(hidden_size, width) for width in widths)  # and the bias
        self.above = nn.ModuleList(nn.Linear(hidden_size, width, bias=False) for width in widths[:-1])

    @override
    def forward(self, x: Tensor, state: HMState | None = None, boundaries: Tensor | None = None) -> HMOutput:
        """Return hidden states and boundaries.

        Args:
            x: the input.
            state: to go on from.
            boundaries: given ones, in place of those that are found, (steps, batch, layers − 1).
        """
        x = steps_first(x, self.input_size, self.batch_first)
        layers, batch = len(self.across), x.shape[1]
        given = boundaries.transpose(0, 1) if boundaries is not None and self.batch_first else boundaries
        if given is not None and given.shape != (len(x), batch, layers - 1):
            raise ConfigurationError(f"boundaries are {(len(x), batch, layers - 1)}, not {tuple(given.shape)}")
        if state is None:
            zeros = x.new_zeros(layers, batch, self.hidden_size)
            state = HMState(zeros, zeros, x.new_zeros(layers - 1, batch, 1))
        check_state(state, ((layers, batch, self.hidden_size),) * 2 + ((layers - 1, batch, 1),))
        h, c, z = ([*part] for part in state)
        hidden, found = [], []
        always = x.new_ones(batch, 1)
        for t, into in enumerate(self.below[0](x)):  # of all steps at once
            for layer in range(layers):
                z_below = z[layer - 1] if layer else always
                total = self.across[layer](h[layer]) + (z_below * self.below[layer](h[layer - 1]) if layer else into)
                z_before = torch.zeros_like(always)
                if layer < layers - 1:
                    z_before = z[layer]
                    total = total + z_before * self.above[layer](h[layer + 1])
                f, i, o, g = total[:, : 4 * self.hidden_size].chunk(4, dim=1)
                gates = torch.sigmoid(f), torch.sigmoid(i), torch.sigmoid(o), torch.tanh(g)
                h[layer], c[layer] = hm_update(h[layer], c[layer], gates, z_before, z_below)
                if layer < layers - 1:
                    z[layer] = self._found(total[:, -1:]) if given is None else given[t, :, layer : layer + 1]
            hidden.append(torch.stack(h, dim=1))
            found.append(torch.cat(z, dim=1))
        outputs, marks = torch.stack(hidden), torch.stack(found)
        if self.batch_first:
            outputs, marks = outputs.transpose(0, 1), marks.transpose(0, 1)
        return HMOutput(outputs, marks, HMState(torch.stack(h), torch.stack(c), torch.stack(z)))

    def _found(self, x: Tensor) -> Tensor:
        sample = self.boundary == "sample" and self.training
        return cast(Tensor, _Boundary.apply(x, self.slope, sample))

    @override
    def extra_repr(self) -> str:
        return f"boundary={self.boundary!r}, slope={self.slope:g}"

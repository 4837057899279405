"""Hierarchical multiscale LSTMs: layers detect boundaries, and copy their state between boundaries."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.rnn.sequences import check_shapes, initial_state, steps_first
from tying.depth.tracing import LeafModule
from tying.errors import check_choice, check_count, check_counts, check_range

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
    """The output of an :class:`HMLSTM`.

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


class HMLSTM(LeafModule):
    """The hierarchical multiscale LSTM: every layer but the top one detects boundaries in its input.

    A layer reads the layer below if that layer has a boundary, reads the layer above if it had a boundary in the
    previous step, and otherwise copies its state; see :func:`hm_update`. The gradient of a boundary is that of a hard
    sigmoid (straight-through estimator). The slope changes outputs only if boundaries are sampled.

    Args:
        input_size: size of the input.
        hidden_size: size of the state of each layer.
        layers: number of layers, two or more.
        batch_first: inputs and outputs are (batch, steps, …) instead of (steps, batch, …).
        boundary: ``"step"``: a boundary is where the detector is above zero; ``"sample"``: in training it is drawn with
            the probability that the hard sigmoid gives.
        slope: slope a of the hard sigmoid; :class:`tying.callbacks.SlopeAnnealing` raises it.

    Shape: (steps, batch, inputs) to :class:`HMOutput`.

    Raises:
        ConfigurationError: ``layers`` is below 2, or ``slope`` is not above 0 and finite; inputs, states or boundaries
            have other shapes, or no steps.

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
        check_counts(input_size=input_size, hidden_size=hidden_size)
        check_count("layers", layers, "[2, inf)")  # all but the top one detect boundaries
        check_choice("boundary", boundary, get_args(Boundary))
        check_range("slope", slope, "(0, inf)")
        self.input_size = input_size
        self.hidden_size, self.batch_first, self.boundary, self.slope = hidden_size, batch_first, boundary, slope
        widths = [4 * hidden_size + (layer < layers - 1) for layer in range(layers)]  # the last unit is the detector
        self.below = nn.ModuleList(
            nn.Linear(hidden_size if layer else input_size, width, bias=False) for layer, width in enumerate(widths)
        )
        self.across = nn.ModuleList(nn.Linear(hidden_size, width) for width in widths)  # with the bias of the gates
        self.above = nn.ModuleList(nn.Linear(hidden_size, width, bias=False) for width in widths[:-1])

    @override
    def forward(self, x: Tensor, state: HMState | None = None, boundaries: Tensor | None = None) -> HMOutput:
        """Return hidden states and boundaries.

        Args:
            x: the input.
            state: the initial state; ``None`` for zeros.
            boundaries: given boundaries, (steps, batch, layers − 1), to use instead of detected ones.
        """
        x = steps_first(x, self.input_size, self.batch_first)
        layers, batch = len(self.across), x.shape[1]
        if boundaries is not None:
            boundaries = boundaries.transpose(0, 1) if self.batch_first else boundaries
            check_shapes("boundaries", [boundaries], (len(x), batch, layers - 1))
        shape = (layers, batch, self.hidden_size)
        h, c, z = ([*part] for part in initial_state(x, state, shape, shape, (layers - 1, batch, 1)))
        hidden, marks = [], []
        always, never = x.new_ones(batch, 1), x.new_zeros(batch, 1)
        sample = self.boundary == "sample" and self.training
        for t, projected in enumerate(self.below[0](x)):  # the inputs of all steps at once
            for layer in range(layers):
                z_below = z[layer - 1] if layer else always
                z_before = z[layer] if layer < layers - 1 else never
                total = self.across[layer](h[layer])
                total = total + (z_below * self.below[layer](h[layer - 1]) if layer else projected)
                if layer < layers - 1:
                    total = total + z_before * self.above[layer](h[layer + 1])
                f, i, o, g = total[:, : 4 * self.hidden_size].chunk(4, dim=1)
                gates = torch.sigmoid(f), torch.sigmoid(i), torch.sigmoid(o), torch.tanh(g)
                h[layer], c[layer] = hm_update(h[layer], c[layer], gates, z_before, z_below)
                if layer < layers - 1:
                    z[layer] = (
                        detect_boundary(total[:, -1:], self.slope, sample)
                        if boundaries is None
                        else boundaries[t, :, layer : layer + 1]
                    )
            hidden.append(torch.stack(h, dim=1))
            marks.append(torch.cat(z, dim=1))
        dim = 1 if self.batch_first else 0
        state = HMState(torch.stack(h), torch.stack(c), torch.stack(z))
        return HMOutput(torch.stack(hidden, dim), torch.stack(marks, dim), state)

    @override
    def extra_repr(self) -> str:
        return f"boundary={self.boundary!r}, slope={self.slope:g}"

"""HyperLSTM: a small LSTM rescales the weights of a large LSTM at each step."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.depth.rnn.sequences import initial_state, steps_first
from tying.depth.tracing import LeafModule
from tying.errors import ConfigurationError, check_counts


class HyperState(NamedTuple):
    """The state of a :class:`HyperLSTM`, or, without the first dimension, of a :class:`HyperLSTMCell`.

    Attributes:
        h: hidden states, (layers, batch, size).
        c: cells, (layers, batch, size).
        hyper_h: hidden states of the small LSTMs, (layers, batch, hyper size).
        hyper_c: cells of the small LSTMs, (layers, batch, hyper size).
    """

    h: Tensor
    c: Tensor
    hyper_h: Tensor
    hyper_c: Tensor


def _lstm(gates: tuple[Tensor, ...], c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next hidden state and cell of an LSTM from its gates i, f, g and o, before their nonlinearities."""
    i, f, g, o = gates
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class _ScaleEmbedding(nn.Linear):
    """The linear map to the embeddings of scales; initially 1 for every input."""

    @override
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)


class _ShiftEmbedding(nn.Linear):
    """The linear map to the embeddings of shifts; initially near 0."""

    @override
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)


class HyperLSTMCell(LeafModule, nn.LSTMCell):
    """An LSTM cell whose weights a small LSTM, ``hyper``, rescales row by row at each step.

    ``hyper`` reads ``(h_{t−1}, x_t)``. Its hidden state ``ĥ_t`` gives each gate y of i, f, g and o separate embeddings
    z, and ``y = d_h(z_h) ⊙ W_h h_{t−1} + d_x(z_x) ⊙ W_x x_t + b(z_b) + b₀``: the weight is ``W(z) = diag(d(z)) W``,
    which is never materialised. Initially the scales d are 1 and the shifts b(z) are 0, so that the cell starts as a
    plain LSTM. Its weights have the names of ``nn.LSTMCell``. (The authors start from 0.1, under layer
    normalisation.)

    Args:
        input_size: size of the input.
        hidden_size: size of the state.
        hyper_size: size of the state of the small LSTM.
        embedding_size: size of each z.
        bias: whether to add b₀.

    Shape: inputs (batch, inputs) and an optional state to :class:`HyperState`.

    Raises:
        ConfigurationError: a size is below 1, or an input or state has another shape.

    Example:
        >>> state = HyperLSTMCell(4, 8, hyper_size=3, embedding_size=2)(torch.zeros(5, 4))
        >>> state.h.shape, state.hyper_h.shape
        (torch.Size([5, 8]), torch.Size([5, 3]))

    Source: D. Ha, A. Dai and Q. V. Le, HyperNetworks, 2017.
    """

    def __init__(
        self, input_size: int, hidden_size: int, hyper_size: int, embedding_size: int, bias: bool = True
    ) -> None:
        check_counts(hidden_size=hidden_size, hyper_size=hyper_size, embedding_size=embedding_size)
        super().__init__(input_size, hidden_size, bias)
        self.hyper = nn.LSTMCell(input_size + hidden_size, hyper_size)
        self.scale_embedding = _ScaleEmbedding(hyper_size, 8 * embedding_size)  # z_h of four gates, then z_x
        self.shift_embedding = _ShiftEmbedding(hyper_size, 4 * embedding_size, bias=False)  # z_b
        self.scale = nn.Parameter(torch.empty(8, embedding_size, hidden_size))
        self.shift = nn.Parameter(torch.empty(4, embedding_size, hidden_size))
        self.reset_parameters()

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not hasattr(self, "shift"):  # called by the constructor of nn.LSTMCell
            return
        self.hyper.reset_parameters()
        self.scale_embedding.reset_parameters()
        mean = 1 / self.scale.shape[1]  # random with a fixed mean: embeddings with equal scales would stay equal
        nn.init.normal_(self.scale, std=mean)
        with torch.no_grad():
            self.scale.add_(mean - self.scale.mean(dim=1, keepdim=True))
        self.shift_embedding.reset_parameters()
        nn.init.zeros_(self.shift)

    @override
    def forward(self, input: Tensor, hx: tuple[Tensor, ...] | None = None) -> HyperState:  # type: ignore[override]
        if input.ndim != 2 or input.shape[1] != self.input_size:
            raise ConfigurationError(f"inputs are (batch, {self.input_size}), not {tuple(input.shape)}")
        return self.run(input.unsqueeze(0), self.initial_state(input, hx, input.shape[0]))[1]

    def initial_state(self, x: Tensor, hx: Sequence[Tensor] | None, *leading: int) -> list[Tensor]:
        """Check the shapes of a state and return its parts, or zeros for None; shapes begin with ``leading``."""
        large, small = (*leading, self.hidden_size), (*leading, self.hyper.hidden_size)
        return initial_state(x, hx, large, large, small, small)

    def run(self, x: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, HyperState]:
        """Return the hidden states of all steps of (steps, batch, inputs), and the last state."""
        h, c, hyper_h, hyper_c = state
        hidden = self.hidden_size
        biases = self.bias_ih + self.bias_hh if self.bias else None
        # the parts that depend on inputs alone, for all steps at once
        from_x = self._by_gate(F.linear(x, self.weight_ih)).unbind(1)
        to_hyper = F.linear(x, self.hyper.weight_ih[:, hidden:], self.hyper.bias_ih + self.hyper.bias_hh)
        across = torch.cat((self.hyper.weight_ih[:, :hidden], self.hyper.weight_hh), dim=1)
        outputs = []
        for projected, small in zip(from_x, to_hyper, strict=True):
            gates = small + F.linear(torch.cat((h, hyper_h), dim=1), across)
            hyper_h, hyper_c = _lstm(gates.chunk(4, dim=1), hyper_c)
            scales = self._by_embedding(self.scale_embedding(hyper_h), self.scale)
            shifts = self._by_embedding(self.shift_embedding(hyper_h), self.shift)
            total = torch.addcmul(shifts, scales[:4], self._by_gate(F.linear(h, self.weight_hh)))
            total = torch.addcmul(total, scales[4:], projected)
            if biases is not None:
                total = total + biases.view(4, 1, hidden)
            h, c = _lstm(total.unbind(0), c)
            outputs.append(h)
        return torch.stack(outputs), HyperState(h, c, hyper_h, hyper_c)

    def _by_gate(self, x: Tensor) -> Tensor:
        """Reshape (…, batch, 4 · size) to (4, …, batch, size)."""
        return x.view(*x.shape[:-1], 4, self.hidden_size).movedim(-2, 0)

    @staticmethod
    def _by_embedding(z: Tensor, weight: Tensor) -> Tensor:
        """Multiply embeddings (batch, k · embedding) by weights (k, embedding, size) to (k, batch, size)."""
        return torch.bmm(z.view(z.shape[0], *weight.shape[:2]).transpose(0, 1), weight)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hyper_size={self.hyper.hidden_size}, embedding_size={self.scale.shape[1]}"


class HyperLSTM(LeafModule):
    """Layers of :class:`HyperLSTMCell` over sequences.

    Args:
        input_size: size of the input.
        hidden_size: size of the state.
        hyper_size: size of the state of each layer's small LSTM.
        embedding_size: size of the embeddings z.
        num_layers: number of layers; each reads the outputs of the layer below.
        bias: whether to add b₀.
        batch_first: inputs and outputs are (batch, steps, …) instead of (steps, batch, …).

    Shape: inputs (steps, batch, inputs) and an optional :class:`HyperState` to outputs (steps, batch, size) and the
    last state.

    Raises:
        ConfigurationError: see :class:`HyperLSTMCell`; ``num_layers`` is below 1, or a sequence is empty.

    Example:
        >>> outputs, state = HyperLSTM(4, 8, hyper_size=3, embedding_size=2)(torch.zeros(5, 2, 4))
        >>> outputs.shape, state.hyper_h.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 3]))

    Source: D. Ha, A. Dai and Q. V. Le, HyperNetworks, 2017.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        hyper_size: int = 32,
        embedding_size: int = 4,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        check_counts(num_layers=num_layers)
        self.input_size, self.batch_first = input_size, batch_first
        self.layers = nn.ModuleList(
            HyperLSTMCell(hidden_size if layer else input_size, hidden_size, hyper_size, embedding_size, bias)
            for layer in range(num_layers)
        )

    @override
    def forward(self, x: Tensor, hx: tuple[Tensor, ...] | None = None) -> tuple[Tensor, HyperState]:
        x = steps_first(x, self.input_size, self.batch_first)
        cells = cast(list[HyperLSTMCell], [*self.layers])
        states = cells[0].initial_state(x, hx, len(cells), x.shape[1])
        last = []
        for cell, *state in zip(cells, *states, strict=True):
            x, end = cell.run(x, state)
            last.append(end)
        end = HyperState(*(torch.stack(parts) for parts in zip(*last, strict=True)))
        return x.transpose(0, 1) if self.batch_first else x, end

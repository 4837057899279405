"""HyperLSTM: a small LSTM rescales the weights of a large LSTM at each step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.depth.rnn.sequences import Input, RecurrentLayer, Step, check_cell_input, check_dtype, initial_state, unroll
from tying.depth.tracing import LeafModule
from tying.errors import check_counts


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


def _lstm_update(gates: tuple[Tensor, ...], c: Tensor) -> tuple[Tensor, Tensor]:
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

    Hooks of ``hyper`` do not run, as its products are computed for all steps at once: parametrizations of its weights
    work, but ``torch.nn.utils.prune`` does not.

    Args:
        input_size: size of the input.
        hidden_size: size of the state.
        hyper_size: size of the state of the small LSTM.
        embedding_size: size of each z.
        bias: whether to add b₀.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape: inputs (batch, inputs) or (inputs,) and an optional state to :class:`HyperState`. A state may also be
    ``(h, c)``, with zeros for the small LSTM.

    Raises:
        ConfigurationError: a size is below 1, or an input or state has another size.

    Example:
        >>> state = HyperLSTMCell(4, 8, hyper_size=3, embedding_size=2)(torch.zeros(5, 4))
        >>> state.h.shape, state.hyper_h.shape
        (torch.Size([5, 8]), torch.Size([5, 3]))

    Source: D. Ha, A. Dai and Q. V. Le, HyperNetworks, 2017.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        hyper_size: int,
        embedding_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_counts(hidden_size=hidden_size, hyper_size=hyper_size, embedding_size=embedding_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(input_size, hidden_size, bias, **factory)
        self.hyper = nn.LSTMCell(input_size + hidden_size, hyper_size, **factory)
        self.scale_embedding = _ScaleEmbedding(hyper_size, 8 * embedding_size, **factory)  # z_h of four gates, then z_x
        self.shift_embedding = _ShiftEmbedding(hyper_size, 4 * embedding_size, bias=False, **factory)  # z_b
        self.scale = nn.Parameter(torch.empty(8, embedding_size, hidden_size, **factory))
        self.shift = nn.Parameter(torch.empty(4, embedding_size, hidden_size, **factory))
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

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Size of each part of the state."""
        return (self.hidden_size,) * 2 + (self.hyper.hidden_size,) * 2

    @override
    def forward(self, input: Tensor, hx: Sequence[Tensor] | None = None) -> HyperState:  # type: ignore[override]
        check_cell_input(self, input)
        state = initial_state(input, hx, *((*input.shape[:-1], size) for size in self.sizes), optional=2)
        rows = [part.reshape(-1, size) for part, size in zip(state, self.sizes, strict=True)]
        last = self.step_function()(rows, *self.project(input.reshape(-1, self.input_size)))
        return HyperState(*(part.view(*input.shape[:-1], -1) for part in last))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what depends on inputs alone, for all steps at once: parts of the gates, and of those of ``hyper``."""
        hyper = self.hyper
        to_hyper = F.linear(x, hyper.weight_ih[:, self.hidden_size :], hyper.bias_ih + hyper.bias_hh)
        return F.linear(x, self.weight_ih), to_hyper

    def step_function(self) -> Step:
        """Return the function from a state and the parts that depend on inputs to the next state."""
        biases = (self.bias_ih + self.bias_hh).view(4, 1, self.hidden_size) if self.bias else None
        across = torch.cat((self.hyper.weight_ih[:, : self.hidden_size], self.hyper.weight_hh), dim=1)

        def step(state: Sequence[Tensor], from_x: Tensor, to_hyper: Tensor) -> HyperState:
            h, c, hyper_h, hyper_c = state
            gates = to_hyper + F.linear(torch.cat((h, hyper_h), dim=1), across)
            hyper_h, hyper_c = _lstm_update(gates.chunk(4, dim=1), hyper_c)
            scales = self._by_embedding(self.scale_embedding(hyper_h), self.scale)
            shifts = self._by_embedding(self.shift_embedding(hyper_h), self.shift)
            total = torch.addcmul(shifts, scales[:4], self._by_gate(F.linear(h, self.weight_hh)))
            total = torch.addcmul(total, scales[4:], self._by_gate(from_x))
            if biases is not None:
                total = total + biases
            return HyperState(*_lstm_update(total.unbind(0), c), hyper_h, hyper_c)

        return step

    def _by_gate(self, x: Tensor) -> Tensor:
        """Reshape (batch, 4 · size) to (4, batch, size)."""
        return x.view(-1, 4, self.hidden_size).transpose(0, 1)

    @staticmethod
    def _by_embedding(z: Tensor, weight: Tensor) -> Tensor:
        """Multiply embeddings (batch, k · embedding) by weights (k, embedding, size) to (k, batch, size)."""
        return torch.bmm(z.view(z.shape[0], *weight.shape[:2]).transpose(0, 1), weight)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hyper_size={self.hyper.hidden_size}, embedding_size={self.scale.shape[1]}"


class HyperLSTMLayer(HyperLSTMCell):
    """One layer and direction of :class:`HyperLSTM`: a :class:`HyperLSTMCell` that runs over sequences.

    Shape: inputs (steps, batch, inputs) and state to outputs (steps, batch, size) and last state.
    """

    @override
    def forward(  # type: ignore[override]  # sequences
        self, x: Tensor, state: Sequence[Tensor], batch_sizes: list[int] | None = None, reverse: bool = False
    ) -> tuple[Tensor, Sequence[Tensor]]:
        check_dtype(self, x)
        [outputs], last = unroll(self.step_function(), self.project(x), state, batch_sizes, reverse)
        return outputs, last


class HyperLSTM(RecurrentLayer):
    """Layers of :class:`HyperLSTMCell` over sequences.

    It can stand where an ``nn.LSTM`` stands, but its state has four parts: ``outputs, (h, c, *_) = net(x)``. Give the
    arguments after the sizes by name: their order is another.

    Args:
        input_size: size of the input.
        hidden_size: size of the state.
        hyper_size: size of the state of each layer's small LSTM.
        embedding_size: size of the embeddings z.
        num_layers: number of layers; each reads the outputs of the layer below.
        bias: whether to add b₀.
        batch_first: inputs and outputs are (batch, steps, …) instead of (steps, batch, …).
        dropout: dropout probability for the outputs of all layers but the last.
        bidirectional: whether each layer also runs from the last step to the first, with weights of its own.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape: see ``nn.LSTM``: inputs (steps, batch, inputs) and an optional :class:`HyperState` or ``(h, c)`` to outputs
    (steps, batch, size) and the last :class:`HyperState`; packed sequences and unbatched inputs are supported.

    Raises:
        ConfigurationError: see :class:`HyperLSTMCell`; ``num_layers`` is below 1, or ``dropout`` not in [0, 1]; an
            input or state has another size or dtype, or no steps.

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
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        self.layers = nn.ModuleList(
            HyperLSTMLayer(inputs, hidden_size, hyper_size, embedding_size, bias, device, dtype)
            for inputs in self.layer_input_sizes()
        )

    @override
    def forward(self, input: Input, hx: Sequence[Tensor] | None = None) -> tuple[Any, HyperState]:
        x, layout = self.enter(input)
        layers: list[Any] = [*self.layers]
        states = layout.enter_state(x, hx, *((len(layers), size) for size in layers[0].sizes), optional=2)
        outputs, states = self.run_layers(layers, x, states, layout.batch_sizes)
        return layout.leave(outputs), HyperState(*layout.leave_state(states))

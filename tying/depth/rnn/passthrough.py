"""Passthrough networks: large recurrent states with low-rank transition matrices."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]  # which torch does not list
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from tying.depth.rnn.sequences import Input, RecurrentLayer, check_dtype, unroll
from tying.errors import ConfigurationError, check_count, check_counts
from tying.hard.low_rank import low_rank, low_rank_plus_diagonal


class StateMatrix(nn.Module):
    """The map ``h ↦ h Wᵀ`` with ``W = P Q + diag(s)``, computed from its factors.

    P and Q are initialised by Glorot's uniform distribution, s uniformly in [−0.01, 0.01].

    Args:
        size: n, size of the state.
        rank: d, rank of P Q; 0 for the diagonal alone.
        diagonal: whether to add diag(s).
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape: (..., n) to (..., n).

    Raises:
        ConfigurationError: the size is below 1, the rank is negative or above the size, or it is 0 without a diagonal.

    Example:
        >>> sum(p.numel() for p in StateMatrix(size=128, rank=24).parameters())
        6272
    """

    def __init__(self, size: int, rank: int, diagonal: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_counts(size=size)
        check_count("rank", rank, "[0, inf)" if diagonal else "[1, inf)")
        if rank > size:
            raise ConfigurationError(
                f"rank={rank} is over the size {size}: its factors would have {2 * size * rank:,} entries, and a full "
                f"matrix has {size * size:,}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.left = nn.Parameter(torch.empty(size, rank, **factory))  # P
        self.right = nn.Parameter(torch.empty(rank, size, **factory))  # Q
        self.diagonal = nn.Parameter(torch.empty(size, **factory)) if diagonal else None  # s
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw P, Q and s."""
        if self.left.numel():
            nn.init.xavier_uniform_(self.left)
            nn.init.xavier_uniform_(self.right)
        if self.diagonal is not None:
            nn.init.uniform_(self.diagonal, -0.01, 0.01)

    @property
    def weight(self) -> Tensor:
        """The matrix W."""
        return (
            low_rank(self.left, self.right)
            if self.diagonal is None
            else low_rank_plus_diagonal(self.left, self.right, self.diagonal)
        )

    @override
    def forward(self, h: Tensor) -> Tensor:
        product = h @ self.right.t() @ self.left.t()
        return product if self.diagonal is None else torch.addcmul(product, h, self.diagonal.to(product.dtype))

    @override
    def extra_repr(self) -> str:
        size, rank = self.left.shape
        return f"size={size}, rank={rank}, diagonal={self.diagonal is not None}"


class _GateInput(nn.Linear):
    """The linear map from an input to the gates u, r and m of a :class:`PassthroughGRULayer`."""

    def __init__(self, inputs: int, size: int, update_bias: float, bias: bool, **factory: Any) -> None:
        self.update_bias = update_bias
        super().__init__(inputs, 3 * size, bias, **factory)

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in self.weight.detach().chunk(3):
            nn.init.xavier_uniform_(weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
            nn.init.constant_(self.bias.detach().chunk(3)[0], self.update_bias)


class PassthroughGRULayer(nn.Module):
    """One layer and direction of :class:`PassthroughGRU`.

    Args:
        inputs: size of the input.
        size: n, size of the state.
        rank: d, rank of the square matrices.
        diagonal: whether the square matrices have a diagonal.
        shared_projection: whether the three square matrices share Q.
        update_bias: initial bias of u.
        bias: whether there are biases.
        factory: ``device`` and ``dtype`` of the parameters.

    Shape: inputs (steps, batch, inputs) and state [(batch, n)], to outputs (steps, batch, n) and last state.
    """

    def __init__(
        self,
        inputs: int,
        size: int,
        rank: int,
        diagonal: bool,
        shared_projection: bool,
        update_bias: float,
        bias: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.input = _GateInput(inputs, size, update_bias, bias, **factory)
        self.update, self.reset, self.candidate = (StateMatrix(size, rank, diagonal, **factory) for _ in range(3))
        if shared_projection:
            self.reset.right = self.candidate.right = self.update.right

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in (self.input, self.update, self.reset, self.candidate):
            module.reset_parameters()

    def step(self, state: Sequence[Tensor], projected: Tensor) -> list[Tensor]:
        """Return the next state from the inputs of the gates, (batch, 3 n)."""
        [h] = state
        u, r, m = projected.chunk(3, dim=1)
        u = torch.sigmoid(u + self.update(h))
        r = torch.sigmoid(r + self.reset(h))
        m = torch.tanh(m + self.candidate(h * r))
        return [torch.lerp(m, h, u)]

    @override
    def forward(
        self, x: Tensor, state: Sequence[Tensor], batch_sizes: list[int] | None = None, reverse: bool = False
    ) -> tuple[Tensor, Sequence[Tensor]]:
        check_dtype(self, x)
        projected = self.input(x)  # of all steps at once
        state = [part.to(projected.dtype) for part in state]  # autocast may have lowered the precision
        [outputs], last = unroll(self.step, [projected], state, batch_sizes, reverse)
        return outputs, last


class PassthroughGRU(RecurrentLayer):
    """A gated recurrent unit with square matrices of low rank, optionally plus a diagonal.

    ``u = σ(W_u x + U_u h + b_u)``, ``r = σ(W_r x + U_r h + b_r)``, ``m = tanh(W_m x + U_m (h ⊙ r) + b_m)`` and
    ``h' = (1 − u) ⊙ m + u ⊙ h``; each U is a :class:`StateMatrix`. (``nn.GRU`` instead resets after the product.)
    It can stand where an ``nn.GRU`` stands; its parameters have other names. Give the arguments after the sizes by
    name: their order is another.

    Args:
        input_size: size of the input.
        hidden_size: n, size of the state.
        rank: d, rank of the square matrices; 0 for their diagonals alone.
        diagonal: whether the square matrices have a diagonal.
        num_layers: number of layers; each reads the outputs of the layer below.
        batch_first: inputs and outputs are (batch, steps, …) instead of (steps, batch, …).
        shared_projection: whether the three square matrices of a layer share Q.
        update_bias: initial bias of u; above 0, the layer initially keeps most of its state.
        bias: whether there are biases b.
        dropout: dropout probability for the outputs of all layers but the last.
        bidirectional: whether each layer also runs from the last step to the first, with matrices of its own.
        device: device of the parameters.
        dtype: dtype of the parameters.
        learned_state: learn the state from which a call without a state starts, ``initial_state``, (layers, n) and
            initially zeros.

    Shape: see ``nn.GRU``: inputs (steps, batch, inputs) and optional states (layers, batch, n) to outputs
    (steps, batch, n) and states; packed sequences and unbatched inputs are supported.

    Raises:
        ConfigurationError: see :class:`StateMatrix`; ``num_layers`` is below 1, or ``dropout`` not in [0, 1]; an input
            or state has another size or dtype, or no steps.

    Example:
        >>> outputs, state = PassthroughGRU(1, 128, rank=24)(torch.zeros(5, 2, 1))
        >>> outputs.shape, state.shape
        (torch.Size([5, 2, 128]), torch.Size([1, 2, 128]))

    Source: A. V. Miceli Barone, Low-rank passthrough neural networks, 2016.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        rank: int,
        diagonal: bool = True,
        num_layers: int = 1,
        batch_first: bool = False,
        shared_projection: bool = False,
        update_bias: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        learned_state: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            PassthroughGRULayer(inputs, hidden_size, rank, diagonal, shared_projection, update_bias, **options)
            for inputs in self.layer_input_sizes()
        )
        state = torch.zeros(len(self.layers), hidden_size, device=device, dtype=dtype) if learned_state else None
        self.initial_state = None if state is None else nn.Parameter(state)

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.initial_state is not None:
            nn.init.zeros_(self.initial_state)

    @override
    def forward(self, input: Input, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        x, layout = self.enter(input)
        states = layout.enter_state(x, hx, (len(self.layers), self.hidden_size))
        if hx is None and self.initial_state is not None:
            states = [self.initial_state.unsqueeze(1).expand_as(states[0])]
        outputs, states = self.run_layers(self.layers, x, states, layout.batch_sizes)
        [h] = layout.leave_state(states)
        return layout.leave(outputs), h

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learned_state=True" if self.initial_state is not None else super().extra_repr()


class PassthroughHighway(nn.Module):
    """A highway block of low rank: ``y = f(x) ⊙ τ(x) + x ⊙ (1 − τ(x))``, ``f = tanh(W x + b)``, ``τ = σ(U x + c)``.

    It is feed-forward: it has no state, and applied to a sequence, padded or packed, it treats each step alone. It
    therefore has none of the attributes of ``nn.GRU``.

    Args:
        size: n, size of the input.
        rank: d, rank of W and U, each a :class:`StateMatrix`.
        diagonal: whether W and U have a diagonal.
        carry_bias: initial value of −c; above 0, the output is initially mostly the input.
        bias: whether there are biases b and c.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape: (..., n) to (..., n); packed sequences are supported, except by ``torch.jit.script``.

    Raises:
        ConfigurationError: see :class:`StateMatrix`; an input has another size or dtype.

    Example:
        >>> PassthroughHighway(64, rank=4)(torch.zeros(2, 64)).shape
        torch.Size([2, 64])

    Source: A. V. Miceli Barone, Low-rank passthrough neural networks, 2016.
    """

    def __init__(
        self,
        size: int,
        rank: int,
        diagonal: bool = True,
        carry_bias: float = 1.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.transform, self.gate = (StateMatrix(size, rank, diagonal, **factory) for _ in range(2))
        self.transform_bias, self.gate_bias = (
            nn.Parameter(torch.empty(size, **factory)) if bias else None for _ in range(2)
        )
        self.size, self.carry_bias = size, carry_bias
        self._reset_biases()  # W and U are drawn already

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.transform.reset_parameters()
        self.gate.reset_parameters()
        self._reset_biases()

    def _reset_biases(self) -> None:
        if self.transform_bias is not None and self.gate_bias is not None:
            nn.init.zeros_(self.transform_bias)
            nn.init.constant_(self.gate_bias, -self.carry_bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not is_scripting():
            if _is_packed(x):
                return _map_packed(self.forward, x)
            _check_input(self, x)
        f = torch.tanh(_biased(self.transform(x), self.transform_bias))
        return x + (f - x) * torch.sigmoid(_biased(self.gate(x), self.gate_bias))  # lerp does not promote types


def _is_packed(x: object) -> bool:
    return isinstance(x, PackedSequence)


def _map_packed(function: Callable[[Tensor], Tensor], packed: Any) -> Tensor:
    """Return packed sequences of what a function returns for all their steps."""
    return PackedSequence(function(packed.data), *packed[1:])  # type: ignore[return-value]  # for torch.jit.script


def _check_input(block: PassthroughHighway, x: object) -> None:
    """Raise a ConfigurationError unless an input is (..., size) and has the block's dtype."""
    if not isinstance(x, Tensor):  # a proxy of torch.fx
        return
    if x.shape[-1:] != (block.size,):
        raise ConfigurationError(f"Expected input size (..., {block.size}), got {tuple(x.shape)}")
    check_dtype(block, x)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias

"""Passthrough networks: large recurrent states with low-rank transition matrices."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.rnn.sequences import initial_state, steps_first
from tying.depth.tracing import LeafModule
from tying.errors import ConfigurationError, check_count, check_counts
from tying.hard.low_rank import low_rank, low_rank_plus_diagonal


class StateMatrix(nn.Module):
    """The map ``h ↦ h Wᵀ`` with ``W = P Q + diag(s)``, computed from its factors.

    P and Q are initialised by Glorot's uniform distribution, s uniformly in [−0.01, 0.01].

    Args:
        size: n, size of the state.
        rank: d, rank of P Q; 0 for the diagonal alone.
        diagonal: whether to add diag(s).

    Shape: (..., n) to (..., n).

    Raises:
        ConfigurationError: the rank is negative or above the size, or it is 0 without a diagonal.

    Example:
        >>> sum(p.numel() for p in StateMatrix(size=128, rank=24).parameters())
        6272
    """

    def __init__(self, size: int, rank: int, diagonal: bool = True) -> None:
        super().__init__()
        check_count("rank", rank, "[0, inf)" if diagonal else "[1, inf)")
        if rank > size:
            raise ConfigurationError(
                f"rank={rank} is over the size {size}: its factors would have {2 * size * rank:,} entries, and a full "
                f"matrix has {size * size:,}"
            )
        self.left = nn.Parameter(torch.empty(size, rank))  # P
        self.right = nn.Parameter(torch.empty(rank, size))  # Q
        self.diagonal = nn.Parameter(torch.empty(size)) if diagonal else None  # s
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

    def __init__(self, inputs: int, size: int, update_bias: float) -> None:
        self.update_bias = update_bias
        super().__init__(inputs, 3 * size)

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in self.weight.detach().chunk(3):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.bias.detach().chunk(3)[0], self.update_bias)


class PassthroughGRULayer(nn.Module):
    """One layer of :class:`PassthroughGRU`.

    Args:
        inputs: size of the input.
        size: n, size of the state.
        rank: d, rank of the square matrices.
        diagonal: whether the square matrices have a diagonal.
        shared_projection: whether the three square matrices share Q.
        update_bias: initial bias of u.

    Shape: inputs (steps, batch, inputs) and state (batch, n), to outputs (steps, batch, n).
    """

    def __init__(
        self, inputs: int, size: int, rank: int, diagonal: bool, shared_projection: bool, update_bias: float
    ) -> None:
        super().__init__()
        self.input = _GateInput(inputs, size, update_bias)
        self.update, self.reset, self.candidate = (StateMatrix(size, rank, diagonal) for _ in range(3))
        if shared_projection:
            self.reset.right = self.candidate.right = self.update.right

    @override
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        outputs = []
        projected = self.input(x)  # of all steps at once
        h = h.to(projected.dtype)  # autocast may have lowered the precision
        for u, r, m in (step.chunk(3, dim=1) for step in projected):
            u = torch.sigmoid(u + self.update(h))
            r = torch.sigmoid(r + self.reset(h))
            m = torch.tanh(m + self.candidate(h * r))
            h = torch.lerp(m, h, u)
            outputs.append(h)
        return torch.stack(outputs)


class PassthroughGRU(LeafModule):
    """A gated recurrent unit with square matrices of low rank, optionally plus a diagonal.

    ``u = σ(W_u x + U_u h + b_u)``, ``r = σ(W_r x + U_r h + b_r)``, ``m = tanh(W_m x + U_m (h ⊙ r) + b_m)`` and
    ``h' = (1 − u) ⊙ m + u ⊙ h``; each U is a :class:`StateMatrix`. (``nn.GRU`` instead resets after the product.)

    Args:
        input_size: size of the input.
        hidden_size: n, size of the state.
        rank: d, rank of the square matrices; 0 for their diagonals alone.
        diagonal: whether the square matrices have a diagonal.
        num_layers: number of layers; each reads the outputs of the layer below.
        batch_first: inputs and outputs are (batch, steps, …) instead of (steps, batch, …).
        shared_projection: whether the three square matrices of a layer share Q.
        update_bias: initial bias of u; above 0, the layer initially keeps most of its state.

    Shape: inputs (steps, batch, inputs) and optional states (layers, batch, n) to outputs (steps, batch, n) and states.

    Raises:
        ConfigurationError: see :class:`StateMatrix`; ``num_layers`` is below 1; an input or state has another shape, or
            no steps.

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
    ) -> None:
        super().__init__()
        check_counts(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        self.input_size, self.hidden_size, self.batch_first = input_size, hidden_size, batch_first
        self.layers = nn.ModuleList(
            PassthroughGRULayer(
                hidden_size if layer else input_size, hidden_size, rank, diagonal, shared_projection, update_bias
            )
            for layer in range(num_layers)
        )

    @override
    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = steps_first(x, self.input_size, self.batch_first)
        shape = (len(self.layers), x.shape[1], self.hidden_size)
        [states] = initial_state(x, None if hx is None else [hx], shape)
        last = []
        for layer, h in zip(self.layers, states, strict=True):
            x = layer(x, h)
            last.append(x[-1])
        return x.transpose(0, 1) if self.batch_first else x, torch.stack(last)


class PassthroughHighway(nn.Module):
    """A highway block of low rank: ``y = f(x) ⊙ τ(x) + x ⊙ (1 − τ(x))``, ``f = tanh(W x + b)``, ``τ = σ(U x + c)``.

    Args:
        size: n, size of the input.
        rank: d, rank of W and U, each a :class:`StateMatrix`.
        diagonal: whether W and U have a diagonal.
        carry_bias: initial value of −c; above 0, the output is initially mostly the input.

    Shape: (..., n) to (..., n).

    Example:
        >>> PassthroughHighway(64, rank=4)(torch.zeros(2, 64)).shape
        torch.Size([2, 64])

    Source: A. V. Miceli Barone, Low-rank passthrough neural networks, 2016.
    """

    def __init__(self, size: int, rank: int, diagonal: bool = True, carry_bias: float = 1.0) -> None:
        super().__init__()
        self.transform, self.gate = StateMatrix(size, rank, diagonal), StateMatrix(size, rank, diagonal)
        self.transform_bias, self.gate_bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.carry_bias = carry_bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the biases; W and U have reset methods of their own."""
        nn.init.zeros_(self.transform_bias)
        nn.init.constant_(self.gate_bias, -self.carry_bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        f = torch.tanh(self.transform(x) + self.transform_bias)
        return x + (f - x) * torch.sigmoid(self.gate(x) + self.gate_bias)  # lerp does not promote types

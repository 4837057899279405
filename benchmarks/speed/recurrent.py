"""What recurrent layers cost: forward and backward, against torch's LSTM, a loop over its cell, and padded batches."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.report import table
from benchmarks.speed.timing import passes, race
from tying.depth import HMLSTM, HyperLSTM, PassthroughGRU, ZoneoutLSTM

BATCH, STEPS, INPUTS, SIZE = 100, 784, 1, 256
RANK = 24


class Loop(nn.Module):
    """An LSTM as a loop over torch's cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(INPUTS, SIZE)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the hidden states of all steps."""
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs), None


class Packed(nn.Module):
    """A recurrent network whose input is packed first, as sequences of half of the steps to all of them."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net = net
        self.lengths = torch.linspace(steps / 2, steps, BATCH).long()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the hidden states of all steps."""
        outputs, _ = self.net(pack_padded_sequence(x, self.lengths, enforce_sorted=False))
        return outputs.data, None


def measure() -> str:
    """Run all measurements, and return their tables as Markdown."""
    torch.manual_seed(0)
    nets: dict[str, nn.Module] = {
        "zoneout LSTM, rates 0.15": ZoneoutLSTM(INPUTS, SIZE, zoneout_cell=0.15, zoneout_hidden=0.15),
        "zoneout LSTM, rates 0": ZoneoutLSTM(INPUTS, SIZE),
        f"passthrough GRU, rank {RANK}": PassthroughGRU(INPUTS, SIZE, RANK),
        "LSTM by a hypernetwork of 32 units": HyperLSTM(INPUTS, SIZE),
        "HM-LSTM, 3 layers": HMLSTM(INPUTS, SIZE, outputs="top"),
    }
    return f"{_against_torch(nets)}\n\n{_packed(nets)}"


def _sequences(steps: int) -> torch.Tensor:
    return torch.randn(steps, BATCH, INPUTS, generator=torch.Generator().manual_seed(0))


def _against_torch(layers: dict[str, nn.Module]) -> str:
    """Return the table of each layer's time over those of torch's LSTM and of a loop over its cell."""
    fused, loop = "torch's LSTM", "loop over torch's LSTMCell"
    nets = {fused: nn.LSTM(INPUTS, SIZE), loop: Loop(), **layers}
    x = _sequences(STEPS)
    result = race({side: passes(net, x) for side, net in nets.items()}, races=5, rounds=3)
    sizes = {side: f"{sum(weight.numel() for weight in net.parameters()):,}" for side, net in nets.items()}
    what = (
        f"Forward and backward, batch {BATCH}, {STEPS} steps of {INPUTS} input, {SIZE} units, fp32; median of 5 races "
        "(extremes):"
    )
    peers = {"/ torch's LSTM": fused, "/ loop": loop}
    return f"{what}\n\n{result.table(peers, {'parameters': sizes})}"


def _packed(nets: dict[str, nn.Module]) -> str:
    """Return the table of each layer's time for packed sequences over that for the padded batch."""
    steps, rows = STEPS // 4, []
    x = _sequences(steps)
    for side, net in nets.items():
        result = race({"padded": passes(net, x), "packed": passes(Packed(net, steps), x)}, races=5, rounds=1)
        rows.append([side, *result.row("padded"), *result.row("packed", "padded")])
    what = (
        f"The same with {steps} steps, of a padded batch and of its sequences packed, with lengths from half of the "
        "steps to all:"
    )
    return f"{what}\n\n{table(['side', 'padded ms', 'packed ms', 'packed / padded'], rows)}"

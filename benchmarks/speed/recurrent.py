"""What recurrent layers cost: forward and backward, against torch's LSTM and a loop over its cell."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.report import table
from benchmarks.speed.timing import passes, race
from tying.depth import HyperLSTM, PassthroughGRU, ZoneoutLSTM

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


def measure() -> str:
    """Run all measurements, and return their table as Markdown."""
    torch.manual_seed(0)
    fused, loop = "torch's LSTM", "loop over torch's LSTMCell"
    nets = {
        fused: nn.LSTM(INPUTS, SIZE),
        loop: Loop(),
        "zoneout LSTM, rates 0.15": ZoneoutLSTM(INPUTS, SIZE, zoneout_cell=0.15, zoneout_hidden=0.15),
        "zoneout LSTM, rates 0": ZoneoutLSTM(INPUTS, SIZE),
        f"passthrough GRU, rank {RANK}": PassthroughGRU(INPUTS, SIZE, RANK),
        "LSTM by a hypernetwork of 32 units": HyperLSTM(INPUTS, SIZE),
    }
    x = torch.randn(STEPS, BATCH, INPUTS, generator=torch.Generator().manual_seed(0))
    result = race({side: passes(net, x) for side, net in nets.items()}, races=5, rounds=3)
    rows = [
        [
            side,
            f"{sum(p.numel() for p in net.parameters()):,}",
            f"{1e3 * result.median(side):.0f}",
            result.told(side, fused),
            result.told(side, loop),
        ]
        for side, net in nets.items()
    ]
    what = (
        f"Forward and backward, batch {BATCH}, {STEPS} steps of {INPUTS} input, {SIZE} units, fp32; median of 5 races "
        "(extremes):"
    )
    heading = ["side", "parameters", "ms", "/ torch's LSTM", "/ loop"]
    return f"{what}\n\n{table(heading, rows)}"

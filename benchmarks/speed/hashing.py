"""What hashed layers cost, against dense ones, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.perform import stored_bytes
from benchmarks.report import table
from benchmarks.speed.timing import Step, paired, passes, race, torch_alone
from tying import compiled
from tying.hashing import BlockHash, HashedConv2d, HashedEmbedding, HashedLinear, ModulusHash
from tying.hashing.codebook import put_codebook

ROUNDS, PAIRS = 4, 15
LINEAR = {(2000, 2000): (128, 512), (3072, 2000): (128,)}
ROWS, WIDTH, LOOKED_UP = 1_000_000, 64, 4096  # of an embedding
# ResNet-20's convolutions: channels in, channels out, stride, size of the image, how many of them
CONVOLUTIONS = [(16, 16, 1, 32, 6), (16, 32, 2, 32, 1), (32, 32, 1, 16, 5), (32, 64, 2, 16, 1), (64, 64, 1, 8, 5)]


class Naive(nn.Linear):
    """The layer that one would write first: ``table[index]``."""

    def __init__(self, inputs: int, outputs: int, ratio: float) -> None:
        super().__init__(inputs, outputs)
        del self.weight
        size = round(ratio * inputs * outputs)
        self.table = nn.Parameter(torch.randn(size) / inputs**0.5)
        self.register_buffer("index", torch.randint(size, (outputs, inputs)))

    @override
    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self.index, Tensor)
        return F.linear(input, self.table[self.index], self.bias)


def clustered(inputs: int, outputs: int) -> nn.Module:
    """Return a layer whose weights are of 32 values, assigned at random: what matters for the time."""
    layer = nn.Linear(inputs, outputs)
    put_codebook(layer, "weight", torch.randint(32, (inputs * outputs,)), torch.randn(32) / inputs**0.5)
    return layer


def linear() -> list[list[str]]:
    """Return the rows of linear layers."""
    rows: list[list[str]] = []
    for (inputs, outputs), batches in LINEAR.items():
        hashed = partial(HashedLinear, inputs, outputs)
        made: dict[str, Callable[[], nn.Module]] = {
            "uniform, ratio 0.1, stored": partial(hashed, table_ratio=0.1, index="stored"),
            "uniform, ratio 0.1, computed": partial(hashed, table_ratio=0.1, index="computed"),
            "uniform, ratio 0.01, stored": partial(hashed, table_ratio=0.01, index="stored"),
            "uniform, ratio 0.5, stored": partial(hashed, table_ratio=0.5, index="stored"),
            "uniform with sign, ratio 0.1, stored": partial(hashed, table_ratio=0.1, sign=True),
            "blocks of 32, ratio 0.1": partial(hashed, table_ratio=0.1, hash=BlockHash()),
            "modulus, ratio 0.1": partial(hashed, table_ratio=0.1, hash=ModulusHash()),
            "modulus, ratio 0.01": partial(hashed, table_ratio=0.01, hash=ModulusHash()),
            "plain, a hundredth of the outputs": partial(nn.Linear, inputs, max(1, outputs // 100)),
            "clustered, 32 values": partial(clustered, inputs, outputs),
            "naive table[index], ratio 0.1": partial(Naive, inputs, outputs, 0.1),
        }
        dense = nn.Linear(inputs, outputs)
        for batch in batches:
            x = torch.randn(batch, inputs, requires_grad=True)
            sides = {name: partial(_against, layer, dense, x) for name, layer in made.items()}
            rows += [[f"{inputs}×{outputs}, {batch}: {name}", *row] for name, *row in paired(sides, ROUNDS, PAIRS)]
    return rows


def _against(make: Callable[[], nn.Module], dense: nn.Module, x: Tensor) -> tuple[Step, Step]:
    return passes(make(), x), passes(dense, x)


def convolutions() -> list[list[str]]:
    """Return the row of ResNet-20's convolutions, one after another, at batch 128."""
    hashed, dense = [], []
    for into, out, stride, size, count in CONVOLUTIONS:
        for _ in range(count):
            x = torch.randn(128, into, size, size, requires_grad=True)
            hashed.append(passes(HashedConv2d(into, out, 3, stride, padding=1, bias=False, table_ratio=0.1), x))
            dense.append(passes(nn.Conv2d(into, out, 3, stride, padding=1, bias=False), x))

    def run(every: list[Step]) -> None:
        for step in every:
            step()

    name = "ResNet-20's convolutions, 128: uniform, ratio 0.1, stored"
    return paired({name: lambda: (partial(run, hashed), partial(run, dense))}, ROUNDS, PAIRS)


def embedding() -> list[list[str]]:
    """Return the row of an embedding of blocks, over a plain one with as many parameters as its table."""
    rows = torch.randint(ROWS, (LOOKED_UP,))

    def made() -> tuple[Step, Step]:
        hashed = HashedEmbedding(ROWS, WIDTH, table_ratio=0.1, hash=BlockHash())
        plain, fewer = nn.Embedding(ROWS // 10, WIDTH), rows % (ROWS // 10)
        return passes(hashed, rows), passes(plain, fewer)

    return paired({f"embedding of {ROWS:,}×{WIDTH}: blocks of 32, ratio 0.1": made}, ROUNDS, PAIRS)


def steps() -> list[list[str]]:
    """Return the rows of all layers."""
    return linear() + convolutions() + embedding()


def parts() -> list[list[str]]:
    """Return milliseconds to read the 4 M weights of a layer of 2000×2000, and to sum their gradients."""
    hashed = partial(HashedLinear, 2000, 2000, bias=False, table_ratio=0.1)
    layers = {
        "uniform, stored": hashed(index="stored"),
        "uniform, computed": hashed(index="computed"),
        "uniform with sign, stored": hashed(index="stored", sign=True),
        "blocks of 32": hashed(hash=BlockHash()),
    }
    rows, upstream = [], torch.randn(2000, 2000)
    for name, layer in layers.items():
        weight, [table] = layer.weight, layer.parameters()
        sides = {
            "read": partial(getattr, layer, "weight"),
            "sum": partial(torch.autograd.grad, weight, table, upstream, retain_graph=True),
        }
        result = race(sides)
        rows.append([name, *(f"{1e3 * result.median(side):.2f}" for side in sides)])
    return rows


def memory() -> list[list[str]]:
    """Return bytes that layers hold after a step of AdamW, measured, over those of the dense layer."""
    rows = []
    theirs = _bytes_of(nn.Linear(2000, 2000, bias=False))
    for index in ("stored", "computed"):
        ours = _bytes_of(HashedLinear(2000, 2000, bias=False, table_ratio=0.1, index=index))
        shares = [f"{ours[at] / theirs[at]:.4f}" for at in (0, 1)]
        rows.append([f"uniform, ratio 0.1, {index}", *shares, f"{ours[2] / 2**20:.1f}"])
    return rows


def _bytes_of(layer: nn.Module) -> list[int]:
    """Return the bytes of what training holds, of the checkpoint, and of tensors beside parameters."""
    optimizer = torch.optim.AdamW(layer.parameters())
    passes(layer, torch.randn(8, 2000))()
    optimizer.step()
    trained = [[(weight, weight.grad) for weight in layer.parameters()], optimizer.state_dict()]
    others = [value for module in layer.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return [stored_bytes(state) for state in (trained, layer.state_dict(), others)]


def measure() -> Iterator[str]:
    """Run the measurements; yield their results as paragraphs of Markdown."""
    heading = ["layer, batch: hash", "ms dense", "ratio to dense", "95 % interval"]
    parts_heading = ["hash", "ms to read", "ms to sum"]
    yield (
        f"Forward and backward of a hashed layer over those of the dense layer of its shape; {ROUNDS * PAIRS} pairs, "
        f"side by side, in {ROUNDS} rounds over all layers. An embedding is compared with one of as many parameters, "
        f"{LOOKED_UP:,} rows at a time. The last columns are of compiled loops, which `pip install 'tying[fast]'` adds:"
    )
    with torch_alone():
        rows, of_parts = steps(), parts()
    if compiled.is_working():
        heading += ["compiled", "95 % interval, compiled"]
        parts_heading += ["to read, compiled", "to sum, compiled"]
        rows = [[*row, *cells] for row, (_, _, *cells) in zip(rows, steps(), strict=True)]
        of_parts = [[*row, *cells] for row, (_, *cells) in zip(of_parts, parts(), strict=True)]
    yield table(heading, rows)
    yield "The parts: reading the 4 M weights of a layer of 2000×2000, and summing their gradients by slot, alone:"
    yield table(parts_heading, of_parts)
    yield "What a layer of 2000×2000 holds after a step of AdamW, over the dense layer:"
    yield table(["hash", "table, gradient, optimizer", "checkpoint", "index, MiB"], memory())

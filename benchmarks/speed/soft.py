"""What soft tying costs: against memory bandwidth, against autograd, and as a share of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.report import ROOT, table
from benchmarks.speed.timing import Step, race, time_of, torch_alone, with_extremes
from tying import compiled, resolve
from tying.callbacks import SoftTying
from tying.cli import parse
from tying.lightning_workarounds import callbacks_of
from tying.soft import GaussianMixturePrior, TyingPenalty
from tying.soft.mixture import CPU_CHUNK

PAIRS, SIDE = 52, 519  # 52 pairs of 519 × 519: 14.0 million weights on each side
MIXTURE_WEIGHTS, COMPONENTS = 10_000_000, 17
TIGHT = 0.003


def pairs_of_weights(count: int, side: int) -> nn.ModuleDict:
    """Return a model of two lists, ``a`` and ``b``, of square weights, with gradients."""
    model = nn.ModuleDict(
        {part: nn.ParameterList(nn.Parameter(torch.randn(side, side)) for _ in range(count)) for part in "ab"}
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def by_autograd(model: nn.ModuleDict, transposed: bool = False) -> Step:
    """Return what one would write by hand: the penalty in the loss."""
    a, b = ([*side.parameters()] for side in (model["a"], model["b"]))

    def run() -> None:
        partners = [y.T for y in b] if transposed else b
        terms: list[Tensor] = [((x - y) ** 2).sum() / 2 for x, y in zip(a, partners, strict=True)]
        (1e-3 * torch.stack(terms).sum()).backward()  # type: ignore[no-untyped-call]  # torch's own

    return run


def by_copying(words: int) -> Step:
    """Return the memory bandwidth's own measure: as many words read and written as a plain copy can."""
    source = torch.randn(words // 2)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def by_adding(model: nn.ModuleDict) -> Step:
    """Return the fewest operations that read both weights, and read and write both gradients."""
    weights = [parameter.detach() for parameter in model.parameters()]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    def run() -> None:
        for gradient, weight in zip(gradients, weights, strict=True):
            gradient.add_(weight, alpha=1e-3)

    return run


def resnet_step() -> tuple[Step, Step]:
    """Return a training step at batch 128 of what ``configs/soft.yaml`` trains, and what its callback adds to it."""
    cli = parse([f"--config={ROOT / 'configs' / name}.yaml" for name in ("base", "soft")])
    [callback] = [callback for callback in callbacks_of(cli.trainer) if isinstance(callback, SoftTying)]
    optimizer = torch.optim.SGD(cli.model.parameters(), lr=1e-3, momentum=0.9)
    cli.trainer.optimizers = [optimizer]
    callback.setup(cli.trainer, cli.model, "fit")
    callback.on_fit_start(cli.trainer, cli.model)
    callback._remove_hooks()  # what the optimizer would call is timed with the pull
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(cli.model(x), y).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()

    def pull() -> None:
        callback.on_after_backward(cli.trainer, cli.model)
        callback.on_before_optimizer_step(cli.trainer, cli.model, optimizer)
        callback._after_step(cli.trainer, cli.model, optimizer)

    return step, pull


def matching() -> list[str]:
    """Return, in words, the seconds that it takes to match 5,000 ties in 10,000 parameters, best of three."""
    model = pairs_of_weights(5000, 1)
    found = []
    for label, ties in [
        ("5,000 literal ties", [f"a.{i} ~ b.{i}" for i in range(5000)]),
        ("one pattern that binds 5,000", ["a.{i} ~ b.{i}"]),
    ]:
        seconds = min(time_of(partial(resolve, model, ties)) for _ in range(3))
        found.append(f"Matching {label} in a model of 10,000 parameters takes {seconds:.2f} s.")
    return found


def mixture(std: float | None = None) -> list[str]:
    """Return what the mixture prior costs, value and gradient: milliseconds, and the ratio to passes of ``exp``.

    Args:
        std: of all components; as they begin by default.
    """
    weights = nn.Parameter(0.05 * torch.randn(MIXTURE_WEIGHTS))
    weights.grad = torch.zeros_like(weights)
    prior = GaussianMixturePrior(COMPONENTS, std=std)
    chunk = torch.empty(CPU_CHUNK)

    def passes() -> None:
        for _ in range(COMPONENTS):
            for part in torch.split(weights.detach(), CPU_CHUNK):
                torch.exp(part, out=chunk[: len(part)])

    sides = {"prior": lambda: prior.add_gradients_([weights], 1e-3), "exp": passes}
    result = race(sides, races=5, rounds=3)
    return result.row("prior", "exp")


def mixtures() -> list[list[str]]:
    """Return the rows of the mixture prior: torch alone and, where numba works, compiled."""
    stds = {"as the components begin": None, f"components of standard deviation {TIGHT}": TIGHT}
    with torch_alone():
        rows = [[name, *mixture(std)] for name, std in stds.items()]
    if compiled.is_working():
        rows = [[*row, *mixture(std)] for row, std in zip(rows, stds.values(), strict=True)]
    return rows


def pulls() -> Iterator[str]:
    """Yield what pulls take, over a copy of as many words and over autograd."""
    model = pairs_of_weights(PAIRS, SIDE)
    plain = TyingPenalty(resolve(model, ["a.{i} ~ b.{i}"]))
    transposed = TyingPenalty(resolve(model, ["a.{i} ~ b.{i} | o i -> i o"]))
    words = 6 * PAIRS * SIDE**2
    bound, adding, autograd = (
        "copy of six words a pair",
        "two in-place additions a pair",
        "autograd, penalty in the loss",
    )
    sides: dict[str, Step] = {
        bound: by_copying(words),
        adding: by_adding(model),
        "gradient": lambda: plain.add_gradients_(1e-3),
        "decoupled": lambda: plain.pull_(1e-9),
        "proximal": lambda: plain.prox_(1e-9),
        autograd: by_autograd(model),
        "gradient, transposed pairs": lambda: transposed.add_gradients_(1e-3),
        "autograd, transposed pairs": by_autograd(model, transposed=True),
    }
    result = race(sides)
    faster = result.told(autograd, "gradient")
    faster_transposed = result.told("autograd, transposed pairs", "gradient, transposed pairs")
    yield f"{PAIRS} pairs of {SIDE}×{SIDE} weights, 14.0 M on each side, fp32; median of 7 races (extremes):"
    yield result.table({"/ copy": bound, "/ additions": adding})
    yield (
        f"The fused gradient is {faster} times faster than autograd; for transposed pairs, {faster_transposed} times.\n"
        "A copy of as many words measures memory bandwidth; the two additions are the least that touches these six."
    )


def hooks() -> Iterator[str]:
    """Yield the share of a training step that the hooks of a callback take."""
    step, pull = resnet_step()
    result = race({"step": step, "pull": pull}, races=7, rounds=10)
    share = with_extremes([100 * ratio for ratio in result.ratios("pull", "step")])
    yield "The callback of `configs/soft.yaml`, which ties 16 convolutions of ResNet-20, in a step at batch 128:"
    yield table(["hooks of", "ms of the step", "% of the step"], [["soft.yaml", *result.row("step"), share]])


def priors() -> Iterator[str]:
    """Yield what the mixture prior takes."""
    yield (
        f"The mixture prior, value and gradient, of {MIXTURE_WEIGHTS / 1e6:.0f} M weights and {COMPONENTS} components, "
        f"over {COMPONENTS} passes of `torch.exp` over as many numbers, {CPU_CHUNK:,} at a time; the last columns are "
        "of compiled loops, which `pip install 'tying[fast]'` adds:"
    )
    columns = ["ms", "/ passes of exp", *["ms, compiled", "compiled / passes of exp"] * compiled.is_working()]
    yield table(["mixture prior", *columns], mixtures())


def measure() -> Iterator[str]:
    """Run the measurements; yield their results as paragraphs of Markdown."""
    yield from pulls()
    yield from hooks()
    yield from priors()
    yield "\n".join(matching())

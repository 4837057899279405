"""What a strength does to a gap in a step: as computed, and as optimizers and penalties do it."""

import pytest
import torch
from torch import nn

from tying import resolve
from tying.errors import ConfigurationError
from tying.soft import TyingPenalty
from tying.soft.strength import gap_factor

RATE, STRENGTH, MEMBERS = 0.5, 0.25, 3  # x = 0.375


def deviations(update, momentum, nesterov, rate, steps=6):
    """Return the deviation of a weight from its group's mean, which is 0, before each step without a loss."""
    model = nn.ModuleList(nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(MEMBERS))
    for layer, value in zip(model, (3.0, -1.0, -2.0), strict=True):
        nn.init.constant_(layer.weight, value)
    penalty = TyingPenalty(resolve(model, ["*.weight"]))
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum, nesterov=nesterov)
    values = []
    for _ in range(steps):
        values.append(model[0].weight.item())
        if update == "gradient":
            optimizer.zero_grad()
            penalty.add_gradients_(STRENGTH)
            optimizer.step()
        else:
            (penalty.pull_ if update == "decoupled" else penalty.prox_)(rate * STRENGTH)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("rate", [RATE, 4.0])
@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
def test_steps_without_momentum_multiply_the_gap(update, rate):
    values = deviations(update, 0.0, False, rate)
    factor = gap_factor(rate * STRENGTH * MEMBERS, update)
    assert torch.allclose((values[1:] / values[:-1]).abs(), torch.full_like(values[1:], factor), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rate", [1e-3, RATE, 6.0])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_steps_with_momentum_are_a_recurrence_of_this_radius(momentum, nesterov, rate):
    values = deviations("gradient", momentum, nesterov, rate)[1:]  # the first step has no momentum yet
    # w_{n+1} = sum · w_n − product · w_{n−1}
    total, product = torch.linalg.solve(torch.stack([values[1:3], -values[:2]], dim=1), values[2:4]).tolist()
    roots = torch.linalg.eigvals(torch.tensor([[total, -product], [1.0, 0.0]], dtype=torch.float64)).abs()
    assert gap_factor(rate * STRENGTH * MEMBERS, "gradient", momentum, nesterov) == pytest.approx(
        roots.max().item(), rel=1e-6
    )


def test_limits():
    assert gap_factor(0.0, "decoupled") == gap_factor(0.0, "proximal") == 1
    assert gap_factor(0.0, "gradient", 0.9) == pytest.approx(1, rel=1e-12)
    assert gap_factor(float("inf"), "proximal") == 0
    assert gap_factor(2.0, "decoupled") == 1  # the stability bound
    assert gap_factor(2 * 1.9, "gradient", 0.9) == pytest.approx(1, rel=1e-12)
    for wrong in ((-1.0, "proximal"), (1.0, "gradient", 1.0)):
        with pytest.raises(ConfigurationError, match="must be"):
            gap_factor(*wrong)

"""The synthetic experiment: its limits, and its verdict."""

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import hybrid_toy
from benchmarks.hybrid_toy import log_joint, sample, solve, verdict


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(hybrid_toy, "STEPS", 60)


def test_the_density():
    parameters = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 0.5]], dtype=torch.float64)
    points = torch.randn(5, 2, dtype=torch.float64)
    for k in range(2):
        normal = torch.distributions.Normal(parameters[k, :2], parameters[k, 2].exp())
        expected = normal.log_prob(points).sum(-1) + torch.tensor(0.5).double().log()
        torch.testing.assert_close(log_joint(points, parameters)[:, k], expected)


def test_the_limits():
    generator = torch.Generator().manual_seed(1)
    points = sample(20, 2, generator)
    other = points.clone()
    other[:, 5:20] += 3.0  # unlabelled ones of the first class
    apart = solve(points, 4, [0, 0.5, 1]) - solve(other, 4, [0, 0.5, 1])
    assert not apart[:, 2].any()  # the discriminative limit knows nothing of unlabelled points
    assert apart[:, 0].abs().max() > apart[:, 1].abs().max() > 0


def test_all_problems_at_once_are_each_alone():
    points = sample(10, 3, torch.Generator().manual_seed(1))
    together = solve(points, 2, [0, 0.3, 1])
    for draw in range(3):
        for i, alpha in enumerate((0, 0.3, 1)):
            torch.testing.assert_close(together[draw, i], solve(points[draw : draw + 1], 2, [alpha])[0, 0])


def test_verdicts():
    noise = 0.001 * torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    inner = torch.tensor([0.5, 0.9, 0.6]) + noise
    assert verdict(inner, (0, 0.5, 1))[0] == 0.5
    assert verdict(inner, (0, 0.5, 1))[1].startswith("reproduced: +0.39")
    assert verdict(torch.tensor([0.5, 0.6, 0.9]) + noise, (0, 0.5, 1)) == (1, "not reproduced: the best α is a limit")
    gains = torch.tensor([0.3, -0.2] * 10).double()  # better than the discriminative limit on average, not surely
    undecided = torch.stack([torch.full_like(gains, 0.5), torch.full_like(gains, 0.6), 0.6 - gains], dim=1)
    assert verdict(undecided, (0, 0.5, 1))[1].startswith("undecided: +0.1000 over the generative limit")


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    monkeypatch.setitem(benchmarks.COMPUTED, "hybrid-toy", lambda: hybrid_toy.report(draws=4))
    monkeypatch.setattr(hybrid_toy, "STEPS", 3)
    assert benchmarks.main(["run", "hybrid-toy", "--save"]) == 0
    assert "| 0.005 |" in capsys.readouterr().out
    assert (tmp_path / "hybrid-toy.md").exists()
    assert (tmp_path / "hybrid-toy.png").read_bytes().startswith(b"\x89PNG")

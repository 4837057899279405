"""Modules that one fully_shard call must take together."""

import pytest
from torch import nn

from tying.errors import ConfigurationError
from tying.hard import (
    LowRankResidual,
    generate_weights,
    lower_rank,
    relax,
    shard_groups,
    share_templates,
    tie,
)
from tying.hashing import hash_weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 6)) for _ in range(4))
        self.head = nn.Linear(6, 11, bias=False)
        self.scale = nn.Parameter(self.head.weight.detach().clone())


def names(net, lists):
    paths = {module: path for path, module in net.named_modules()}
    return [[paths[module] for module in modules] for modules in lists]


APART = [["blocks.0"], ["blocks.1"], ["blocks.2"], ["blocks.3"]]
TOGETHER = [["blocks.0", "blocks.1", "blocks.2", "blocks.3"]]


@pytest.mark.parametrize(
    ("change", "units", "expected"),
    [
        (lambda net: None, ["blocks.*"], APART),
        (lambda net: lower_rank(net, ["blocks.*.0.weight"], 2), ["blocks.*"], APART),
        (lambda net: tie(net, ["blocks.0.0 ~ blocks.2.0"]), ["blocks.*"], [["blocks.0", "blocks.2"], *APART[1::2]]),
        (
            lambda net: tie(net, ["blocks.0.0.weight ~ blocks.2.1.weight | o i -> i o"]),
            ["blocks.*"],
            [["blocks.0", "blocks.2"], *APART[1::2]],
        ),
        (
            lambda net: tie(net, ["blocks.0.0 ~ blocks.1.0", "blocks.1.1 ~ blocks.3.1"]),
            ["blocks.*"],
            [["blocks.0", "blocks.1", "blocks.3"], ["blocks.2"]],
        ),
        (lambda net: tie(net, ["embed.weight ~ head.weight"]), ["blocks.*", "head"], [*APART, ["embed", "head"]]),
        (lambda net: tie(net, ["embed.weight ~ head.weight"]), ["blocks.*"], APART),
        (lambda net: tie(net, ["embed.weight ~ scale"]), ["blocks.*", "embed"], APART),
        (lambda net: share_templates(net, ["blocks.*.0.weight"], 2), ["blocks.*"], TOGETHER),
        (
            lambda net: share_templates(net, ["blocks.*.0.weight"], 2),
            ["blocks.0"],
            [["blocks.0", "blocks.1.0", "blocks.2.0", "blocks.3.0"]],
        ),
        (lambda net: generate_weights(net, ["blocks.*.0.weight"], 4, 2, 2), ["blocks.*"], TOGETHER),
        (lambda net: hash_weights(net, ["blocks.*.*.weight"], 0.5, scope="network"), ["blocks.*"], TOGETHER),
        (lambda net: hash_weights(net, ["blocks.*.*.weight"], 0.5), ["blocks.*"], APART),
        (lambda net: relax(net, ["blocks.{0..3}"], LowRankResidual(1)), ["blocks.*"], TOGETHER),
        (
            lambda net: tie(net, ["blocks.0.0 ~ blocks.1.0"]),
            ["blocks.*", "blocks.0.0"],
            [["blocks.0.0", "blocks.1"], ["blocks.0"], *APART[2:]],
        ),
    ],
)
def test_units_that_share_parameters_are_one_list(change, units, expected):
    net = Net()
    change(net)
    result = names(net, shard_groups(net, units))
    assert sorted(result) == sorted(expected)
    position = {name: index for index, modules in enumerate(result) for name in modules}
    inside = [(inner, outer) for inner in position for outer in position if inner.startswith(f"{outer}.")]
    assert all(position[inner] < position[outer] for inner, outer in inside)


def test_modules_are_units_too():
    net = Net()
    tie(net, ["blocks.0.0 ~ blocks.1.0"])
    assert names(net, shard_groups(net, [*net.blocks, net])) == [["blocks.0", "blocks.1"], ["blocks.2"], ["blocks.3"]]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (["block.*"], r"units: pattern 'block\.\*' matches no module\. Nearest"),
        ([nn.Linear(2, 2)], "units: Linear is no module of the model"),
        ([], "units must be a pattern of module names, or several"),
        (
            ["blocks.0", "blocks.0.1", "blocks.1", "blocks.1.1"],
            "two lists of modules that share parameters each contain a part of the other",
        ),
    ],
)
def test_units_that_do_not_fit_are_refused(units, message):
    net = Net()
    tie(
        net,
        ["blocks.0.0.weight ~ blocks.1.1.weight | o i -> i o", "blocks.1.0.weight ~ blocks.0.1.weight | o i -> i o"],
    )
    with pytest.raises(ConfigurationError, match=message):
        shard_groups(net, units)

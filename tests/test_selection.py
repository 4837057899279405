import time
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tying import ConfigurationError, Tie, resolve
from tying.models import Autoencoder, ResNet
from tying.selection.resolve import resolve_each


def names(model, *ties):
    return [group.names for group in resolve(model, list(ties))]


def stack(**sizes):
    """A model of one module list per name, each of that many square layers."""
    return nn.ModuleDict({name: nn.ModuleList([nn.Linear(3, 3) for _ in range(n)]) for name, n in sizes.items()})


def test_string_and_dataclass_say_the_same():
    text = "encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o"
    tie = Tie("encoder.{i}.weight", "decoder.{-i}.weight", "o i -> i o")
    assert Tie.parse(text) == tie
    assert str(tie) == text
    model = Autoencoder([8, 6, 4, 2])
    assert names(model, text) == names(model, tie)


@pytest.mark.parametrize("text", ["", "~ a", "a ~", "a ~ b |", "a | o i -> i o | x", "a ~ b ~ c", "a | x ~ y"])
def test_malformed_string(text):
    with pytest.raises(ConfigurationError, match=r"must have the form 'source ~ target \| relation'"):
        Tie.parse(text)


def test_a_string_for_the_list():
    with pytest.raises(ConfigurationError, match="ties must be a list"):
        resolve(stack(a=2), "a.*.weight")


def test_mirrored_stacks():
    groups = resolve(Autoencoder([8, 6, 4, 2]), ["encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o"])
    assert [g.names for g in groups] == [
        ("encoder.0.weight", "decoder.4.weight"),
        ("encoder.2.weight", "decoder.2.weight"),
        ("encoder.4.weight", "decoder.0.weight"),
    ]
    assert [[tuple(t.shape) for t in g.tensors()] for g in groups] == [[(6, 8)] * 2, [(4, 6)] * 2, [(2, 4)] * 2]
    assert {g.relation for g in groups} == {"o i -> i o"}


def test_mirroring_ranks_each_side_by_itself():
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
            "b": nn.Sequential(nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
        }
    )
    expected = [("a.0.weight", "b.3.weight"), ("a.2.weight", "b.1.weight")]
    assert names(model, "a.{i}.weight ~ b.{-i}.weight") == expected
    assert names(model, "a.{-i}.weight ~ b.{i}.weight") == expected


def test_mirroring_ranks_within_the_shared_captures():
    model = nn.ModuleDict({f"s{s}": stack(e=n, d=n) for s, n in [(0, 2), (1, 3)]})
    expected = [(f"s{s}.e.{i}.weight", f"s{s}.d.{n - 1 - i}.weight") for s, n in [(0, 2), (1, 3)] for i in range(n)]
    assert names(model, "s{s}.e.{i}.weight ~ s{s}.d.{-i}.weight") == expected


def test_captures_of_the_source_alone_do_not_divide_ranks():
    one = {f"x{k}": nn.ModuleDict({f"e{k}": nn.Linear(3, 3)}) for k in range(3)}
    model = nn.ModuleDict({**one, **{f"d{i}": nn.Linear(3, 3) for i in range(3)}})
    assert names(model, "x{k}.e{i}.weight ~ d{-i}.weight") == [
        (f"x{i}.e{i}.weight", f"d{2 - i}.weight") for i in range(3)
    ]
    model["x0"]["e1"] = nn.Linear(3, 3)
    del model["d2"], model["x2"]
    assert names(model, "x{k}.e{i}.weight ~ d{-i}.weight")[1][:2] == ("x0.e1.weight", "x1.e1.weight")


def test_mirroring_modules_counts_only_those_with_parameters():
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
            "b": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU()),
        }
    )
    assert ("a.0.weight", "b.1.weight") in names(model, "a.{i} ~ b.{-i}")


def test_mirroring_more_than_ten_is_numeric():
    pairs = names(stack(a=12, b=12), "a.{i}.weight ~ b.{-i}.weight")
    assert pairs == [(f"a.{i}.weight", f"b.{11 - i}.weight") for i in range(12)]


def test_mirroring_after_exclusion():
    tie = Tie("a.{i}.weight", "a.{-i}.weight", exclude=("a.1.weight",))
    assert names(stack(a=3), tie) == [("a.0.weight", "a.2.weight")]
    with pytest.raises(ConfigurationError, match=r"only 'a\.1\.weight' is in it"):
        resolve(stack(a=3), ["a.{i}.weight ~ a.{-i}.weight"])


def test_mirroring_unequal_stacks():
    with pytest.raises(ConfigurationError, match="has no partner"):
        resolve(stack(a=3, b=2), ["a.{i}.weight ~ b.{-i}.weight"])


def test_binding_without_partner_on_either_side():
    for sizes in ({"a": 3, "b": 2}, {"a": 2, "b": 3}):
        with pytest.raises(
            ConfigurationError, match=r"'[ab]\.2\.weight' has no partner among what '[ab]\.\{i\}\.weight'"
        ):
            resolve(stack(**sizes), ["a.{i}.weight ~ b.{i}.weight"])


def test_without_target_one_group():
    assert names(stack(a=3), "a.*.weight") == [("a.0.weight", "a.1.weight", "a.2.weight")]


def test_without_target_one_group_per_binding():
    model = nn.ModuleDict({"s": nn.ModuleList([stack(a=2, b=2), stack(a=2, b=2)])})
    found = names(model, "s.*.{x}.*.weight")
    assert found == [tuple(f"s.{i}.{x}.{j}.weight" for i in (0, 1) for j in (0, 1)) for x in ("a", "b")]


def test_modules_are_paired_by_relative_name():
    assert names(stack(a=2, b=2), "a ~ b") == [
        (f"a.{i}.{kind}", f"b.{i}.{kind}") for i in (0, 1) for kind in ("weight", "bias")
    ]


def test_outermost_modules_win():
    model = nn.Sequential(
        OrderedDict(
            block=nn.Sequential(OrderedDict(block=nn.Linear(2, 2))),
            other=nn.Sequential(OrderedDict(block=nn.Linear(2, 2))),
        )
    )
    assert names(model, "block ~ other") == [
        ("block.block.weight", "other.block.weight"),
        ("block.block.bias", "other.block.bias"),
    ]
    assert names(model, "*") == names(model, "block ~ other")


def test_modules_without_target_one_group_per_relative_name():
    model = ResNet(14)
    [first, *_] = groups = names(model, Tie("layer1.*", exclude=("**.norm*",)))
    assert len(groups) == 2
    assert first == ("layer1.0.branch.conv1.weight", "layer1.1.branch.conv1.weight")


def test_modules_whose_parameters_differ():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)})
    with pytest.raises(ConfigurationError, match=r"'a\.bias' has no partner"):
        resolve(model, ["a ~ b"])
    assert names(model, Tie("a", "b", exclude=("**.bias",))) == [("a.weight", "b.weight")]


def test_exclude_covers_what_is_below_a_module():
    assert names(stack(a=3), Tie("**.weight", exclude=("a.0",))) == [("a.1.weight", "a.2.weight")]
    with pytest.raises(ConfigurationError, match="leaves nothing"):
        resolve(stack(a=3), [Tie("**.weight", exclude=("a",))])


def test_exclude_that_covers_nothing():
    with pytest.raises(ConfigurationError, match=r"exclude pattern 'b\*' covers no parameter"):
        resolve(stack(a=3), [Tie("a.*", exclude=("b*",))])


@pytest.mark.parametrize("text", ["a.weight = b.weight", "a.weight, b.weight", "a ~ b : o i -> i o"])
def test_not_a_pattern(text):
    with pytest.raises(ConfigurationError, match="is not a pattern of names"):
        Tie.parse(text)
    with pytest.raises(ConfigurationError, match="is not a pattern of names"):
        Tie(text)


def test_ties_that_share_a_weight_merge():
    model = stack(a=4)
    assert names(model, "a.0.weight ~ a.1.weight", "a.2.weight ~ a.3.weight") == [
        ("a.0.weight", "a.1.weight"),
        ("a.2.weight", "a.3.weight"),
    ]
    merged = names(model, "a.0.weight ~ a.1.weight", "a.2.weight ~ a.3.weight", "a.3.weight ~ a.0.weight")
    assert [set(group) for group in merged] == [{f"a.{i}.weight" for i in range(4)}]
    assert merged[0][0] == "a.0.weight"


def test_merged_relations_compose():
    model = nn.ParameterDict({"a": torch.randn(2, 3), "b": torch.randn(3, 2), "c": torch.randn(2, 3, 1)})
    [group] = resolve(model, ["b ~ a | x y -> y x", "c ~ a | x y 1 -> x y"])
    assert group.names == ("b", "a", "c")
    with torch.no_grad():
        model["b"].copy_(model["a"].T)
        model["c"].copy_(model["a"][:, :, None])
    first, *others = group.tensors()
    assert first.shape == (3, 2)
    assert all(torch.equal(first, other) for other in others)


def test_relations_that_disagree():
    model = nn.ParameterDict({name: torch.zeros(2, 2) for name in "abc"})
    with pytest.raises(ConfigurationError, match=r"disagrees with an earlier one: 'a' would reach 'c'"):
        resolve(model, ["a ~ b", "b ~ c", "a ~ c | i j -> j i"])
    assert len(resolve(model, ["a ~ b | i j -> j i", "b ~ c | k l -> l k", "a ~ c"])) == 1


def test_a_weight_tied_to_itself():
    model = nn.ParameterDict({"a": torch.zeros(2, 2)})
    with pytest.raises(ConfigurationError, match="would tie a weight to itself"):
        resolve(model, ["a ~ a"])
    with pytest.raises(ConfigurationError, match=r"ties 'a' to itself through 'i j -> j i'"):
        resolve(model, ["a ~ a | i j -> j i"])


def test_aliases_count_once():
    model = stack(a=3)
    model["a"][1].weight = model["a"][0].weight
    assert names(model, "a.*.weight") == [("a.0.weight", "a.2.weight")]
    with pytest.raises(ConfigurationError, match=r"'a\.1\.weight' is already the same tensor as 'a\.0\.weight'"):
        resolve(model, ["a.0.weight ~ a.1.weight"])


def test_captures_that_stand_alone():
    with pytest.raises(ConfigurationError, match=r"capture \{j\} is only in the target"):
        resolve(stack(a=2, b=2), ["a.{i}.weight ~ b.{j}.weight"])
    with pytest.raises(ConfigurationError, match=r"mirrored capture"):
        resolve(stack(a=2, b=2), ["a.{-i}.weight"])
    assert names(stack(a=2, b=1), "a.{i}.weight ~ b.0.weight") == [("a.0.weight", "a.1.weight", "b.0.weight")]


def test_nothing_matched_suggests_names():
    with pytest.raises(
        ConfigurationError, match=r"'a\.0\.weigth' matches no parameter.*Nearest existing names: a\.0\.weight"
    ):
        resolve(stack(a=2), ["a.0.weigth ~ a.1.weight"])


def test_shapes_that_do_not_meet_are_named():
    model = Autoencoder([8, 6, 4])
    with pytest.raises(
        ConfigurationError, match=r"'encoder\.0\.weight' and 'decoder\.2\.weight' do not fit.*\(6, 8\).*\(8, 6\)"
    ):
        resolve(model, ["encoder.{i}.weight ~ decoder.{-i}.weight"])
    with pytest.raises(ConfigurationError, match=r"'o i -> i o' would fit$"):
        resolve(model, ["encoder.{i}.weight ~ decoder.{-i}.weight"])
    with pytest.raises(ConfigurationError, match="exclude one of them"):
        resolve(ResNet(14), ["layer2.*.branch.conv1.weight"])
    kernels = nn.ModuleList(nn.Conv2d(4, 4, 3) for _ in range(2))
    message = (
        r"relation 'o i -> i o' is for 2-dimensional weights, and these have the shapes \(4, 4, 3, 3\) and "
        r"\(4, 4, 3, 3\); the relation 'o i h w -> i o h w' would fit$"
    )
    with pytest.raises(ConfigurationError, match=message):
        resolve(kernels, ["0.weight ~ 1.weight | o i -> i o"])


def test_a_string_for_exclude():
    with pytest.raises(ConfigurationError, match=r"exclude must be a list of patterns; write \['\*\*\.bias'\]"):
        Tie("a", exclude="**.bias")


def test_each_tie_by_itself():
    good, bad = resolve_each(stack(a=2), ["a.*.weight", "b"])
    assert [group.names for group in good] == [("a.0.weight", "a.1.weight")]
    assert isinstance(bad, ConfigurationError)


def test_relation_needs_a_target():
    with pytest.raises(ConfigurationError, match="needs a target"):
        resolve(stack(a=2), [Tie("a.*.weight", relation="o i -> i o")])


def test_names_through_wrappers():
    model = stack(a=3)
    model["a"][0] = torch.compile(model["a"][0])
    model["a"][1] = checkpoint_wrapper(model["a"][1])
    nn.utils.parametrize.register_parametrization(model["a"][2], "weight", nn.Identity())
    assert names(torch.compile(model), "a.*.weight") == [("a.0.weight", "a.1.weight", "a.2.weight")]
    assert names(model, "a.0 ~ a.1")[0] == ("a.0.weight", "a.1.weight")


@pytest.mark.parametrize(
    "ties", [[f"a.{i} ~ b.{i}" for i in range(5000)], ["a.{i} ~ b.{i}"]], ids=["literal", "pattern"]
)
def test_five_thousand_ties_take_under_a_second(ties):
    pairs = {name: nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(5000)]) for name in "ab"}
    model = nn.ModuleDict(pairs)
    times = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        assert len(resolve(model, ties)) == 5000
        times.append(time.perf_counter() - start)
    assert min(times) < 1

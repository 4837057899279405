"""Copies, parts and remains of tied models."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.optim.swa_utils import AveragedModel

from tying import Tie, resolve
from tying.hard import audit, bake, load_plain, lower_rank, share_templates, tie, tied, untie

TRANSPOSED = "0.weight ~ 1.weight | o i -> i o"


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def pairs(count=2):
    return nn.Sequential(*(linear(2, 2) for _ in range(2 * count)))


def letters(names="abc", size=4):
    return nn.ModuleDict({name: linear(size, size) for name in names})


@pytest.mark.parametrize("made", [copy.deepcopy, lambda model: AveragedModel(model).module])
@pytest.mark.parametrize("which", [0, 1])
def test_a_copy_is_untied_alone(made, which):
    model, x = nn.Sequential(linear(8, 3), linear(3, 8)), torch.randn(2, 8)
    tie(model, [TRANSPOSED])
    both = [model, made(model)]
    assert untie(both[which]) == 1
    assert torch.equal(both[0](x), both[1](x))
    assert tied(both[which]) == []
    assert len(tied(both[1 - which])) == 1
    assert (len([*both[which].parameters()]), len([*both[1 - which].parameters()])) == (2, 1)


def test_copies_within_a_model_are_untied_together():
    block = nn.Sequential(linear(3, 3), linear(3, 3))
    tie(block, [TRANSPOSED])
    model = nn.Sequential(*(copy.deepcopy(block) for _ in range(3)))
    before = model(torch.ones(1, 3))
    assert untie(model) == 3
    assert torch.equal(model(torch.ones(1, 3)), before)


def test_a_copy_takes_on_more_ties_alone():
    model = nn.ModuleDict({name: linear(4, 4) for name in "aex"})
    tie(model, ["a.weight ~ x.weight | o i -> i o"])
    other = copy.deepcopy(model)
    tie(other, ["x.weight ~ e.weight | o i -> i o"])
    assert torch.equal(model["x"].weight, model["a"].weight.T)
    assert torch.equal(other["e"].weight, other["a"].weight)
    deep = nn.Bilinear(2, 2, 2, bias=False)
    deep.other = nn.Parameter(torch.randn(2, 2, 2))
    both = nn.ModuleDict({"one": deep, "source": nn.Bilinear(2, 2, 2, bias=False)})
    tie(both, ["source.weight ~ one.weight | o i j -> o j i"])
    second = copy.deepcopy(both)
    second.more = nn.Parameter(torch.randn(2, 2, 2))
    tie(second, ["more ~ one.other | o i j -> o j i"])
    assert "other" in both["one"]._parameters
    assert both["one"].other.shape == (2, 2, 2)


def test_names_mean_what_they_hold():
    """A weight that is another one, transposed, is read as it lies under its own name."""
    model = letters()
    tie(model, ["a.weight ~ b.weight | o i -> i o"])
    [group] = resolve(model, ["b.weight ~ c.weight"])
    assert group.names == ("a.weight", "c.weight")
    tie(model, ["b.weight ~ c.weight"])
    assert torch.equal(model["c"].weight, model["b"].weight)
    assert torch.equal(model["c"].weight, model["a"].weight.T)
    again = letters()
    tie(again, ["a.weight ~ b.weight | o i -> i o"])
    with pytest.raises(ValueError, match=r"ties 'b\.weight' to itself through"):
        tie(again, ["[ab].weight ~ c.weight"])
    with pytest.raises(ValueError, match=r"ties 'b\.weight' to itself through"):
        tie(again, ["a.weight ~ b.weight"])
    oblong = nn.ModuleDict({"a": linear(3, 4), "b": linear(4, 3), "c": linear(4, 3)})
    tie(oblong, ["a.weight ~ b.weight | o i -> i o"])
    tie(oblong, ["b.weight ~ c.weight"])
    assert torch.equal(oblong["c"].weight, oblong["b"].weight)


def test_what_is_gone_is_left_alone():
    model = pairs()
    tie(model, ["0.weight ~ 1.weight", "2.weight ~ 3.weight"])
    model[3] = nn.Identity()
    assert "one of them is no longer a parameter of the model" in audit(model).problems[0]
    assert untie(model) == 1
    assert model[0].weight is not model[1].weight
    assert audit(model).problems == ()


@pytest.mark.parametrize("outputs", [3, 4], ids=["square", "oblong"])
def test_removing_the_parametrization_leaves_the_source_alone(outputs):
    """As what exports models does."""
    model = nn.Sequential(linear(3, outputs), linear(outputs, 3))
    tie(model, [TRANSPOSED])
    own, source, x = model[0].weight.detach().clone(), model[0].weight, torch.randn(2, 3)
    before = model(x)
    remove_parametrizations(model[1], "weight")
    assert model[0].weight is source
    assert torch.equal(source, own)
    assert torch.equal(model(x), before)
    assert audit(model).problems
    tie(model, [TRANSPOSED])
    assert audit(model).problems == ()


def test_what_others_add_to_a_related_weight_computes_it_too():
    model = nn.Sequential(linear(3, 4), linear(4, 3))
    tie(model, [TRANSPOSED])

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

        def right_inverse(self, weight):
            return weight / 2

    register_parametrization(model[1], "weight", Double())
    assert torch.equal(model[1].weight, 2 * model[0].weight.T)
    model[1].weight = torch.ones(3, 4)
    assert torch.equal(model[0].weight, torch.full((4, 3), 0.5))


@pytest.mark.parametrize(("norm", "parted"), [("weight_norm", 0), ("spectral_norm", 1)])
def test_what_others_have_parametrized_is_untied(norm, parted):
    model = pairs(1)
    tie(model, ["0.weight ~ 1.weight"])
    getattr(parametrizations, norm)(model[1])
    assert "Untie them first" in audit(model).problems[0]
    assert untie(model) == parted
    assert len([*model.parameters()]) == 2 + (norm == "weight_norm")


def test_a_head_of_another_shape_is_not_overwritten():
    model = nn.ModuleDict({"emb": nn.Embedding(10, 4), "head": linear(4, 10)})
    ties = ["emb.weight ~ head.weight"]
    tie(model, ties)
    model["head"] = linear(4, 3)
    with pytest.raises(ValueError, match=r"Its shape is \(3, 4\), where \(10, 4\) belongs: untie them"):
        tie(model, ties)
    assert model["head"].weight.shape == (3, 4)
    assert untie(model) == 0
    with pytest.raises(ValueError, match=r"shapes \(10, 4\) and \(3, 4\) differ"):
        tie(model, ties)


def test_a_tie_by_hand_outlives_untying():
    model = nn.ModuleDict({"emb": nn.Embedding(10, 4), "head": linear(4, 10), "dec": nn.Embedding(10, 4)})
    model["head"].weight = model["emb"].weight
    tie(model, ["emb.weight ~ dec.weight"])
    assert untie(model) == 1
    assert model["head"].weight is model["emb"].weight
    assert model["dec"].weight is not model["emb"].weight
    other = letters()
    other["c"].weight = other["b"].weight
    tie(other, ["a.weight ~ b.weight | o i -> i o"])
    assert untie(other) == 1
    assert other["b"].weight is other["c"].weight
    tie(other, ["a.weight ~ b.weight"])
    tie(other, ["a.weight ~ b.weight"])
    assert untie(other) == 1


def test_other_ties_of_a_call_are_remembered():
    model, ties = pairs(), ["0.weight ~ 1.weight", "2.weight ~ 3.weight"]
    tie(model, ties)
    assert untie(model, ["1.weight"]) == 1
    assert [group.names for group in tie(model, ties)] == [("2.weight", "3.weight"), ("0.weight", "1.weight")]


def test_a_part_stays_guarded_when_the_whole_is_tied():
    inner = nn.Sequential(linear(2, 2), linear(2, 2))
    model = nn.ModuleDict({"sub": nn.ModuleDict({"inner": inner}), "c": linear(2, 2), "d": linear(2, 2)})
    tie(model["sub"], ["inner.0.weight ~ inner.1.weight"])
    tie(model, ["c.weight ~ d.weight"])
    with pytest.raises(ValueError, match="are tied, but differ"):
        inner.load_state_dict({"0.weight": torch.zeros(2, 2), "1.weight": torch.ones(2, 2)})
    assert {group.names for group in tied(model)} == {
        ("c.weight", "d.weight"),
        ("sub.inner.0.weight", "sub.inner.1.weight"),
    }
    [group] = tie(model, ["sub.inner.1.weight ~ c.weight"])
    assert len(group.names) == 4
    assert len(audit(model).groups) == 1
    assert untie(model) == 3


def test_a_part_tells_of_ties_made_above():
    model = nn.ModuleDict({"net": nn.Sequential(linear(4, 3), linear(3, 4)), "head": linear(2, 2)})
    tie(model, [Tie("net.0.weight", "net.1.weight", "o i -> i o")])
    report = audit(model["net"])
    assert report.groups == (("0.weight", "1.weight"),)
    assert report.relations == ("o i -> i o",)
    with pytest.raises(ValueError, match=r"0\.weight, 1\.weight: tied in a model of which this is a part"):
        untie(model["net"])


@pytest.mark.parametrize("ties", [["0.weight ~ 1.weight"], [TRANSPOSED]], ids=["plain", "related"])
@pytest.mark.parametrize("outside", [False, True], ids=["in the model", "beside it"])
def test_a_copy_of_a_part_stays_guarded(ties, outside):
    """As of a teacher that follows an encoder (BYOL)."""
    model = nn.ModuleDict({"encoder": pairs(1), "head": pairs(1)})
    tie(model, [Tie.parse(f"encoder.{each}".replace("~ ", "~ encoder.")) for each in ties])
    teacher = copy.deepcopy(model["encoder"])
    whole = nn.ModuleDict({"student": model, "teacher": teacher}) if outside else model
    whole["teacher"] = teacher
    if not outside:
        assert len(tied(model)) == 2
    tie(model, ["head.0.weight ~ head.1.weight"])
    assert {group.names[0].removeprefix("student.") for group in tied(whole)} == {
        "encoder.0.weight",
        "head.0.weight",
        "teacher.0.weight",
    }
    unequal = {key: torch.randn_like(value) for key, value in whole.state_dict().items()}
    equal = {**whole.state_dict(), "teacher.0.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"'teacher\.0\.weight' and 'teacher\.1\.weight' are tied, but differ"):
        whole.load_state_dict(equal)
    with pytest.warns(UserWarning, match="cannot hold all weights"):
        assert "teacher.1.weight" in load_plain(whole, unequal, "mean")
    whole.load_state_dict({key: value.clone() for key, value in whole.state_dict().items()}, assign=True)
    assert len(tied(whole)) == 3
    assert untie(whole, ["teacher.1.weight"]) == 1
    assert len(tied(whole)) == 2
    assert untie(whole) == 2
    whole.load_state_dict(unequal)


def test_a_copy_is_untied_wherever_it_is_put():
    model = nn.ModuleDict({"net": nn.ModuleDict({"encoder": pairs(1)})})
    tie(model, ["net.encoder.0.weight ~ net.encoder.1.weight"])
    model["teacher"] = copy.deepcopy(model["net"]["encoder"])
    model["other"] = nn.ModuleDict({"a": nn.ModuleDict({"b": copy.deepcopy(model["net"]["encoder"])})})
    assert len(tied(model)) == 3
    assert untie(model, ["teacher.0.weight"]) == 1
    with pytest.raises(ValueError, match="tied in a model of which this is a part"):
        untie(model["other"])
    assert untie(model) == 2


def test_a_source_of_another_shape_is_left_alone():
    model = nn.ModuleDict({"a": linear(4, 3), "b": linear(3, 4), "c": linear(2, 2), "d": linear(2, 2)})
    tie(model, ["a.weight ~ b.weight | o i -> i o"])
    model["a"] = linear(4, 5)
    model.load_state_dict({key: value for key, value in model.state_dict().items() if key[0] in "cd"}, strict=False)
    assert model["a"].weight.shape == (5, 4)
    assert model["b"].weight.shape == (4, 3)


def test_a_part_of_two_names_is_covered_by_its_models_record():
    model = nn.ModuleDict({"part": pairs(1)})
    tie(model, ["part.0.weight ~ part.1.weight"])
    whole = nn.ModuleDict({"first": model["part"], "model": model})
    assert [group.names for group in tied(whole)] == [("model.part.0.weight", "model.part.1.weight")]
    assert untie(whole) == 1


def test_what_a_tied_wrapper_wraps_is_guarded():
    model = pairs(1)
    wrapper = torch.compile(model, backend="eager")
    tie(wrapper, ["0.weight ~ 1.weight"])
    assert len(tied(wrapper)) == 1
    with pytest.raises(ValueError, match="are tied, but differ"):
        model.load_state_dict(pairs(1).state_dict())
    model.load_state_dict(model.state_dict(), assign=True)
    assert model[0].weight is model[1].weight
    assert untie(wrapper) == 1
    model.load_state_dict(pairs(1).state_dict())


def test_loading_casts():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    lower_rank(model, ["1.weight"], 4)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict()
    load_plain(model, plain)
    torch.testing.assert_close(model[1].weight.float(), plain["1.weight"])


def test_copies_of_other_shapes_are_told():
    model = pairs(1)
    tie(model, ["0.weight ~ 1.weight"])
    wrong = {"0.weight": torch.zeros(2, 2), "1.weight": torch.zeros(3, 2)}
    for unequal in ("source", "mean", "error"):
        with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' are tied, and differ in shape"):
            load_plain(model, wrong, unequal)


def test_looking_changes_nothing():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4))
    tie(model, ["1.weight ~ 2.weight"])
    before = copy.deepcopy(model.state_dict())
    audit(model)
    bake(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


def test_a_missing_copy_is_filled_in_below_compile():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    tie(model, [TRANSPOSED])
    model[1] = torch.compile(model[1], backend="eager")
    state = dict(model.state_dict())
    state.pop("1._orig_mod.weight")
    model.load_state_dict(state)


def test_audit_counts_what_is_stored():
    model = nn.Sequential(*(linear(8, 8) for _ in range(4)))
    share_templates(model, ["*.weight"], 4)
    report = audit(model)
    assert (report.unique, report.virtual, report.saved_bytes) == (272, 256, -64)
    assert "64 bytes more by sharing" in report.counts()
    assert any(
        "computed from other parameters. A model that does not compute them loads" in limit for limit in report.limits
    )


def test_all_or_nothing():
    model = pairs()
    tie(model, ["0.weight ~ 1.weight"])
    model[1].weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="matches no parameter"):
        tie(model, ["nope ~ 2.weight"])
    assert not model[1].weight.any()
    whole = nn.ParameterDict({name: nn.Parameter(torch.ones(2).long(), requires_grad=False) for name in "ab"})
    whole.update({name: nn.Parameter(torch.randn(2)) for name in "cd"})
    before = {name: value.clone() for name, value in whole.items()}
    with pytest.raises(ValueError, match="'a' holds integers, which have no mean"):
        tie(whole, ["c ~ d", "a ~ b"], init="mean")
    assert all(torch.equal(whole[name], value) for name, value in before.items())
    assert tied(whole) == []
    for wrong in ([3], []):
        with pytest.raises(ValueError, match="ties must be a list of at least one Tie, string or mapping"):
            tie(model, wrong)

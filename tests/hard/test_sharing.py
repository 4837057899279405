import copy
import re

import pytest
import torch
from torch import nn
from toys import TIES, Toy

from tying import Tie, resolve
from tying.hard import audit, bake, load_plain, tie, tied, untie
from tying.weights.state_dict import are_equal

TRANSPOSED = "encoder.weight ~ decoder.weight | o i -> i o"


def linears(**layers):
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in layers.items()})


def autoencoder():
    return linears(encoder=(6, 3), decoder=(3, 6))


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def unchanged(model, before):
    now = snapshot(model)
    return now.keys() == before.keys() and all(
        now[name].is_meta or torch.equal(now[name], before[name]) for name in now
    )


def test_plain_tie_is_one_parameter():
    model = linears(a=(3, 3), b=(3, 3), c=(3, 3))
    source = model["a"].weight
    [group] = tie(model, ["*.weight"])
    assert model["b"].weight is model["c"].weight is source
    assert group.names == ("a.weight", "b.weight", "c.weight")
    assert group.parameters == (source,) * 3
    assert group.shared
    assert [tensor is source for tensor in group.tensors()] == [True] * 3
    assert len(list(model.parameters())) == 4


def test_related_tie_is_computed_from_the_source():
    model = autoencoder()
    source = model["encoder"].weight
    [group] = tie(model, [TRANSPOSED])
    assert group.relation == "o i -> i o"
    assert torch.equal(model["decoder"].weight, source.T)
    assert model["decoder"].weight.data_ptr() == source.data_ptr()  # no copy
    assert sum(p.numel() for p in model.parameters()) == 18 + 3 + 6
    with torch.no_grad():
        source.add_(1)
    assert torch.equal(model["decoder"].weight, source.T)
    new = torch.randn(6, 3)
    model["decoder"].weight = new
    assert torch.equal(source, new.T)
    assert source.is_contiguous()


@pytest.mark.parametrize("init", ["source", "mean"])
def test_init_by_hand(init):
    model = autoencoder()
    a, b = model["encoder"].weight.detach().clone(), model["decoder"].weight.detach().clone()
    tie(model, [TRANSPOSED], init)
    torch.testing.assert_close(model["encoder"].weight, a if init == "source" else (a + b.T) / 2, rtol=0, atol=0)


def test_gradient_is_the_sum_over_uses():
    torch.manual_seed(0)
    model = autoencoder().double()
    free = copy.deepcopy(model)
    tie(model, [TRANSPOSED])
    with torch.no_grad():
        free["decoder"].weight.copy_(free["encoder"].weight.T)
    x = torch.randn(5, 6, dtype=torch.float64)
    for m in (model, free):
        (m["decoder"](m["encoder"](x).tanh()) - x).square().sum().backward()
    expected = free["encoder"].weight.grad + free["decoder"].weight.grad.T
    torch.testing.assert_close(model["encoder"].weight.grad, expected, rtol=0, atol=1e-12)


def test_three_way_ties_merge_also_over_calls():
    """Output projection, decoder embedding and encoder embedding (Press and Wolf's three-way tying)."""
    model = nn.ModuleDict({"source": nn.Embedding(7, 4), "target": nn.Embedding(7, 4), "out": nn.Linear(4, 7)})
    before = sum(p.numel() for p in model.parameters())
    tie(model, ["target.weight ~ out.weight"])
    [group] = tie(model, ["source.weight ~ target.weight"])
    assert group.names == ("source.weight", "target.weight", "out.weight")
    assert model["source"].weight is model["out"].weight
    assert before - sum(p.numel() for p in model.parameters()) == 2 * 7 * 4
    assert len(tied(model)) == 1


def test_merging_through_relations_composes_them():
    model = linears(a=(6, 3), b=(3, 6), c=(6, 3), d=(3, 6))
    tie(model, ["b.weight ~ c.weight | o i -> i o"])
    [group] = tie(model, ["a.weight ~ b.weight | o i -> i o"])
    assert group.names == ("a.weight", "b.weight", "c.weight")
    assert model["c"].weight is model["a"].weight  # twice transposed
    assert torch.equal(model["b"].weight, model["a"].weight.T)
    tie(model, ["a.weight ~ d.weight | o i -> i o"])
    assert torch.equal(model["d"].weight, model["a"].weight.T)
    assert sum(p.numel() for name, p in model.named_parameters() if "bias" not in name) == 18


def test_convolution_to_transposed_convolution():
    model = nn.ModuleDict({"down": nn.Conv2d(3, 8, 3), "up": nn.ConvTranspose2d(8, 3, 3)})
    tie(model, ["down.weight ~ up.weight"])  # both are (8, 3, 3, 3)
    assert model["up"].weight is model["down"].weight
    other = nn.ModuleDict({"down": nn.Conv2d(3, 8, 3), "up": nn.Conv2d(8, 3, 3)})
    tie(other, ["down.weight ~ up.weight | o i h w -> i o h w"])
    assert torch.equal(other["up"].weight, other["down"].weight.transpose(0, 1))


def test_whole_modules_without_norms():
    layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # noqa: E731
    model = nn.TransformerEncoder(layer(), 4, enable_nested_tensor=False)
    one = sum(p.numel() for name, p in model.layers[0].named_parameters() if "norm" not in name)
    before = sum(p.numel() for p in model.parameters())
    groups = tie(model, [Tie("layers.*", exclude=("**.norm*",))])
    assert before - sum(p.numel() for p in model.parameters()) == 3 * one
    assert all(len(group) == 4 for group in groups)
    assert model.layers[3].norm1.weight is not model.layers[0].norm1.weight
    assert model.layers[3].self_attn.in_proj_weight is model.layers[0].self_attn.in_proj_weight


def test_groups_of_layers():
    """ALBERT's groups: g = 1 shares all layers, g = L none."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    tie(model, ["[01]", "[23]"])
    assert model[0].weight is model[1].weight
    assert model[2].bias is model[3].bias
    assert model[0].weight is not model[2].weight


def test_recurrent_weights_stay_where_the_module_looks_for_them():
    model = nn.ModuleDict({"a": nn.LSTM(3, 3), "b": nn.LSTM(3, 3)})
    tie(model, ["a ~ b"])
    x = torch.randn(4, 3)
    assert torch.equal(model["a"](x)[0], model["b"](x)[0])
    with torch.no_grad():
        model["a"].weight_hh_l0.add_(1)
    assert torch.equal(model["a"](x)[0], model["b"](x)[0])


def test_exclude_may_be_a_list():
    model = linears(a=(3, 3), b=(3, 3))
    assert len(tie(model, [Tie("[ab]", exclude=["*.bias"])])) == 1
    assert model["a"].bias is not model["b"].bias


def test_tying_twice_changes_nothing():
    model = Toy()
    groups = tie(model, TIES)
    parameters = list(model.parameters())
    again = tie(model, TIES)
    assert [group.names for group in again] == [group.names for group in groups]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert tie(model, TIES[:1])[0].names == groups[0].names


def test_only_the_groups_of_these_ties_are_returned():
    model = linears(a=(3, 3), b=(3, 3), c=(2, 2), d=(2, 2))
    tie(model, ["a.weight ~ b.weight"])
    [group] = tie(model, ["c.weight ~ d.weight"])
    assert group.names == ("c.weight", "d.weight")
    assert len(tied(model)) == 2


def test_untie():
    model = Toy()
    tie(model, TIES)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    assert untie(model) == 3
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in Toy().named_parameters()]
    assert type(model.decoder[0]) is nn.Linear
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert untie(model) == 0
    with torch.no_grad():
        model.encoder[0].weight.add_(1)
    assert torch.equal(model.state_dict()["decoder.2.weight"], values["decoder.2.weight"])
    model.load_state_dict(Toy(seed=3).state_dict())  # unequal copies: nobody guards them now
    tie(model, TIES)
    assert len(tied(model)) == 3


UNEQUAL = r"'(inner\.)?encoder\.weight' and '(inner\.)?decoder\.weight' are tied, but differ in this state dict"


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside a parent"])
@pytest.mark.parametrize("copied", [False, True], ids=["", "deepcopy"])
@pytest.mark.parametrize("assign", [False, True])
def test_unequal_copies_are_refused_before_anything_is_written(inside, copied, assign):
    model = autoencoder()
    tie(model, [TRANSPOSED])
    if inside:
        model = nn.ModuleDict({"inner": model})
    if copied:
        model = copy.deepcopy(model)
    before = snapshot(model)
    wrong = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=UNEQUAL):
        model.load_state_dict(wrong, assign=assign)
    assert unchanged(model, before)
    prefix = "inner." if inside else ""
    wrong[f"{prefix}decoder.weight"] = wrong[f"{prefix}encoder.weight"].T.clone()
    model.load_state_dict(wrong, assign=assign)
    inner = model["inner"] if inside else model
    assert torch.equal(inner["decoder"].weight, wrong[f"{prefix}decoder.weight"])
    assert len(tied(inner)) == 1


def test_missing_copies_are_filled_in():
    model = autoencoder()
    tie(model, [TRANSPOSED])
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items() if name != "decoder.weight"}
    model.load_state_dict(state)
    assert torch.equal(model["decoder"].weight, state["encoder.weight"].T)
    state["decoder.weight"] = state.pop("encoder.weight").T + 1
    model.load_state_dict(state)
    assert torch.equal(model["encoder"].weight, state["decoder.weight"].T)


def test_what_is_taken_apart_is_found_and_mended():
    model = autoencoder()
    tie(model, [TRANSPOSED])
    model["encoder"].load_state_dict(nn.Linear(6, 3).state_dict(), assign=True)  # a part alone: nobody can tie again
    with pytest.raises(ValueError, match=r"'decoder.weight' was tied to 'encoder.weight', and is another tensor now"):
        tied(model)
    tie(model, [TRANSPOSED])
    assert torch.equal(model["decoder"].weight, model["encoder"].weight.T)
    assert len(tied(model)) == 1


@pytest.mark.parametrize(
    ("prepare", "ties", "told"),
    [
        (lambda m: m["decoder"].weight.requires_grad_(False), [TRANSPOSED], r"'decoder.weight' cannot be tied to 'encoder.weight': requires_grad is False for one and True"),
        (lambda m: m["decoder"].double(), [TRANSPOSED], r"dtype is torch.float64 for one and torch.float32"),
        (lambda m: m["decoder"].to("meta"), [TRANSPOSED], r"device is meta for one and cpu"),
        (lambda m: nn.utils.parametrizations.weight_norm(m["decoder"]), ["encoder.weight ~ decoder.parametrizations.weight.original1 | o i -> i o"], "it is parametrized: it is computed from other weights"),
        (lambda m: tie(m, [TRANSPOSED]), ["other.weight ~ decoder.weight | o i -> i o"], r"'other.weight' and 'decoder.weight' do not fit: relation 'o i -> i o' does not map shape \(6, 3\) to shape \(6, 3\)"),
        (lambda m: m.update({"lazy": nn.LazyLinear(3)}), ["encoder.bias ~ lazy.bias"], "has no shape yet, since its layer is lazy: call the model on a batch"),
        (lambda m: m.update({"lstm": nn.LSTM(2, 3)}), ["lstm.weight_ih_l0 ~ lstm.weight_hh_l0 | (a o) i -> (a o) i"], "do not map|does not map"),
        (lambda m: m.update({"lstm": nn.LSTM(3, 3), "wide": nn.Linear(12, 3)}), ["wide.weight ~ lstm.weight_ih_l0 | o i -> i o"], "LSTM keeps its weights where they cannot be computed. Make it the source"),
        (lambda m: None, ["encoder.wieght ~ decoder.weight"], "Nearest existing names: encoder.weight"),
        (lambda m: None, ["encoder.weight ~ decoder.weight"], r"shapes \(3, 6\) and \(6, 3\) differ"),
    ],
)  # fmt: skip
def test_mistakes_change_nothing(prepare, ties, told):
    """Either all ties of a call are in place, or none."""
    model = linears(encoder=(6, 3), decoder=(3, 6), other=(3, 6), a=(2, 2), b=(2, 2))
    prepare(model)
    try:
        before = snapshot(model)
    except ValueError:  # a lazy layer has nothing to copy
        before = None
    with pytest.raises(ValueError, match=told):
        tie(model, ["a.weight ~ b.weight", *ties], init="mean")
    assert model["a"].weight is not model["b"].weight
    assert before is None or unchanged(model, before)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="init must be 'source' or 'mean', not 'first'"):
        tie(autoencoder(), [TRANSPOSED], "first")
    with pytest.raises(ValueError, match=r"ties must be a list; write \["):
        tie(autoencoder(), TRANSPOSED)


def test_resolve_sees_the_ties():
    model = linears(a=(3, 3), b=(3, 3), c=(3, 3))
    tie(model, ["a.weight ~ b.weight"])
    [group] = resolve(model, ["*.weight"])
    assert group.names == ("a.weight", "c.weight")


def test_equality_is_that_of_bits():
    nan = torch.tensor([float("nan"), 1.0])
    assert are_equal(nan, nan.clone())
    assert not are_equal(torch.zeros(2), -torch.zeros(2))
    assert not are_equal(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not are_equal(torch.zeros(2), torch.zeros(2, 1))


def test_what_others_parametrize_is_no_longer_equal():
    model = linears(a=(3, 3), b=(3, 3))
    tie(model, ["a.weight ~ b.weight"])
    nn.utils.parametrizations.spectral_norm(model["a"])
    with pytest.raises(ValueError, match=r"'a.weight' was tied to 'a.weight', and something has parametrized it since"):
        tied(model)
    assert "something has parametrized it since" in audit(model).problems[0]
    model.load_state_dict(model.state_dict())
    other = linears(a=(3, 3), b=(3, 3))
    tie(other, ["a.weight ~ b.weight"])
    nn.utils.parametrizations.weight_norm(other["b"])
    assert "no longer a parameter of the model: something has removed or parametrized it" in audit(other).problems[0]
    other.load_state_dict(other.state_dict())
    assert (untie(model), untie(other)) == (1, 0)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_part_is_guarded_too(assign):
    """As `model.network.load_state_dict(pretrained)` does."""
    model = nn.ModuleDict({"net": autoencoder(), "head": nn.Linear(2, 2)})
    tie(model, ["net.encoder.weight ~ net.decoder.weight | o i -> i o"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'encoder\.weight' and 'decoder\.weight' are tied, but differ"):
        model["net"].load_state_dict(autoencoder().state_dict(), assign=assign)
    assert unchanged(model, before)
    plain = autoencoder()
    with torch.no_grad():
        plain["decoder"].weight.copy_(plain["encoder"].weight.T)
    model["net"].load_state_dict(plain.state_dict(), assign=assign)
    assert len(tied(model)) == 1
    assert torch.equal(model["net"]["decoder"].weight, plain["decoder"].weight)
    untie(model)
    model["net"].load_state_dict(autoencoder().state_dict(), assign=assign)


def test_functions_see_the_ties_of_parts_and_behind_wrappers():
    inner = autoencoder()
    tie(inner, [TRANSPOSED])
    for model in (nn.ModuleDict({"net": inner}), torch.compile(inner)):
        prefix = "net." if isinstance(model, nn.ModuleDict) else ""
        assert [group.names for group in tied(model)] == [(f"{prefix}encoder.weight", f"{prefix}decoder.weight")]
        assert audit(model).relations == ("o i -> i o",)
        assert sorted(bake(model)) == sorted(prefix + name for name in autoencoder().state_dict())
        unequal = {prefix + name: torch.randn_like(value) for name, value in inner.state_dict().items()}
        with pytest.warns(UserWarning, match="cannot hold all weights"):
            assert [*load_plain(model, unequal, "source")] == [f"{prefix}decoder.weight"]
        assert torch.equal(inner["encoder"].weight, unequal[f"{prefix}encoder.weight"])
    assert untie(nn.ModuleDict({"net": inner})) == 1
    assert tied(inner) == []


def test_missing_copies_below_wrappers_are_filled_in():
    model = linears(a=(3, 3), b=(3, 3))
    tie(model, ["a.weight ~ b.weight"])
    model["b"] = torch.compile(model["b"])
    state = {name: value for name, value in model.state_dict().items() if name != "b._orig_mod.weight"}
    assert len(state) == 3
    model.load_state_dict(state)


def test_a_module_of_two_names_is_tied_once():
    model = autoencoder()
    model["again"] = model["decoder"]
    [group] = tie(model, [TRANSPOSED])
    assert set(group.names) == {"encoder.weight", "decoder.weight", "again.weight"}
    assert torch.equal(model["again"].weight, model["encoder"].weight.T)
    assert untie(model) == 1
    assert model["again"].weight is model["decoder"].weight
    assert not hasattr(model["decoder"], "parametrizations")


def test_broken_ties_are_mended_before_new_ones():
    model = linears(a=(3, 3), b=(3, 3), c=(3, 3))
    tie(model, ["a.weight ~ b.weight"])
    model["b"].weight = nn.Parameter(torch.zeros(3, 3))
    tie(model, ["a.weight ~ b.weight", "a.bias ~ c.bias"])
    assert model["b"].weight is model["a"].weight
    assert len(tied(model)) == 2


def test_untie_some():
    model = Toy()
    tie(model, TIES)
    assert untie(model, ["encoder.0.weight"]) == 1
    assert [group.names[0] for group in tied(model)] == ["encoder.2.weight", "encoder.0.bias"]
    with pytest.raises(ValueError, match="are tied, but differ"):
        model.load_state_dict(Toy(seed=4).state_dict())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (torch.zeros(2, 2), "has shape (2, 2) in this state dict"),
        (torch.zeros(2), "has shape (2,)"),
        ("text", "is not a tensor in this state dict, but a str"),
    ],
)
def test_odd_entries_of_a_state_dict(wrong, told):
    model = autoencoder()
    tie(model, [TRANSPOSED])
    state = {**model.state_dict(), "decoder.weight": wrong}
    for load in (model.load_state_dict, lambda state: load_plain(model, state)):
        with pytest.raises(ValueError, match=re.escape(f"'decoder.weight' {told}")):
            load(state)


def test_one_layer_at_all_depths_leaves_the_base_size_of_albert():
    words, size, inner = 30_000, 128, 768
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(inner, nhead=12, dim_feedforward=3072)
        encoder = nn.TransformerEncoder(layer, num_layers=12, enable_nested_tensor=False)
        embeddings = [nn.Embedding(count, size) for count in (words, 512, 2)]
        ends = [nn.LayerNorm(size), nn.Linear(size, inner), nn.Linear(inner, inner)]
        model = nn.ModuleDict({"front": nn.ModuleList([*embeddings, *ends]), "encoder": encoder})
    tie(model, ["encoder.layers.*"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_683_584

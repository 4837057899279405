"""What state dicts hold of tied weights, and what loading them with missing names reports."""

import copy
import io
from multiprocessing.reduction import ForkingPickler
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from tying.hard import tie
from tying.hashing import hash_weights
from tying.torch_workarounds import viewed

TIES = {
    "plain": ["a.weight ~ b.weight"],
    "transposed": ["a.weight ~ b.weight | o i -> i o"],
    "copied": ["a.weight ~ b.weight | o i -> (i o) 1"],  # no view of its source
}


class Pair(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(1, 36) if kind == "copied" else nn.Linear(6, 6)


class Parent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net, self.head = tied(kind), nn.Linear(2, 2)


def tied(kind):
    net = Pair(kind)
    tie(net, TIES[kind])
    return net


def size_of(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return file.tell()


def test_a_transposed_entry_is_contiguous_and_pickled_as_a_view():
    net = tied("transposed")
    state = net.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    assert all(value.is_contiguous() for value in state.values())
    assert torch.equal(state["b.weight"], net.b.weight)
    assert size_of(state) < size_of({**state, "b.weight": state["b.weight"].clone()})
    assert size_of(copy.deepcopy(state)) == size_of(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["b.weight"]) is torch.Tensor
    assert loaded["b.weight"].untyped_storage().data_ptr() == loaded["a.weight"].untyped_storage().data_ptr()
    again = ForkingPickler.loads(ForkingPickler.dumps(state))  # as between processes
    assert all(torch.equal(value, again[name]) for name, value in state.items())


def test_an_entry_stands_for_the_weight_until_it_is_written_to():
    net, fresh = tied("transposed"), tied("transposed")
    state = net.state_dict()
    with torch.no_grad():
        net.a.weight.mul_(2)  # as an optimizer's step
    for entries in (state, copy.deepcopy(state)):
        fresh.load_state_dict(entries)
        assert torch.equal(fresh.b.weight, net.b.weight)
    state["b.weight"].zero_()
    for entries in (state, copy.deepcopy(state)):
        assert not entries["b.weight"].any()
        with pytest.raises(ValueError, match=r"'a.weight' and 'b.weight' are tied, but differ"):
            fresh.load_state_dict(entries)
    assert net.b.weight.any()


@pytest.mark.parametrize("kind", TIES)
def test_entries_become_parameters_of_a_plain_model(kind):
    net, plain = tied(kind), Pair(kind)
    plain.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(plain.b.weight, net.b.weight)
    assert type(plain.b.weight) is nn.Parameter
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).b.weight, net.b.weight)


@pytest.mark.parametrize("kind", TIES)
def test_state_dicts_of_inference_mode_are_those_of_training(kind):
    net, fresh = tied(kind), tied(kind)
    with torch.inference_mode():
        state = net.state_dict()
    assert size_of(state) == size_of(net.state_dict())
    fresh.load_state_dict(state)
    assert torch.equal(fresh.b.weight, net.b.weight)


def test_the_memory_of_an_entry_is_freed_with_it():
    entry = tied("transposed").state_dict()["b.weight"]
    alive = ref(entry)
    del entry
    assert alive() is None


@pytest.mark.parametrize("kind", TIES)
def test_entries_with_gradients_or_without_values_are_plain(kind):
    net = tied(kind)
    kept = net.state_dict(keep_vars=True)
    kept["b.weight"].sum().backward()
    assert torch.equal(net.a.weight.grad, torch.ones(6, 6))
    for state in (kept, net.to("meta").state_dict()):
        assert all(viewed(value) is value for value in state.values())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("where", ["alone", "in a parent"])
@pytest.mark.parametrize("missing", ["a.weight", "b.weight"])
@pytest.mark.parametrize("kind", TIES)
def test_an_absent_name_is_reported_and_follows(kind, missing, where, assign):
    make, prefix = (lambda: tied(kind), "") if where == "alone" else (lambda: Parent(kind), "net.")
    model, fresh = make(), make()
    state = {name: value.clone() for name, value in model.state_dict().items() if name != prefix + missing}
    result = fresh.load_state_dict(state, strict=False, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([prefix + missing], [])
    expected, loaded = model.state_dict(), fresh.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())
    assert make().load_state_dict(state).missing_keys == []  # a strict load fills it in


@pytest.mark.parametrize("kind", TIES)
def test_a_parted_tie_follows_a_state_dict_without_its_source(kind):
    model, parted = tied(kind), tied(kind).to("meta").to_empty(device="cpu")
    state = {name: value for name, value in model.state_dict().items() if name != "a.weight"}
    assert parted.load_state_dict(state, strict=False).missing_keys == ["a.weight"]
    assert torch.equal(parted.a.weight, model.a.weight)
    assert torch.equal(parted.b.weight, model.b.weight)


@pytest.mark.parametrize("kind", TIES)
def test_names_that_are_all_absent_are_reported_plainly(kind):
    net = tied(kind)
    state = {name: value for name, value in net.state_dict().items() if "bias" in name}
    assert sorted(net.load_state_dict(state, strict=False).missing_keys) == ["a.weight", "b.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "a.weight", "b.weight"'):
        net.load_state_dict(state)


@pytest.mark.parametrize("kind", TIES)
def test_safetensors_files_of_one_network_load_into_others(kind, tmp_path):
    """A file of a tied network has the names that a loader of plain networks looks for, or those that it fills in."""
    net, fresh = tied(kind), tied(kind)
    save_model(net, tmp_path / "net.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "net.safetensors"))
    assert torch.equal(fresh.b.weight, net.b.weight)
    with torch.no_grad():
        fresh.a.weight.zero_()
    assert load_model(fresh, tmp_path / "net.safetensors") == (set(), [])
    assert torch.equal(fresh.b.weight, net.b.weight)


def test_a_table_that_layers_share_is_reported_once_for_each_that_is_absent():
    models = [nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2)]
    for model in models:
        hash_weights(model, ["*.weight"], 0.5, scope="network")
    state = models[0].state_dict()
    del state["1.table"]
    assert models[1].load_state_dict(state, strict=False).missing_keys == ["1.table"]
    assert torch.equal(models[1][1].weight, models[0][1].weight)


def test_an_average_over_state_dicts_is_exact():
    """By the entries, as some averages are kept: a weight tied by hand would be averaged twice."""
    net, average = tied("transposed").double(), tied("transposed").double()
    with torch.no_grad():
        net.a.weight.normal_()
    expected = (average.a.weight + 3 * net.a.weight) / 4
    for mean, value in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        mean.mul_(0.25).add_(value, alpha=0.75)
    torch.testing.assert_close(average.a.weight, expected, rtol=0, atol=1e-14)
    assert torch.equal(average.b.weight, average.a.weight.T)

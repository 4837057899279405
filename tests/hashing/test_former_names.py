"""Hashes and parametrizations of version 0.1.0 in users' files: former names work, and warn."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tying.hashing
from tying.errors import ConfigurationError
from tying.hashing import (
    DirichletHash,
    Hash,
    HashedLinear,
    HashedParametrization,
    ModulusHash,
    RecurrentHash,
    SeededHash,
    hash_weights,
)
from tying.hashing.fast_paths import Blocks, RepeatedRows

CALLS = {
    "draw": lambda hash: hash.draw(5),
    "seeded": lambda hash: hash.seeded(3),
    "structure": lambda hash: hash.structure((2, 3), 5, 0),
    "takes_vectors": lambda hash: hash.takes_vectors,
}


@pytest.mark.parametrize(
    ("former", "current", "hash"),
    [
        ("draw", "state", DirichletHash(seed=1)),
        ("seeded", "with_salt", DirichletHash(seed=1)),
        ("structure", "fast_path", ModulusHash()),
        ("takes_vectors", "include_biases", RecurrentHash(2)),
    ],
)
def test_former_names_of_hashes(former, current, hash):
    with pytest.warns(DeprecationWarning, match=rf"Hash\.{former} is now called {current}"):
        result = CALLS[former](hash)
    arguments = {"state": (5,), "with_salt": (3,), "fast_path": ((2, 3), 5, 0)}.get(current)
    expected = getattr(hash, current) if arguments is None else getattr(hash, current)(*arguments)
    assert torch.equal(result, expected) if isinstance(result, torch.Tensor) else result == expected


def test_former_names_of_parametrizations():
    with pytest.warns(DeprecationWarning, match="VirtualWeight is now called HashedParametrization"):
        assert tying.hashing.VirtualWeight is HashedParametrization
    weight = HashedParametrization((2, 3), 4, ModulusHash(), sign=True)
    with pytest.warns(DeprecationWarning, match="is now called slots"):
        assert torch.equal(weight.entries(), weight.slots())
    with pytest.warns(DeprecationWarning, match="is now called extended_slots"):
        assert torch.equal(weight.extended_entries(), weight.extended_slots())
    with pytest.warns(DeprecationWarning, match="is now called state"):
        assert weight.common is weight.state
    with pytest.warns(DeprecationWarning, match="is now called fast_path"):
        assert weight.structure is None


@pytest.mark.filterwarnings("always:.*is now called:DeprecationWarning")
def test_former_overrides_are_used(recwarn):
    @dataclass(frozen=True)
    class Shifted(SeededHash):
        seed: int = 0
        takes_vectors = True

        def slot(self, ids, table_size, drawn=None):
            return (ids + drawn) % table_size

        def draw(self, table_size):
            assert super().draw(table_size) is None
            return torch.tensor([self.seed])

        def seeded(self, salt):
            return super().seeded(salt + 1)

        def structure(self, shape, table_size, first):
            return RepeatedRows(tuple(shape), table_size, (first + self.seed) % table_size)

    names = {str(warning.message).split()[0].rpartition(".")[2] for warning in recwarn}
    assert names == {"draw", "seeded", "structure", "takes_vectors"}
    hash = Shifted(3)
    assert hash.index(4, 8).tolist() == [3, 4, 5, 6]
    assert hash.with_salt(4) == Shifted(3 ^ 5)
    layer = HashedLinear(4, 8, table_ratio=0.25, hash=hash)
    assert (layer.virtual.index, hash.include_biases) == ("structured", True)
    assert torch.equal(layer.weight.flatten(), layer.table[layer.virtual.slots().flatten()])
    assert torch.equal(layer.state_dict()["virtual.drawn"], torch.tensor([3]))


@pytest.mark.filterwarnings("ignore:.*is now called:DeprecationWarning")
def test_a_former_override_calls_that_of_its_parent():
    class Reversed(DirichletHash):
        def draw(self, table_size):
            return super().draw(table_size).flip(0).flip(0)

    assert torch.equal(Reversed(seed=1).index(9, 4), DirichletHash(seed=1).index(9, 4))


@pytest.mark.parametrize("method", ["check", "check_layers", "check_shape"])
def test_former_checks_are_called(method):
    class Refusing(ModulusHash):
        pass

    def refuse(self, *arguments):
        getattr(super(Refusing, self), method)(*arguments)
        raise ConfigurationError(f"{method} was called")

    setattr(Refusing, method, refuse)
    with pytest.raises(ConfigurationError, match=f"{method} was called"):
        hash_weights(nn.Linear(4, 4), ["weight"], 0.5, Refusing())


def test_validate_is_called_with_what_is_known():
    calls = []

    class Recording(ModulusHash):
        def validate(self, shapes, table_size=None, scope=None):
            super().validate(shapes, table_size, scope)
            calls.append(([tuple(shape) for shape in shapes], table_size, scope))

    hash_weights(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)), ["*.weight"], 0.5, Recording(), scope="network")
    assert calls == [
        ([(2, 4), (3, 2)], None, "network"),
        ([(14,)], 7, None),
        ([(2, 4)], None, None),
        ([(3, 2)], None, None),
    ]


def test_a_fast_path_is_for_the_slots_that_it_was_written_for():
    class Parent(Hash):
        def slot(self, ids, table_size):
            return ids // 2 * 2 % table_size + ids % 2

        def fast_path(self, shape, table_size, first):
            return Blocks(tuple(shape), 2, first, lambda ids: self.slot(ids, table_size))

    class Child(Parent):
        def slot(self, ids, table_size):
            return (ids + 1) % table_size

    assert HashedParametrization((4, 4), 8, Parent()).index == "structured"
    assert HashedParametrization((4, 4), 8, Child()).index == "stored"

import pytest
import torch

from tying import ConfigurationError
from tying.selection.relation import Relation, bind, check

PATTERNS = [
    ("o i -> i o", (3, 5), (5, 3)),
    ("o i h w -> i o h w", (4, 3, 2, 2), (3, 4, 2, 2)),
    ("o i -> o i 1 1", (4, 3), (4, 3, 1, 1)),
    ("o (h w) -> (o h) w", (4, 6), (8, 3)),
    ("(g o) i -> g i o", (6, 5), (2, 5, 3)),
    ("... a b -> ... b a", (2, 3, 4, 5), (2, 3, 5, 4)),
    ("a ... -> ... a", (2, 3, 4), (3, 4, 2)),
]


@pytest.mark.parametrize(("pattern", "source", "target"), PATTERNS)
def test_inverse_undoes(pattern, source, target):
    relation = bind(pattern, source, target)
    tensor = torch.randn(source)
    there = relation(tensor)
    assert there.shape == target
    assert torch.equal(relation.inverse()(there), tensor)
    assert relation.then(relation.inverse()) == Relation()
    assert relation.inverse().inverse() == relation


def test_transpose_by_hand():
    assert torch.equal(
        bind("o i -> i o", (2, 2), (2, 2))(torch.tensor([[1, 2], [3, 4]])), torch.tensor([[1, 3], [2, 4]])
    )


def test_composition_is_compared_entry_by_entry():
    first, second = bind("a b -> b a", (3, 3), (3, 3)), bind("x y -> y x", (3, 3), (3, 3))
    assert first.then(second) != Relation()
    assert first.then(second).agrees_with(Relation(), (3, 3))
    assert not first.agrees_with(Relation(), (3, 3))


def test_same_order_is_identity():
    assert bind("a b -> a b", (3, 4), (3, 4)) == Relation()


@pytest.mark.parametrize(
    "pattern",
    [
        "o i -> o",
        "o -> o i",
        "o i",
        "o i -> i o -> o i",
        "o o -> o",
        "o 2 -> 2 o",
        "o ? -> ? o",
        "tensor i -> i tensor",
        "... ellipsis0 -> ellipsis0 ...",
    ],
)
def test_not_invertible(pattern):
    with pytest.raises(ConfigurationError, match="relation"):
        check(pattern)


def test_one_sided_axes_are_named():
    with pytest.raises(
        ConfigurationError, match=r"relation 'o i -> o' cannot be inverted: axes i are on one side only"
    ):
        bind("o i -> o", (2, 3), (2,))


@pytest.mark.parametrize(
    ("pattern", "source", "target"),
    [
        (None, (2, 3), (3, 2)),
        ("o i -> i o", (2, 3), (2, 3)),
        ("o i -> i o", (2, 3, 4), (3, 2)),
        ("o (h w) -> (o h) w", (4, 6), (9, 3)),
        ("(a b) c -> (b a) c", (4, 2), (4, 2)),
    ],
)
def test_shapes_that_do_not_meet(pattern, source, target):
    with pytest.raises(ConfigurationError, match=r"\(.*\).*\(.*\)"):
        bind(pattern, source, target)


def test_relations_agree_whatever_new_tensors_are():
    with torch.device("meta"):
        assert not bind("o i -> i o", (2, 3), (3, 2)).agrees_with(bind("o i -> (o i)", (2, 3), (6,)), (2, 3))
        assert bind("a b -> b a", (2, 3), (3, 2)).agrees_with(bind("o i -> i o", (2, 3), (3, 2)), (2, 3))

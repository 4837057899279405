"""Samples taken out and added in, in every memory format and in nested arguments."""

import pytest
import torch

from tying.depth.rows import add_rows, is_rows, take_arguments, take_rows

D = torch.float64
LAYOUTS = {
    "contiguous": lambda: torch.randn(5, 3, 4, 2, dtype=D),
    "channels last": lambda: torch.randn(5, 3, 4, 2, dtype=D).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(3, 5, 4, dtype=D).transpose(0, 1),
    "sliced": lambda: torch.randn(5, 6, 4, dtype=D)[:, ::2],
    "expanded": lambda: torch.randn(5, 1, 4, dtype=D).expand(5, 3, 4),
    "vector": lambda: torch.randn(5, dtype=D),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_are_those_of_torch(layout, dim):
    torch.manual_seed(0)
    x = LAYOUTS[layout]()
    if dim >= x.ndim:
        pytest.skip("it has one dimension")
    rows = torch.tensor([2, 0])
    taken = take_rows(x, rows, dim)
    assert torch.equal(taken, x.index_select(dim, rows))
    added = torch.randn_like(taken)
    total = add_rows(x, rows, added, dim, 0.5)
    assert torch.equal(total, x.index_add(dim, rows, added, alpha=0.5))
    if layout in ("contiguous", "channels last") and dim == 0:
        assert total.stride() == x.stride()
        assert sorted(range(4), key=taken.stride) == sorted(range(4), key=x.stride)
    x, added = (one.clone().requires_grad_() for one in (x, added))
    assert torch.autograd.gradcheck(lambda x, added: add_rows(x, rows, added, dim, 0.5), (x, added))
    assert torch.autograd.gradgradcheck(lambda x, added: add_rows(x, rows, added, dim, 0.5).square(), (x, added))
    assert torch.autograd.gradcheck(lambda x: take_rows(x, rows, dim), (x,))


def test_dtypes_are_promoted():
    assert add_rows(torch.zeros(3, 2, dtype=torch.bfloat16), torch.tensor([1]), torch.ones(1, 2)).dtype == torch.float32
    assert add_rows(torch.zeros(3, 2), torch.tensor([1]), torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_arguments_of_some_samples():
    """Rows are taken in nested tuples, lists and dicts; what all samples share stays whole."""
    rows, per_sample, common = torch.tensor([2, 0]), torch.arange(8).view(4, 2), torch.arange(2)[None]
    nested = {"pair": (per_sample, common), "list": [per_sample, 3], "scale": torch.tensor(2.0), "name": "x"}
    taken = take_arguments(nested, rows, 4, "nested")
    assert torch.equal(taken["pair"][0], per_sample[rows])
    assert taken["pair"][1] is common
    assert torch.equal(taken["list"][0], per_sample[rows])
    assert taken["list"][1:] == [3]
    assert taken["scale"] is nested["scale"]
    assert taken["name"] == "x"
    named = torch.return_types.max((per_sample, per_sample))
    assert torch.equal(take_arguments([named], rows, 4, "nested")[0][1], per_sample[rows])


def test_rows_are_told_by_the_shape():
    assert is_rows(torch.zeros(4, 2), 4)
    assert is_rows(torch.zeros(4), 4)
    assert is_rows(torch.zeros(4, 4, dtype=torch.int64), 4)  # positions of tokens
    assert is_rows(torch.zeros(1, 1), 1)
    assert is_rows(torch.zeros(1, 4), 4) is False
    assert is_rows(torch.tensor(1.0), 4) is False
    assert is_rows(torch.zeros(3, 2), 4) is None
    assert is_rows(torch.zeros(4, 4), 4) is None  # a mask of attention
    assert is_rows(torch.zeros(4, 4, dtype=torch.bool), 4) is None

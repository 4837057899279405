"""What every family computes: in each type of numbers as in float64, and its gradients as differences have them."""

import pytest
import torch
from torch.autograd import gradcheck

from tying.depth import fractal_join, skip_forward, stochastic_depth, swapout
from tying.hard.hypernetwork import generate
from tying.hard.low_rank import low_rank, low_rank_plus_diagonal
from tying.hard.templates import mix_templates
from tying.hashing import CodebookHash, HashedParametrization, ModulusHash, UniformHash
from tying.soft import huber, l1, l2, mixture_nll

MASK = torch.arange(24).view(4, 6) % 3 > 0
ASSIGNED = torch.arange(24) % 5 - 1
FAMILIES = {  # the function, and the shapes of its arguments
    "l2": (lambda *w: l2(w), [(4, 6)] * 3),
    "l1": (lambda *w: l1(w), [(4, 6)] * 3),
    "huber": (lambda a, b: huber(a, b, 0.5), [(4, 6)] * 2),
    "mixture": (mixture_nll, [(4, 6), (3,), (3,), (3,)]),
    "low rank": (low_rank, [(4, 2), (2, 6)]),
    "low rank and a diagonal": (low_rank_plus_diagonal, [(6, 2), (2, 6), (6,)]),
    "templates": (mix_templates, [(2, 4, 6), (2,)]),
    "generated": (generate, [(3,), (2, 4, 3), (2, 4), (2, 1, 1, 4), (2, 1, 1)]),
    "hashed, signed, half kept": (HashedParametrization((4, 6), 7, UniformHash(0), sign=True, density=0.5), [(7,)]),
    "hashed, structured": (HashedParametrization((4, 6), 7, ModulusHash(), scale=0.7), [(7,)]),
    "clustered": (HashedParametrization((4, 6), 4, CodebookHash(ASSIGNED)), [(4,)]),
    "stochastic depth": (lambda x, f: stochastic_depth(x, lambda: f, keep=0.3, training=False), [(4, 6)] * 2),
    "swapout": (lambda x, f: swapout(x, f, MASK, ~MASK | (x > 0)), [(4, 6)] * 2),
    "skip forward": (lambda x, f: skip_forward(x, f, MASK), [(4, 6)] * 2),
    "fractal": (lambda *x: fractal_join(x), [(4, 6)] * 3),
}


def arguments(family, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, **options).to(dtype) for shape in FAMILIES[family][1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_of_each_type(dtype, family):
    function, given = FAMILIES[family][0], arguments(family, dtype)
    expected, found = function(*(one.double() for one in given)), function(*given)
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert float(error) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family):
    given = [one.requires_grad_() for one in arguments(family)]
    assert gradcheck(FAMILIES[family][0], given)

"""Merges given their draws, at their limits, and on average."""

import math
import sys

import pytest
import torch
from torch import nn

from tying import ConfigurationError
from tying.depth import (
    FeedForward,
    Residual,
    Sampled,
    SkipForward,
    StochasticDepth,
    Sum,
    Swapout,
    keep_schedule,
    stochastic_depth,
)
from tying.depth.draws import draw, keep_mask
from tying.depth.merge import Branch, skip_branch

X = torch.randn(6, 5, dtype=torch.float64)


def block(merge, width=5, norm=False, dtype=torch.float64):
    torch.manual_seed(7)
    parts = [nn.Linear(width, width), *([nn.BatchNorm1d(width)] if norm else []), nn.Tanh()]
    return Residual(nn.Sequential(*parts).to(dtype), merge=merge)


def at(seed, function):
    torch.manual_seed(seed)
    return function()


# draws


@pytest.mark.parametrize("keep", [0.0, 2**-16, 0.1, 0.5, 0.73, 1 - 2**-16, 1.0])
def test_probabilities_of_masks_are_exact(keep, monkeypatch):
    """Each of the 2¹⁶ values that a draw may have, once."""
    every = torch.arange(2**16).to(torch.int16).view(torch.int64)  # wraps around
    monkeypatch.setattr(torch.Tensor, "random_", lambda words, *_: words.copy_(every))
    assert int(keep_mask(keep, (2**16,)).sum()) == round(keep * 2**16)


def test_masks_are_independent_and_as_frequent_as_said():
    torch.manual_seed(0)
    mask = keep_mask(0.3, (1000, 1003)).double()
    bound = 5 * math.sqrt(0.3 * 0.7 / mask.numel())  # five standard deviations, of a fixed seed
    assert abs(float(mask.mean()) - 0.3) < bound
    for lag in (1, 2, 3, 4, 1003):
        flat = mask.flatten() - 0.3
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 5 * 0.21 / math.sqrt(mask.numel())
    assert keep_mask(0.5, (3, 2, 1)).shape == (3, 2, 1)
    assert keep_mask(0.5, ()).shape == ()


def test_one_draw_by_the_global_generator():
    drawn = at(0, lambda: [draw(0.3) for _ in range(4000)])
    assert drawn == at(0, lambda: [draw(0.3) for _ in range(4000)])
    assert abs(sum(drawn) / 4000 - 0.3) < 5 * math.sqrt(0.21 / 4000)


# limits

ALL_ONE = [
    StochasticDepth(1.0),
    StochasticDepth(1.0, "row"),
    StochasticDepth(1.0, "subset", "train"),
    Swapout(1.0, 1.0),
]


@pytest.mark.parametrize("merge", ALL_ONE, ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_keeping_all_is_the_sum_bitwise(merge, training):
    own, state = block(merge).train(training), torch.get_rng_state()
    assert torch.equal(own(X), block(Sum())(X))
    torch.set_rng_state(state)
    own(X)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn


@pytest.mark.parametrize("mode", ["batch", "row", "subset", "auto"])
@pytest.mark.parametrize("scale", ["test", "train"])
@pytest.mark.parametrize("training", [True, False])
def test_keeping_none_is_the_block_absent(mode, scale, training):
    dropped = block(StochasticDepth(0.0, mode, scale)).train(training)
    assert torch.equal(dropped(X), X)
    dropped(X).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in dropped.parameters())


def test_the_table_of_swapout_given_the_masks():
    f = block(Sum()).branch(X)
    first, second = (keep_mask(0.5, X.shape) for _ in range(2))
    one, zero = torch.ones_like(first), torch.zeros_like(first)

    def merged(merge, *masks):
        """With these masks in place of draws, in order."""
        given = iter(masks)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["tying.depth.swapout"], "keep_mask", lambda *_: next(given))
            return merge(X, lambda: f)

    assert torch.equal(merged(Swapout(1.0, 1.0)), X + f)  # residual
    assert torch.equal(merged(Swapout(0.5, 0.5), one, one), X + f)
    assert torch.equal(merged(Swapout(0.5, 0.5), zero, one), f)  # feed-forward
    assert torch.equal(FeedForward()(X, lambda: f), f)
    assert torch.equal(merged(Swapout(0.5, 0.5), zero, second), f * second)  # dropout on the branch
    assert torch.equal(merged(Swapout(0.5, 0.5), first, first), X * first + f * first)  # dropout on a residual unit
    for whole in (one, zero):  # stochastic depth
        assert torch.equal(merged(Swapout(1.0, 0.5), whole), X + f * whole)
    assert torch.equal(merged(Swapout(0.5, 0.5), first, ~first), torch.where(first, X, f))  # skip-forward
    assert torch.equal(merged(SkipForward(0.5), ~first), torch.where(first, X, f))
    assert torch.equal(merged(Swapout(0.5, 0.5), first, second), X * first + f * second)


def test_masks_have_the_memory_format_of_what_they_mask():
    for x in (torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)):
        out = Swapout(0.5, 0.5)(x, lambda x=x: x)
        assert out.stride() == x.stride()
        assert {*(out / x).unique().tolist()} == {0.0, 1.0, 2.0}
    half = torch.rand(4, 6, 5)[:, ::2]
    assert {*(Swapout(0.5, 1.0)(half, lambda: half) / half).unique().tolist()} == {1.0, 2.0}


def test_swapout_draws_both_masks_independently():
    torch.manual_seed(0)
    x, f = torch.ones(400, 500), torch.full((400, 500), 2.0)
    values, counts = Swapout(0.3, 0.6)(x, lambda: f).unique(return_counts=True)
    assert values.tolist() == [0.0, 1.0, 2.0, 3.0]
    for count, share in zip(counts.tolist(), (0.7 * 0.4, 0.3 * 0.4, 0.7 * 0.6, 0.3 * 0.6), strict=True):
        assert abs(count / x.numel() - share) < 5 * math.sqrt(share * (1 - share) / x.numel())


@pytest.mark.parametrize("skip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("branch", [0.0, 0.5, 1.0])
def test_swapout_evaluates_to_the_means_of_its_masks(skip, branch):
    own = block(Swapout(skip, branch)).eval()
    torch.testing.assert_close(own(X), skip * X + branch * own.branch(X), rtol=1e-15, atol=1e-15)
    assert torch.equal(own(X), own(X))


@pytest.mark.parametrize("merge", [FeedForward(), SkipForward(1.0), Swapout(0.0, 1.0)], ids=repr)
def test_a_shortcut_that_is_dropped_has_a_zero_gradient(merge):
    way, branch = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    own = Residual(branch, way, merge)
    assert torch.equal(own(X), branch(X))
    own(X).relu_().sum().backward()
    assert torch.equal(way.weight.grad, torch.zeros_like(way.weight))
    assert branch.weight.grad.any()


# means


@pytest.mark.parametrize("scale", ["test", "train"])
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_the_mean_in_training_is_what_evaluation_computes(mode, scale):
    merge = StochasticDepth(0.7, mode, scale)
    own = block(merge)
    torch.manual_seed(0)
    mean = torch.stack([own(X) for _ in range(4000)]).mean(dim=0)
    f, keep = own.branch(X), 0.7
    spread = f.abs() * math.sqrt(keep * (1 - keep) / 4000) / (keep if scale == "train" else 1)
    assert bool(((mean - own.eval()(X)).abs() <= 5 * spread + 1e-12).all())
    assert torch.allclose(own(X), X + (keep * f if scale == "test" else f), rtol=1e-12)


@pytest.mark.parametrize("merge", [Swapout(0.4, 0.8), SkipForward(0.3)], ids=repr)
def test_the_mean_of_masks_for_units(merge):
    own = block(merge)
    torch.manual_seed(0)
    passes = torch.stack([own(X) for _ in range(4000)])
    spread = passes.std(dim=0) / math.sqrt(4000)
    assert bool(((passes.mean(dim=0) - own.eval()(X)).abs() <= 5 * spread).all())


# modes


@pytest.mark.parametrize("scale", ["test", "train"])
def test_subset_and_row_give_the_same_numbers(scale):
    results = []
    for mode in ("row", "subset"):
        own = block(StochasticDepth(0.3, mode, scale))
        x = X.clone().requires_grad_()
        out = at(4, lambda own=own, x=x: own(x))
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in own.parameters())])
    for row, subset in zip(*results, strict=True):
        torch.testing.assert_close(row, subset, rtol=1e-12, atol=1e-12)
    assert not torch.equal(results[0][0], X)


def test_subset_computes_the_branch_of_the_kept_rows_alone():
    own, alone = block(StochasticDepth(0.5, "subset"), norm=True), block(Sum(), norm=True)
    mask = at(3, lambda: keep_mask(0.5, (6,)))
    out = at(3, lambda: own(X))
    assert 1 < int(mask.sum()) < 6
    assert torch.equal(out[mask], X[mask] + alone.branch(X[mask]))
    assert torch.equal(out[~mask], X[~mask])
    assert torch.equal(own.branch[1].running_mean, alone.branch[1].running_mean)


def test_subset_of_none():
    own = block(StochasticDepth(0.3, "subset"), norm=True)
    seed = next(s for s in range(100) if not at(s, lambda: keep_mask(0.3, (3,))).any())
    out = at(seed, lambda: own(X[:3]))
    assert torch.equal(out, X[:3])
    out.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in own.parameters())


def test_one_row_alone_has_no_batch_statistics():
    own = block(StochasticDepth(0.3, "subset"), norm=True)
    seed = next(s for s in range(100) if int(at(s, lambda: keep_mask(0.3, (3,))).sum()) == 1)
    with pytest.raises(ConfigurationError, match="kept one of 3 samples for a branch with batch normalisation"):
        at(seed, lambda: own(X[:3]))
    own.branch.eval()
    assert at(seed, lambda: own(X[:3])).shape == (3, 5)
    plain = block(StochasticDepth(0.3, "subset"))
    assert at(seed, lambda: plain(X[:3])).shape == (3, 5)


def test_auto_is_subset_or_row():
    from tying.depth.stochastic_depth import BREAK_EVEN

    low, high = BREAK_EVEN - 0.1, (1 + BREAK_EVEN) / 2
    for keep, mode in ((low, "subset"), (high, "row")):
        for seed in range(3):
            own, other = (block(StochasticDepth(keep, m), norm=True) for m in ("auto", mode))
            assert torch.equal(at(seed, lambda own=own: own(X)), at(seed, lambda other=other: other(X)))


def test_batch_mode_does_not_compute_what_it_drops():
    calls = []
    kept = [torch.equal(stochastic_depth(X, lambda: calls.append(1) or X, keep=0.5), 2 * X) for _ in range(50)]
    assert len(calls) == sum(kept)
    assert 0 < sum(kept) < 50


def test_a_plain_function_is_a_branch_but_for_subsets():
    assert StochasticDepth(0.5, "row")(X, lambda: X).shape == X.shape
    with pytest.raises(ConfigurationError, match="use Residual"):
        StochasticDepth(0.5, "subset")(X, lambda: X)


EVERY = [
    *(StochasticDepth(0.3, mode, scale) for mode in ("batch", "row", "subset", "auto") for scale in ("test", "train")),
    Swapout(0.3, 0.6),
    SkipForward(0.3),
]


@pytest.mark.parametrize("merge", EVERY, ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_autocast_and_low_precision(merge, training):
    own, x = block(merge, dtype=torch.float32).train(training), X.float()
    exact = at(3, lambda: own(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = at(3, lambda: own(x))
    assert mixed.dtype == torch.float32
    low = at(3, lambda: own.to(torch.bfloat16)(x.to(torch.bfloat16)))
    assert low.dtype == torch.bfloat16
    for out in (mixed, low):
        torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


def test_auto_falls_back_to_rows():
    own, rows = (block(StochasticDepth(0.3, mode), norm=True) for mode in ("auto", "row"))
    seed = next(s for s in range(100) if int(at(s, lambda: keep_mask(0.3, (3,))).sum()) == 1)
    assert torch.equal(at(seed, lambda: own(X[:3])), at(seed, lambda: rows(X[:3])))
    plain = [at(3, lambda mode=mode: StochasticDepth(0.3, mode)(X, lambda: X)) for mode in ("auto", "row")]
    assert torch.equal(*plain)


def test_statistics_of_all_processes_take_all_rows():
    def synchronized(mode):
        own = block(StochasticDepth(0.3, mode), norm=True)
        own.branch = nn.SyncBatchNorm.convert_sync_batchnorm(own.branch)
        return own

    for seed in range(3):
        assert torch.equal(*(at(seed, lambda mode=mode: synchronized(mode)(X)) for mode in ("auto", "row")))
    with pytest.raises(
        ConfigurationError, match=r"mode='subset' cannot be combined with SyncBatchNorm.*use mode='row'"
    ):
        synchronized("subset")(X)
    assert synchronized("subset").eval()(X).shape == X.shape


def test_derivatives_by_functions_of_torch():
    own = block(StochasticDepth(0.0))
    parameters = dict(own.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(own, p, (X,)).sum())(parameters)
    assert not any(gradient.any() for gradient in gradients.values())


# what is left out


def test_left_out_gives_zero_gradients_and_something_to_overwrite():
    layer = nn.Linear(5, 5).double()
    frozen = nn.Linear(5, 5).double().requires_grad_(False)
    x = X.clone().requires_grad_()
    out = skip_branch(x.relu(), Branch(nn.Sequential(layer, frozen), [(x, 0)], [layer, frozen]))
    out.relu_().sum().backward()
    assert torch.equal(x.grad, (X > 0).double())
    assert torch.equal(layer.weight.grad, torch.zeros(5, 5, dtype=torch.float64))
    assert frozen.weight.grad is None
    with torch.no_grad():
        assert skip_branch(x, Branch(layer, [(x, 0)], [layer])) is not x
        assert torch.equal(skip_branch(x, lambda: x), x)


def test_skipped_steps_still_decay_and_keep_momentum():
    """As in the paper's code, whose gradients of one flat vector are zero where a block is skipped."""
    own = block(StochasticDepth(0.5))
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    moved = []
    torch.manual_seed(0)
    for _ in range(8):
        before = own.branch[0].weight.detach().clone()
        optimizer.zero_grad()
        own(X).sum().backward()
        skipped = not own.branch[0].weight.grad.any()
        optimizer.step()
        moved.append((skipped, not torch.equal(before, own.branch[0].weight)))
    assert {skipped for skipped, _ in moved} == {True, False}
    assert all(changed for _, changed in moved)


# in the company of torch


@pytest.mark.parametrize(
    "merge",
    [StochasticDepth(0.5), StochasticDepth(0.5, "row"), StochasticDepth(0.5, "subset"), Swapout(0.5, 0.5)],
    ids=repr,
)
def test_activation_checkpointing_draws_the_same(merge):
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for saved in (False, True):
        own = nn.Sequential(*(block(merge) for _ in range(4)))
        x = X.clone().requires_grad_()
        torch.manual_seed(1)
        for one in own:
            x = checkpoint(one, x, use_reentrant=False) if saved else one(x)
        x.square().sum().backward()
        gradients.append([p.grad for p in own.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("merge", [StochasticDepth(0.5, "row"), Swapout(0.5, 0.5), SkipForward(0.5)], ids=repr)
def test_draws_change_under_compilation(merge):
    torch._dynamo.reset()
    own = torch.compile(block(merge), fullgraph=True, backend="aot_eager")
    outs = [own(X) for _ in range(4)]
    assert len({tuple(out.flatten().tolist()) for out in outs}) > 1
    own(X).sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_batch_mode_under_compilation():
    torch._dynamo.reset()
    own = torch.compile(block(StochasticDepth(0.5)), backend="aot_eager")
    plain = block(Sum())(X)
    torch.manual_seed(0)
    outs = [own(X) for _ in range(12)]
    kept = [torch.allclose(out, plain) for out in outs]
    assert all(one or torch.equal(out, X) for one, out in zip(kept, outs, strict=True))
    assert 0 < sum(kept) < 12


def test_export_in_evaluation():
    own = block(StochasticDepth(0.5, "subset")).eval()
    assert torch.equal(torch.export.export(own, (X,)).module()(X), own(X))


# arguments


def test_keeps_by_depth():
    assert keep_schedule(1.0, 0.5, 5) == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert keep_schedule(0.9, 0.5, 1) == [0.5]
    for count in range(2, 40):
        keeps = keep_schedule(0.9, 0.3, count)
        assert (len(keeps), keeps[0], keeps[-1]) == (count, 0.9, 0.3)  # both ends, bitwise
    depth = sum(keep_schedule(1 - 0.5 / 54, 0.5, 54))
    assert depth == pytest.approx((3 * 54 - 1) / 4)  # the paper's: about 40 of 54


def test_merges_of_other_probabilities():
    assert StochasticDepth(0.5, "row").with_keep(0.9).keep_prob("keep") == 0.9
    assert Swapout(0.4, 0.8).with_keep(0.5).keep_prob("keep_skip") == 0.5
    shared = Swapout(0.4, 0.8).scaled(0.5)
    assert (shared.keep_prob("keep_skip"), shared.keep_prob("keep_branch")) == (0.7, 0.9)
    merge = StochasticDepth(0.5)
    merge.drop_scale = 0.5
    assert merge.keep_prob("keep") == 0.75
    merge.drop_scale = 0.0
    assert torch.equal(merge(X, lambda: X), 2 * X)


def test_former_names_work_and_warn():
    merge = Swapout(0.4, 0.8)
    with pytest.warns(DeprecationWarning, match=r"Merge\.keeps is now called prob_names"):
        assert merge.keeps == ("keep_skip", "keep_branch")
    with pytest.warns(DeprecationWarning, match=r"Merge\.kept is now called keep_prob"):
        assert merge.kept("keep_skip") == 0.4
    with pytest.warns(DeprecationWarning, match=r"Merge\.with_share is now called scaled"):
        assert merge.with_share(0.5).keep_skip == 0.7
    with pytest.warns(DeprecationWarning, match=r"Merge\.share is now called drop_scale"):
        merge.share = 0.5
    with pytest.warns(DeprecationWarning, match=r"Merge\.share is now called drop_scale"):
        assert merge.share == merge.drop_scale == 0.5
    with pytest.warns(DeprecationWarning, match=r"Merge\.kept is now called keep_prob"):

        class Always(StochasticDepth):
            def kept(self, name):
                return 1.0

    assert torch.equal(Always(0.5).eval()(X, lambda: X), X + X)
    with pytest.warns(DeprecationWarning, match=r"Merge\.kept is now called keep_prob"):

        class Half(StochasticDepth):
            def kept(self, name):
                return super().kept(name) / 2

    with pytest.warns(DeprecationWarning, match=r"Merge\.kept is now called keep_prob"):
        assert torch.equal(Half(0.5).eval()(X, lambda: X), 1.25 * X)
    with pytest.warns(DeprecationWarning, match=r"Sampled\.spread is now called std"):
        assert torch.equal(Sampled(X, X + 1).spread, X + 1)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: StochasticDepth(1.5), r"keep must be in \[0, 1\], not 1\.5"),
        (lambda: Swapout(0.5, -0.1), r"keep_branch must be in \[0, 1\], not -0\.1"),
        (lambda: SkipForward(math.nan), r"keep must be in \[0, 1\], not nan"),
        (lambda: StochasticDepth(0.5, "rows"), "mode must be 'batch', 'row', 'subset' or 'auto', not 'rows'. Nearest"),
        (lambda: StochasticDepth(0.5, scale="tests"), "scale must be 'test' or 'train', not 'tests'"),
        (lambda: Sum().with_keep(0.5), "Sum keeps everything"),
        (lambda: Swapout(0.5, 0.5).with_keep(2), "not 2"),
        (lambda: keep_schedule(1, 0.5, 0), "count must be 1 or more"),
        (lambda: keep_schedule(1, -0.5, 2), r"last must be in \[0, 1\], not -0\.5"),
    ],
)
def test_mistakes(make, told):
    with pytest.raises(ConfigurationError, match=told):
        make()

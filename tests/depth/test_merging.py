"""Merges put into models of other people, and taken out again."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock

from tying import ConfigurationError
from tying.callbacks import ResidualMerging
from tying.depth import Recurrent, Residual, StochasticDepth, Sum, Swapout, apply_merge, keep_schedule, remove_merge
from tying.models import ResNet


def small(make):
    torch.manual_seed(0)
    model = make(num_classes=10)
    model.maxpool = nn.Identity()
    return model


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=options == {"batch_first": True, "norm_first": False})


def images(count=4):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


CASES = {
    "BasicBlock": (lambda: small(resnet18), "layer*.*", 8),
    "Bottleneck": (lambda: small(resnet50), "layer*.*", 16),
    "Residual": (lambda: ResNet(depth=8), "layer*.*", 3),
}


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("case", CASES)
def test_a_sum_changes_nothing_and_all_is_restored(case):
    make, blocks, count = CASES[case]
    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    names, kinds = [*model.state_dict()], [type(m) for m in model.modules()]
    for merge in (StochasticDepth(1.0), Swapout(1.0, 1.0)):
        assert apply_merge(model, blocks, merge) == count
        assert [*model.state_dict()] == names
        for merged, own in zip(gradients(model, images()), gradients(plain, images()), strict=True):
            assert torch.equal(merged, own)
        assert remove_merge(model) == count
        assert [type(m) for m in model.modules()] == kinds
    assert remove_merge(model) == 0
    assert torch.equal(model.eval()(images()), plain.eval()(images()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_blocks_of_every_kind_drop_and_train(case, mode):
    """In-place activations of torchvision among them, and downsampling blocks."""
    make, blocks, _ = CASES[case]
    model = make()
    apply_merge(model, blocks, StochasticDepth(0.5, mode))
    torch.manual_seed(0)
    for _ in range(4):
        assert all(torch.isfinite(g).all() for g in gradients(model, images(8)))


def test_left_out_blocks_are_the_shortcut():
    model = small(resnet18)
    apply_merge(model, "layer1.*", StochasticDepth(0.0))
    x = model.relu(model.bn1(model.conv1(images())))
    assert torch.equal(model.layer1(x), x)
    model.layer1(x).sum().backward()
    assert torch.equal(model.layer1[0].conv1.weight.grad, torch.zeros_like(model.layer1[0].conv1.weight))


def test_keeps_by_block():
    model = ResNet(depth=20)
    assert apply_merge(model, ["layer1.*", "layer3.*"], Swapout(0.5, 0.5), keep=[1, 0.9, 0.8, 0.7, 0.6, 0.5]) == 6
    found = [model.get_submodule(f"layer{stage}.{i}").merge.keep_branch for stage in (1, 3) for i in range(3)]
    assert found == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert type(model.layer2[0].merge) is Sum
    remove_merge(model)
    apply_merge(model, "layer*.*", StochasticDepth(0.5), keep=0.8)
    assert model.layer1[0].merge.keep == 0.8


@pytest.mark.parametrize("merge", [StochasticDepth(0.5), StochasticDepth(0.1), Swapout(0.4, 0.8)], ids=repr)
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize(
    "put",
    [
        lambda model, merge: apply_merge(model, "*", merge, keep="linear"),
        lambda model, merge: ResidualMerging("*", merge, keep_schedule="linear").apply(model),
        lambda model, merge: ResidualMerging("*", merge).apply(model),
    ],
    ids=["function", "callback", "callback's default"],
)
def test_linear_keeps_are_those_of_the_formula_and_of_the_schedule(put, merge, count):
    model = nn.Sequential(*(Residual(nn.Linear(2, 2)) for _ in range(count)))
    assert put(model, merge) == count
    for name in merge.prob_names:
        p, keeps = getattr(merge, name), [getattr(block.merge, name) for block in model]
        assert keeps == keep_schedule(1 - (1 - p) / count, p, count)  # bitwise
        assert keeps[-1] == p
        assert keeps == pytest.approx([1 - (1 - p) * n / count for n in range(1, count + 1)], abs=1e-15)


def test_uniform_is_the_merge_itself():
    class Average(nn.Module):
        def forward(self, x, branch):
            return (x + branch()) / 2

    for merge in (Swapout(0.4, 0.8), Sum(), Average()):
        for keep in ("uniform", None):
            model = nn.Sequential(*(Residual(nn.Linear(2, 2)) for _ in range(2)))
            apply_merge(model, "*", merge, keep)
            assert [repr(block.merge) for block in model] == [repr(merge)] * 2
    model = nn.Sequential(Residual(nn.Linear(2, 2)))
    apply_merge(model, "*", Sum(), keep="linear")
    assert model[0].merge.prob_names == ()
    with pytest.raises(ConfigurationError, match="Average is not"):
        apply_merge(nn.Sequential(Residual(nn.Linear(2, 2))), "*", Average(), keep="linear")


def test_a_merge_of_ones_own():
    class Average(nn.Module):
        def forward(self, x, branch):
            return (x + branch()) / 2

    model = nn.Sequential(Residual(nn.Linear(3, 3)))
    x, plain = torch.randn(2, 3), model[0].branch
    apply_merge(model, "0", Average())
    assert torch.equal(model(x), (x + plain(x)) / 2)


def test_merged_models_are_copied_pickled_and_loaded():
    model = small(resnet18)
    plain = copy.deepcopy(model)
    apply_merge(model, "layer*.*", StochasticDepth(0.5, "row"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(images()), model.eval()(images()))
        assert remove_merge(other) == 8
        other.load_state_dict(plain.state_dict())
    assert isinstance(model.layer1[0], BasicBlock)
    assert model.layer1[0].merge.keep == 0.5


# transformers


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_layers(norm_first, batch_first):
    model, plain = (encoder(norm_first=norm_first, batch_first=batch_first) for _ in range(2))
    x = torch.randn(*((5, 4) if batch_first else (4, 5)), 8)  # five samples of length four
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    padding = torch.zeros(5, 4, dtype=torch.bool)
    padding[1, 2:] = True
    assert apply_merge(model, "layers.*", StochasticDepth(1.0)) == 2
    for given in ({}, {"mask": mask}, {"src_key_padding_mask": padding}, {"mask": mask, "is_causal": True}):
        torch.testing.assert_close(model(x, **given), plain(x, **given), rtol=0, atol=0)
    model.eval()
    plain.eval()
    with torch.no_grad():
        kept = ~padding if batch_first else ~padding.T
        ours, theirs = (one(x, src_key_padding_mask=padding) for one in (model, plain))
        torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-4, atol=1e-5)  # which takes a fast path
    remove_merge(model)
    assert all(type(layer) is nn.TransformerEncoderLayer for layer in model.layers)
    assert model.use_nested_tensor == plain.use_nested_tensor


@pytest.mark.parametrize("batch_first", [True, False])
def test_subsets_of_sequences(batch_first):
    """Samples are chosen along their own dimension, and their masks with them."""
    model, same = (encoder(batch_first=batch_first).double() for _ in range(2))
    apply_merge(model, "layers.*", StochasticDepth(0.5, "row"))
    apply_merge(same, "layers.*", StochasticDepth(0.5, "subset"))
    x = torch.randn(*((5, 4) if batch_first else (4, 5)), 8, dtype=torch.float64)
    padding = torch.zeros(5, 4, dtype=torch.bool)
    padding[:, 3] = torch.tensor([True, False, True, False, False])
    own = torch.randn(10, 4, 4, dtype=torch.float64)  # for each sample and head
    for given in ({}, {"mask": own}, {"src_key_padding_mask": padding}):
        outs = []
        for one in (model, same):
            torch.manual_seed(2)
            outs.append(one(x, **given))
        torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)


def test_one_sequence_alone():
    for batch_first in (True, False):
        model, plain = (encoder(batch_first=batch_first).layers[0] for _ in range(2))
        apply_merge(nn.Sequential(model), "0", StochasticDepth(1.0))
        x, padding = torch.randn(4, 8), torch.tensor([False, False, False, True])
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding))


# what cannot be merged


@pytest.mark.parametrize(
    ("blocks", "arguments", "told"),
    [
        ("layr1.*", {}, r"blocks: pattern 'layr1\.\*' matches no module\. Nearest"),
        (["layer1.*", "none"], {}, "pattern 'none' matches no module"),
        ([], {}, "blocks must be a pattern"),
        (
            "stem.*",
            {},
            "the ReLU 'stem.activation' has no parameters, so that there is nothing to skip: name the block",
        ),
        (["layer*", "layer2.*"], {}, "the Residual 'layer2.0' lies within 'layer2', which matches, too: name one"),
        (["!layer1"], {}, "blocks must be a pattern of module names, or several, not"),
        (["layer1.*", "!layer1.**"], {}, r"blocks: 'layer1\.\*', '!layer1\.\*\*' exclude all that they match"),
        (["layer*.*", "!layr1.*"], {}, r"pattern '!layr1\.\*' matches no module. Nearest"),
        ("layer*.*", {"keep": "half"}, "a number, one for each block, 'linear', 'uniform' or 'model', not 'half'"),
        ("layer*.*", {"keep": [0.5, 0.5]}, "2 keeps for 3 blocks: layer1.0, layer2.0, layer3.0"),
        ("layer*.*", {"keep": [0.5, 0.5, 1.5]}, r"keep must be in \[0, 1\], not 1\.5"),
    ],
)
def test_mistakes_change_nothing(blocks, arguments, told):
    model = ResNet(depth=8)
    with pytest.raises(ConfigurationError, match=told):
        apply_merge(model, blocks, StochasticDepth(0.5), **arguments)
    assert all(type(m.merge) is Sum for m in model.modules() if isinstance(m, Residual))


@pytest.mark.parametrize(
    ("merge", "told"),
    [
        (StochasticDepth, "not the class StochasticDepth"),
        (lambda x, branch: x, "merge must be a module, called as merge"),
    ],
)
def test_a_merge_is_a_module(merge, told):
    with pytest.raises(ConfigurationError, match=told):
        apply_merge(ResNet(depth=8), "layer*.*", merge)


def test_a_merge_that_cannot_be_copied_changes_nothing():
    class Single(Sum):
        def __deepcopy__(self, memo):
            raise RuntimeError("one only")

    model = ResNet(depth=8)
    with pytest.raises(RuntimeError, match="one only"):
        apply_merge(model, "layer*.*", Single())
    assert all(type(m.merge) is Sum for m in model.modules() if isinstance(m, Residual))


def test_keeps_of_a_tensor():
    model = ResNet(depth=8)
    apply_merge(model, "layer*.*", StochasticDepth(0.5), keep=torch.linspace(1, 0.5, 3))
    assert [model.get_submodule(f"layer{n}.0").merge.keep for n in (1, 2, 3)] == [1.0, 0.75, 0.5]


def test_encoders_are_restored_after_several_merges():
    model = encoder(batch_first=True, norm_first=False)
    assert model.use_nested_tensor
    apply_merge(model, "layers.0", StochasticDepth(0.5))
    apply_merge(model, "layers.1", StochasticDepth(0.5))
    assert not model.use_nested_tensor
    assert remove_merge(model) == 2
    assert model.use_nested_tensor


def test_the_steps_of_a_recurrent_block_are_blocks():
    model = ResNet(depth=20, shared=True)
    assert apply_merge(model, "layer*.*", StochasticDepth(0.5), keep=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]) == 9
    assert [block.merge.keep for block in model.layer1[0].blocks] == [0.9, 0.8, 0.7]
    assert model.layer2[0].merge.keep == 0.6
    assert remove_merge(model) == 9


def test_a_merge_is_not_applied_twice():
    model = ResNet(depth=8)
    apply_merge(model, "layer2.*", StochasticDepth(0.5))
    with pytest.raises(ConfigurationError, match=r"layer2\.0 \(StochasticDepth\): merged already: leave out merge="):
        apply_merge(model, "layer*.*", Swapout(0.5, 0.5))
    assert type(model.layer1[0].merge) is Sum
    other = small(resnet18)
    apply_merge(other, "layer1.0", Sum())
    with pytest.raises(ConfigurationError, match=r"layer1\.0 \(Sum\): merged already"):
        apply_merge(other, "layer1.*", Sum())
    built = nn.Sequential(Residual(nn.Linear(2, 2), merge=Swapout(0.5, 0.5)))
    with pytest.raises(ConfigurationError, match=r"0 \(Swapout\): merged already"):
        apply_merge(built, "0", StochasticDepth(0.5))
    with pytest.raises(ConfigurationError, match=r"keep needs a tying\.depth\.Merge, which Identity is not"):
        apply_merge(ResNet(depth=8), "layer1.*", nn.Identity(), keep=0.5)


def test_blocks_that_are_used_again_within_others():
    model = nn.Sequential(Recurrent(Recurrent(Residual(nn.Linear(3, 3)), steps=2), steps=3))
    assert apply_merge(model, "0", StochasticDepth(0.5)) == 6
    assert all(isinstance(block.merge, StochasticDepth) for again in model[0].blocks for block in again.blocks)

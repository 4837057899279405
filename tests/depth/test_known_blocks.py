"""Blocks of timm and torchvision whose branches are known: each branch has its own draw."""

import copy
import pickle
from functools import partial

import pytest
import torch
from timm.models import create_model
from timm.models._efficientnet_blocks import InvertedResidual as TimmInvertedResidual
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformerBlock as TimmSwinBlock
from timm.models.vision_transformer import Block, ResPostBlock
from torch import nn
from torch.fx import symbolic_trace
from torchvision.models.convnext import CNBlock
from torchvision.models.efficientnet import FusedMBConv, FusedMBConvConfig, MBConv, MBConvConfig
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.mobilenetv2 import InvertedResidual as InvertedResidualV2
from torchvision.models.mobilenetv3 import InvertedResidual as InvertedResidualV3
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import SwinTransformerBlock, SwinTransformerBlockV2
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from tying import ConfigurationError
from tying.depth import StochasticDepth, Swapout, apply_merge, remove_merge, sampling
from tying.depth.draws import keep_mask

D = torch.float64


def inverted(channels, stride=1):
    return InvertedResidualV3(
        InvertedResidualConfig(8, 3, 16, channels, True, "HS", stride, 1, 1.0), partial(nn.BatchNorm2d, eps=0.001)
    )


def downsampled(block, expansion):
    return block(8, 8, 2, nn.Sequential(nn.Conv2d(8, 8 * expansion, 1, 2, bias=False), nn.BatchNorm2d(8 * expansion)))


def attention(block, x):
    return block.dropout(block.self_attention(x, x, x, need_weights=False)[0])


def convnext(b, x):
    x = b.mlp(b.norm(b.conv_dw(x).movedim(1, -1))).movedim(-1, 1)
    return x if b.gamma is None else x * b.gamma.view(-1, 1, 1)


def basic(b, x):
    return b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(x)))))


def bottleneck(b, x):
    return b.bn3(b.conv3(torch.relu(b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(x))))))))


IMAGE, MAP, SEQUENCE = (8, 6, 6), (6, 6, 8), (5, 8)
# of each block: how to make it, the shape of a sample, its branches, and its shortcut and last activation if it has some
BLOCKS = {
    "timm ViT": (
        lambda: Block(8, 2, init_values=0.5, qkv_bias=True),
        SEQUENCE,
        [lambda b, x: b.ls1(b.attn(b.norm1(x))), lambda b, x: b.ls2(b.mlp(b.norm2(x)))],
    ),
    "timm ViT, norms last": (
        lambda: ResPostBlock(8, 2, init_values=0.5),
        SEQUENCE,
        [lambda b, x: b.norm1(b.attn(x)), lambda b, x: b.norm2(b.mlp(x))],
    ),
    "timm ConvNeXt": (lambda: ConvNeXtBlock(8, ls_init_value=0.5), IMAGE, [convnext]),
    "timm ConvNeXt, convolutions": (
        lambda: ConvNeXtBlock(8, conv_mlp=True, ls_init_value=None),
        IMAGE,
        [lambda b, x: b.mlp(b.norm(b.conv_dw(x)))],
    ),
    "timm ConvNeXt, downsampling": (
        lambda: ConvNeXtBlock(8, 16, stride=2, ls_init_value=0.5),
        IMAGE,
        [convnext],
        lambda b, x: b.shortcut(x),
    ),
    "timm Swin": (
        lambda: TimmSwinBlock(8, (6, 6), 2, window_size=3, shift_size=1),
        MAP,
        [lambda b, x: b._attn(b.norm1(x)), lambda b, x: b.mlp(b.norm2(x))],
    ),
    "ViT": (
        lambda: EncoderBlock(2, 8, 16, 0.0, 0.0),
        SEQUENCE,
        [lambda b, x: attention(b, b.ln_1(x)), lambda b, x: b.mlp(b.ln_2(x))],
    ),
    "Swin": (
        lambda: SwinTransformerBlock(8, 2, [3, 3], [1, 1]),
        MAP,
        [lambda b, x: b.attn(b.norm1(x)), lambda b, x: b.mlp(b.norm2(x))],
    ),
    "Swin V2": (
        lambda: SwinTransformerBlockV2(8, 2, [3, 3], [1, 1]),
        MAP,
        [lambda b, x: b.norm1(b.attn(x)), lambda b, x: b.norm2(b.mlp(x))],
    ),
    "ConvNeXt": (lambda: CNBlock(8, 0.5, 0.0), IMAGE, [lambda b, x: b.layer_scale * b.block(x)]),
    "MobileNetV2": (lambda: InvertedResidualV2(8, 8, 1, 2), IMAGE, [lambda b, x: b.conv(x)]),
    "MobileNetV3": (lambda: inverted(8), IMAGE, [lambda b, x: b.block(x)]),
    "EfficientNet": (
        lambda: MBConv(MBConvConfig(2, 3, 1, 8, 8, 1), 0.0, nn.BatchNorm2d),
        IMAGE,
        [lambda b, x: b.block(x)],
    ),
    "EfficientNet, fused": (
        lambda: FusedMBConv(FusedMBConvConfig(2, 3, 1, 8, 8, 1), 0.0, nn.BatchNorm2d),
        IMAGE,
        [lambda b, x: b.block(x)],
    ),
    "ResNet": (lambda: BasicBlock(8, 8), IMAGE, [basic], lambda b, x: x, torch.relu),
    "ResNet, downsampling": (
        lambda: downsampled(BasicBlock, 1),
        IMAGE,
        [basic],
        lambda b, x: b.downsample(x),
        torch.relu,
    ),
    "ResNet, bottleneck": (
        lambda: downsampled(Bottleneck, 4),
        IMAGE,
        [bottleneck],
        lambda b, x: b.downsample(x),
        torch.relu,
    ),
}
every_block = pytest.mark.parametrize("case", BLOCKS)


def made(case, merge=None):
    """A block in a model, with a merge or without, in float64 and with random weights, and six samples."""
    make, shape, *_ = BLOCKS[case]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(D)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    if merge is not None:
        assert apply_merge(model, "0", merge) == 1
    return model, torch.randn(6, *shape, dtype=D)


def parts(case):
    """The branches, the shortcut and the last activation of a block."""
    given = BLOCKS[case][2:]
    return (*given, *[lambda b, x: x, lambda x: x][len(given) - 1 :])


def results(model, *arguments):
    """The output, and the gradients of the first argument and of all weights."""
    model.zero_grad()
    x = arguments[0].clone().requires_grad_()
    out = model(x, *arguments[1:])
    out.square().sum().backward()
    return [out.detach(), x.grad, *(weight.grad for weight in model.parameters())]


def at(seed, function, *arguments):
    torch.manual_seed(seed)
    return function(*arguments)


def assert_equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_block
@pytest.mark.parametrize("merge", [StochasticDepth(1.0), StochasticDepth(1.0, "subset"), Swapout(1.0, 1.0)], ids=repr)
def test_keeping_all_is_the_plain_block_bitwise(case, merge):
    (model, x), (plain, _) = made(case, merge), made(case)
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert_equal(results(model, x), results(plain, x))
    assert_equal(results(model.eval(), x), results(plain.eval(), x))


@every_block
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_evaluation_is_the_plain_block_bitwise(case, mode):
    (model, x), (plain, _) = made(case, StochasticDepth(0.3, mode, "train")), made(case)
    assert_equal(results(model.eval(), x), results(plain.eval(), x))


@every_block
@pytest.mark.parametrize("training", [True, False])
def test_keeping_none_is_the_shortcut(case, training):
    model, x = made(case, StochasticDepth(0.0))
    _, shortcut, activation = parts(case)
    plain = copy.deepcopy(model[0]).train(training)
    out, gradient, *gradients = results(model.train(training), x)
    x.requires_grad_()
    expected = activation(shortcut(plain, x))
    expected.square().sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(gradient, x.grad)
    for weight, ours in zip(plain.parameters(), gradients, strict=True):
        assert torch.equal(ours, torch.zeros_like(ours) if weight.grad is None else weight.grad)


def by_rows(case, block, x, masks, factor):
    """The output of a block, sample by sample and branch by branch."""
    branches, shortcut, activation = parts(case)
    rows = []
    for number in range(len(x)):
        row = x[number : number + 1]
        for branch, mask in zip(branches, masks, strict=True):
            f = branch(block, row)
            row = shortcut(block, row) + (factor * f if mask[number] else torch.zeros_like(f))
        rows.append(activation(row))
    return torch.cat(rows)


@every_block
@pytest.mark.parametrize("scale", ["test", "train"])
@pytest.mark.parametrize("mode", ["row", "subset"])
def test_each_branch_draws_for_each_sample(case, mode, scale):
    model, x = made(case, StochasticDepth(0.6, mode, scale))
    masks = at(1, lambda: [keep_mask(0.6, (6,)) for _ in parts(case)[0]])
    assert all(1 < int(mask.sum()) < 6 for mask in masks)
    with sampling(model), torch.no_grad():  # batch norms of a row alone have no statistics
        expected = by_rows(case, model[0], x, masks, 1 / 0.6 if scale == "train" else 1)
        torch.testing.assert_close(at(1, model, x), expected, rtol=1e-12, atol=1e-12)


@every_block
def test_subset_and_row_have_the_same_gradients(case):
    both = []
    for mode in ("row", "subset"):
        model, x = made(case, StochasticDepth(0.6, mode))
        with sampling(model):
            both.append(at(1, results, model, x))
    for row, subset in zip(*both, strict=True):
        torch.testing.assert_close(row, subset, rtol=1e-11, atol=1e-12)


@every_block
def test_each_branch_is_computed_or_not_for_a_batch(case):
    model, x = made(case, StochasticDepth(0.5))
    outs = [at(seed, results, model.eval().train(), x) for seed in range(24)]
    count = len(parts(case)[0])
    assert len({tuple(out[0].flatten().tolist()) for out in outs}) == 2**count
    assert all(gradient is not None for out in outs for gradient in out)


@every_block
@pytest.mark.parametrize("merge", [StochasticDepth(0.5, "subset"), Swapout(0.5, 0.5)], ids=repr)
def test_removal_is_bitwise(case, merge):
    (model, x), (plain, _) = made(case, merge), made(case)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for other in (model, copied):
        assert isinstance(other[0], type(plain[0]))
        assert remove_merge(other) == 1
        assert type(other[0]) is type(plain[0])
        assert other[0].__dict__.keys() == plain[0].__dict__.keys()
        assert_equal(results(other, x), results(plain, x))


DROPPING = {
    "timm ViT": lambda rate: Block(8, 2, drop_path=rate),
    "timm ViT, norms last": lambda rate: ResPostBlock(8, 2, drop_path=rate),
    "timm ConvNeXt": lambda rate: ConvNeXtBlock(8, drop_path=rate),
    "timm Swin": lambda rate: TimmSwinBlock(8, (6, 6), 2, window_size=3, drop_path=rate),
    "Swin": lambda rate: SwinTransformerBlock(8, 2, [3, 3], [1, 1], stochastic_depth_prob=rate),
    "Swin V2": lambda rate: SwinTransformerBlockV2(8, 2, [3, 3], [1, 1], stochastic_depth_prob=rate),
    "ConvNeXt": lambda rate: CNBlock(8, 0.5, rate),
    "EfficientNet": lambda rate: MBConv(MBConvConfig(2, 3, 1, 8, 8, 1), rate, nn.BatchNorm2d),
    "EfficientNet, fused": lambda rate: FusedMBConv(FusedMBConvConfig(2, 3, 1, 8, 8, 1), rate, nn.BatchNorm2d),
}


@pytest.mark.parametrize("case", DROPPING)
def test_drop_paths_of_known_blocks_are_taken_over(case):
    torch.manual_seed(0)
    model, x = nn.Sequential(DROPPING[case](0.5)), torch.randn(6, *BLOCKS[case][1])
    plain = nn.Sequential(DROPPING[case](0.0))
    plain.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="DropPath or StochasticDepth modules in the blocks"):
        apply_merge(model, "0", StochasticDepth(1.0))
    assert torch.equal(model(x), plain(x))  # neither drops, and both are in training mode
    remove_merge(model)
    apply_merge(model, "0", StochasticDepth(1.0), keep="model")
    assert model[0].merge.keep == 0.5
    remove_merge(model)
    assert len({tuple(model(x).flatten().tolist()) for _ in range(4)}) > 1


# timm's masks and checkpoints


@pytest.mark.parametrize("kind", [Block, ResPostBlock])
@pytest.mark.parametrize("shape", [(6, 1, 6, 6), (6, 6), (1, 1, 6, 6), None], ids=str)
def test_masks_of_attention(kind, shape):
    """As many positions as samples: a mask of positions is the same for all samples."""
    torch.manual_seed(0)
    plain, x = kind(8, 2).to(D), torch.randn(6, 6, 8, dtype=D)
    arguments = [(torch.rand(shape) < 0.8) | torch.eye(6, dtype=torch.bool)] if shape else [None, True]
    outs = {}
    for merge in (StochasticDepth(1.0), StochasticDepth(0.5, "row"), StochasticDepth(0.5, "subset")):
        model = nn.Sequential(copy.deepcopy(plain))
        apply_merge(model, "0", merge)
        outs[merge] = at(1, results, model[0], x, *arguments)
    first, row, subset = outs.values()
    assert_equal(first, results(plain, x, *arguments))
    for masked, selected in zip(row, subset, strict=True):
        torch.testing.assert_close(masked, selected, rtol=1e-11, atol=1e-12)


def small(name):
    sizes = {"test_vit2": {"img_size": 32}, "test_convnext": {}, "swin_tiny_patch4_window7_224": {}}[name]
    if name.startswith("swin"):
        sizes = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}
    torch.manual_seed(0)
    return create_model(name, num_classes=3, drop_path_rate=0.0, **sizes)


PATTERNS = {
    "test_vit2": "blocks.*",
    "test_convnext": "stages.*.blocks.*",
    "swin_tiny_patch4_window7_224": "layers.*.blocks.*",
}
every_model = pytest.mark.parametrize("name", PATTERNS)


@every_model
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_checkpointing_of_timm_draws_the_same(name, mode):
    x, both = torch.randn(4, 3, 32, 32), []
    for checkpointing in (False, True):
        model = small(name)
        apply_merge(model, PATTERNS[name], StochasticDepth(0.5, mode))
        model.set_grad_checkpointing(checkpointing)
        both.append(at(2, results, model.train(), x))
    assert_equal(*both)


# graphs


@every_block
def test_graphs_draw(case):
    (plain, x), (model, _) = made(case), made(case, StochasticDepth(0.5, "row", "train"))
    traced = symbolic_trace(model)
    assert [str(node.target) for node in traced.graph.nodes].count("0.merge") == len(parts(case)[0])
    assert torch.equal(traced.eval()(x), plain.eval()(x))
    assert not torch.equal(at(0, traced.train(), x), at(1, traced, x))


@pytest.mark.parametrize("case", ["timm ViT", "timm ConvNeXt", "timm Swin", "ViT", "Swin", "EfficientNet"])
def test_blocks_are_compiled_and_exported(case):
    torch._dynamo.reset()
    (model, x), (plain, _) = made(case, StochasticDepth(0.5, "row", "train")), made(case)
    exported = torch.export.export(model.eval(), (x,)).module()
    assert torch.equal(exported(x), plain.eval()(x))
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    assert len({tuple(compiled(x).flatten().tolist()) for _ in range(4)}) > 1


def test_feature_extractors_of_torchvision():
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3)
    x, nodes = torch.randn(4, 3, 16, 16), ["encoder.layers.encoder_layer_0", "heads"]
    plain = create_feature_extractor(copy.deepcopy(model), nodes, suppress_diff_warning=True)
    apply_merge(model, "encoder.layers.*", StochasticDepth(0.5, "row", "train"))
    extractor = create_feature_extractor(model, nodes, suppress_diff_warning=True)
    outs = [extractor.eval()(x), plain.eval()(x)]
    assert all(torch.equal(outs[0][node], outs[1][node]) for node in nodes)
    assert len({tuple(extractor.train()(x)[nodes[0]].flatten().tolist()) for _ in range(12)}) > 4


# what has no shortcut


@pytest.mark.parametrize(
    "block",
    [
        lambda: InvertedResidualV2(8, 16, 1, 2),
        lambda: InvertedResidualV2(8, 8, 2, 2),
        lambda: inverted(16),
        lambda: MBConv(MBConvConfig(2, 3, 2, 8, 8, 1), 0.0, nn.BatchNorm2d),
        lambda: TimmInvertedResidual(8, 16),
    ],
    ids=["channels", "stride", "V3", "MBConv", "timm"],
)
def test_blocks_without_a_shortcut_are_refused(block):
    model = nn.Sequential(InvertedResidualV2(8, 8, 1, 2), block())
    kinds = [type(part) for part in model.modules()]
    with pytest.raises(ConfigurationError, match=r"blocks: the (InvertedResidual|MBConv) '1' has no shortcut, since"):
        apply_merge(model, "*", StochasticDepth(0.5))
    assert [type(part) for part in model.modules()] == kinds

"""Merges on whole blocks: of transformers, torchvision and timm, and of toys."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from torch import nn
from torchvision.models import MobileNetV2
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth

from tying import ConfigurationError
from tying.depth import (
    FeedForward,
    Merge,
    Residual,
    SkipForward,
    StochasticDepth,
    Sum,
    Swapout,
    apply_merge,
    remove_merge,
)
from tying.depth.draws import keep_mask
from tying.hard import lower_rank
from tying.selection.patterns import Pattern

D = torch.float64
TOKENS = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=D)
PADDING = torch.ones(4, 6, dtype=torch.long)
PADDING[1, 4:] = 0


def gpt2(drop):
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=16, n_layer=3, n_head=2,
        resid_pdrop=drop, embd_pdrop=drop, attn_pdrop=drop, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2Model(config)


def llama(drop):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=8, attention_dropout=drop,
    )  # fmt: skip
    return transformers.LlamaModel(config)


def bert(drop):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, hidden_dropout_prob=drop, attention_probs_dropout_prob=drop,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def t5(drop):
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, dropout_rate=drop,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5Model(config)


def vit(drop):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        hidden_dropout_prob=drop, attention_probs_dropout_prob=drop,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False)


def convnext(drop):
    settings = [CNBlockConfig(8, 16, 3), CNBlockConfig(16, None, 1)]
    return ConvNeXt(settings, stochastic_depth_prob=0.0, layer_scale=1.0, num_classes=5)


def mobilenet(drop):
    return MobileNetV2(num_classes=5, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 3, 1]], dropout=drop)


TEXT = {"input_ids": TOKENS, "attention_mask": PADDING}
CASES = {  # make, inputs, the list of blocks, the blocks that are merged
    "GPT2": (gpt2, TEXT, "h", "h.{1..2}"),
    "Llama": (llama, TEXT, "layers", "layers.{1..2}"),
    "BERT": (bert, TEXT, "encoder.layer", "encoder.layer.{1..2}"),
    "T5": (t5, {**TEXT, "decoder_input_ids": TOKENS}, "decoder.block", "decoder.block.{1..2}"),
    "ViT": (vit, {"pixel_values": IMAGES}, "layers", "layers.{1..2}"),
    "ConvNeXt": (convnext, {"x": IMAGES}, "features.1", "features.1.{1..2}"),
    "MobileNetV2": (mobilenet, {"x": IMAGES}, "features", "features.{3..4}"),
}
every_model = pytest.mark.parametrize("case", CASES)
every_mode = pytest.mark.parametrize("mode", ["batch", "row", "subset", "auto"])


def build(case, drop=0.0):
    torch.manual_seed(0)
    return CASES[case][0](drop).to(D)


def run(model, case, seed=0, rows=None):
    torch.manual_seed(seed)
    inputs = {name: x if rows is None else x[rows] for name, x in CASES[case][1].items()}
    output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


def shallow(model, case):
    """Return a copy of the model without the merged blocks."""
    copied, (container, pattern) = copy.deepcopy(model), CASES[case][2:]
    layers = copied.get_submodule(container)
    merged = [number for number in range(len(layers)) if Pattern(pattern).match(f"{container}.{number}") is not None]
    for number in reversed(merged):  # the later ones are renamed
        del layers[number]
    return copied


def equal_training(ours, theirs, case):
    """Compare outputs and gradients bitwise, in training mode and in evaluation."""
    for training in (True, False):
        outputs = [run(model.train(training), case) for model in (ours, theirs)]
        assert torch.equal(*outputs)
    gradients = []
    for model in (ours.train(), theirs.train()):
        model.zero_grad()
        run(model, case).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() >= gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


@every_model
@pytest.mark.parametrize(
    "merge", [StochasticDepth(1.0, "batch"), StochasticDepth(1.0, "subset", "train"), Sum(), Swapout(1.0, 1.0)], ids=str
)
def test_keeping_everything_changes_nothing(case, merge):
    model, plain = build(case, drop=0.2), build(case, drop=0.2)
    names = [*model.state_dict()]
    apply_merge(model, CASES[case][3], merge, whole=True)
    assert [*model.state_dict()] == names
    equal_training(model, plain, case)


@every_model
@every_mode
@pytest.mark.parametrize("scale", ["test", "train"])
def test_dropping_everything_removes_the_blocks(case, mode, scale):
    model = build(case, drop=0.2)
    removed = shallow(model, case)
    apply_merge(model, CASES[case][3], StochasticDepth(0.0, mode, scale), whole=True)
    for training in (True, False):
        assert torch.equal(run(model.train(training), case), run(removed.train(training), case))
    run(model.train(), case).square().sum().backward()
    unused = {name for name, p in build_used(case).items() if p.grad is None}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in unused), name


def build_used(case):
    plain = build(case)
    run(plain.train(), case).square().sum().backward()
    return dict(plain.named_parameters())

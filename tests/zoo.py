"""Architectures of torchvision, timm and transformers, in small configurations.

Weights are random, nothing is downloaded, and dropout is off, so that two calls with one input agree bitwise.

    model, inputs = build("GPT2"), ZOO["GPT2"].inputs()
    loss_of(output_of(model, inputs)).backward()
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import timm
import torch
import transformers
from timm.models.metaformer import GroupNorm1NoBias, MetaFormer
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import VGG, make_layers

Inputs = dict[str, torch.Tensor]
ROWS = 6  # unlike the number of tokens or channels of any input


class Architecture(NamedTuple):
    """A network of another library, and what tests must know about it.

    Attributes:
        make: builds the network.
        inputs: draws arguments of its forward, of a given number of samples.
        blocks: pattern of the names of its residual blocks, or several; the first T5 block makes the position bias.
        equal: names of two modules of equal shapes, to tie.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[..., Inputs]
    blocks: str | tuple[str, ...]
    equal: tuple[str, str]


def images(size: int, rows: int = ROWS) -> Inputs:
    return {"x": torch.randn(rows, 3, size, size)}


def pixels(rows: int = ROWS) -> Inputs:
    return {"pixel_values": torch.randn(rows, 3, 16, 16)}


def tokens(rows: int = ROWS) -> Inputs:
    return {"input_ids": torch.randint(3, 50, (rows, 8))}


def sequences(rows: int = ROWS) -> Inputs:
    return {**tokens(rows), "decoder_input_ids": torch.randint(3, 50, (rows, 5))}


def sounds(rows: int = ROWS) -> Inputs:
    return {"input_features": torch.randn(rows, 8, 32), "decoder_input_ids": torch.randint(3, 50, (rows, 5))}


def resnet(block: type[nn.Module], width: int = 64) -> nn.Module:
    return models.ResNet(block, [2, 2, 1, 1], num_classes=10, width_per_group=width)


def efficientnet_b0() -> nn.Module:
    stages = [(1, 3, 1, 16, 16, 2), (4, 3, 2, 16, 24, 3), (4, 5, 2, 24, 32, 3)]
    settings = [MBConvConfig(*stage, width_mult=1.0, depth_mult=1.0) for stage in stages]
    return models.EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.0, num_classes=10)


def convnext_tiny() -> nn.Module:
    stages = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 2)]
    return models.ConvNeXt(stages, stochastic_depth_prob=0.0, num_classes=10)


def swin_t() -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "window_size": [4, 4]}
    return models.SwinTransformer(
        depths=[2, 2, 2], num_heads=[2, 2, 4], stochastic_depth_prob=0.0, num_classes=10, **sizes
    )


def vit_b_16() -> nn.Module:
    sizes = {"num_layers": 3, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return models.VisionTransformer(image_size=32, patch_size=16, num_classes=10, **sizes)


def maxvit_t() -> nn.Module:
    return models.MaxVit((64, 64), 16, 2, [16, 32], [2, 2], 8, stochastic_depth_prob=0.0, num_classes=10)


def densenet121() -> nn.Module:
    return models.DenseNet(growth_rate=8, block_config=(2, 2, 2), num_init_features=16, num_classes=10)


def vgg11_bn() -> nn.Module:
    features = make_layers([8, "M", 16, "M", 32, 32, "M", 32, 32, "M"], batch_norm=True)
    model = VGG(features, init_weights=False)
    model.classifier = nn.Linear(32 * 7 * 7, 10)  # its own has 120 million weights
    return model


def poolformerv2_s12() -> nn.Module:
    return MetaFormer(
        num_classes=10, depths=(2, 2, 2, 2), dims=(16, 32, 48, 64), norm_layers=GroupNorm1NoBias, use_mlp_head=False
    )


TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
DECODER = {**TOKENS, **ENCODER, "max_position_embeddings": 32, "num_key_value_heads": 1}
COUNTS = ("layers", "attention_heads", "ffn_dim")
BOTH = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in zip(COUNTS, (3, 2, 32), strict=True)}
BOTH |= {**TOKENS, "d_model": 16, "decoder_start_token_id": 1, "dropout": 0.0}


def gpt2() -> nn.Module:
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TOKENS, **sizes, **dropout))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def gemma2() -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**DECODER, head_dim=8, sliding_window=4))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4))


def mamba() -> nn.Module:
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 3, "time_step_rank": 2}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**TOKENS, **sizes))


def bert() -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**TOKENS, **ENCODER, **dropout))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**TOKENS, **sizes, dropout_rate=0.0))


def bart() -> nn.Module:
    config = transformers.BartConfig(**BOTH, max_position_embeddings=32, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(**ENCODER, image_size=16, patch_size=8, hidden_dropout_prob=0.0, num_labels=10)
    return transformers.ViTForImageClassification(config)


def whisper() -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
    config = transformers.WhisperConfig(**BOTH, **sizes, suppress_tokens=None, begin_suppress_tokens=None)
    return transformers.WhisperForConditionalGeneration(config)


def of_timm(
    name: str, size: int, blocks: str | tuple[str, ...], equal: tuple[str, str], **arguments: object
) -> Architecture:
    make = partial(timm.create_model, name, num_classes=10, **arguments)
    return Architecture(make, partial(images, size), blocks, equal)


SMALL_VIT = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3}
STAGES = {"depths": (2, 2, 2, 2), "dims": (16, 32, 48, 64)}
small, medium = partial(images, 32), partial(images, 64)

TORCHVISION = {
    "resnet18": Architecture(partial(resnet, BasicBlock), small, "layer[12].1", ("layer1.0", "layer1.1")),
    "resnet50": Architecture(
        partial(resnet, Bottleneck, 16), small, "layer[12].1", ("layer1.0.conv2", "layer1.1.conv2")
    ),
    "wide_resnet50_2": Architecture(
        partial(resnet, Bottleneck, 32), small, "layer[12].1", ("layer1.0.conv2", "layer1.1.conv2")
    ),
    "mobilenet_v2": Architecture(
        partial(models.mobilenet_v2, num_classes=10, width_mult=0.25, dropout=0.0),
        small,
        ("features.[35689]", "features.1[02356]"),
        ("features.8", "features.9"),
    ),
    "mobilenet_v3_small": Architecture(
        partial(models.mobilenet_v3_small, num_classes=10, width_mult=0.5, dropout=0.0),
        small,
        ("features.[35678]", "features.1[01]"),
        ("features.10", "features.11"),
    ),
    "efficientnet_b0": Architecture(efficientnet_b0, small, "features.[123].[12]", ("features.2.1", "features.2.2")),
    "convnext_tiny": Architecture(convnext_tiny, small, "features.[135].*", ("features.1.0", "features.1.1")),
    "regnet_y_400mf": Architecture(
        partial(models.regnet_y_400mf, num_classes=10),
        small,
        "trunk_output.block?.block?-[1-5]",
        ("trunk_output.block4.block4-1", "trunk_output.block4.block4-2"),
    ),
    "swin_t": Architecture(swin_t, small, "features.[135].*", ("features.1.0", "features.1.1")),
    "vit_b_16": Architecture(
        vit_b_16, small, "encoder.layers.*", ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1")
    ),
    "maxvit_t": Architecture(
        maxvit_t,
        medium,
        "blocks.?.layers.1",
        ("blocks.0.layers.1.layers.grid_attention", "blocks.0.layers.1.layers.window_attention"),
    ),
    "densenet121": Architecture(
        densenet121,
        small,
        "features.denseblock?.*",
        ("features.denseblock1.denselayer1.conv2", "features.denseblock1.denselayer2.conv2"),
    ),
    "vgg11_bn": Architecture(vgg11_bn, small, "features.*", ("features.11", "features.18")),
}
TIMM = {
    "resnet10t": of_timm("resnet10t", 32, "layer[12].1", ("layer1.0", "layer1.1"), layers=(2, 2, 1, 1)),
    "test_vit2": of_timm("test_vit2", 160, "blocks.*", ("blocks.0", "blocks.1")),
    "test_convnext": of_timm("test_convnext", 64, "stages.*.blocks.*", ("stages.1.blocks.0", "stages.1.blocks.1")),
    "test_efficientnet": of_timm(
        "test_efficientnet", 64, "blocks.[1-4].1", ("blocks.1.1.conv_exp", "blocks.2.0.conv_exp"), depth_multiplier=2
    ),
    "convnext_atto": of_timm(
        "convnext_atto", 64, "stages.*.blocks.*", ("stages.1.blocks.0", "stages.1.blocks.1"), **STAGES
    ),
    "resnetv2_50": of_timm(
        "resnetv2_50",
        64,
        "stages.*.blocks.1",
        ("stages.1.blocks.0.conv2", "stages.1.blocks.1.conv2"),
        layers=(2, 2, 2, 2),
        channels=(16, 32, 64, 128),
    ),
    "mobilenetv3_small_050": of_timm("mobilenetv3_small_050", 64, "blocks.[1-4].[12]", ("blocks.4.1", "blocks.4.2")),
    "regnetx_002": of_timm("regnetx_002", 64, "s[34].b[2-7]", ("s4.b2", "s4.b3")),
    "edgenext_xx_small": of_timm(
        "edgenext_xx_small", 64, "stages.*.blocks.*", ("stages.2.blocks.0", "stages.2.blocks.1")
    ),
    "poolformerv2_s12": Architecture(
        poolformerv2_s12, medium, "stages.*.blocks.*", ("stages.1.blocks.0", "stages.1.blocks.1")
    ),
    "fastvit_t8": of_timm(
        "fastvit_t8",
        64,
        "stages.*.blocks.*",
        ("stages.1.blocks.0", "stages.1.blocks.1"),
        layers=(2, 2, 2, 2),
        embed_dims=(16, 32, 64, 128),
    ),
    "mobilevit_xxs": of_timm(
        "mobilevit_xxs",
        64,
        ("stages.1.[12]", "stages.*.1.transformer.*"),
        ("stages.2.1.transformer.0", "stages.2.1.transformer.1"),
    ),
    "ghostnet_050": of_timm(
        "ghostnet_050", 64, ("blocks.6.[12]", "blocks.8.*"), ("blocks.6.1", "blocks.6.2"), drop_rate=0.0
    ),
    "vit_tiny_patch16_224": of_timm("vit_tiny_patch16_224", 32, "blocks.*", ("blocks.0", "blocks.1"), **SMALL_VIT),
    "deit3_small_patch16_224": of_timm(
        "deit3_small_patch16_224", 32, "blocks.*", ("blocks.0", "blocks.1"), **SMALL_VIT
    ),
    "eva02_tiny_patch14_224": of_timm(
        "eva02_tiny_patch14_224", 28, "blocks.*", ("blocks.0", "blocks.1"), **{**SMALL_VIT, "img_size": 28}
    ),
    "swin_tiny_patch4_window7_224": of_timm(
        "swin_tiny_patch4_window7_224",
        32,
        "layers.*.blocks.*",
        ("layers.0.blocks.0", "layers.0.blocks.1"),
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 2, 2),
        num_heads=(2, 2, 4),
        drop_path_rate=0.0,
    ),
    "mixer_s32_224": Architecture(
        partial(MlpMixer, num_classes=10, img_size=32, patch_size=8, num_blocks=3, embed_dim=32),
        small,
        "blocks.*",
        ("blocks.0", "blocks.1"),
    ),
    "xcit_nano_12_p16_224": of_timm(
        "xcit_nano_12_p16_224", 64, "blocks.*", ("blocks.0", "blocks.1"), depth=3, embed_dim=32
    ),
    "nfnet_f0": of_timm(
        "nfnet_f0",
        64,
        "stages.?.1",
        ("stages.1.0.conv2", "stages.1.1.conv2"),
        depths=(1, 2, 2, 1),
        channels=(32, 64, 128, 128),
        stem_chs=32,
        group_size=8,
        num_features=128,
    ),
}
TRANSFORMERS = {
    "GPT2": Architecture(gpt2, tokens, "transformer.h.*", ("transformer.h.0", "transformer.h.1")),
    "Llama": Architecture(llama, tokens, "model.layers.*", ("model.layers.0", "model.layers.1")),
    "Gemma2": Architecture(gemma2, tokens, "model.layers.*", ("model.layers.0", "model.layers.1")),
    "Mixtral": Architecture(mixtral, tokens, "model.layers.*", ("model.layers.0", "model.layers.1")),
    "Mamba": Architecture(mamba, tokens, "backbone.layers.*", ("backbone.layers.0", "backbone.layers.1")),
    "BERT": Architecture(bert, tokens, "bert.encoder.layer.*", ("bert.encoder.layer.0", "bert.encoder.layer.1")),
    "T5": Architecture(t5, sequences, "*coder.block.[12]", ("encoder.block.1", "encoder.block.2")),
    "BART": Architecture(
        bart, sequences, "model.*coder.layers.*", ("model.encoder.layers.0", "model.encoder.layers.1")
    ),
    "ViT": Architecture(vit, pixels, "vit.layers.*", ("vit.layers.0", "vit.layers.1")),
    "Whisper": Architecture(
        whisper, sounds, "model.*coder.layers.*", ("model.encoder.layers.0", "model.encoder.layers.1")
    ),
}
ZOO = {**TORCHVISION, **TIMM, **TRANSFORMERS}
NO_BLOCKS = {
    "densenet121": "a layer returns its input with new channels, so no block keeps its input's shape",
    "vgg11_bn": "no layer adds its input to its output",
}
DOZEN = ("resnet18", "convnext_tiny", "vit_b_16", "swin_t", "test_vit2", "test_convnext", "test_efficientnet")
DOZEN += ("GPT2", "Llama", "BERT", "T5", "Whisper")  # of the main suite


def build(name: str) -> nn.Module:
    """Return an architecture of the zoo in training mode; its weights are the same at each call.

    None is zero: with zero gains and heads, as libraries begin, many blocks would change nothing and learn nothing.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZOO[name].make().train()
        for weight in model.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.1)
        return model


def output_of(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return the model's first output, the logits."""
    output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """Return the mean of the output times sines: unlike that of its square, its gradient passes through a norm."""
    return (output * torch.arange(output.numel()).view(output.shape).sin()).mean()

"""The public callbacks on models that others wrote: a test for each cell of a table.

A cell works where the model trains three steps, is tied as its callback says, loads into a fresh run, and is exported;
or it is refused, for a reason that a user can act on.
"""

import copy
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import timm
import torch
import torchvision
import transformers
from families import FAMILIES, Sites
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Stranger(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    sites: Sites


def images():
    return (torch.randn(8, 3, 32, 32),)


def tokens():
    return (torch.randint(50, (2, 8)),)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.lstm = nn.LSTM(16, 16, num_layers=2, batch_first=True)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0])


class Adversaries(nn.Module):
    """A generator and a discriminator, which two optimizers train."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.Tanh())))
        self.discriminator = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.Tanh())))

    def forward(self, noise):
        return self.discriminator(self.generator(noise))


def gpt2():
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=3, n_head=2, **options)
    )


def bert():
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
        ),
        add_pooling_layer=False,
    )


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=8,
            use_cache=False,
        )
    )


MODELS = {
    "torchvision resnet18": Stranger(
        torchvision.models.resnet18,
        images,
        Sites(
            ("net.layer1.0.conv1.weight", "net.layer1.1.conv1.weight"),
            ("net.layer1.0", "net.layer1.1"),
            "net.layer1.*.conv*.weight",
            "net.layer?.*",
        ),
    ),
    "torchvision resnet50": Stranger(
        torchvision.models.resnet50,
        images,
        Sites(
            ("net.layer1.0.conv2.weight", "net.layer1.1.conv2.weight"),
            ("net.layer1.1", "net.layer1.2"),
            "net.layer1.*.conv2.weight",
            "net.layer?.*",
        ),
    ),
    "torchvision mobilenet_v3_small": Stranger(
        torchvision.models.mobilenet_v3_small,
        images,
        Sites(
            ("net.features.5.block.0.0.weight", "net.features.6.block.0.0.weight"),
            ("net.features.5", "net.features.6"),
            "net.features.[56].block.0.0.weight",
            "net.features.[3568]",
        ),
    ),
    "torchvision convnext_tiny": Stranger(
        lambda: torchvision.models.convnext_tiny(stochastic_depth_prob=0.0),
        images,
        Sites(
            ("net.features.1.0.block.3.weight", "net.features.1.1.block.3.weight"),
            ("net.features.1.0", "net.features.1.1"),
            "net.features.1.*.block.3.weight",
            "net.features.1.*",
        ),
    ),
    "torchvision vit_b_16": Stranger(
        lambda: torchvision.models.vit_b_16(image_size=32),
        images,
        Sites(
            ("net.encoder.layers.encoder_layer_0.mlp.0.weight", "net.encoder.layers.encoder_layer_1.mlp.0.weight"),
            ("net.encoder.layers.encoder_layer_0", "net.encoder.layers.encoder_layer_1"),
            "net.encoder.layers.encoder_layer_[0-2].mlp.0.weight",
            "net.encoder.layers.*",
        ),
    ),
    "timm resnet10t": Stranger(
        lambda: timm.create_model("resnet10t"),
        images,
        Sites(
            ("net.layer1.0.conv1.weight", "net.layer1.0.conv2.weight"),
            ("net.layer1.0.conv1", "net.layer1.0.conv2"),
            "net.layer1.*.conv?.weight",
            "net.layer1.*",
        ),
    ),
    "timm vit_tiny": Stranger(
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48),
        images,
        Sites(
            ("net.blocks.0.mlp.fc1.weight", "net.blocks.1.mlp.fc1.weight"),
            ("net.blocks.0", "net.blocks.1"),
            "net.blocks.*.mlp.fc1.weight",
            "net.blocks.*",
        ),
    ),
    "transformers GPT-2": Stranger(
        gpt2,
        tokens,
        Sites(
            ("net.transformer.h.0.mlp.c_fc.weight", "net.transformer.h.1.mlp.c_fc.weight"),
            ("net.transformer.h.0", "net.transformer.h.1"),
            "net.transformer.h.*.mlp.c_fc.weight",
            "net.transformer.h.*",
        ),
    ),
    "transformers BERT": Stranger(
        bert,
        tokens,
        Sites(
            ("net.encoder.layer.0.output.dense.weight", "net.encoder.layer.1.output.dense.weight"),
            ("net.encoder.layer.0", "net.encoder.layer.1"),
            "net.encoder.layer.*.output.dense.weight",
            "net.encoder.layer.*",
        ),
    ),
    "transformers Llama": Stranger(
        llama,
        tokens,
        Sites(
            ("net.model.embed_tokens.weight", "net.lm_head.weight"),
            ("net.model.layers.0", "net.model.layers.1"),
            "net.model.layers.*.mlp.up_proj.weight",
            "net.model.layers.*",
        ),
    ),
    "torch nn.Transformer": Stranger(
        lambda: nn.Transformer(16, 2, 3, 3, 32, dropout=0.0, batch_first=True),
        lambda: (torch.randn(2, 5, 16), torch.randn(2, 4, 16)),
        Sites(
            ("net.encoder.layers.0.linear1.weight", "net.decoder.layers.0.linear1.weight"),
            ("net.encoder.layers.0", "net.encoder.layers.1"),
            "net.encoder.layers.*.linear1.weight",
            "net.encoder.layers.*",
        ),
    ),
    "an LSTM language model": Stranger(
        LanguageModel,
        tokens,
        Sites(
            ("net.head.weight", "net.embedding.weight"),
            ("net.head", "net.embedding"),
            "net.lstm.weight_*",
            "net.lstm",
            lstms="net.lstm",
        ),
    ),
    "a GAN": Stranger(
        Adversaries,
        lambda: (torch.randn(2, 8),),
        Sites(
            ("net.generator.0.weight", "net.discriminator.0.weight"),
            ("net.generator", "net.discriminator"),
            "net.generator.*.weight",
            "net.generator.*",
        ),
    ),
}


def output_of(net, inputs):
    output = net(*inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


class Trained(pl.LightningModule):
    """Trains any network to return sines; an adversarial one, by two optimizers in turn."""

    def __init__(self, stranger):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = stranger.make()
            self.batch = stranger.inputs()
        self.initial = copy.deepcopy(self.state_dict())
        self.automatic_optimization = not isinstance(self.net, Adversaries)

    def loss(self):
        output = output_of(self.net, self.batch)
        target = torch.arange(output.numel()).view(output.shape).sin()
        return F.mse_loss(output, target) / 1000  # small beside what pulls

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.loss()
        for optimizer, play in zip(self.optimizers(), (self.deceive, self.detect), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(play(*self.batch) / 1000)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        return None

    def deceive(self, noise):
        return F.softplus(-self.net(noise)).mean()

    def detect(self, noise):
        real, fake = torch.ones_like(noise), self.net.generator(noise).detach()
        return F.softplus(-self.net.discriminator(real)).mean() + F.softplus(self.net.discriminator(fake)).mean()

    def forward(self, batch):
        return output_of(self.net, self.batch)

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.SGD(self.parameters(), lr=0.1)
        parts = [*self.net.children()]
        own = [{id(p): p for p in part.parameters()} for part in parts]
        return [
            torch.optim.SGD(part.values(), lr=0.1)
            for part in (own[0], {k: own[1][k] for k in own[1] if k not in own[0]})
        ]

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(3)))

    predict_dataloader = train_dataloader


REFUSED = {
    ("an LSTM language model", "ResidualMerging"): "only it computes output 2 (a tuple)",
    ("a GAN", "ResidualMerging"): "the Tanh 'net.generator.1' has no parameters",
    ("an LSTM language model", "Coupling"): "'net.head.bias' has no partner",
    **{(f"torchvision resnet{n}", "Looping"): "a loop needs blocks that keep the shape" for n in (18, 50)},
    ("torchvision mobilenet_v3_small", "Looping"): "'net.features.3' and 'net.features.5' are not consecutive",
    **{(f"torchvision resnet{n}", "RecurrentDepth"): "must be equal to share weights" for n in (18, 50)},
    ("torchvision mobilenet_v3_small", "RecurrentDepth"): "a stage needs two blocks or more",
    ("timm resnet10t", "RecurrentDepth"): "a stage needs two blocks or more",
    ("an LSTM language model", "RecurrentDepth"): "not an entry of an nn.ModuleList or nn.Sequential",
    ("a GAN", "RecurrentDepth"): "a Linear and 'net.generator.1' a Tanh: the blocks of a stage must be equal",
    **{
        (model, "ZoneoutStates"): "modules: pattern 'net.lstms.*' matches no module"
        for model in MODELS
        if model != "an LSTM language model"
    },
}


@functools.cache
def free(model):
    """Return the model, trained without ties."""
    module = Trained(MODELS[model])
    trainer_of([]).fit(module)
    return module


def trainer_of(callbacks):
    return pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callbacks,
    )


LARGE = ("torchvision resnet18", "torchvision resnet50", "torchvision convnext_tiny", "torchvision vit_b_16")
CELLS = [
    pytest.param(model, family, marks=[pytest.mark.slow] * (model in LARGE)) for model in MODELS for family in FAMILIES
]


@pytest.mark.filterwarnings("ignore:MixtureTying begins with", "ignore:The tensor attributes self.lstm._flat_weights")
@pytest.mark.parametrize(("model", "family"), CELLS)
def test_strangers(model, family, record_property):
    record_property("cell", ("strangers", family, model))
    stranger, callback = MODELS[model], FAMILIES[family].callback
    module, trainer = Trained(stranger), trainer_of([callback(stranger.sites)])
    if reason := REFUSED.get((model, family)):
        with pytest.raises(ValueError, match=re.escape(reason)):
            trainer.fit(module)
        record_property("remark", f"refused: {reason}")
        return
    trainer.fit(module)
    trainer.save_checkpoint("last.ckpt")
    with torch.no_grad():
        expected = output_of(module.eval().net, module.batch)
    again = Trained(stranger)
    [*_, predicted] = trainer_of([callback(stranger.sites)]).predict(again, ckpt_path="last.ckpt", weights_only=True)
    torch.testing.assert_close(predicted, expected)
    program = torch.export.export(module.net, module.batch)
    torch.testing.assert_close(output_of(program.module(), module.batch).detach(), expected, rtol=1e-4, atol=1e-5)
    FAMILIES[family].holds(module, free(model), stranger.sites)

"""Small models, data and trainers for the tests of callbacks."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

TIES = ["encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o", "encoder.0.bias ~ decoder.0.bias"]
STRENGTH = 0.05


class Toy(pl.LightningModule):
    """A mirrored autoencoder whose optimizer, data precision and loss each test chooses."""

    def __init__(self, optimizer=None, penalty=None, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
            self.decoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        self.penalty = penalty  # a function of the model, added to the loss

    def loss(self, batch):
        x = batch[0].to(self.encoder[0].weight.dtype)
        loss = (self.decoder(self.encoder(x)) - x).square().mean()
        return loss if self.penalty is None else loss + self.penalty(self)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def by_hand(model, strength=STRENGTH):
    """strength · Ω of TIES, written out."""
    pairs = [
        (model.encoder[0].weight, model.decoder[2].weight.T),
        (model.encoder[2].weight, model.decoder[0].weight.T),
        (model.encoder[0].bias, model.decoder[0].bias),
    ]
    return strength * sum((a - b).square().sum() / 2 for a, b in pairs)


def batches(count=10, size=4, world=1):
    generator = torch.Generator().manual_seed(1)
    dataset = TensorDataset(torch.randn(count * size, 6, generator=generator))
    rank = int(os.environ.get("RANK", 0))
    sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=False) if world > 1 else None
    return DataLoader(dataset, batch_size=size, sampler=sampler)


def train(model, callbacks=(), *, data=None, ckpt_path=None, **arguments: Any) -> pl.Trainer:
    arguments = {
        "accelerator": "cpu",
        "max_epochs": 5,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        **arguments,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **arguments)
    trainer.fit(model, batches() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

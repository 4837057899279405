"""An autoencoder with a decoder that mirrors the encoder, so that ties can pair their layers."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.models.classifier import SingleStep
from tying.models.networks import stack


class Autoencoder(SingleStep):
    """Linear layers with ReLUs from the input to a code, and mirrored layers back; the loss is the mean squared error.

    The layers are ``encoder.0``, ``encoder.2``, ... and ``decoder.0``, ``decoder.2``, ..., so that
    ``"encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o"`` ties each layer to its mirror image.

    Args:
        sizes: units of each layer, from input to code.
        lr: learning rate of Adam.

    Shape: (batch, ...) with ``sizes[0]`` entries per sample; the reconstruction has the input's shape.

    Example:
        >>> [tuple(p.shape) for name, p in Autoencoder([8, 4, 2]).named_parameters() if name.endswith("weight")]
        [(4, 8), (2, 4), (4, 2), (8, 4)]
    """

    def __init__(self, sizes: Sequence[int] = (3072, 512, 128), lr: float = 1e-3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*stack(sizes))
        self.save_hyperparameters({"sizes": list(sizes), "lr": lr})
        self.decoder = nn.Sequential(*stack([*sizes][::-1]))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.encoder(x.flatten(1)))).view(x.shape)

    @override
    def step(self, stage: str, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] if isinstance(batch, list | tuple) else batch
        loss = F.mse_loss(self(x), x)
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=stage != "train")
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])

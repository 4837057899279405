"""A classifier and an autoencoder of the same images."""

import copy
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.errors import ConfigurationError, check_range
from tying.models.classifier import Classification


class HybridClassifier(Classification):
    """Train a classifier on labelled images and an autoencoder on all images; both encoders start with equal weights.

    The loss is the mean cross entropy of the labelled images, plus ``reconstruction`` times the mean squared error of
    all images. The encoders, ``classifier.encoder`` and ``autoencoder.encoder``, are independent unless
    :class:`tying.callbacks.Coupling` or another callback ties them. The classifier makes the predictions.

    Args:
        encoder: maps images to a code.
        head: maps the code to logits.
        decoder: maps the code to images.
        reconstruction: weight of the autoencoder's loss, ≥ 0.
        options: further arguments of :class:`tying.models.classifier.Classification`.

    Shape: training batches are dictionaries with ``labelled`` and ``unlabelled``, each (images, labels); other batches
    are (images, labels).

    Raises:
        ConfigurationError: ``reconstruction`` is negative, or the training data has no unlabelled part.

    Example:
        >>> from tying.models import MLP
        >>> model = HybridClassifier(MLP([4, 3]), MLP([3, 2]), MLP([3, 4]), num_classes=2)
        >>> [name for name, _ in model.named_parameters() if name.endswith("weight")]  # doctest: +NORMALIZE_WHITESPACE
        ['classifier.encoder.1.weight', 'classifier.head.1.weight', 'autoencoder.encoder.1.weight',
         'autoencoder.decoder.1.weight']
    """

    def __init__(
        self, encoder: nn.Module, head: nn.Module, decoder: nn.Module, reconstruction: float = 1.0, **options: Any
    ) -> None:
        check_range("reconstruction", reconstruction, "[0, inf)")
        super().__init__(**options)
        self.classifier = self.laid_out(nn.Sequential(OrderedDict(encoder=encoder, head=head)))
        self.autoencoder = self.laid_out(nn.Sequential(OrderedDict(encoder=copy.deepcopy(encoder), decoder=decoder)))

    @override
    def logits(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(x))

    @override
    def on_train_start(self) -> None:
        loader = self.trainer.train_dataloader
        parts = getattr(loader, "iterables", loader)  # the loaders of a CombinedLoader
        if not (isinstance(parts, dict) and {"labelled", "unlabelled"} <= parts.keys()):
            raise ConfigurationError(
                "HybridClassifier trains on batches of a labelled and an unlabelled part: set the data's labelled to "
                "fewer than all, or give a CombinedLoader of {'labelled': ..., 'unlabelled': ...}"
            )

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        images = torch.cat([batch["labelled"][0], batch["unlabelled"][0]])
        error = F.mse_loss(self.autoencoder(images).view_as(images), images)
        self.log("train/reconstruction", error)
        return loss + float(self.hparams["reconstruction"]) * error

"""One classifier for each of several domains with different inputs and the same classes."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.errors import ConfigurationError, listed
from tying.models.classifier import Classification


class DomainClassifiers(Classification):
    """Train a copy of one network for each domain, ``networks.<domain>``; all copies start with the same weights.

    The loss is the sum of the domains' mean cross entropies. The networks are independent unless they are tied.

    Args:
        network: maps inputs to logits; the first domain uses it, each other domain a copy.
        domains: names of the domains, the keys of batches.
        options: further arguments of :class:`tying.models.classifier.Classification`.

    Shape: batches are dictionaries of (inputs, labels) by domain. To predict, give a dictionary of loaders, or a
    list in the order of the domains: Lightning runs one loader after another.

    Raises:
        ConfigurationError: there is no domain, or a name is repeated or is not an identifier; in use, a batch has
            other domains.

    Example:
        >>> from tying.models import MLP
        >>> model = DomainClassifiers(MLP([4, 3]), domains=["colour", "grey"], num_classes=3)
        >>> {domain: logits.shape for domain, logits in model({"grey": torch.zeros(2, 4)}).items()}
        {'grey': torch.Size([2, 3])}

    Source: I. Goodfellow, Y. Bengio and A. Courville, Deep Learning, section 7.9, 2016.
    """

    def __init__(self, network: nn.Module, domains: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        if self.hparams["test_samples"] > 1:
            raise ConfigurationError("DomainClassifiers tests by one pass: test_samples must be 1")
        if not domains or len({*domains}) < len(domains) or not all(map(str.isidentifier, domains)):
            raise ConfigurationError(f"domains must be distinct names, at least one, not {list(domains)}")
        self.domains = list(domains)
        self.networks = nn.ModuleDict(
            {domain: self.laid_out(copy.deepcopy(network) if i else network) for i, domain in enumerate(domains)}
        )
        self.count_accuracy(f"{stage}/{domain}" for stage in ("train", "val", "test") for domain in self.domains)

    @override
    def forward(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        return {domain: self.networks[domain](self.laid_out_input(images)) for domain, images in x.items()}

    @override
    def step(self, stage: str, batch: Any, batch_idx: int) -> Tensor:
        if not isinstance(batch, dict) or batch.keys() != {*self.domains}:
            kind = listed(map(repr, batch)) if isinstance(batch, dict) else type(batch).__name__
            raise ConfigurationError(
                f"DomainClassifiers trains on dictionaries of batches of {listed(map(repr, self.domains))}, not on "
                f"{kind}: set its domains to those of the data, or give a CombinedLoader of a dictionary of loaders"
            )
        logits = self({domain: x for domain, (x, _) in batch.items()})
        return torch.stack(
            [self.log_loss(f"{stage}/{domain}", logits[domain], y) for domain, (_, y) in batch.items()]
        ).sum()

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loaders = self.trainer.predict_dataloaders
        domain = ([*loaders] if isinstance(loaders, Mapping) else self.domains)[dataloader_idx]
        x = batch[0] if isinstance(batch, list | tuple) else batch
        return cast(Tensor, self({domain: x})[domain].softmax(dim=-1))

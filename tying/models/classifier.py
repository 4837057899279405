"""LightningModules that train classifiers, and their base classes."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from tying.depth import Sampled, sampled
from tying.errors import ConfigurationError, check_choice, check_counts, check_range
from tying.lightning_namespace import pl
from tying.models.pretrained import load_pretrained
from tying.weights.optimizers import decay_groups

RANGES = {
    "lr": "[0, inf]",
    "momentum": "[0, 1)",
    "weight_decay": "[0, inf]",
    "warmup": "[0, 1]",
}


class SingleStep(pl.LightningModule):
    """A LightningModule that trains, validates and tests with the same method, :meth:`step`."""

    def step(self, stage: str, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log it.

        Args:
            stage: ``"train"``, ``"val"`` or ``"test"``.
            batch: batch of the stage's loader.
            batch_idx: index of the batch.
        """
        raise NotImplementedError

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step("train", batch, batch_idx)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step("val", batch, batch_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step("test", batch, batch_idx)


class Classification(SingleStep):
    """Train on the cross entropy of :meth:`logits`, which a subclass defines, and log loss and accuracy.

    Args:
        num_classes: number of classes.
        optimizer: SGD or AdamW.
        lr: peak learning rate.
        momentum: momentum of SGD.
        weight_decay: weight decay of either optimizer, for all parameters but the coefficients of template mixtures.
        schedule: learning rate after the warm-up. ``"cosine"``: half a cosine down to 0; ``"linear"``: a line down to
            0; ``"step"``: divide by 10 at each of ``drops``; ``"constant"``. ``"plateau"`` has no warm-up: divide by
            10 after four epochs without a better training accuracy.
        warmup: fraction of all steps over which the learning rate rises linearly from 0.
        drops: fractions of all steps, for ``schedule="step"``.
        label_smoothing: label smoothing of the cross entropy in training.
        channels_last: use the channels-last memory format for convolutions and four-dimensional inputs.
        test_samples: number of sampled passes, for models with stochastic merges (:mod:`tying.depth`). If it is above
            1, tests also log loss and accuracy of the mean probabilities as ``test/sampled/…``, and the standard
            deviation of the predicted class's probability as ``test/spread``; predictions are
            :class:`tying.depth.Sampled`.
        nesterov: use Nesterov's form of SGD's momentum, if ``momentum`` is above 0.

    Shape: batches are (inputs, labels), with integer labels of shape (batch,). A training batch may also be a
    dictionary with a batch of this form under ``labelled``.

    Raises:
        ConfigurationError: the optimizer or schedule is unknown, or a number is out of range; in use, the number of
            logits is not ``num_classes``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Literal["cosine", "linear", "step", "constant", "plateau"] = "cosine",
        warmup: float = 0.05,
        drops: Sequence[float] = (0.5, 0.75),
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        test_samples: int = 1,
        nesterov: bool = True,
    ) -> None:
        super().__init__()
        drops = list(drops)
        self.save_hyperparameters(ignore=["network", "encoder", "head", "decoder", "pretrained", "fresh"])
        check_choice("optimizer", optimizer, ("sgd", "adamw"))
        check_choice("schedule", schedule, ("cosine", "linear", "step", "constant", "plateau"))
        check_counts(num_classes=num_classes, test_samples=test_samples)
        for name, interval in RANGES.items():
            check_range(name, self.hparams[name], interval)
        self.count_accuracy(("train", "val", "test", *(["test/sampled"] if test_samples > 1 else [])))

    def count_accuracy(self, places: Iterable[str]) -> None:
        """Create the accuracies that :meth:`log_accuracy` updates."""
        self.accuracy = nn.ModuleDict(
            {f"{place}/accuracy": MulticlassAccuracy(self.hparams["num_classes"], average="micro") for place in places}
        )

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of inputs."""
        raise NotImplementedError

    def laid_out(self, module: nn.Module) -> nn.Module:
        """Convert a module to the channels-last memory format if ``channels_last`` is true, and return it."""
        return module.to(memory_format=torch.channels_last) if self.hparams["channels_last"] else module

    def laid_out_input(self, x: Tensor) -> Tensor:
        """Return four-dimensional inputs in the channels-last memory format if ``channels_last`` is true."""
        return x.contiguous(memory_format=torch.channels_last) if self.hparams["channels_last"] and x.ndim == 4 else x

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.laid_out_input(x))

    @override
    def step(self, stage: str, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch["labelled"] if isinstance(batch, dict) else batch
        return self.log_loss(stage, self(x), y)

    def log_loss(self, place: str, logits: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross entropy; log it and the accuracy as ``<place>/loss`` and ``<place>/accuracy``.

        Labels are smoothed if ``place`` begins with "train".
        """
        training = place.startswith("train")
        loss = F.cross_entropy(logits, y, label_smoothing=self.hparams["label_smoothing"] if training else 0.0)
        self.log(f"{place}/loss", loss, sync_dist=not training)
        self.log_accuracy(place, logits, y)
        return loss

    def log_accuracy(self, place: str, logits: Tensor, y: Tensor) -> None:
        """Update the accuracy of a place, and log it as ``<place>/accuracy`` at the end of the epoch."""
        if logits.shape[-1] != (classes := self.hparams["num_classes"]):
            raise ConfigurationError(
                f"num_classes is {classes}, and the network returns {logits.shape[-1]} logits a sample"
            )
        accuracy = cast(MulticlassAccuracy, self.accuracy[f"{place}/accuracy"])
        accuracy.update(logits, y)
        self.log(f"{place}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        if self.hparams["test_samples"] > 1:
            x, y = batch
            mean, std = sampled(self, x, self.hparams["test_samples"])
            smallest = torch.finfo(mean.dtype).tiny  # keeps the loss finite if a probability is 0
            self.log("test/sampled/loss", F.nll_loss(mean.clamp_min(smallest).log(), y), sync_dist=True)
            self.log("test/spread", std.gather(1, mean.argmax(dim=1, keepdim=True)).mean(), sync_dist=True)
            self.log_accuracy("test/sampled", mean, y)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor | Sampled:
        x = batch[0] if isinstance(batch, list | tuple) else batch
        samples = self.hparams["test_samples"]
        return sampled(self, x, samples) if samples > 1 else cast(Tensor, self(x).softmax(dim=-1))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups."""
        return decay_groups(self, self.hparams["weight_decay"])

    @override
    def configure_optimizers(self) -> pl.utilities.types.OptimizerLRScheduler:
        hparams = self.hparams
        lr, momentum, groups = hparams["lr"], hparams["momentum"], self.parameter_groups()
        optimizer = (
            torch.optim.SGD(groups, lr, momentum, nesterov=hparams["nesterov"] and momentum > 0)
            if hparams["optimizer"] == "sgd"
            else torch.optim.AdamW(groups, lr)
        )
        if hparams["schedule"] == "plateau":
            return {
                "optimizer": optimizer,
                "lr_scheduler": {
                    "scheduler": ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=3, threshold=0.0),
                    "monitor": "train/accuracy",
                },
            }
        if math.isinf(steps := self.trainer.estimated_stepping_batches):
            raise ConfigurationError(
                "a learning rate's schedule needs an end: set the trainer's max_epochs or max_steps"
            )
        factor = partial(
            learning_rate_factor,
            total=int(steps),
            warmup=hparams["warmup"],
            schedule=hparams["schedule"],
            drops=hparams["drops"],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class Classifier(Classification):
    """Train ``network`` on the cross entropy, and log loss and accuracy.

    Args:
        network: maps a batch of inputs to logits.
        pretrained: path of a Classifier's checkpoint; its weights and buffers are loaded.
        fresh: patterns of weights and buffers that are not loaded, such as ``"network.head"`` for a new head.
        options: further arguments of :class:`Classification`.

    Raises:
        ConfigurationError: see :class:`Classification` and :func:`tying.models.pretrained.load_pretrained`.

    Example:
        >>> from tying.models import MLP
        >>> Classifier(MLP([4, 3]), num_classes=3)(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, network: nn.Module, pretrained: str | None = None, fresh: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__(**options)
        self.network = self.laid_out(network)
        if pretrained is not None:
            load_pretrained(self, pretrained, fresh)
        elif fresh:
            raise ConfigurationError(f"fresh={list(fresh)} needs pretrained: without it, no weight is loaded")

    @override
    def logits(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.network(x))


def learning_rate_factor(step: int, total: int, warmup: float, schedule: str, drops: Sequence[float] = ()) -> float:
    """Return the factor on the peak learning rate at ``step`` of ``total``.

    Example:
        >>> [round(learning_rate_factor(step, 10, 0.2, "cosine"), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    falling = min((step - rising) / max(1, total - rising), 1.0)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * falling)) / 2
    if schedule == "linear":
        return 1 - falling
    return 0.1 ** sum(step >= drop * total for drop in drops) if schedule == "step" else 1.0

"""Low-rank, template and generated weights, and untied biases, during training."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from typing_extensions import override

from tying.callbacks.base import picture_folder
from tying.callbacks.transform import ModelTransform
from tying.errors import ConfigurationError
from tying.hard import generate_weights, lower_rank, plot_similarity, share_templates, untie_biases
from tying.hard.untied_bias import has_untied_bias


class LowRankWeights(ModelTransform):
    """Train weights of lower rank; see :func:`tying.hard.lower_rank`.

    Args:
        parameters: patterns of names; a leading ``!`` excludes.
        rank: of each weight.
        diagonal: add a diagonal; for square weights.

    Example:
        >>> LowRankWeights(["network.layer3.*.branch.conv2.weight"], rank=8).rank
        8
    """

    def __init__(self, parameters: list[str], rank: int, diagonal: bool = False) -> None:
        super().__init__()
        self.parameters, self.rank, self.diagonal = parameters, rank, diagonal

    @override
    def change(self, model: nn.Module) -> list[str]:
        return lower_rank(model, self.parameters, self.rank, self.diagonal)


class TemplateWeights(ModelTransform):
    """Train weights that are mixtures of shared templates; see :func:`tying.hard.share_templates`.

    When training ends, the similarity of the layers is plotted as ``layer_similarity.png`` in the logger's directory.

    Args:
        parameters: patterns of names; a leading ``!`` excludes.
        templates: number of templates for each shape of weights.

    Example:
        >>> TemplateWeights(["network.layer3.*.branch.conv2.weight"], templates=2).templates
        2
    """

    def __init__(self, parameters: list[str], templates: int) -> None:
        super().__init__()
        self.parameters, self.templates = parameters, templates

    @override
    def change(self, model: nn.Module) -> list[str]:
        return [*share_templates(model, self.parameters, self.templates)]

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if folder := picture_folder(trainer):
            plot_similarity(pl_module, folder / "layer_similarity.png")


class GeneratedWeights(ModelTransform):
    """Train convolution kernels that a small network generates; see :func:`tying.hard.generate_weights`.

    Args:
        parameters: patterns of names; a leading ``!`` excludes.
        embedding: size of the embedding of a basic kernel.
        in_channels: of a basic kernel.
        out_channels: of a basic kernel.

    Example:
        >>> GeneratedWeights(["network.layer*.conv*.weight"]).embedding
        64
    """

    def __init__(
        self, parameters: list[str], embedding: int = 64, in_channels: int = 16, out_channels: int = 16
    ) -> None:
        super().__init__()
        self.parameters, self.embedding = parameters, embedding
        self.in_channels, self.out_channels = in_channels, out_channels

    @override
    def change(self, model: nn.Module) -> list[str]:
        return generate_weights(model, self.parameters, self.embedding, self.in_channels, self.out_channels)


class UntiedBiases(ModelTransform):
    """Train convolutions with a bias for each position; see :func:`tying.hard.untie_biases`.

    Args:
        parameters: patterns of names of biases; a leading ``!`` excludes.
        input_size: size of one sample that the model takes, such as (3, 32, 32).

    Raises:
        ConfigurationError: ``input_size`` is no size.

    Example:
        >>> UntiedBiases(["features.*.bias"], input_size=(3, 32, 32)).input_size
        [3, 32, 32]
    """

    def __init__(self, parameters: list[str], input_size: list[int]) -> None:
        super().__init__()
        if not input_size or min(input_size) < 1:
            raise ConfigurationError(f"input_size must be that of one sample, such as [3, 32, 32], not {input_size}")
        self.parameters, self.input_size = parameters, [*input_size]

    @override
    def is_applied(self, model: nn.Module) -> bool:
        names = self.changed(model)
        return bool(names) and all(has_untied_bias(model, name) for name in names)

    @override
    def change(self, model: nn.Module) -> list[str]:
        like = next(model.parameters())
        example = torch.zeros(1, *self.input_size, dtype=like.dtype, device=like.device)
        return untie_biases(model, self.parameters, example)

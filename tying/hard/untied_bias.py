"""Convolutions with a bias for each output position."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import override

from tying.errors import ConfigurationError, listed
from tying.selection.resolve import select
from tying.weights.derived import check_free, eval_mode, locate_parameters


class _UntiedBias(nn.modules.conv._ConvNd):
    """A convolution whose bias has the size of its output, (channels, ...)."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        output: Tensor = self._conv_forward(input, self.weight, None)
        if output.shape[-self.bias.ndim :] != self.bias.shape:
            raise ValueError(f"biases for {tuple(self.bias.shape)} do not fit an output of {tuple(output.shape)}")
        return output + self.bias.to(output.dtype)  # which autocast may have lowered


class _UntiedBias1d(_UntiedBias, nn.Conv1d):
    pass


class _UntiedBias2d(_UntiedBias, nn.Conv2d):
    pass


class _UntiedBias3d(_UntiedBias, nn.Conv3d):
    pass


_UNTIED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: _UntiedBias1d,
    nn.Conv2d: _UntiedBias2d,
    nn.Conv3d: _UntiedBias3d,
}


def untie_biases(model: nn.Module, parameters: Sequence[str], example: Tensor) -> list[str]:
    """Give convolutions a bias for each channel and place, where theirs is one for all places; return their names.

    Each starts as the bias it replaces, the same at every place, so that the model computes what it did. Biases keep
    their names and take the size of the convolution's output, (channels, height, width), which one pass of ``example``
    through the model finds; the model then takes inputs of that size alone.

    Args:
        model: changed in place.
        parameters: patterns of names of biases; a leading ``!`` leaves out.
        example: an input of the model, (batch, ...).

    Raises:
        ConfigurationError: a pattern matches nothing, or something else than the bias of a convolution that ``example``
            passes, with outputs of one size; or a bias is tied, or its layer parametrized. Nothing is changed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten())
        >>> untie_biases(model, ["0.bias"], torch.zeros(1, 1, 6, 7)), model[0].bias.shape
        (['0.bias'], torch.Size([3, 4, 5]))

    Source: O. Chang and H. Lipson, Balanced and deterministic weight-sharing helps network performance, 2018, whose
    convolutions have such biases.
    """
    chosen, places = select(model, parameters), locate_parameters(model)
    if computed := [name for name in chosen if is_parametrized(places[name].owner)]:
        raise ConfigurationError(f"{listed(computed)}: of layers that are parametrized; untie biases before that")
    others = [name for name in chosen if type(places[name].owner) not in _UNTIED or places[name].attribute != "bias"]
    if others:
        raise ConfigurationError(
            f"{listed(others)}: only biases of {', '.join(kind.__name__ for kind in _UNTIED)} can be untied"
        )
    for name in chosen:
        check_free(name, places)
    sizes = _output_sizes(model, {places[name].owner for name in chosen}, example)
    for name in chosen:
        found = sizes.get(places[name].owner, set())
        if len(found) != 1:
            seen = f"with outputs of {sorted(found)}" if found else "not at all"
            raise ConfigurationError(f"{name!r}: the example passes this convolution {seen}; one size is needed")
    for name, bias in chosen.items():
        layer, (size,) = places[name].owner, sizes[places[name].owner]
        untied = bias.detach().view(-1, *[1] * len(size)).expand(-1, *size).clone()
        layer.__class__ = _UNTIED[type(layer)]
        layer.bias = nn.Parameter(untied, requires_grad=bias.requires_grad)
    return list(chosen)


def has_untied_bias(model: nn.Module, name: str) -> bool:
    """Tell whether a model has a bias of this name for each place."""
    places = locate_parameters(model)
    return name in places and isinstance(places[name].owner, _UntiedBias)


def _output_sizes(model: nn.Module, layers: set[nn.Module], example: Tensor) -> dict[nn.Module, set[tuple[int, ...]]]:
    sizes: dict[nn.Module, set[tuple[int, ...]]] = {}

    def look(layer: nn.Module, _: object, output: Tensor) -> None:
        dimensions = layer.weight.ndim - 2  # type: ignore[operator]  # a convolution's
        sizes.setdefault(layer, set()).add(tuple(output.shape[-dimensions:]))

    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        with eval_mode(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes

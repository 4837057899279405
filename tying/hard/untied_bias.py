"""Convolutions with a bias for each output position."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import override

from tying.errors import ConfigurationError, listed
from tying.torch_workarounds import convolve, is_proxy
from tying.weights.derived import Locations, eval_mode, locate_parameters, swap_class
from tying.weights.replace import check_free, select_weights


class _UntiedBias(nn.Module):
    """A convolution whose bias has the size of its output, (channels, ...)."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    @override
    def forward(self, input: Tensor) -> Tensor:
        output = convolve(self, input, self.weight, None)
        if self.bias is None:  # an adapter makes such a layer without one
            return output
        if not is_proxy(output) and output.shape[-self.bias.ndim :] != self.bias.shape:
            raise ValueError(f"biases for {tuple(self.bias.shape)} do not fit an output of {tuple(output.shape)}")
        return output + self.bias.to(output.dtype)  # autocast may have lowered the output's


class _UntiedBias1d(_UntiedBias, nn.Conv1d):  # type: ignore[misc]  # torch's bias is optional
    """A 1-d convolution with a bias for each output position."""


class _UntiedBias2d(_UntiedBias, nn.Conv2d):  # type: ignore[misc]  # torch's bias is optional
    """A 2-d convolution with a bias for each output position."""


class _UntiedBias3d(_UntiedBias, nn.Conv3d):  # type: ignore[misc]  # torch's bias is optional
    """A 3-d convolution with a bias for each output position."""


_UNTIED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: _UntiedBias1d,
    nn.Conv2d: _UntiedBias2d,
    nn.Conv3d: _UntiedBias3d,
}


def untie_biases(model: nn.Module, parameters: Sequence[str], example: Tensor) -> list[str]:
    """Give convolutions a bias for each channel and output position, instead of each channel; return their names.

    Each bias starts with the former value at all positions, so that the model's outputs do not change. Biases keep
    their names and take the shape of the convolution's output, (channels, height, width), in a forward pass of
    ``example``. The model then takes inputs of that size only. It also loads biases of one number for each channel.
    Convolutions that share a bias share the new one.

    Args:
        model: changed in place.
        parameters: patterns of names of biases; a leading ``!`` excludes.
        example: an input of the model, (batch, ...).

    Raises:
        ConfigurationError: a pattern matches nothing, or a parameter that is not a convolution's bias; or a bias is
            tied through a relation, its layer is parametrized, or the outputs of its layers for ``example`` do not
            have one size. Nothing is changed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten())
        >>> untie_biases(model, ["0.bias"], torch.zeros(1, 1, 6, 7)), model[0].bias.shape
        (['0.bias'], torch.Size([3, 4, 5]))

    Source: O. Chang and H. Lipson, Balanced and deterministic weight-sharing helps network performance, 2018; whose
    convolutions have these biases.
    """
    selection, locations = select_weights(model, parameters), locate_parameters(model)
    layers = _owners(selection.weights, locations)
    outputs = _output_sizes(model, {layer for owners in layers.values() for layer in owners}, example)
    sizes = {name: set.union(*(outputs[layer] for layer in owners)) for name, owners in layers.items()}
    for name, owners in layers.items():
        if len(sizes[name]) != 1 or not all(outputs[layer] for layer in owners):
            seen = f"outputs of {sorted(sizes[name])}" if sizes[name] else "none"
            raise ConfigurationError(
                f"{name!r}: its convolution needs outputs of one size, and the example gives {seen}"
            )
    selection.report("untie_biases")
    for name, bias in selection.weights.items():
        spread = nn.Parameter(_spread(bias.detach(), *sizes[name]), bias.requires_grad)
        for layer in layers[name]:
            swap_class(layer, _UNTIED[type(layer)])
            layer.bias = spread
            layer.register_load_state_dict_pre_hook(_spread_loaded)  # type: ignore[no-untyped-call]  # torch's
    return [*layers]


def _owners(biases: Mapping[str, nn.Parameter], locations: Locations) -> dict[str, list[nn.Module]]:
    """Return the convolutions that each bias belongs to: several if they share it.

    Raises:
        ConfigurationError: a parameter is not a convolution's bias, its layer is parametrized, or it is tied through a
            relation.
    """
    layers = {name: [location.owner for location in locations.owners(name)] for name in biases}
    if parametrized := [name for name, owners in layers.items() if any(map(is_parametrized, owners))]:
        raise ConfigurationError(f"{listed(parametrized)}: belongs to a layer that is parametrized: untie biases first")
    if others := [
        name
        for name, owners in layers.items()
        if any(type(layer) not in _UNTIED or layer.bias is not biases[name] for layer in owners)
    ]:
        raise ConfigurationError(
            f"{listed(others)}: only biases of {', '.join(kind.__name__ for kind in _UNTIED)} can be untied"
        )
    for name in layers:
        check_free(name, locations)
    return layers


def _spread(bias: Tensor, size: Sequence[int]) -> Tensor:
    return bias.view(-1, *[1] * len(size)).expand(-1, *size).clone()


def _spread_loaded(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a layer load a bias with one number for each channel: every position starts with it."""
    key, size = f"{prefix}bias", layer.get_parameter("bias").shape
    if key in state_dict and state_dict[key].shape == size[:1]:
        state_dict[key] = _spread(state_dict[key], size[1:])


def has_untied_bias(model: nn.Module, name: str) -> bool:
    """Return whether the named bias of a model has an entry for each output position."""
    locations = locate_parameters(model)
    return name in locations and isinstance(locations[name].owner, _UntiedBias)


def _output_sizes(model: nn.Module, layers: set[nn.Module], example: Tensor) -> dict[nn.Module, set[tuple[int, ...]]]:
    """Return the spatial sizes of the outputs of each convolution."""
    sizes: dict[nn.Module, set[tuple[int, ...]]] = {layer: set() for layer in layers}

    def add_size(layer: nn.Module, _: object, output: Tensor) -> None:
        sizes[layer].add(tuple(output.shape[2 - layer.get_parameter("weight").ndim :]))

    with ExitStack() as hooks, eval_mode(model):
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(add_size))
        model(example)
    return sizes

"""Calibration: how large the inputs are that each weight of a model is multiplied by, over some batches."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tying.errors import ConfigurationError
from tying.selection.index import clean_name
from tying.weights.derived import eval_mode

Forward = Callable[[nn.Module, Any], Any]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def call(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Call a model on a batch and return its output.

    Args:
        model: the model.
        batch: keyword arguments, if it is a mapping; a tuple or a list, whose first item is the input; or the input.
        forward: is called with the model and the batch instead.

    Example:
        >>> call(nn.Identity(), (torch.ones(2), "labels")), call(nn.Identity(), {"input": torch.zeros(1)})
        (tensor([1., 1.]), tensor([0.]))
    """
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Temporarily evaluate a model, without gradients; the global random generators keep their states."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with eval_mode(model), torch.random.fork_rng([*devices]):
        yield


def input_scales(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], forward: Forward | None = None
) -> dict[str, Tensor]:
    """Return the root mean square, over batches, of the inputs that each weight is multiplied by.

    The mean is over samples and positions; for a convolution with groups, over the groups too. The model evaluates the
    batches; it and the global random generators do not change.

    Args:
        model: the model.
        names: names of weights of linear layers and convolutions, which may be derived.
        batches: see :func:`call`; each counts by its number of inputs.
        forward: as for :func:`call`.

    Returns:
        By name, a tensor that broadcasts to the weight: (1, in) for a linear layer, (1, in, 1, 1) for a convolution,
        and (in, 1) for a layer that stores its weight transposed, such as the Conv1D of transformers. An input that is
        always zero, such as a dead unit, has scale 0. Weights of other modules, and of modules that the model does not
        call, are left out.

    Raises:
        ConfigurationError: there are no batches, or an input is not finite.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> input_scales(layer, ["weight"], [torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.tensor([[5.0, 1.0]])])
        {'weight': tensor([[4.0825, 0.8165]])}
    """
    modules = {clean_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
    owners = {name: modules[name.rpartition(".")[0]] for name in names if name.split(".")[-1] == "weight"}
    is_empty = True
    with _measured(filter(_multiplies, owners.values())) as squares, undisturbed(model):
        for batch in batches:
            is_empty = False
            call(model, batch, forward)
    if is_empty:
        raise ConfigurationError("calibration has no batches: give one or more, or leave calibration out")
    scales = {name: _shaped(owner, squares[owner]) for name, owner in owners.items() if owner in squares}
    for name, scale in scales.items():
        if not scale.isfinite().all():
            raise ConfigurationError(f"calibration: an input of {name!r} is NaN or infinite")
    return scales


@contextmanager
def _measured(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, int]]]:
    """Yield, for each module that is called, the sum of squares of its inputs by feature, and their number."""
    squares: dict[nn.Module, tuple[Tensor, int]] = {}

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = next(iter([*args, *kwargs.values()]))
        features = _by_feature(module, x.to(torch.promote_types(x.dtype, torch.float32)))
        total, count = squares.get(module, (features.new_zeros(()), 0))
        squares[module] = total + features.square().sum(dim=0), count + len(features)

    hooks = [module.register_forward_pre_hook(measure, with_kwargs=True) for module in {*modules}]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of transformers that stores its weight transposed."""
    layers = sys.modules.get("transformers.pytorch_utils")  # importing it is slow
    return layers is not None and isinstance(module, layers.Conv1D)


def _multiplies(module: nn.Module) -> bool:
    """Return whether a module multiplies its weight by its input, in a way that is known."""
    return isinstance(module, nn.Linear | Convolution | TransposedConvolution) or _is_conv1d(module)


def _by_feature(module: nn.Module, x: Tensor) -> Tensor:
    """Return a module's input as rows of the features that one output is computed from; (rows, features)."""
    if isinstance(module, Convolution | TransposedConvolution):
        x = x.movedim(-len(module.kernel_size) - 1, -1)
    groups = module.groups if isinstance(module, Convolution) else 1
    return x.reshape(-1, x.shape[-1] // groups)


def _shaped(module: nn.Module, squares: tuple[Tensor, int]) -> Tensor:
    """Return the root mean square of each feature in a shape that broadcasts to the module's weight."""
    total, count = squares
    is_transposed = isinstance(module, TransposedConvolution) or _is_conv1d(module)
    shape = [1] * getattr(module, "weight").ndim  # noqa: B009  # mypy does not know that it has one
    shape[0 if is_transposed else 1] = -1
    return (total / count).sqrt().view(shape)

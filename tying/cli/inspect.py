"""``tying inspect``: report what a configuration ties, without training."""

import copy
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from tying.callbacks import TyingCallback
from tying.callbacks.observers.summary import print_summary
from tying.callbacks.transform import ModelTransform, averaging_before
from tying.depth import Merge
from tying.errors import ConfigurationError, listed
from tying.files import read
from tying.hard import audit
from tying.hashing import plot_loads, report
from tying.selection.index import clean_name
from tying.selection.resolve import resolve, resolve_each
from tying.selection.tie import TiedGroup


def inspect(
    model: pl.LightningModule,
    callbacks: Sequence[pl.Callback],
    checkpoint: Path | None = None,
    weights_only: bool | None = True,
    plot: Path | None = None,
) -> None:
    """Print which weights each tie matches, and which weights no tie matches; change the model as training would.

    Args:
        model: the model to inspect.
        callbacks: those of the configuration; they are left as they are.
        checkpoint: load the weights of this one.
        weights_only: unpickle nothing but tensors and plain types from it.
        plot: write how hashes use their tables to this PNG: heat maps and histograms.

    Raises:
        ConfigurationError: ties do not fit the model; those that do are printed first.
    """
    if plot is not None and plot.is_dir():
        raise ConfigurationError(f"plot: {plot} is a folder; give a file's name, such as loads.png")
    model.configure_model()
    callbacks = [copy.copy(callback) for callback in _effective(model, callbacks)]
    transforms = [callback for callback in callbacks if isinstance(callback, ModelTransform)]
    if checkpoint is not None:
        load_weights(model, callbacks, _weights(checkpoint, weights_only), f"ckpt_path: {checkpoint}")
    before = dict(model.named_parameters())
    affected = _examine(model, callbacks)
    after = model.named_parameters()  # computed weights have other names now
    free = [clean_name(name) for name, parameter in after if name in before and id(parameter) not in affected]
    print(f"Not matched by any tie: {len(free)}: {', '.join(free)}" if free else "Every parameter is tied.")
    for description, names in _shared_modules(model).items():
        print(f"{description}: {listed(names)}")
    audited, hashed = audit(model), report(model)
    if hashed.weights:
        print(f"Hashed: {hashed}")
        if plot is not None:
            plot_loads(model, plot)
    elif plot is not None:
        raise ConfigurationError("plot: no weight of the model is hashed")
    if transforms:
        print(f"With {', '.join(type(callback).__name__ for callback in transforms)}: {audited.counts()}")
    problems = [problem for transform in transforms if (problem := averaging_before(transform, callbacks))]
    for line in [*(f"Problem: {problem}." for problem in problems), *audited.remarks()]:
        print(line)


def _effective(model: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> list[pl.Callback]:
    """Return the configuration's callbacks and the model's own, which replace those of one class: Lightning's rule."""
    added = model.configure_callbacks()
    added = [*added] if isinstance(added, Sequence) else [added]
    replaced = {type(callback) for callback in added}
    for hidden in replaced & {type(callback) for callback in callbacks}:
        print(f"{hidden.__name__} of the configuration is replaced by that of {type(model).__name__} itself")
    return [*(callback for callback in callbacks if type(callback) not in replaced), *added]


def _examine(model: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> set[int]:
    """Let callbacks change the model, transforms first as in training; print which weights each affects.

    Returns:
        The identities of all affected weights.

    Raises:
        ConfigurationError: some callbacks do not fit; the message has all of their errors.
    """
    tying = [callback for callback in callbacks if isinstance(callback, TyingCallback)]
    transforms = [callback for callback in tying if isinstance(callback, ModelTransform)]
    pulled: list[tuple[str, TiedGroup]] = []
    errors: list[str] = []
    for callback in [*transforms, *(callback for callback in tying if callback not in transforms)]:
        kind = type(callback).__name__
        try:
            groups = [(kind, group) for group in _match_ties(model, callback)]
            if isinstance(callback, ModelTransform):
                if groups:
                    print_summary(model, groups, max_rows=None)  # before they are one: with their gaps
                callback.apply(model)
                if not groups:
                    print(f"{kind}: {callback.describe(model)}")
            elif not groups and (weights := callback.affected(model)):
                print(f"{kind}: {len(weights)} weights: {listed(weights)}")
            else:
                pulled += groups
        except ConfigurationError as error:
            errors.append(str(error))
    if errors:
        raise ConfigurationError("; ".join(errors))
    for callback in tying:
        callback.check_conflicts(model, callbacks)
    if pulled or not transforms:
        print_summary(model, pulled, max_rows=None)
    return {id(weight) for callback in tying for weight in callback.affected(model).values()}


def _match_ties(model: pl.LightningModule, callback: TyingCallback) -> Sequence[TiedGroup]:
    """Return the groups that a callback ties; print which weights its ties match."""
    if isinstance(callback, ModelTransform) and callback.is_applied(model):  # by the model itself
        callback.apply(model)
        return callback.groups
    results = resolve_each(model, callback.ties)
    for tie, result in zip(callback.ties, results, strict=True):
        if not isinstance(result, ConfigurationError):
            weights, count = sum(map(len, result)), len(result)
            print(f"{type(callback).__name__}: '{tie}' matches {weights} weights in {count} group{'s' * (count > 1)}")
    if errors := [str(result) for result in results if isinstance(result, ConfigurationError)]:
        raise ConfigurationError("; ".join(errors))
    groups = resolve(model, callback.ties) if callback.ties else []
    callback.check_groups(groups)
    return groups


def _shared_modules(model: pl.LightningModule) -> dict[str, list[str]]:
    """Return how modules that share over depth or time describe themselves, merges apart, and their names."""
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        shares = type(module).__module__.startswith("tying.depth.") and not isinstance(module, Merge)
        if shares and (description := module.extra_repr()):
            names.setdefault(f"{type(module).__name__}({description})", []).append(clean_name(name))
    return names


def _weights(path: Path, weights_only: bool | None) -> dict[str, Tensor]:
    content = read(path, "ckpt_path") if weights_only else torch.load(path, "cpu", weights_only=weights_only)
    if not isinstance(content, dict) or not isinstance(state_dict := content.get("state_dict"), dict):
        raise ConfigurationError(f"ckpt_path: {path} is no checkpoint of Lightning: it has no state_dict")
    return state_dict


def load_weights(
    model: pl.LightningModule, callbacks: Sequence[pl.Callback], weights: dict[str, Tensor], context: str
) -> None:
    """Let callbacks change a model as training would have, and load the weights of that training.

    Raises:
        ConfigurationError: they do not fit.
    """
    for callback in callbacks:
        if isinstance(callback, TyingCallback):
            callback.prepare(model, weights)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigurationError(f"{context} does not fit the model: {error}") from None

"""``tying inspect``: report what a configuration ties, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from tying.callbacks import WeightClustering
from tying.callbacks.base import Choosing, TyingCallback
from tying.callbacks.observers.summary import print_summary
from tying.callbacks.transform import ChangesModel, averaging_before
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
    """Print which weights each tie matches, and which weights no tie matches; what callbacks change, they change.

    Args:
        model: what to inspect.
        callbacks: those of the configuration.
        checkpoint: take the weights of this one.
        weights_only: unpickle nothing but tensors and plain types from it.
        plot: write how hashes use their tables to this PNG: heat maps and histograms.

    Raises:
        ConfigurationError: ties do not fit the model; those that do are printed first.
    """
    if plot is not None and plot.is_dir():
        raise ConfigurationError(f"plot: {plot} is a folder; give a file's name, such as loads.png")
    model.configure_model()
    callbacks = _in_force(model, callbacks)
    changing = [callback for callback in callbacks if isinstance(callback, ChangesModel)]
    if checkpoint is not None:
        load_weights(model, callbacks, _weights(checkpoint, weights_only), f"ckpt_path: {checkpoint}")
    before = dict(model.named_parameters())
    held = _met(model, callbacks)
    after = dict(model.named_parameters())  # what is computed has another name now
    free = [clean_name(name) for name, parameter in before.items() if name in after and id(parameter) not in held]
    print(f"Not matched by any tie: {len(free)}: {', '.join(free)}" if free else "Every parameter is tied.")
    for kind, names in _used_again(model).items():
        print(f"{kind}: {listed(names)}")
    audited, hashed = audit(model), report(model)
    if hashed.weights:
        print(f"Hashed: {hashed}")
        if plot is not None:
            plot_loads(model, plot)
    elif plot is not None:
        raise ConfigurationError("plot: no weight of the model is hashed")
    if changing:
        print(f"With {', '.join(type(callback).__name__ for callback in changing)}: {audited.counts()}")
    wrong = [f"Problem: {problem}." for one in changing if (problem := averaging_before(one, callbacks))]
    for line in [*wrong, *audited.remarks()]:
        print(line)


def _in_force(model: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> list[pl.Callback]:
    """Return the configuration's callbacks and the model's own, which replace those of one class: Lightning's rule."""
    own = model.configure_callbacks()
    own = [*own] if isinstance(own, Sequence) else [own]
    replaced = {type(callback) for callback in own}
    for hidden in replaced & {type(callback) for callback in callbacks}:
        print(f"{hidden.__name__} of the configuration is replaced by that of {type(model).__name__} itself")
    return [*(callback for callback in callbacks if type(callback) not in replaced), *own]


def _met(model: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> set[int]:
    """Let callbacks meet the model as in training, where pulls come last; print what they do to which weights.

    Returns:
        the identities of all weights that they hold.

    Raises:
        ConfigurationError: some do not fit; all of these are told.
    """
    held: list[tuple[pl.Callback, nn.Parameter]] = []
    pulled: list[tuple[str, TiedGroup]] = []
    errors: list[str] = []
    for callback in sorted(callbacks, key=lambda one: not isinstance(one, ChangesModel)):
        kind = type(callback).__name__
        try:
            groups = [(kind, group) for group in _tied(model, callback)] if isinstance(callback, TyingCallback) else []
            held += [(callback, weight) for _, group in groups for weight in group.parameters]
            if isinstance(callback, ChangesModel):
                if groups:
                    print_summary(model, groups, max_rows=None)  # before they are one: with their gaps
                callback.apply(model)
                if told := callback.told(model):
                    print(f"{kind}: {told}")
            else:
                pulled += groups
            if isinstance(callback, Choosing) and (chosen := callback.choose(model)):
                held += [(callback, weight) for weight in chosen.values()]
                print(f"{kind}: {len(chosen)} weights: {listed(chosen)}")
        except ConfigurationError as error:
            errors.append(str(error))
    if errors:
        raise ConfigurationError("; ".join(errors))
    for callback in callbacks:
        if isinstance(callback, Choosing):
            callback.refuse(model, held)
    if pulled or not any(isinstance(callback, ChangesModel) for callback in callbacks):
        print_summary(model, pulled, max_rows=None)
    return {id(weight) for _, weight in held}


def _tied(model: pl.LightningModule, callback: TyingCallback) -> Sequence[TiedGroup]:
    """Return the groups that a callback ties; print what its ties match."""
    if isinstance(callback, ChangesModel) and callback.is_applied(model):  # by the model itself
        callback.apply(model)
        return callback.groups
    found = resolve_each(model, callback.ties)
    for tie, result in zip(callback.ties, found, strict=True):
        if not isinstance(result, ConfigurationError):
            weights, count = sum(map(len, result)), len(result)
            print(f"{type(callback).__name__}: '{tie}' matches {weights} weights in {count} group{'s' * (count > 1)}")
    if wrong := [str(result) for result in found if isinstance(result, ConfigurationError)]:
        raise ConfigurationError("; ".join(wrong))
    groups = resolve(model, callback.ties)
    callback.check(groups)
    return groups


def _used_again(model: pl.LightningModule) -> dict[str, list[str]]:
    """Return what modules that share over depth or time say of themselves, merges apart, and their names."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        ours = type(module).__module__.startswith("tying.depth.") and not isinstance(module, Merge)
        if ours and (told := module.extra_repr()):
            found.setdefault(f"{type(module).__name__}({told})", []).append(clean_name(name))
    return found


def _weights(path: Path, weights_only: bool | None) -> dict[str, Tensor]:
    content = read(path, "ckpt_path") if weights_only else torch.load(path, "cpu", weights_only=weights_only)
    if not isinstance(content, dict) or not isinstance(state_dict := content.get("state_dict"), dict):
        raise ConfigurationError(f"ckpt_path: {path} is no checkpoint of Lightning: it has no state_dict")
    return state_dict


def load_weights(
    model: pl.LightningModule, callbacks: Sequence[pl.Callback], weights: dict[str, Tensor], context: str
) -> None:
    """Let callbacks change a model as training would have, and load its weights from then.

    Raises:
        ConfigurationError: they do not fit.
    """
    for callback in callbacks:
        if isinstance(callback, ChangesModel):
            callback.apply(model)
        elif isinstance(callback, WeightClustering):
            callback.prepare(model, weights)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigurationError(f"{context} does not fit the model: {error}") from None

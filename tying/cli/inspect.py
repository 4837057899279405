"""``tying inspect``: report what a configuration ties, without training."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch

from tying.callbacks import AnchorTying, TyingCallback
from tying.callbacks.anchor import describe_importance
from tying.callbacks.base import accept_need
from tying.callbacks.conflicts import acting_on
from tying.callbacks.observers.summary import group_row, summary, summary_lines
from tying.callbacks.penalty import PenaltyCallback
from tying.callbacks.transform import ModelTransform, averaging_before
from tying.cli.strength import describe_strength, optimizers_of
from tying.depth import Merge
from tying.depth.generated_classes import GeneratedType
from tying.errors import ConfigurationError, listed
from tying.files import read
from tying.hard import audit
from tying.hashing import HashReport, plot_loads, report
from tying.lightning_namespace import pl
from tying.mixins import kept_beside
from tying.selection.index import clean_name
from tying.selection.resolve import resolve, resolve_each
from tying.selection.tie import TiedGroup


def inspect(
    model: pl.LightningModule,
    callbacks: Sequence[pl.Callback],
    checkpoint: Path | None = None,
    weights_only: bool | None = True,
    plot: Path | None = None,
    json: bool = False,
    trainer: pl.Trainer | None = None,
) -> None:
    """Print which weights each tie matches, and which weights no tie matches. This changes nothing.

    Args:
        model: the model to inspect; callbacks change a copy of it, as they would for training.
        callbacks: the callbacks of the configuration.
        checkpoint: path of a checkpoint to load weights from.
        weights_only: unpickle only tensors and plain types from the checkpoint.
        plot: path of a PNG for heat maps and histograms of how hashes use their tables.
        json: print one JSON document instead of text; NaN and infinity become null.
        trainer: the trainer that the model's optimizers may ask for, for what strengths do at their learning rates.

    Raises:
        ConfigurationError: ties do not fit the model. The ties that fit are printed first, as text only.
    """
    if plot is not None and plot.is_dir():
        raise ConfigurationError(f"plot: {plot} is a folder; give a file's name, such as loads.png")
    model, text = copy.deepcopy(model), list[str]()
    try:
        with torch.random.fork_rng(devices=[]):
            document = _collect(model, callbacks, checkpoint, weights_only, trainer, text)
        if plot is not None:
            if not document["hashes"]["weights"]:
                raise ConfigurationError("plot: no weight of the model is hashed")
            plot_loads(model, plot)
    finally:
        for part in [] if json else text:
            print(part)
    if json:  # in JSON there is no NaN nor infinity
        print(dumps(loads(dumps(document), parse_constant=lambda name: None), indent=2))


def _collect(
    model: pl.LightningModule,
    callbacks: Sequence[pl.Callback],
    checkpoint: Path | None,
    weights_only: bool | None,
    trainer: pl.Trainer | None,
    text: list[str],
) -> dict[str, Any]:
    """Return the report of :func:`inspect` as plain types; append it as text to ``text``, up to an error."""
    model.configure_model()
    effective = effective_callbacks(model, callbacks)
    replaced = [*dict.fromkeys(type(callback).__name__ for callback in callbacks if callback not in effective)]
    text += [f"{name} of the configuration is replaced by that of {type(model).__name__} itself" for name in replaced]
    callbacks = [copy.copy(callback) for callback in effective]
    transforms = [callback for callback in callbacks if isinstance(callback, ModelTransform)]
    states = load_checkpoint(model, callbacks, checkpoint, weights_only) if checkpoint is not None else {}
    before = [name for name, _ in model.named_parameters()]
    entries, affected = _examine(model, callbacks, text)
    strengths = _strengths(model, callbacks, trainer, text)
    free = [
        clean_name(name)
        for name, parameter in model.named_parameters()
        if name in before and id(parameter) not in affected  # computed weights have other names now
    ]
    text.append(_describe_free(free, [*map(clean_name, before)]))
    shared, audited, hashed = _shared_modules(model), audit(model), report(model)
    text += [f"{description}: {listed(names)}" for description, names in shared.items()]
    text += _describe_hashes(hashed, entries)
    if transforms:
        text.append(f"With {', '.join(type(callback).__name__ for callback in transforms)}: {audited.counts()}")
    importances = {
        callback.label: means
        for callback in callbacks
        if isinstance(callback, AnchorTying) and (means := callback.layer_importances(states))
    }
    text += [f"{label}: {describe_importance(means)}" for label, means in importances.items()]
    problems = [problem for transform in transforms if (problem := averaging_before(transform, callbacks))]
    text += [*(f"Problem: {problem}." for problem in problems), *audited.remarks()]
    return {
        "replaced": replaced,
        "callbacks": entries,
        "unmatched": free,
        "modules": shared,
        "report": audited.as_dict(),
        "hashes": asdict(hashed),
        "importances": importances,
        "strengths": strengths,
        "problems": [*problems, *audited.problems],
        "limits": audited.limits,
    }


def _describe_free(free: Sequence[str], names: Sequence[str]) -> str:
    """Return a sentence that lists the weights that no tie matches, among the names of all weights."""
    if not free:
        return "Every parameter is tied."
    return f"Not matched by any tie: {len(free)}: {', '.join(_as_patterns(free, {*names}.difference(free)))}"


def _as_patterns(names: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return names; three or more that differ only in numbers become a pattern and their count.

    Names that have the same pattern as one of the others remain.

    Example:
        >>> _as_patterns([*(f"{layer}.norm{n}" for layer in (0, 1) for n in (1, 2)), "0.conv", "2.conv"], ["1.conv"])
        ['*.norm* (4)', '0.conv', '2.conv']
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    taken = {re.sub(r"\d+", "*", name) for name in others}
    parts = [[f"{p} ({len(group)})"] if len(group) > 2 and p not in taken else group for p, group in alike.items()]
    return [name for part in parts for name in part]


def _describe_hashes(hashed: HashReport, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the report of hashed weights, without its first line if that is a callback's description."""
    if not hashed.weights:
        return []
    count, _, tables = str(hashed).partition("\n")
    return [tables if any(entry.get("description") == count for entry in entries) else f"Hashed: {count}\n{tables}"]


def _strengths(
    model: pl.LightningModule,
    callbacks: Sequence[pl.Callback],
    trainer: pl.Trainer | None,
    text: list[str],
) -> dict[str, list[str]]:
    """Return what the strength of each callback does to the gap of its groups in a step; append it to ``text``."""
    pulling = [callback for callback in callbacks if isinstance(callback, PenaltyCallback) and callback.ties]
    optimizers = optimizers_of(model, trainer) if pulling else []
    sentences = {
        callback.label: describe_strength(callback, resolve(model, callback.ties), optimizers) for callback in pulling
    }
    text += [f"{label}: {sentence}." for label, lines in sentences.items() for sentence in lines]
    return {label: lines for label, lines in sentences.items() if lines}


def effective_callbacks(model: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> list[pl.Callback]:
    """Return the callbacks of the configuration and of the model; the model's replace those of the same class."""
    added = model.configure_callbacks()
    added = [*added] if isinstance(added, Sequence) else [added]
    kinds = {type(callback) for callback in added}
    rest = [callback for callback in callbacks if type(callback) not in kinds]
    return [*rest, *kept_beside(model, callbacks), *added]


def _examine(
    model: pl.LightningModule, callbacks: Sequence[pl.Callback], text: list[str]
) -> tuple[list[dict[str, Any]], set[int]]:
    """Let callbacks change the model, transforms first as in training; append to ``text`` which weights each affects.

    Returns:
        The ties, groups and affected weights of each callback, as plain types; the identities of all affected weights.

    Raises:
        ConfigurationError: some callbacks do not fit; the message has all of their errors.
    """
    tying = [callback for callback in callbacks if isinstance(callback, TyingCallback)]
    entries: dict[TyingCallback, dict[str, Any]] = {}
    pulled: list[tuple[dict[str, Any], TiedGroup]] = []  # with their rows
    errors: list[str] = []
    for callback in sorted(tying, key=lambda callback: not isinstance(callback, ModelTransform)):
        kind = type(callback).__name__
        try:
            with acting_on(model, callback, callbacks):
                ties, groups = _match_ties(model, callback, text)
                # before they become one weight, to report their gaps
                rows = [group_row(kind, group) for group in groups]
                entries[callback] = {"callback": kind, "name": callback.name, "ties": ties, "groups": rows}
                if isinstance(callback, ModelTransform):
                    if groups:
                        text.append(summary(rows, summary_lines(model, groups, callbacks), max_rows=None))
                    callback.apply(model)
                    if not groups:
                        entries[callback]["description"] = callback.describe(model)
                        text.append(f"{kind}: {entries[callback]['description']}")
                elif not groups and (weights := callback.affected(model)):
                    text.append(f"{kind}: {len(weights)} weights: {listed(weights)}")
                else:
                    pulled += zip(rows, groups, strict=True)
        except ConfigurationError as error:
            errors.append(str(error))
    if errors:
        raise ConfigurationError("; ".join(errors))
    for callback in tying:
        callback.check_conflicts(model, callbacks)
    if pulled or not any(isinstance(callback, ModelTransform) for callback in tying):
        lines = summary_lines(model, [group for _, group in pulled], callbacks)
        text.append(summary([row for row, _ in pulled], lines, max_rows=None))
    affected = {callback: callback.affected(model) for callback in tying}
    return (
        [{**entry, "affects": [*affected[callback]]} for callback, entry in entries.items()],
        {id(weight) for weights in affected.values() for weight in weights.values()},
    )


def _match_ties(
    model: pl.LightningModule, callback: TyingCallback, text: list[str]
) -> tuple[list[dict[str, Any]], Sequence[TiedGroup]]:
    """Return how many weights each tie of a callback matches, and the groups; append the former to ``text``."""
    if isinstance(callback, ModelTransform) and callback.is_applied(model):  # by the model itself
        callback.apply(model)
        return [], callback.groups
    results = resolve_each(model, callback.ties)
    matches: list[dict[str, Any]] = [
        {"tie": str(tie), "weights": sum(map(len, result)), "groups": len(result)}
        for tie, result in zip(callback.ties, results, strict=True)
        if not isinstance(result, ConfigurationError)
    ]
    text += [
        f"{type(callback).__name__}: '{match['tie']}' matches {match['weights']} weights in {match['groups']} "
        f"group{'s' * (match['groups'] > 1)}"
        for match in matches
    ]
    if errors := [str(result) for result in results if isinstance(result, ConfigurationError)]:
        raise ConfigurationError("; ".join(errors))
    groups = resolve(model, callback.ties) if callback.ties else []
    callback.check_groups(groups)
    return matches, groups


def _shared_modules(model: pl.LightningModule) -> dict[str, list[str]]:
    """Return the names of modules that share weights over depth or time, by their description."""
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        cls = type(module)
        if isinstance(module, Merge) or isinstance(cls, GeneratedType):  # callbacks describe merges and loops of blocks
            continue
        if cls.__module__.startswith("tying.depth.") and module.extra_repr():
            names.setdefault(f"{cls.__name__}({module.extra_repr()})", []).append(clean_name(name))
    return names


def load_checkpoint(
    model: pl.LightningModule, callbacks: Sequence[pl.Callback], checkpoint: Path, weights_only: bool | None
) -> Mapping[str, Any]:
    """Let callbacks change a model as in training, load the weights of a checkpoint, and return its callbacks' states.

    Raises:
        ConfigurationError: the file is not a checkpoint of Lightning, or does not fit.
    """
    content = read(checkpoint, "ckpt_path") if weights_only else torch.load(checkpoint, "cpu", weights_only=False)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ConfigurationError(f"ckpt_path: {checkpoint} is not a checkpoint of Lightning: it has no state_dict")
    load_weights(model, callbacks, content["state_dict"], f"ckpt_path: {checkpoint}")
    states: Mapping[str, Any] = content.get("callbacks", {})
    return states


def load_weights(
    model: pl.LightningModule, callbacks: Sequence[pl.Callback], weights: dict[str, torch.Tensor], context: str
) -> None:
    """Let callbacks change a model as they do in training, and load the weights of that training.

    Raises:
        ConfigurationError: they do not fit.
    """
    for callback in callbacks:
        if isinstance(callback, TyingCallback):
            callback.prepare(model, weights)
            accept_need(model, callback)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigurationError(f"{context} does not fit the model: {error}") from None

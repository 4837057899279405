"""Advise on which weights may be tied, by what ties do to the outputs of a model."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tying.advice.candidates import find_candidates, tieable_weights
from tying.advice.measure import Comparison, Record, fingerprint
from tying.advice.plans import Planner, most_saved
from tying.advice.report import Advice
from tying.advice.study import Study
from tying.advice.untrained import looks_untrained
from tying.errors import ConfigurationError, check_count, check_range
from tying.selection.resolve import select
from tying.weights.calibration import Forward


def advise(
    model: nn.Module,
    batches: Iterable[Any],
    budget: float,
    steps: int = 0,
    forward: Forward | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    parameters: Sequence[str] = ("**",),
    training: Iterable[Any] | None = None,
    rate: float = 1e-3,
) -> Advice:
    """Advise on which weights of a trained model may be tied; see :mod:`tying.advice`. The model stays as it is.

    Args:
        model: the trained model; evaluated in eval mode.
        batches: inputs, tuples and lists that begin with the input, or mappings of keyword arguments. All are kept.
        budget: share of the parameters that may remain, in (0, 1).
        steps: number of steps of distillation of each plan.
        forward: returns the output of a model for a batch; default: its logits, or its first floating-point tensor.
        out: folder for tables, picture, YAML and what is measured; an interrupted run goes on there.
        progress: show a progress bar.
        parameters: patterns of the parameters among which to save; a leading ``!`` excludes.
        training: batches to distil on; default: ``batches``, whose errors are then too good.
        rate: learning rate of the distillation.

    Raises:
        ConfigurationError: there are no batches or no weights to tie, ties do not reach the budget, or the outputs are
            zero, not finite or no tensors.

    Warns:
        UserWarning: the model looks untrained.

    Example:
        >>> import torch
        >>> model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
        >>> weights = [nn.init.orthogonal_(layer.weight) for layer in model]
        >>> _ = model[2].load_state_dict(model[1].state_dict())
        >>> advice = advise(model, [torch.randn(32, 16)], budget=0.8, progress=False)
        >>> advice.groups[0].ties, advice.groups[0].error, advice.groups[0].verdict, advice.ties
        (('{1..2}.weight',), 0.0, 'tie', ['{1..2}.weight'])
    """
    check_range("budget", budget, "(0, 1)")
    check_count("steps", steps, "[0, inf)")
    check_range("rate", rate, "(0, inf)")
    if not (kept := [*batches]):
        raise ConfigurationError("there are no batches: give one or more, on which to compare outputs")
    return _advise(
        model, kept, budget, steps, forward, out, progress, parameters, kept if training is None else training, rate
    )


def _advise(
    model: nn.Module,
    batches: Sequence[Any],
    budget: float,
    steps: int,
    forward: Forward | None,
    out: str | Path | None,
    progress: bool,
    parameters: Sequence[str],
    training: Iterable[Any],
    rate: float,
) -> Advice:
    """Return advice, given arguments that are checked, and save it if there is a folder."""
    folder = None if out is None else Path(out)
    weights = tieable_weights(model, parameters)
    total = sum(weight.numel() for weight in select(model, parameters).values())
    candidates = find_candidates(weights)
    _check_reachable(budget, total, most_saved(candidates, weights))
    if looks_untrained(model):
        warnings.warn(
            f"{type(model).__name__} looks untrained: its weights are as they are initialised. What may be tied in a "
            "random function says nothing about a trained one: train it, or load a checkpoint, first",
            stacklevel=3,
        )
    planner = Planner(model, weights, needed=total - int(budget * total))
    record = Record(folder, fingerprint(model, batches, forward))
    study = Study(model, weights, Comparison(model, batches, forward), record, progress)
    groups = study.groups(candidates, planner)
    errors = {group: row.error for group, row in groups.items()}
    verdicts = [group for group, row in groups.items() if row.may_tie]
    plans = study.plans(planner.plans(errors, verdicts), training, steps, rate, total)
    advice = Advice((*groups.values(),), (*plans,), total, budget, steps)
    if folder is not None:
        advice.save(folder)
    return advice


def _check_reachable(budget: float, total: int, saved: int) -> None:
    """Raise an error if ties cannot meet a budget."""
    if not saved:
        raise ConfigurationError("no two weights of the model can be tied: none of them have equal or related shapes")
    if total - saved > int(budget * total):
        share = -(-1000 * (total - saved) // total) / 1000  # rounded up
        raise ConfigurationError(
            f"budget={budget:g} is out of reach: if all weights of equal or related shapes were tied, "
            f"{total - saved:,} of {total:,} parameters would remain. Give a budget of {share:g} or more, or leave "
            "parameters out that cannot be tied"
        )

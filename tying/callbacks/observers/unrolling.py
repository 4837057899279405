"""Test recurrent blocks and loops with more or fewer steps than in training, or train them with random numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.callbacks.base import Callback
from tying.callbacks.figures import log_figure
from tying.callbacks.looping import Looping
from tying.depth import Recurrent
from tying.depth.draws import agreed_rand
from tying.depth.loop import loops_in
from tying.errors import ConfigurationError, check_count
from tying.figures import legend_below, new_figure
from tying.lightning_namespace import pl
from tying.lightning_workarounds import callbacks_of
from tying.weights.calibration import call

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an optional package

UNITS = {"accuracy": "fraction correct", "bits": "bits per character", "loss": "mean"}


class Unrolling(Callback):
    """Test a model also with more, or fewer, steps of its recurrent blocks and passes through its loops.

    Logs ``test/steps+1/accuracy`` and so on for a classifier. For a model that returns its loss, as those of
    transformers do, or that predicts a class at each position, logs ``test/steps+1/loss``, or ``test/steps+1/bits`` if
    its ``task`` is ``"language"``, as of :class:`tying.models.SequenceModel`. Draws it against the steps as
    ``unrolling``, see :func:`tying.callbacks.figures.log_figure`. Additional steps use the normalisation layers of the
    last trained step. A batch is the inputs and the labels, or a mapping of keyword arguments.

    Args:
        extra: numbers of steps to add to each :class:`tying.depth.Recurrent`, and of passes to each loop of
            :func:`tying.depth.loop`; negative numbers remove steps, and at least one step remains.
        train_extra: numbers of steps to add in training: each batch gets one of them, with equal probabilities, the
            same in all processes; default: none. Validation and plain tests have the model's number of steps.

    Raises:
        ConfigurationError: ``extra`` or ``train_extra`` is empty; in use, the model has no recurrent block and no loop,
            or returns neither a loss nor logits that fit the labels; with ``train_extra``, a Looping follows, which
            would set the number of passes.

    Example:
        >>> Unrolling(extra=[-1, 0, 1, 2]).extra
        [-1, 0, 1, 2]
    """

    def __init__(self, extra: list[int], train_extra: list[int] | None = None) -> None:
        self.extra = _checked("extra", extra)
        self.train_extra = None if train_extra is None else _checked("train_extra", train_extra)
        self._steps_in_training = ExitStack()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.train_extra is None:
            return
        _check_has_steps(pl_module)
        callbacks = callbacks_of(trainer)
        if any(isinstance(later, Looping) for later in callbacks[callbacks.index(self) :]):
            raise ConfigurationError(
                "Unrolling: train_extra adds to the passes that Looping sets: list it after Looping"
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._steps_in_training.close()  # of a batch that another callback has skipped
        if self.train_extra is not None:
            extra = self.train_extra[int(agreed_rand() * len(self.train_extra))]
            self._steps_in_training.enter_context(_unrolled(pl_module, extra))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps_in_training.close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._steps_in_training.close()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _check_has_steps(pl_module)
        self._metric = ""
        self._scores: dict[int, list[Tensor]] = {extra: [] for extra in self.extra}

    @override
    @torch.no_grad()
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for extra, scores in self._scores.items():
            with _unrolled(pl_module, extra), trainer.precision_plugin.forward_context():
                self._metric, total, count = score(pl_module, batch)
            scores.append(torch.stack([total.float(), total.new_tensor(count, dtype=torch.float32)]))

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sums = torch.stack([torch.stack(scores).sum(dim=0) for scores in self._scores.values()])
        totals, counts = trainer.strategy.reduce(sums, reduce_op="sum").unbind(dim=1)
        values = dict(zip(self._scores, totals / counts, strict=True))
        for extra, value in values.items():
            pl_module.log(f"test/steps{extra:+d}/{self._metric}", value)
        units = " and ".join(["steps"] * bool(_recurrents(pl_module)) + ["passes"] * bool(loops_in(pl_module)))
        scores = {extra: float(value) for extra, value in values.items()}
        log_figure(trainer, partial(unrolling_figure, scores, units, self._metric), "unrolling")


def unrolling_figure(scores: Mapping[int, float], units: str, metric: str) -> "Figure":
    """Plot what a model scores against its numbers of steps.

    Args:
        scores: values of the metric, by the number of steps beyond those of training.
        units: what the steps are, such as ``"passes"``.
        metric: name of the metric.
    """
    figure = new_figure(5, 3.6, f"Test {metric} against the number of {units}")
    axes = figure.subplots()
    axes.plot([*scores], [*scores.values()], marker="o", label="test")
    axes.axvline(0, color="grey", linewidth=0.8, linestyle="--", label="as in training")
    axes.set(xlabel=f"{units} beyond those of training (number)", ylabel=f"test {metric} ({UNITS[metric]})")
    axes.locator_params(axis="x", integer=True)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def score(model: nn.Module, batch: Any) -> tuple[str, Tensor, int]:
    """Return what to measure on a batch: the metric's name, its sum over the batch, and the number of its terms.

    The metric is the loss, if the model returns it; the accuracy of logits (batch, classes); or the cross entropy of
    logits (batch, steps, classes), in bits if the model's ``task`` is ``"language"``.

    Args:
        model: called as :func:`tying.weights.calibration.call` says.
        batch: the inputs and the labels; or a mapping of keyword arguments, of which ``labels`` may be one.

    Raises:
        ConfigurationError: the model returns neither a loss nor logits that fit the labels.

    Example:
        >>> score(nn.Identity(), (torch.tensor([[1.0, 2.0], [4.0, 3.0]]), torch.tensor([1, 1])))
        ('accuracy', tensor(1), 2)
    """
    output = call(model, batch)
    if isinstance(loss := getattr(output, "loss", None), Tensor):
        size = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        return "loss", loss * size, size
    logits = getattr(output, "logits", output)
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape:
        raise ConfigurationError(
            "Unrolling needs a model that returns a loss, or logits of shape (*labels.shape, classes); "
            f"{type(model).__name__} returns {_described(logits)}, and the labels of the batch are {_described(labels)}"
        )
    if logits.ndim == 2:
        return "accuracy", (logits.argmax(dim=-1) == labels).sum(), len(labels)
    entropy = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    is_language = getattr(model, "task", None) == "language"
    return "bits" if is_language else "loss", entropy / (math.log(2) if is_language else 1), labels.numel()


def _checked(name: str, extra: list[int]) -> list[int]:
    """Return a copy of a list of numbers of steps, after checking it."""
    if not isinstance(extra, Sequence) or not extra:
        raise ConfigurationError(f"{name} must be a list of numbers of steps, such as [-1, 0, 1, 2], not {extra!r}")
    for steps in extra:
        check_count(f"every entry of {name}", steps, "(-inf, inf)")
    return [*extra]


def _check_has_steps(model: nn.Module) -> None:
    if not _recurrents(model) and not loops_in(model):
        raise ConfigurationError(
            "Unrolling: the model has no tying.depth.Recurrent and no loop: RecurrentDepth or Looping makes them"
        )


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@contextmanager
def _unrolled(model: nn.Module, extra: int) -> Iterator[None]:
    """Temporarily add steps to the recurrent blocks of a model, and passes to its loops."""
    steps = {recurrent: recurrent.steps for recurrent in _recurrents(model)}
    passes = [(loop, loop.passes) for loop in loops_in(model)]
    try:
        for recurrent, trained in steps.items():
            recurrent.steps = max(1, trained + extra)
        for loop, trained in passes:
            loop.passes = max(1, trained + extra)
        yield
    finally:
        for recurrent, trained in steps.items():
            recurrent.steps = trained
        for loop, trained in passes:
            loop.passes = trained


def _recurrents(model: nn.Module) -> list[Recurrent]:
    return [module for module in model.modules() if isinstance(module, Recurrent)]

"""Distil a model into a changed copy of it."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tying.advice.measure import output_of
from tying.errors import ConfigurationError
from tying.weights.calibration import Forward, undisturbed
from tying.weights.derived import eval_mode

WARM = 0.1  # part of the steps in which the learning rate rises


def distil(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Any],
    steps: int,
    rate: float,
    forward: Forward | None = None,
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Train a student to give the outputs of a teacher, both in eval mode, with Adam.

    Minimises ``‖y' − y‖² / ‖y‖²`` of each batch. The learning rate rises for a tenth of the steps, and then falls
    linearly to zero. Parameters that need no gradient stay.

    Args:
        teacher: not changed.
        student: trained in place.
        batches: read again from the start when they end.
        steps: number of steps.
        rate: largest learning rate.
        forward: returns the output of a model for a batch.
        advance: called after each step.

    Example:
        >>> teacher, student = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> distil(teacher, student, [torch.randn(8, 2)], steps=200, rate=0.1)
        >>> bool((student.weight - teacher.weight).abs().max() < 0.1)
        True
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    rise = max(1, int(WARM * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    for _, batch in zip(range(steps), _repeated(batches), strict=False):
        with undisturbed(teacher):
            target = output_of(teacher, batch, forward)
        optimizer.zero_grad()
        with eval_mode(student), torch.enable_grad():
            _relative(output_of(student, batch, forward), target).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        schedule.step()
        advance()


def _relative(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / target.square().sum()


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches, again and again.

    Raises:
        ConfigurationError: there are none, or they can be read only once and are too few.
    """
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise ConfigurationError(
                "training has too few batches for the steps, and cannot be read again: give a loader or a list"
            )


def lean_copy(model: nn.Module, separate: Iterable[nn.Parameter] = ()) -> nn.Module:
    """Return a copy of a model that shares all parameters with it but the given ones.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> copied = lean_copy(model, [model.weight])
        >>> copied.weight is model.weight, copied.bias is model.bias
        (False, True)
    """
    apart = {id(parameter) for parameter in separate}
    shared = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in apart}
    return copy.deepcopy(model, shared)


def free(copied: nn.Module, model: nn.Module) -> None:
    """Free the memory of the parameters of a copy that are not the model's, and make the copy useless.

    Modules with derived weights are in reference cycles: without this, they would stay in memory for a while.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> copied = lean_copy(model, [model.weight])
        >>> free(copied, model)
        >>> copied.weight.numel(), copied.bias.numel()
        (0, 2)
    """
    shared = {id(parameter) for parameter in model.parameters()}
    for parameter in copied.parameters():
        parameter.grad = None
        if id(parameter) not in shared:
            parameter.data = parameter.data.new_empty(0)

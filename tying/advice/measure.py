"""Measure what other weights do to the outputs of a model."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tying.advice.candidates import Candidate, Weights
from tying.advice.plans import rank_of_share
from tying.errors import ConfigurationError
from tying.files import atomically
from tying.hard.factorization import factorize
from tying.weights.calibration import Forward, call, undisturbed

KEPT = 0.25  # of the bytes of the model: larger outputs are computed again rather than kept


def output_of(model: nn.Module, batch: Any, forward: Forward | None = None) -> Tensor:
    """Return the output of a model for a batch: its ``logits``, or the first floating-point tensor of it.

    Raises:
        ConfigurationError: the output holds no such tensor.

    Example:
        >>> output_of(nn.Identity(), (torch.ones(2, 3), torch.zeros(2))).shape
        torch.Size([2, 3])
    """
    output = call(model, batch, forward)
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return logits
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point() and part.ndim:
            return part
    raise ConfigurationError(
        f"the model returns {type(output).__name__}, which holds no floating-point tensor to compare: give "
        "forward, a function of the model and a batch that returns one"
    )


class Comparison:
    """Compares outputs with those of a model on batches.

    Args:
        model: the model, which is not changed.
        batches: the batches.
        forward: returns the output to compare, given a model and a batch.

    Raises:
        ConfigurationError: the outputs are not finite, or zero throughout.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], forward: Forward | None = None) -> None:
        self.model, self.batches, self.forward = model, batches, forward
        self._kept: list[Tensor] = []
        self._square, size = 0.0, 0
        limit = KEPT * sum(parameter.nbytes for parameter in model.parameters())
        with undisturbed(model):
            for batch in batches:
                output = output_of(model, batch, forward)
                self._square += float(output.double().square().sum())
                size += output.nbytes
                self._kept = [*self._kept, output] if size <= limit else []
        self._keeps = size <= limit
        if not 0 < self._square < float("inf"):
            reason = "zero" if self._square == 0 else "not finite"
            raise ConfigurationError(
                f"the model's outputs on the batches are {reason}: advice compares outputs with them"
            )

    def target(self, number: int) -> Tensor:
        """Return the model's output for a batch."""
        return self._kept[number] if self._keeps else output_of(self.model, self.batches[number], self.forward)

    def error(self, output: Callable[[Any], Tensor]) -> float:
        """Return the relative squared error of outputs, ``Σ ‖y' − y‖² / Σ ‖y‖²``; infinite if they are not finite."""
        error = 0.0
        for number, batch in enumerate(self.batches):
            target = self.target(number)
            error += float((output(batch).double() - target.double()).square().sum())
        return error / self._square if error == error else float("inf")

    def error_of_model(self, changed: nn.Module) -> float:
        """Return the error of a changed model."""
        with undisturbed(self.model), undisturbed(changed):
            return self.error(lambda batch: output_of(changed, batch, self.forward))

    def error_of_values(self, values: Mapping[nn.Parameter, Tensor]) -> float:
        """Return the error of the model while parameters of it have other values."""

        def output(batch: Any) -> Tensor:
            with replaced(values):
                return output_of(self.model, batch, self.forward)

        with undisturbed(self.model):
            return self.error(output)


@contextmanager
def replaced(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Temporarily let parameters hold other tensors; nothing is copied.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> with replaced({weight: torch.zeros(2)}):
        ...     print(weight.tolist())
        [0.0, 0.0]
        >>> weight.tolist()
        [1.0, 1.0]
    """
    before = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


@torch.no_grad()
def tied_values(candidate: Candidate, weights: Weights) -> dict[nn.Parameter, Tensor]:
    """Return the mean of the members for each; of equal members, their value."""
    members = candidate.in_source_layout(weights)
    alike = all(torch.equal(members[0], other) for other in members[1:])
    mean = members[0] if alike else torch.stack(members).mean(dim=0)
    first, *others = candidate.names
    return {weights[first]: mean, **{weights[name]: mean.mT if candidate.relation else mean for name in others}}


def ranks_of_equal_size(candidate: Candidate, weights: Weights) -> tuple[int, ...]:
    """Return the ranks at which the members together have as many values as one of them, or a few less.

    They differ by at most one. There are none if a member would have rank 0.
    """
    total, members = rank_of_share(weights[candidate.names[0]], 1.0), len(candidate.names)
    ranks = [total // members + (number < total % members) for number in range(members)]
    return tuple(ranks) if ranks[-1] else ()


@torch.no_grad()
def low_rank_values(candidate: Candidate, weights: Weights, ranks: Sequence[int]) -> dict[nn.Parameter, Tensor]:
    """Return, for each member, the nearest weight of its rank."""
    ranked = zip(candidate.names, ranks, strict=True)
    return {weights[name]: nearest_of_rank(weights[name].detach(), rank) for name, rank in ranked}


def nearest_of_rank(weight: Tensor, rank: int) -> Tensor:
    """Return the nearest weight of a rank, as ``lower_rank`` stores it."""
    left, right = factorize(weight.reshape(weight.shape[0], -1), rank)
    return (left @ right).reshape(weight.shape)


class Record:
    """What is measured already, in a file, so that an interrupted run goes on where it stopped.

    Args:
        folder: where the file lies; None keeps the values in memory.
        context: what the values depend on, in addition to their keys.
    """

    def __init__(self, folder: Path | None, context: str) -> None:
        self._path = None if folder is None else folder / "measured.json"
        self._contexts: dict[str, dict[str, list[float]]] = {}
        if self._path and self._path.is_file():
            self._contexts = json.loads(self._path.read_text())
        self._known = self._contexts.setdefault(context, {})

    def values(self, key: str, measure: Callable[[], list[float]]) -> list[float]:
        """Return the values of a key: the recorded ones, or else those that are measured now, and recorded."""
        if key not in self._known:
            self._known[key] = measure()
            if self._path:
                with atomically(self._path) as partial:
                    partial.write_text(json.dumps(self._contexts))
        return self._known[key]


def fingerprint(model: nn.Module, batches: Sequence[Any], forward: Forward | None) -> str:
    """Return a hash of what errors depend on: the weights of a model, the batches and the name of ``forward``."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((type(model).__qualname__, getattr(forward, "__qualname__", repr(forward)))).encode())
    for name, value in [*model.state_dict(keep_vars=True).items(), *enumerate(_leaves(batches))]:
        digest.update(repr(name).encode())
        if isinstance(value, Tensor):
            content = value.detach().cpu().contiguous()
            digest.update(repr((content.dtype, content.shape)).encode())
            digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors and other values in nested mappings and sequences."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value

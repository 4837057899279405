"""How important each weight is for what a model has learnt: by the Fisher information, or by the path of training."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from tying.errors import ConfigurationError, check_choice, listed
from tying.selection.resolve import select
from tying.weights.calibration import undisturbed
from tying.weights.sharding import all_gather_object, full, reduce_gradient, reshard

Labels = Literal["sampled", "given"]
Arguments = dict[Any, Any]  # of a model's forward: the input under 0, or all by name
MAX_GRADIENTS = 2**25  # entries: gradients of several samples are computed together up to this size
IGNORED = -100  # the label of positions that do not count, as in torch.nn.functional.cross_entropy


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    parameters: Sequence[str] = ("**",),
    labels: Labels = "sampled",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return ``F_i``, the mean over samples of ``(∂ log p(y|x) / ∂w_i)²``, where p is the softmax of the logits.

    The model is evaluated. Its modes and gradients, and torch's global random generators, do not change.

    Args:
        model: returns logits, or an output that has them as ``logits``. They are (batch, classes), or (batch, steps,
            classes) for sequences, whose log p(y|x) is the sum over steps.
        batches: inputs; tuples or lists of inputs and labels; or mappings of the model's keyword arguments, which may
            contain ``labels``.
        parameters: patterns of names; a leading ``!`` excludes.
        labels: ``"sampled"`` draws y from the model's predictions, for the Fisher information; ``"given"`` uses the
            labels of the batches, for the empirical Fisher information, which is another quantity. Positions with the
            label -100 or the ``attention_mask`` 0 do not count. Labels that are equal to the ``input_ids`` are those
            of the next step, as for the causal language models of transformers.
        seed: seeds the sampled labels, and the order of batches that a loader shuffles.

    Returns:
        F by name, in the shapes of the weights, at least in float32.

    Raises:
        ConfigurationError: a pattern matches nothing, or there are no batches, no logits or no given labels.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> batch = torch.tensor([[2.0], [4.0]]), torch.tensor([1, 0])
        >>> fisher_diagonal(model, [batch], labels="given")["weight"].tolist()
        [[2.5], [2.5]]

    Source: J. Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2017; F. Kunstner, L. Balles
    and P. Hennig, Limitations of the empirical Fisher approximation for natural gradient descent, 2019.
    """
    sums, samples = squared_gradients(model, select(model, parameters), batches, labels, seed)
    if not samples:
        raise ConfigurationError("the Fisher information is a mean over batches of data, and there are none")
    return {name: squares / samples for name, squares in sums.items()}


def squared_gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Iterable[Any], labels: Labels, seed: int = 0
) -> tuple[dict[str, Tensor], int]:
    """Return the sums over samples of which :func:`fisher_diagonal` returns the means, and the number of samples.

    ``torch.func.vmap`` computes the gradients of several samples together. They are computed sample by sample if it
    does not support an operation of the model, or if the model contains an ``nn.LSTM`` or the like, whose list of
    weights it would not see.
    """
    check_choice("labels", labels, get_args(Labels))
    sums = _zeros(weights)
    rows = max(1, MAX_GRADIENTS // max(1, sum(map(Tensor.numel, weights.values()))))
    transformable = rows > 1 and not any(isinstance(module, nn.RNNBase) for module in model.modules())
    compute, samples = _squares_together if transformable else _squares_one_by_one, 0
    with _undisturbed(model, seed):
        for batch in batches:
            arguments, targets = label(model, batch, labels)
            for first in range(0, len(targets), rows):
                part = slice(first, first + rows)
                sample = {key: x[part] if _has_rows(x, targets) else x for key, x in arguments.items()}
                try:
                    squares = compute(model, weights, sample, targets[part])
                except Exception:  # of many kinds: torch cannot transform an operation
                    if compute is _squares_one_by_one:
                        raise
                    compute = _squares_one_by_one
                    squares = compute(model, weights, sample, targets[part])
                for sum_, square in zip(sums.values(), squares, strict=True):
                    sum_ += square
            samples += len(targets)
    return sums, samples


def squared_gradients_of_replicas(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    labels: Labels,
    seed: int,
    replica: int,
    replicas: int,
) -> tuple[dict[str, Tensor], int]:
    """Return what :func:`squared_gradients` returns, for sharded weights and the samples of all replicas.

    Every process must call this with as many batches. The sums are sharded as the weights are.

    Args:
        model: see :func:`fisher_diagonal`.
        weights: the weights, by name.
        batches: see :func:`fisher_diagonal`.
        labels: see :func:`fisher_diagonal`.
        seed: see :func:`fisher_diagonal`.
        replica: which part of the data this process has.
        replicas: the number of parts; the processes of tensor parallelism have one part.
    """
    sums, samples = _zeros(weights), 0
    with _undisturbed(model, seed):
        for batch in batches:
            arguments, targets = label(model, batch, labels)
            squares = _squares_of_replicas(model, weights, arguments, targets, replica, replicas)
            for sum_, square in zip(sums.values(), squares, strict=True):
                sum_ += square
            counts = all_gather_object(len(targets))
            samples += sum(counts) * replicas // len(counts)
    return sums, samples


def _zeros(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32), requires_grad=False)
        for name, weight in weights.items()
    }


@contextmanager
def _undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Temporarily evaluate a model, without gradients, with seeded random generators and no cached casts."""
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it could return the transformed weights of an earlier call
    try:
        with undisturbed(model), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)


def check_logits(model: nn.Module, batch: Any, labels: Labels) -> None:
    """Raise a ConfigurationError if :func:`fisher_diagonal` could not use a model's outputs for a batch."""
    with _undisturbed(model, 0):
        label(model, batch, labels)


def label(model: nn.Module, batch: Any, labels: Labels) -> tuple[Arguments, Tensor]:
    """Return the arguments of a model's forward for a batch, and the label of each sample, or of each of its steps.

    Args:
        model: see :func:`fisher_diagonal`.
        batch: one of its batches.
        labels: whether to sample labels, or to use those of the batch.

    Raises:
        ConfigurationError: the model returns no logits, or the batch has no labels that fit them.

    Example:
        >>> label(nn.Linear(1, 2), (torch.zeros(3, 1), torch.tensor([1, 0, 1])), "given")[1]
        tensor([1, 0, 1])
    """
    arguments: Arguments = {0: batch}
    given: Any = None
    if isinstance(batch, Mapping):
        arguments, given = {**batch}, _labels_of(batch)
    elif isinstance(batch, tuple | list):
        arguments, given = {0: batch[0]}, batch[1] if len(batch) > 1 else None
    logits = _logits(model, arguments)
    shape = logits.shape[:-1]
    fits = isinstance(given, Tensor) and given.shape == shape and not given.is_floating_point()
    if labels == "given" and not fits:
        raise ConfigurationError(
            f"labels='given' needs integer labels of shape {tuple(shape)}, for logits of shape {tuple(logits.shape)}, "
            "as the second item of a batch, or as 'labels' in a mapping: give them, or use labels='sampled'"
        )
    targets = given.long() if labels == "given" else logits.softmax(-1).flatten(0, -2).multinomial(1).view(shape)
    if fits:
        targets = targets.where(given != IGNORED, IGNORED)
    mask = arguments.get("attention_mask")
    return arguments, targets if mask is None or mask.shape != shape else targets.where(mask != 0, IGNORED)


def _labels_of(batch: Mapping[str, Any]) -> Any:
    """Return the labels of a mapping; those of the next step if they are its inputs, which language models shift."""
    given, inputs = batch.get("labels"), batch.get("input_ids")
    if not isinstance(given, Tensor) or not isinstance(inputs, Tensor) or given.shape != inputs.shape:
        return given
    is_input = ((given == inputs) | (given == IGNORED)).all()
    return F.pad(given[:, 1:], (0, 1), value=IGNORED) if is_input else given


def _logits(model: Callable[..., Any], arguments: Arguments) -> Tensor:
    """Return the logits of a model, at least in float32."""
    try:
        output = model(arguments[0]) if 0 in arguments else model(**arguments)
    except (NotImplementedError, TypeError) as error:
        raise ConfigurationError(
            f"importances need log p(y|x), and the model's forward cannot be called on a batch ({error!r}): it must "
            "take the batch, its first item if it is a tuple or a list, or its items by name, and return logits"
        ) from error
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not (
        isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim in (2, 3) and logits.shape[-1] > 1
    ):
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise ConfigurationError(
            f"importances need log p(y|x), and the model's forward returns a {type(output).__name__}{shape}: it must "
            "return logits (batch, classes) or (batch, steps, classes) of two classes or more, or an output that has "
            "them as .logits"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _has_rows(value: Any, targets: Tensor) -> bool:
    """Return whether a value is a tensor with a row for each sample."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(targets)


def _log_probability(model: Callable[..., Any], arguments: Arguments, targets: Tensor) -> Tensor:
    """Return the sum of ``log p(y|x)`` over all samples and positions that count."""
    logits = _logits(model, arguments).flatten(0, -2)
    return -F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)


def _square(gradient: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()


def _squares_together(
    model: nn.Module, weights: Mapping[str, nn.Parameter], arguments: Arguments, targets: Tensor
) -> list[Tensor]:
    """Return the squared gradients with respect to each weight, summed over samples."""
    values = {id(weight): weight.detach() for weight in weights.values()}
    # one name for each place: functional_call restores a module that two names share to the values of this call
    names = {
        f"{path}.{name}".lstrip("."): id(parameter)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in values
    }
    samples = {key: value for key, value in arguments.items() if _has_rows(value, targets)}

    def log_probability(values: Mapping[int, Tensor], sample: Arguments, target: Tensor) -> Tensor:
        replaced = {name: values[key] for name, key in names.items()}
        rows = arguments | {key: value[None] for key, value in sample.items()}
        return _log_probability(
            lambda *args, **kwargs: functional_call(model, replaced, args, kwargs, tie_weights=False),
            rows,
            target[None],
        )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # one by one would be slower still
        gradients = vmap(grad(log_probability), in_dims=(None, 0, 0))(values, samples, targets)
    return [_square(gradient).sum(dim=0) for gradient in gradients.values()]


def _squares_one_by_one(
    model: nn.Module, weights: Mapping[str, nn.Parameter], arguments: Arguments, targets: Tensor
) -> list[Tensor]:
    """Return the squared gradients with respect to each weight, summed over samples."""
    parameters = [*weights.values()]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    sums: list[Any] = [0] * len(parameters)
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        with torch.enable_grad():
            for i in range(len(targets)):
                sample = {k: x[i : i + 1] if _has_rows(x, targets) else x for k, x in arguments.items()}
                value = _log_probability(model, sample, targets[i : i + 1])
                gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
                sums = [total + _square(gradient) for total, gradient in zip(sums, gradients, strict=True)]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return sums


def _squares_of_replicas(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    arguments: Arguments,
    targets: Tensor,
    replica: int,
    replicas: int,
) -> list[Tensor]:
    """Return the squared gradients with respect to each sharded weight, summed over the samples of all replicas.

    A backward pass returns the mean of the replicas' gradients, so only one of them has a loss in each pass. All
    replicas make as many passes as the one with most samples.
    """
    if frozen := [name for name, weight in weights.items() if not weight.requires_grad]:
        raise ConfigurationError(f"{listed(frozen)}: frozen and sharded, so that no gradient is computed: exclude them")
    reshard(model)
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    sums: list[Any] = [0] * len(weights)
    try:
        with torch.enable_grad():
            for owner, i in product(range(replicas), range(max(all_gather_object(len(targets))))):
                place = min(i, len(targets) - 1)
                sample = {k: x[place : place + 1] if _has_rows(x, targets) else x for k, x in arguments.items()}
                for parameter in gradients:
                    parameter.grad = None
                factor = replicas if owner == replica and i == place else 0
                (factor * _log_probability(model, sample, targets[place : place + 1])).backward()  # type: ignore[no-untyped-call]  # torch's
                for weight in weights.values():
                    reduce_gradient(weight)
                computed = (torch.zeros_like(w) if w.grad is None else w.grad for w in weights.values())
                sums = [total + _square(gradient) for total, gradient in zip(sums, computed, strict=True)]
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    return sums


def path_integral(path: Tensor, gradient: Tensor, change: Tensor) -> Tensor:
    """Return ``ω − g Δw``: by how much a weight's own moves have lowered the loss, after one more step.

    Args:
        path: ω, the sum over the steps so far.
        gradient: g, the gradient of the loss at the beginning of the step.
        change: Δw, the weight's change in the step.

    Example:
        >>> path_integral(torch.zeros(1), gradient=torch.tensor([2.0]), change=torch.tensor([-0.5]))
        tensor([1.])

    Source: F. Zenke, B. Poole and S. Ganguli, Continual learning through synaptic intelligence, 2017.
    """
    return path - gradient.to(path.dtype) * change.to(path.dtype)


def path_importance(path: Tensor, change: Tensor, damping: float = 0.1) -> Tensor:
    """Return ``max(ω, 0) / (Δ² + ξ)``, the importance of a weight for a task that has been learnt.

    Args:
        path: ω, from :func:`path_integral`.
        change: Δ, the weight's change over the whole task.
        damping: ξ > 0 bounds the importance of weights that hardly move.

    Example:
        >>> path_importance(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]), damping=0.25)
        tensor([2., 0.])

    Source: F. Zenke, B. Poole and S. Ganguli, Continual learning through synaptic intelligence, 2017.
    """
    return path.clamp(min=0) / (change.to(path.dtype).square() + damping)


def add_importances(
    importances: Mapping[str, Tensor], previous: Mapping[str, Tensor], decay: float = 1.0
) -> dict[str, Tensor]:
    """Return ``F + γ F'``, the importance of each weight for all tasks so far.

    Args:
        importances: F, for the task that has just been learnt, by name.
        previous: F', for the tasks before it; empty if there are none.
        decay: γ in [0, 1].

    Example:
        >>> add_importances({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([4.0, 0.0])}, decay=0.5)
        {'w': tensor([3., 2.])}

    Source: J. Schwarz et al., Progress & compress: a scalable framework for continual learning, 2018.
    """
    return {
        name: importance.detach() + (decay * previous[name].to(importance) if previous else 0)
        for name, importance in importances.items()
    }


def layer_means(importances: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean importance of the entries of each module's weights, by the module's name.

    Example:
        >>> layer_means({"a.weight": torch.tensor([1.0, 2.0]), "a.bias": torch.tensor([6.0])})
        {'a': 3.0}
    """
    parts: dict[str, list[Tensor]] = {}
    for name, importance in importances.items():
        parts.setdefault(name.rpartition(".")[0] or name, []).append(full(importance).flatten().double().cpu())
    return {layer: float(torch.cat(entries).mean()) for layer, entries in parts.items()}

"""Ways to measure how important weights are for what a model has learnt, for :class:`tying.callbacks.AnchorTying`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from tying.callbacks.base import replica_of
from tying.callbacks.training_data import replayed_batches
from tying.errors import ConfigurationError, check_choice, check_count, check_range
from tying.lightning_namespace import pl
from tying.soft.importance import (
    Labels,
    check_logits,
    path_importance,
    path_integral,
    squared_gradients,
    squared_gradients_of_replicas,
)
from tying.weights.sharding import is_sharded, shard_like

Weights = Mapping[str, nn.Parameter]


class TrainingPath:
    """The path of weights through the training of a task: where it began, and its integral ω.

    Args:
        weights: the weights, by name.
        state: the state to continue from; by default the path begins here.
    """

    def __init__(self, weights: Weights, state: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        self.weights = weights
        self.start = {name: weight.detach().clone() for name, weight in weights.items()}
        self.integral = {
            name: torch.zeros_like(start, dtype=torch.promote_types(start.dtype, torch.float32))
            for name, start in self.start.items()
        }
        for part, values in (state or {}).items():
            tensors = getattr(self, part)
            tensors.update({name: shard_like(values[name], tensor).to(tensor) for name, tensor in tensors.items()})
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # gradients and weights before the current step

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the start and the integral."""
        return {"start": self.start, "integral": self.integral}

    def rename(self, names: Mapping[str, str]) -> None:
        """Give weights other names, by their former names, and leave out all others."""
        self.weights = {name: self.weights[former] for former, name in names.items()}
        self.start, self.integral = (
            {name: values[former] for former, name in names.items()} for values in (self.start, self.integral)
        )

    def before_step(self, optimized: set[nn.Parameter], scale: float) -> None:
        """Keep the gradients of an optimizer's parameters, which are those of the loss times a scale."""
        self._before = {
            name: ((weight.grad.to_dense() if weight.grad.is_sparse else weight.grad) / scale, weight.detach().clone())
            for name, weight in self.weights.items()
            if weight in optimized and weight.grad is not None
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Add the step that the weights have taken."""
        for name, (gradient, before) in self._before.items():
            self.integral[name] = path_integral(self.integral[name], gradient, self.weights[name] - before)
        self._before = {}

    def change(self, name: str) -> Tensor:
        """Return how far a weight has moved in all."""
        return self.weights[name].detach() - self.start[name]


class Importance:
    """A measure of the importance of weights for a task. A subclass is a frozen dataclass that defines ``measure``.

    Attributes:
        decay: γ: after a task the importance is γ times the previous one, plus that for the task.
        follows_path: whether ``measure`` takes the path of training, which needs memory for three more copies of the
            weights, and two in a checkpoint.

    Example:
        >>> @dataclass(frozen=True)
        ... class Uniform(Importance):
        ...     decay: float = 0.0
        ...     def measure(self, trainer, module, weights, path):
        ...         return {name: torch.ones_like(weight) for name, weight in weights.items()}
        >>> Uniform().decay
        0.0
    """

    decay: float = 1.0
    follows_path: ClassVar[bool] = False

    def check_batch(self, module: pl.LightningModule, batch: Any) -> None:
        """Raise a ConfigurationError if a model and a batch do not fit; called with the first batch of training."""

    def measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, weights: Weights, path: TrainingPath | None
    ) -> dict[str, Tensor]:
        """Return the importance of each weight for the task that has just been learnt: F ≥ 0, by name.

        Args:
            trainer: the trainer, at the end of training.
            module: the model.
            weights: the weights, by name.
            path: the path of training, if the measure follows it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define measure, which returns a tensor for each weight")


@dataclass(frozen=True)
class Fisher(Importance):
    """Elastic weight consolidation: the diagonal Fisher information; see :func:`tying.soft.fisher_diagonal`.

    Args:
        batches: number of batches of the training data to measure it on.
        labels: ``"sampled"`` draws labels from the model's predictions; ``"given"`` takes those of the data, for the
            empirical Fisher information.
        decay: γ in [0, 1], of the importance for earlier tasks.

    Raises:
        ConfigurationError: an argument is out of range.

    Example:
        >>> Fisher(batches=50)
        Fisher(batches=50, labels='sampled', decay=1.0)

    Source: J. Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2017; J. Schwarz et al.,
    Progress & compress: a scalable framework for continual learning, 2018 (the decay).
    """

    batches: int
    labels: Labels = "sampled"
    decay: float = 1.0

    def __post_init__(self) -> None:
        check_count("Fisher's batches", self.batches)
        check_choice("Fisher's labels", self.labels, get_args(Labels))
        check_range("Fisher's decay", self.decay, "[0, 1]")

    def check_batch(self, module: pl.LightningModule, batch: Any) -> None:
        """Raise a ConfigurationError if the model returns no logits for the batch, or it has no labels for them."""
        check_logits(module, batch, self.labels)

    def measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, weights: Weights, path: TrainingPath | None
    ) -> dict[str, Tensor]:
        """Return the Fisher information, a mean over the samples of all processes."""
        replica, replicas = replica_of(trainer)
        seed = trainer.global_step * replicas + replica
        with (
            replayed_batches(trainer, module, self.batches) as batches,
            trainer.precision_plugin.forward_context(),
        ):
            if any(map(is_sharded, weights.values())):
                sums, samples = squared_gradients_of_replicas(
                    module, weights, batches, self.labels, seed, replica, replicas
                )
                return {name: squares / samples for name, squares in sums.items()}
            sums, samples = squared_gradients(module, weights, batches, self.labels, seed)
        add = trainer.strategy.reduce
        total = add(torch.tensor(float(samples), device=module.device), reduce_op="sum")
        if not total:
            raise ConfigurationError("Fisher: the training data has no batches")
        return {name: torch.as_tensor(add(squares, reduce_op="sum")) / total for name, squares in sums.items()}


@dataclass(frozen=True)
class Synaptic(Importance):
    """Synaptic intelligence: by how much a weight's own moves have lowered the loss; see :func:`path_importance`.

    Args:
        damping: ξ > 0, bounds the importance of weights that hardly move.
        decay: γ in [0, 1], of the importance for earlier tasks.

    Raises:
        ConfigurationError: an argument is out of range.

    Example:
        >>> Synaptic()
        Synaptic(damping=0.1, decay=1.0)

    Source: F. Zenke, B. Poole and S. Ganguli, Continual learning through synaptic intelligence, 2017.
    """

    damping: float = 0.1
    decay: float = 1.0
    follows_path: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("Synaptic's damping", self.damping, "(0, inf)")
        check_range("Synaptic's decay", self.decay, "[0, 1]")

    def measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, weights: Weights, path: TrainingPath | None
    ) -> dict[str, Tensor]:
        """Return ``max(ω, 0) / (Δ² + ξ)``."""
        assert path is not None
        return {
            name: path_importance(integral, path.change(name), self.damping) for name, integral in path.integral.items()
        }

"""Pull weights to a few learned values."""

import copy
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.callbacks.base import is_fresh_run, is_last_epoch, reject_copies, warn_if_too_late
from tying.callbacks.figures import log_figure
from tying.callbacks.penalty import PenaltyCallback
from tying.callbacks.training_data import estimate_batch_norms, num_train_samples
from tying.errors import ConfigurationError, check_count, listed
from tying.hashing.packing import contents
from tying.lightning_namespace import pl
from tying.selection.resolve import parse_patterns, select
from tying.soft import GaussianMixturePrior, TyingPenalty
from tying.soft.group_penalty import Rates
from tying.soft.plots import mixture_figure
from tying.weights.sharding import bounds, is_sharded, local, total


class MixtureTying(PenaltyCallback):
    """Pull weights to a few values by a learned mixture of Gaussians; make them equal to these values at the end.

    From ``start_epoch`` on, the gradient of ``strength / examples`` times :class:`tying.soft.GaussianMixturePrior` is
    added to those of the weights, before clipping and the optimizer's step; a separate Adam trains the mixture. At
    the end of the last epoch components are merged, and each weight becomes the mean of its component. Later tests use
    the quantised network. Checkpoints that are saved at the end of the last training epoch contain it; checkpoints that
    Lightning saves after a validation within an epoch, or only after some epochs, are older. The statistics of batch
    norms are then estimated again, for the quantised weights.

    Logs ``tying/strength`` and ``tying/penalty``; at the end ``tying/distinct`` values, the fraction of nonzero
    weights, ``tying/nonzero``, ``tying/compression``: how many times smaller the model is in a packed file than its
    plain state dict (see :func:`tying.hashing.save_packed`), and ``tying/compression_huffman``, with Huffman codes.
    Draws ``mixture_start`` and ``mixture_end``, see :func:`tying.callbacks.figures.log_figure`.

    Args:
        parameters: patterns of names; a leading ``!`` excludes.
        strength: τ, the weight of the prior relative to the loss summed over the training examples.
        components: number of components, including the one at zero. Initial means are evenly spaced over the range of
            the weights.
        zero_weight: the proportion of the component at zero.
        start_epoch: first epoch in which the mixture acts; train the network before it.
        examples: number of training examples; by default the number in the training data.
        rates: Adam's learning rates of means, log standard deviations and proportions.
        name: distinguishes several callbacks of this class.
        batch_norms: estimate the statistics of batch norms for the quantised weights. An epoch without training calls
            the model on each batch, or on the batch's first element. Batch norms that are not called keep their
            statistics, and a warning names them.

    Raises:
        ConfigurationError: an argument is out of range, a pattern matches nothing, or no single optimizer trains all
            weights.

    Example:
        >>> MixtureTying(["network.**"], components=17, start_epoch=10).zero_weight
        0.999

    Source: S. J. Nowlan and G. E. Hinton, Simplifying neural networks by soft weight-sharing, 1992; K. Ullrich,
    E. Meeds and M. Welling, Soft weight-sharing for neural network compression, 2017.
    """

    def __init__(
        self,
        parameters: list[str],
        strength: float = 3e-3,
        components: int = 17,
        zero_weight: float = 0.999,
        start_epoch: int = 0,
        examples: int | None = None,
        rates: tuple[float, float, float] = (1e-4, 3e-3, 3e-3),
        name: str | None = None,
        batch_norms: bool = True,
    ) -> None:
        super().__init__(strength, "gradient", None, name)
        GaussianMixturePrior(components, zero_weight)  # raises if an argument is out of range
        check_count("start_epoch", start_epoch, "[0, inf)")
        check_count("examples", 1 if examples is None else examples, "[1, inf)")
        if not isinstance(rates, Sequence) or len(rates) != 3 or not all(0 <= rate < math.inf for rate in rates):
            raise ConfigurationError(f"rates are three learning rates of 0 or more, not {rates}")
        self.parameters, self.components, self.zero_weight = parse_patterns(parameters), components, zero_weight
        self.start_epoch, self.examples, self.rates, self.batch_norms = start_epoch, examples, (*rates,), batch_norms
        self.prior: GaussianMixturePrior | None = None
        self._value: Tensor | None = None  # of the penalty at the last step
        self._optimizer: torch.optim.Optimizer | None = None  # of the prior, until components are merged
        self._restored: dict[str, Any] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        parts = {"prior": self.prior, "optimizer": self._optimizer}
        return super().state_dict() | {key: part.state_dict() for key, part in parts.items() if part is not None}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._restored = dict(state_dict)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        reject_copies(trainer, "MixtureTying", "weights that are not quantised", processes=False)
        if is_fresh_run(trainer, stage):
            self.prior, self._optimizer, self._restored = None, None, {}

    @override
    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return select(model, self.parameters)

    @override
    def describe(self, model: nn.Module) -> str:
        return f"{super().describe(model)}, {self.components} components, from epoch {self.start_epoch} on"

    @override
    def build_penalties(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[TyingPenalty]:
        self._weights = self.affected(module)
        self._value = None
        trained = {weight for weight in self._weights.values() if weight.requires_grad}
        if not trained or not any(
            trained <= {p for group in optimizer.param_groups for p in group["params"]}
            for optimizer in trainer.optimizers
        ):
            raise ConfigurationError(
                f"no single optimizer trains {listed(self._weights)}: unfreeze some of them, and give all that "
                "are trained to one optimizer"
            )
        if complex_weights := [name for name, weight in self._weights.items() if weight.is_complex()]:
            raise ConfigurationError(f"{complex_weights[0]!r} is complex, and a mixture takes real weights: exclude it")
        if "prior" in self._restored:
            prior = GaussianMixturePrior(self.components, self.zero_weight).to(self._local_values())
            prior.load_state_dict(self._restored["prior"])
            self._learn(prior, self._restored.get("optimizer"))  # not saved after components are merged
            self._restored = {}
        elif self.prior is not None and self._optimizer is None:  # training continues after its end
            self._learn(self.prior)
        return []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.examples_scale = 1 / (self.examples or num_train_samples(trainer))
        super().on_train_start(trainer, pl_module)
        warn_if_too_late(trainer, "MixtureTying", self.start_epoch)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning skips on_train_epoch_start in a run that resumes at the end of an epoch
        if batch_idx == 0 and self.prior is None and trainer.current_epoch >= self.start_epoch:
            if trainer.global_step == 0 and (untrained := _untrained(pl_module, self._weights)):
                warnings.warn(
                    f"MixtureTying begins with {listed(untrained)} as initialised: the means are spread over the range "
                    "of the weights, which training changes. Give start_epoch, or load a trained network",
                    stacklevel=2,
                )
            if not any(weight.numel() for weight in self._weights.values()):
                raise ConfigurationError(f"{self.label}: {listed(self._weights)} are empty: choose other weights")
            values = self._local_values()
            low, high = bounds([*self._weights.values()])
            if not low < high:
                raise ConfigurationError(
                    f"{self.label}: all of {listed(self._weights)} are {low}: there is no range to spread means over. "
                    "Initialise them, or give start_epoch"
                )
            self._learn(GaussianMixturePrior(self.components, self.zero_weight, low, high).to(values))
            self._draw(trainer, "mixture_start")

    def _learn(self, prior: GaussianMixturePrior, state: dict[str, Any] | None = None) -> None:
        """Train a mixture from now on, by Adam, starting from the given optimizer state."""
        self.prior = prior
        self._optimizer = torch.optim.Adam(
            [{"params": [part], "lr": rate} for part, rate in zip(prior.parameters(), self.rates, strict=True)]
        )
        if state is not None:
            self._optimizer.load_state_dict(state)

    @override
    def add_gradients(self, factor: float, scale: float, rates: Rates) -> None:
        if self.prior is not None and self._trains(rates):
            self.prior.zero_grad()
            strength = factor * self.strength
            self._value = strength * self.prior.add_gradients_([*self._weights.values()], strength, scale)

    @override
    def on_step(self, rates: Rates) -> None:
        if self._optimizer is not None and self._trains(rates):
            self._optimizer.step()

    def _trains(self, rates: Rates) -> bool:
        """Return whether the mixture is trained, and an optimizer with these rates moves some of the weights."""
        return self._optimizer is not None and not rates.keys().isdisjoint(self._weights.values())

    @override
    def value(self) -> Tensor | None:
        return self._value

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._optimizer is not None and is_last_epoch(trainer):
            pl_module.log_dict(self._finish(trainer, pl_module))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._optimizer is not None:
            warnings.warn(
                "training stopped before the end of its last epoch: the weights are quantised now, but not in "
                "its checkpoints",
                stacklevel=2,
            )
            self._finish(trainer, pl_module)

    @torch.no_grad()
    def _finish(self, trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, float]:
        """Draw the mixture, merge its components and quantise the weights; return the values to log, by name."""
        assert self.prior is not None
        self._draw(trainer, "mixture_end")
        self.prior.merge()
        assignments = [self.prior.assign(local(weight)) for weight in self._weights.values()]
        for weight, assignment in zip(self._weights.values(), assignments, strict=True):
            local(weight).copy_(self.prior.all_means().to(weight)[assignment])
        self._optimizer = None
        if self.batch_norms:
            estimate_batch_norms(trainer, model, "MixtureTying")
        size = len(self.prior.log_stds)
        parts = [torch.bincount(assignment.flatten(), minlength=size) for assignment in assignments]
        counts = torch.stack(total(parts, [*self._weights.values()])).sum(dim=0)
        content, used = contents(model), int((counts > 0).sum())
        nonzero = float(counts[1:].sum() / counts.sum().double())  # the first component is that at zero
        pl.utilities.rank_zero_info(
            f"MixtureTying: {int(counts.sum()):,} weights have {used} values, {nonzero:.2%} of them are not zero; "
            f"a packed file of the model is {content.rate:.1f} times smaller than its state dict, "
            f"{content.huffman_rate:.1f} times with Huffman's code"
        )
        return {
            f"{self.log_prefix}/distinct": float(used),
            f"{self.log_prefix}/nonzero": nonzero,
            f"{self.log_prefix}/compression": content.rate,
            f"{self.log_prefix}/compression_huffman": content.huffman_rate,
        }

    def _local_values(self) -> Tensor:
        """Return all weights, or their local shards, in one vector, in float32 at least."""
        dtype = torch.promote_types(next(iter(self._weights.values())).dtype, torch.float32)
        return torch.cat([local(weight.detach()).flatten().to(dtype) for weight in self._weights.values()])

    def _draw(self, trainer: pl.Trainer, name: str) -> None:
        assert self.prior is not None
        draw = partial(mixture_figure, self._local_values(), self.prior, f"epoch {trainer.current_epoch}")
        log_figure(trainer, draw, "_".join(filter(None, (name, self.name))))


def _untrained(model: nn.Module, weights: dict[str, nn.Parameter]) -> list[str]:
    """Return the names of the weights that can be initialised again, if all of them have the initial spread."""
    similar = {}
    for name, weight in weights.items():
        if is_sharded(weight):  # torch copies no sharded module
            return []
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if (
            weight.ndim >= 2
            and hasattr(owner, "reset_parameters")
            and attribute in dict(owner.named_parameters(recurse=False))  # neither computed nor pruned
        ):
            twin = copy.deepcopy(owner)
            with torch.random.fork_rng():
                twin.reset_parameters()  # type: ignore[operator]  # a method
            ratio = weight.detach().std() / twin.get_parameter(attribute).detach().std().clamp(min=1e-12)
            similar[name] = abs(float(ratio) - 1) < 3 / weight.numel() ** 0.5
    return [*similar] if all(similar.values()) else []

"""Pull weights to a few learned values."""

import copy
import math
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from tying.callbacks.base import is_fresh_run, picture_folder, reject_copies, warn_if_too_late
from tying.callbacks.penalty import PenaltyCallback
from tying.callbacks.training_data import estimate_batch_norms, num_train_samples
from tying.errors import ConfigurationError, check_range, listed
from tying.files import save_figure
from tying.hashing.packing import sizes
from tying.lightning_workarounds import can_stop_early
from tying.selection.resolve import select
from tying.soft import GaussianMixturePrior, TyingPenalty
from tying.soft.group_penalty import Rates
from tying.soft.plots import mixture_figure


class MixtureTying(PenaltyCallback):
    """Pull weights to a few values by a learned mixture of Gaussians; make them equal to these values at the end.

    From ``start_epoch`` on, the gradient of ``strength / examples`` times :class:`tying.soft.GaussianMixturePrior` is
    added to those of the weights, before clipping and the optimizer's step; a separate Adam trains the mixture. At
    the end of the last epoch components are merged, and each weight becomes the mean of its component: later tests use
    the quantised network, and so do checkpoints that are saved when training epochs end (checkpoints that Lightning
    saves after a validation within an epoch, or only after some epochs, are older). The statistics of batch norms are
    then estimated anew, for the quantised weights.

    Logs ``tying/strength`` and ``tying/penalty``; at the end ``tying/distinct`` values, the fraction of nonzero
    weights, ``tying/nonzero``, and the compression by a codebook and indices, ``tying/compression`` (bits of a
    codebook, of fixed-length indices and of 5-bit gaps between nonzero weights) and ``tying/compression_huffman``.
    Plots ``mixture_start.png`` and ``mixture_end.png`` in the logger's directory.

    Args:
        parameters: patterns of names; a leading ``!`` excludes.
        strength: τ, the weight of the prior against a sum over the training examples.
        components: number of components, one of them at zero. The means begin evenly over the range of the weights.
        zero_weight: the proportion of the component at zero.
        start_epoch: epoch at whose start the mixture begins; train the network before.
        examples: number of training examples; by default that of the training data.
        rates: Adam's learning rates of means, log standard deviations and proportions.
        name: distinguishes several callbacks of this class.
        batch_norms: estimate the statistics of batch norms for the quantised weights, by an epoch without training
            that calls the model on each batch, or its first element; batch norms that are not called keep theirs, and
            a warning names them.

    Raises:
        ConfigurationError: an argument is out of range, a pattern matches nothing, or not one optimizer trains the
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
        check_range("start_epoch", start_epoch, "[0, inf)")
        if examples is not None:
            check_range("examples", examples, "[1, inf)")
        if len(rates) != 3 or not all(0 <= rate < math.inf for rate in rates):
            raise ConfigurationError(f"rates are three learning rates of 0 or more, not {rates}")
        self.parameters, self.components, self.zero_weight = parameters, components, zero_weight
        self.start_epoch, self.examples, self.rates, self.batch_norms = start_epoch, examples, rates, batch_norms
        self.prior: GaussianMixturePrior | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer | None = None  # of the prior, until components are merged
        self._restored: dict[str, Any] = {}
        self._value: Tensor | None = None

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
    def build_penalties(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[TyingPenalty]:
        self._weights, self._value = self.affected(module), None
        trained = {weight for weight in self._weights.values() if weight.requires_grad}
        optimized = [
            {p for group in optimizer.param_groups for p in group["params"]} for optimizer in trainer.optimizers
        ]
        if not trained or not any(trained <= parameters for parameters in optimized):
            raise ConfigurationError(f"no one optimizer trains {listed(self._weights) or self.parameters}")
        if "prior" in self._restored:
            prior = GaussianMixturePrior(self.components, self.zero_weight).to(self._values())
            prior.load_state_dict(self._restored["prior"])
            self._learn(prior, self._restored.get("optimizer"))  # none is saved after components are merged
            self._restored = {}
        elif self.prior is not None and self._optimizer is None:  # training continues after its end
            self._learn(self.prior)
        return []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.examples_scale = 1 / (self.examples or num_train_samples(trainer))
        warn_if_too_late(trainer, "MixtureTying", self.start_epoch)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # a run that resumes from the last step of an epoch does not start the next one
        if batch_idx == 0 and self.prior is None and trainer.current_epoch >= self.start_epoch:
            if trainer.global_step == 0 and (untrained := _untrained(pl_module, self._weights)):
                warnings.warn(
                    f"MixtureTying begins with {listed(untrained)} as initialised: the means are spread over the range "
                    "of the weights, and a trained network's is another. Give start_epoch, or load a trained network",
                    stacklevel=2,
                )
            values = self._values()
            if not values.numel():
                raise ConfigurationError(f"{listed(self._weights)}: there are no entries to pull to a few values")
            low, high = (float(bound) for bound in values.aminmax())
            if not low < high:
                raise ConfigurationError(
                    f"all of {listed(self._weights)} are {low}: there is no range to spread means over"
                )
            self._learn(GaussianMixturePrior(self.components, self.zero_weight, low, high).to(values))
            self._draw(trainer, "mixture_start")

    def _learn(self, prior: GaussianMixturePrior, state: dict[str, Any] | None = None) -> None:
        """Train a mixture from now on, by an Adam in the given state."""
        self.prior = prior
        parts = zip(prior.parameters(), self.rates, strict=True)
        self._optimizer = torch.optim.Adam([{"params": [part], "lr": rate} for part, rate in parts])
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
        """Return whether the mixture learns, and an optimizer's step moves some of the weights."""
        return self._optimizer is not None and not rates.keys().isdisjoint(self._weights.values())

    @override
    def value(self) -> Tensor | None:
        return self._value

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        progress: Any = trainer.fit_loop.epoch_progress.current
        ends = 0 < epochs <= progress.processed or 0 < steps <= trainer.global_step
        if self._optimizer is not None and (ends or (trainer.should_stop and can_stop_early(trainer))):
            for name, value in self._finish(trainer, pl_module).items():
                pl_module.log(f"{self.log_prefix}/{name}", value)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._optimizer is not None:
            warnings.warn(
                "training ended before its last epoch did: the weights are quantised now, but not in its checkpoints",
                stacklevel=2,
            )
            self._finish(trainer, pl_module)

    @torch.no_grad()
    def _finish(self, trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, float]:
        """Draw the mixture, merge its components and quantise the weights; return what to log of the result."""
        assert self.prior is not None
        self._draw(trainer, "mixture_end")
        self.prior.merge()
        assignments = [self.prior.assign(weight) for weight in self._weights.values()]
        for weight, assignment in zip(self._weights.values(), assignments, strict=True):
            weight.copy_(self.prior.all_means().to(weight)[assignment])
        self._optimizer = None
        if self.batch_norms:
            estimate_batch_norms(trainer, model, "MixtureTying")
        used, slots = torch.unique(torch.cat([assignment.flatten() for assignment in assignments]), return_inverse=True)
        zeros = int(0 in used)  # the component at zero is no entry of the codebook
        parts = torch.split(slots - zeros, [assignment.numel() for assignment in assignments])
        packed, huffman = (32 * len(slots) / bits for bits in sizes(parts, max(1, len(used) - zeros)))
        nonzero = float((slots >= zeros).double().mean())
        rank_zero_info(
            f"MixtureTying: {len(slots):,} weights have {len(used)} values, {nonzero:.2%} of them are not zero; "
            f"{packed:.1f} times smaller, {huffman:.1f} with Huffman's code"
        )
        return {
            "distinct": float(len(used)),
            "nonzero": nonzero,
            "compression": packed,
            "compression_huffman": huffman,
        }

    def _values(self) -> Tensor:
        """Return all weights in one vector, in float32 at least."""
        dtype = torch.promote_types(next(iter(self._weights.values())).dtype, torch.float32)
        return torch.cat([weight.detach().flatten().to(dtype) for weight in self._weights.values()])

    def _draw(self, trainer: pl.Trainer, name: str) -> None:
        assert self.prior is not None
        if folder := picture_folder(trainer):
            figure = mixture_figure(self._values(), self.prior, f"epoch {trainer.current_epoch}")
            save_figure(figure, folder / f"{'_'.join(filter(None, (name, self.name)))}.png")
            for logger in trainer.loggers:
                if add := getattr(getattr(logger, "experiment", None), "add_figure", None):  # TensorBoard's
                    add(f"{self.log_prefix}/{name}", figure, trainer.global_step)


def _untrained(model: nn.Module, weights: dict[str, nn.Parameter]) -> list[str]:
    """Return the names of weights, if all that can be initialised again look as if they had just been initialised."""
    untrained, examined = [], 0
    for name, weight in weights.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if (
            weight.ndim < 2
            or not hasattr(owner, "reset_parameters")
            or attribute not in dict(owner.named_parameters(recurse=False))
        ):
            continue
        twin = copy.deepcopy(owner)
        with torch.random.fork_rng():
            twin.reset_parameters()  # type: ignore[operator]  # a method
        initial, examined = twin.get_parameter(attribute), examined + 1
        if abs(float(weight.detach().std() / initial.detach().std().clamp(min=1e-12)) - 1) < 3 / weight.numel() ** 0.5:
            untrained.append(name)
    return untrained if len(untrained) == examined else []

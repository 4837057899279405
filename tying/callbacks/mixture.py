"""Weights that gather around a few learned values."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from tying.callbacks.base import Choosing, picture_folder, reject_copies, warn_if_too_late
from tying.callbacks.batch_norms import estimate_batch_norms
from tying.callbacks.examples import num_train_samples
from tying.callbacks.penalty import Pull, Pulling
from tying.errors import ConfigurationError, listed
from tying.files import save_figure
from tying.hashing.packing import sizes
from tying.selection.resolve import select
from tying.soft import GaussianMixturePrior
from tying.soft.group_penalty import Rates
from tying.soft.plots import mixture_figure


class MixtureTying(Pulling, Choosing):
    """Draw weights to a few values by a mixture of Gaussians that is learned with them; make them equal at the end.

    From ``start_epoch`` on, the gradient of ``strength / examples`` times :class:`tying.soft.GaussianMixturePrior` is
    added to those of the weights, before clipping and the optimizer's step; the mixture has an Adam of its own. At
    the end of the last epoch components are merged, and each weight becomes the mean of its component: tests thereafter
    are those of the quantised network, and so are checkpoints that are saved when training epochs end (those that
    Lightning saves after a validation within, or not in every, epoch are older). Statistics of batch norms are those
    of other weights then, and are estimated anew.

    Logs ``tying/strength`` and ``tying/penalty``; at the end ``tying/distinct`` values, the share of weights that is
    not zero, ``tying/nonzero``, and by how much indices and a codebook are smaller, ``tying/compression`` (bits of a
    codebook, of fixed-length indices and of 5-bit gaps between weights that are not zero) and
    ``tying/compression_huffman``. Plots ``mixture_start.png`` and ``mixture_end.png`` in the logger's directory.

    Args:
        parameters: patterns of names; a leading ``!`` leaves out.
        strength: τ, the weight of the prior against a sum over the training examples.
        components: of the mixture, one of them at zero. The means begin evenly over the range of the weights.
        zero_weight: the proportion of weights that the component at zero is to have.
        start_epoch: at whose start the mixture begins; a network is to be trained by then.
        examples: number of training examples; that of the training data by default.
        rates: Adam's learning rates of means, log standard deviations and proportions.
        name: tells several of a class apart.
        batch_norms: estimate the statistics of batch norms for the quantised weights, by an epoch without training:
            the model is called on each batch, or its first element; those that it does not call then keep theirs, which
            a warning tells.

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
        GaussianMixturePrior(components, zero_weight)  # raises where it could not be
        if start_epoch < 0:
            raise ConfigurationError(f"start_epoch must be 0 or more, not {start_epoch}")
        if examples is not None and examples < 1:
            raise ConfigurationError(f"examples must be 1 or more, not {examples}")
        if len(rates) != 3 or not all(0 <= rate < math.inf for rate in rates):
            raise ConfigurationError(f"rates are three learning rates of 0 or more, not {rates}")
        self.parameters, self.components, self.zero_weight = parameters, components, zero_weight
        self.start_epoch, self.examples, self.rates = start_epoch, examples, rates
        self.batch_norms = batch_norms
        self.prior: GaussianMixturePrior | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer | None = None  # while the prior learns: until components are merged
        self._saved: dict[str, Any] = {}
        self._value: Tensor | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.prior is not None:
            state["prior"] = self.prior.state_dict()
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        reject_copies(trainer, "MixtureTying", "weights that are not quantised", processes=False)
        if stage == "fit" and trainer.global_step == 0:  # a fresh run; a checkpoint's state is restored after this
            self.prior, self._optimizer, self._saved = None, None, {}

    @override
    def choose(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return select(model, self.parameters)

    @override
    def find_pulls(self, trainer: pl.Trainer, model: pl.LightningModule) -> list[Pull]:
        self._weights, self._value = self.choose(model), None
        trained = {id(weight) for weight in self._weights.values() if weight.requires_grad}
        held = [{id(p) for one in o.param_groups for p in one["params"]} for o in trainer.optimizers]
        if not trained or not any(trained <= own for own in held):
            raise ConfigurationError(f"no one optimizer trains {listed(self._weights) or self.parameters}")
        if "prior" in self._saved:
            prior = GaussianMixturePrior(self.components, self.zero_weight).to(self._all())
            prior.load_state_dict(self._saved["prior"])
            self._learn(prior, self._saved.get("optimizer"))  # none is kept at the end, when components are merged
            self._saved = {}
        elif self.prior is not None and self._optimizer is None:  # training goes on
            self._learn(self.prior)
        return []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._share = 1 / (self.examples or num_train_samples(trainer))
        warn_if_too_late(trainer, "MixtureTying", self.start_epoch)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # a run that goes on from the last step of an epoch does not start the next one
        if batch_idx == 0 and self.prior is None and trainer.current_epoch >= self.start_epoch:
            if trainer.global_step == 0 and (fresh := _untrained(pl_module, self._weights)):
                warnings.warn(
                    f"MixtureTying begins with {listed(fresh)} as initialised: the means are spread over the range of "
                    "the weights, and a trained network's is another. Give start_epoch, or load a trained network",
                    stacklevel=2,
                )
            self._begin()
            self._draw(trainer, "mixture_start")

    def _begin(self) -> None:
        every = self._all()
        if not every.numel():
            raise ConfigurationError(f"{listed(self._weights)}: there are no entries to draw to a few values")
        low, high = (float(bound) for bound in every.aminmax())
        if not low < high:
            raise ConfigurationError(
                f"all of {listed(self._weights)} are {low}: there is no range to spread means over"
            )
        self._learn(GaussianMixturePrior(self.components, self.zero_weight, low, high).to(every))

    def _learn(self, prior: GaussianMixturePrior, state: dict[str, Any] | None = None) -> None:
        """Let a mixture learn from now on, by an Adam in this state."""
        self.prior = prior
        learned = zip(prior.parameters(), self.rates, strict=True)
        self._optimizer = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in learned])
        if state is not None:
            self._optimizer.load_state_dict(state)

    @override
    def add_gradients(self, factor: float, scale: float, rates: Rates) -> None:
        if self.prior is None or self._optimizer is None or not any(weight in rates for weight in self.pulled):
            return
        self.prior.zero_grad()
        strength = factor * self.strength
        self._value = strength * self.prior.add_gradients_(self.pulled, strength, scale)

    @override
    def stepped(self, rates: Rates) -> None:
        if self._optimizer is not None and any(weight in rates for weight in self.pulled):
            self._optimizer.step()

    @override
    def watched(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self._weights if self.strength else {}

    @property
    @override
    def pulled(self) -> list[nn.Parameter]:
        return [*self._weights.values()]

    @override
    def value(self) -> Tensor | None:
        return self._value

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        progress: Any = trainer.fit_loop.epoch_progress.current
        ends = 0 < epochs <= progress.processed or 0 < steps <= trainer.global_step
        ends |= trainer.should_stop and trainer.fit_loop._can_stop_early
        if self._optimizer is not None and ends:
            for name, value in self._finish(trainer, pl_module).items():
                pl_module.log(f"{self._prefix}/{name}", value)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._optimizer is not None:
            warnings.warn(
                "training ended before its last epoch did: the weights are quantised now, those of its checkpoints are "
                "not",
                stacklevel=2,
            )
            self._finish(trainer, pl_module)

    @torch.no_grad()
    def _finish(self, trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, float]:
        """Draw the mixture, merge its components and quantise the weights; return what that makes of them."""
        assert self.prior is not None
        self._draw(trainer, "mixture_end")
        self.prior.merge()
        assignments = []
        for weight in self._weights.values():
            assignments.append(self.prior.assign(weight))
            weight.copy_(self.prior.all_means().to(weight)[assignments[-1]])
        self._optimizer = None
        if self.batch_norms:
            estimate_batch_norms(trainer, model, "MixtureTying")
        used, numbered = torch.unique(torch.cat([one.flatten() for one in assignments]), return_inverse=True)
        zeros = int(0 in used)  # the component at zero is no entry of the codebook
        entries = torch.split(numbered - zeros, [one.numel() for one in assignments])
        small, coded = sizes(entries, max(1, len(used) - zeros))
        bits = 32 * len(numbered)
        kept = float((numbered >= zeros).double().mean())
        rank_zero_info(
            f"MixtureTying: {len(numbered):,} weights of {len(used)} values, {kept:.2%} of them not zero; "
            f"{bits / small:.1f} times smaller, {bits / coded:.1f} with Huffman's code"
        )
        return {
            "distinct": float(len(used)),
            "nonzero": kept,
            "compression": bits / small,
            "compression_huffman": bits / coded,
        }

    def _all(self) -> Tensor:
        dtype = torch.promote_types(self.pulled[0].dtype, torch.float32)
        return torch.cat([weight.detach().flatten().to(dtype) for weight in self.pulled])

    def _draw(self, trainer: pl.Trainer, name: str) -> None:
        assert self.prior is not None
        if not (folder := picture_folder(trainer)):
            return
        figure = mixture_figure(self._all(), self.prior, f"epoch {trainer.current_epoch}")
        own = f"{name}_{self.name}" if self.name else name
        save_figure(figure, folder / f"{own}.png")
        for logger in trainer.loggers:
            if add := getattr(getattr(logger, "experiment", None), "add_figure", None):  # TensorBoard's
                add(f"{self._prefix}/{name}", figure, trainer.global_step)


def _untrained(model: nn.Module, weights: dict[str, nn.Parameter]) -> list[str]:
    """Return the names of weights, if all that their modules could draw anew look as if they had just been drawn."""
    fresh, seen = [], 0
    for name, weight in weights.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        attribute = name.rpartition(".")[2]
        if weight.ndim < 2 or not hasattr(owner, "reset_parameters") or attribute not in owner._parameters:
            continue
        twin = copy.deepcopy(owner)
        with torch.random.fork_rng():
            twin.reset_parameters()  # type: ignore[operator]  # a method
        drawn, seen = twin.get_parameter(attribute), seen + 1
        if abs(float(weight.detach().std() / drawn.detach().std().clamp(min=1e-12)) - 1) < 3 / weight.numel() ** 0.5:
            fresh.append(name)
    return fresh if fresh and len(fresh) == seen else []

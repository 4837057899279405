"""Make weights equal, or compute them from fewer parameters, during training."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from typing_extensions import override

from tying.callbacks.base import counted
from tying.callbacks.figures import log_figure
from tying.callbacks.transform import ModelTransform, grouped, record
from tying.errors import ConfigurationError, check_choice, check_counts, listed
from tying.hard import (
    HyperWeight,
    LowRank,
    LowRankPlusDiagonal,
    TemplateMixture,
    generate_weights,
    lower_rank,
    share_templates,
    tied,
    untie_biases,
)
from tying.hard.hypernetwork import GenerationPlan, plan_generation
from tying.hard.low_rank import check_rank
from tying.hard.templates import similarity_figure
from tying.hard.untied_bias import has_untied_bias
from tying.hashing import Hash, UniformHash, entropy, hash_weights
from tying.hashing.apply import check_choices, select_hashable
from tying.hashing.parametrization import HashedParametrization
from tying.hashing.report import loads_figure, table_counts, titled_loads
from tying.lightning_namespace import pl
from tying.mappings import from_mapping
from tying.selection.resolve import resolve
from tying.selection.tie import Tie, TiedGroup, parse_ties
from tying.soft.group_penalty import gaps
from tying.weights.derived import DerivedWeight, derived_by_others, gathered, locate_parameters
from tying.weights.optimizers import are_alike
from tying.weights.replace import select_weights
from tying.weights.state_dict import record_in, tie_records
from tying.weights.tie import Init, make_ties


class HardTying(ModelTransform):
    """Make tied weights one parameter, before the optimizers are made; see :func:`tying.hard.tie`.

    Args:
        ties: :class:`tying.Tie`, strings ``"source ~ target | relation"``, or mappings of Tie's arguments.
        init: the value of the shared weight: the source's, which is the left side of ``~``, or the mean.
        name: distinguishes several callbacks of this class.

    Raises:
        ConfigurationError: the ties do not fit the model, a callback that averages weights comes before this one, the
            model is sharded already, or an optimizer does not hold the tied weights.

    Warns:
        UserWarning: a new run begins, and a source has more than five times the scale of a weight that takes its
            values; see :func:`tying.hard.tie`.

    Example:
        >>> HardTying(ties=["encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o"]).init
        'source'
    """

    distinguished_by = "name"

    def __init__(
        self, ties: Sequence[Tie | str], init: Literal["source", "mean"] = "source", name: str | None = None
    ) -> None:
        check_choice("init", init, get_args(Init))
        self.ties, self.init, self.name = parse_ties(ties), init, name
        self._groups: list[TiedGroup] = []
        self._warning, self._initial_gap = "", 0.0  # of initial values, which a checkpoint replaces

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return self._groups

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._warning, self._initial_gap = "", 0.0

    @override
    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if self.is_applied(model):
            ties = record_in(model).ties
            names = {name for tie in self.ties for name in ties[tie]}
            if names <= derived_by_others(model).keys():  # another callback computes the tied weights now
                return {}
        return super().affected(model)

    @override
    def monitored(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {group.names[0]: group.parameters[0] for group in self._groups}

    @override
    def check_groups(self, groups: Sequence[TiedGroup]) -> None:
        if unlike := [group for group in groups if not are_alike(group.parameters)]:
            raise ConfigurationError(
                f"{listed(unlike[0].names)} cannot be one weight: they differ in requires_grad, dtype or device"
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = {name for group in self._groups for name in group.names}
        self._groups = [group for group in tied(pl_module) if not names.isdisjoint(group.names)]
        if self._warning:
            warnings.warn(f"HardTying: {self._warning}", stacklevel=2)
        self._warning = ""
        super().on_fit_start(trainer, pl_module)

    @override
    def changed(self, model: nn.Module) -> list[str]:
        return [name for group in self._groups if group.parameters[0].requires_grad for name in group.names]

    @override
    def is_applied(self, model: nn.Module) -> bool:
        return record_in(model).ties.keys() >= {*self.ties}

    @override
    def is_needed(self, model: nn.Module) -> bool:
        return False

    @override
    def apply(self, model: nn.Module) -> list[TiedGroup]:
        if not self.is_applied(model):  # a mixin applies it before setup does
            measurable = not tie_records(model) and not any(parameter.is_meta for parameter in model.parameters())
            groups = resolve(model, self.ties) if measurable else []
            self._initial_gap = max(gaps(groups), default=0.0)
        self._groups, warning = make_ties(model, self.ties, self.init)
        self._warning = self._warning or warning
        return self._groups

    @override
    def describe(self, model: nn.Module) -> str:
        renamed = (f"{name} is now {group.names[0]}" for group in self._groups for name in group.names[1:])
        value = "their mean" if self.init == "mean" else "the latter's values"
        differed = f"; before, they differed (largest gap {self._initial_gap:.4f})" if self._initial_gap else ""
        return f"{listed(renamed, limit=2)} (with {value}){differed}"


class LowRankWeights(ModelTransform):
    """Train weights of lower rank; see :func:`tying.hard.lower_rank`.

    Args:
        parameters: patterns of names; a leading ``!`` excludes.
        rank: rank of each weight.
        diagonal: add a diagonal; for square weights.

    Example:
        >>> LowRankWeights(["network.layer3.*.branch.conv2.weight"], rank=8).rank
        8
    """

    def __init__(self, parameters: list[str], rank: int, diagonal: bool = False) -> None:
        super().__init__(parameters)
        (LowRankPlusDiagonal if diagonal else LowRank)(rank)  # raises if the rank is out of range
        self.rank, self.diagonal = rank, diagonal

    @override
    def check_fits(self, name: str, weight: nn.Parameter) -> None:
        check_rank(weight, self.rank, self.diagonal)

    @override
    def _would_compute(self, derived: DerivedWeight) -> bool:
        step: Any = derived.steps[-1]
        return isinstance(step, LowRankPlusDiagonal if self.diagonal else LowRank) and step.rank == self.rank

    @override
    def _how(self) -> str:
        return f"of rank {self.rank}{' and a diagonal' * self.diagonal}"

    @override
    def change(self, model: nn.Module) -> list[str]:
        return lower_rank(model, self.parameters, self.rank, self.diagonal)


class TemplateWeights(ModelTransform):
    """Train weights that are mixtures of shared templates; see :func:`tying.hard.share_templates`.

    When training ends, the similarity of the layers is drawn as ``layer_similarity``, see
    :func:`tying.callbacks.figures.log_figure`.

    Args:
        parameters: patterns of names; a leading ``!`` excludes.
        templates: number of templates for each shape of weights.

    Example:
        >>> TemplateWeights(["network.layer3.*.branch.conv2.weight"], templates=2).templates
        2
    """

    def __init__(self, parameters: list[str], templates: int) -> None:
        super().__init__(parameters)
        check_counts(templates=templates)
        self.templates = templates

    @override
    def change(self, model: nn.Module) -> list[str]:
        return [*share_templates(model, self.parameters, self.templates)]

    @override
    def _would_compute(self, derived: DerivedWeight) -> bool:
        step: Any = derived.steps[-1]
        return isinstance(step, TemplateMixture) and len(step.bank.templates) == self.templates

    @override
    def _sharing(self, model: nn.Module) -> list[Sequence[str]]:
        return grouped({name: weight.shape for name, weight in self.selected(model).items()})

    @override
    def _how(self) -> str:
        return f"from {counted(self.templates, 'template')} a shape"

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        with gathered(derived_by_others(pl_module).values()):  # only the first process draws
            log_figure(trainer, partial(similarity_figure, pl_module), "layer_similarity")


class GeneratedWeights(ModelTransform):
    """Train weights that small networks generate; see :func:`tying.hard.generate_weights`.

    Args:
        parameters: patterns of names; a leading ``!`` excludes.
        embedding: size of the embedding of a basic kernel.
        in_channels: number of input channels of a basic kernel, or near it if it does not divide the weight's.
        out_channels: number of output channels of a basic kernel, likewise.

    Example:
        >>> GeneratedWeights(["network.layer*.conv*.weight"]).embedding
        64
    """

    def __init__(
        self, parameters: list[str], embedding: int = 64, in_channels: int = 16, out_channels: int = 16
    ) -> None:
        super().__init__(parameters)
        check_counts(embedding=embedding, in_channels=in_channels, out_channels=out_channels)
        self.embedding, self.in_channels, self.out_channels = embedding, in_channels, out_channels

    def _plan(self, model: nn.Module) -> GenerationPlan:
        """Return the weights to generate."""
        return plan_generation(model, self.parameters, self.embedding, self.in_channels, self.out_channels)

    @override
    def selected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        plan = self._plan(model)
        return {name: plan.selection.weights[name] for name in plan.tilings}

    @override
    def change(self, model: nn.Module) -> list[str]:
        if excluded := self._plan(model).describe_excluded():
            pl.utilities.rank_zero_info(f"GeneratedWeights: {excluded}")
        return generate_weights(model, self.parameters, self.embedding, self.in_channels, self.out_channels)

    @override
    def _would_compute(self, derived: DerivedWeight) -> bool:
        step: Any = derived.steps[-1]
        return isinstance(step, HyperWeight)

    @override
    def _sharing(self, model: nn.Module) -> list[Sequence[str]]:
        return grouped(self._plan(model).tilings)

    @override
    def _how(self) -> str:
        return f"generated from embeddings of {self.embedding}"


class UntiedBiases(ModelTransform):
    """Train convolutions with a bias for each position; see :func:`tying.hard.untie_biases`.

    Args:
        parameters: patterns of names of biases; a leading ``!`` excludes.
        input_size: size of one sample of the model's input, such as (3, 32, 32).

    Raises:
        ConfigurationError: ``input_size`` is empty, or has a number below 1.

    Example:
        >>> UntiedBiases(["features.*.bias"], input_size=(3, 32, 32)).input_size
        [3, 32, 32]
    """

    def __init__(self, parameters: list[str], input_size: list[int]) -> None:
        super().__init__(parameters)
        is_size = isinstance(input_size, Sequence) and all(isinstance(size, int) and size > 0 for size in input_size)
        if not input_size or not is_size:
            raise ConfigurationError(f"input_size must be that of one sample, such as [3, 32, 32], not {input_size!r}")
        self.input_size = [*input_size]

    @override
    def selected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return select_weights(model, self.parameters).weights

    @override
    def is_applied(self, model: nn.Module) -> bool:
        names = self.changed(model)
        return bool(names) and all(has_untied_bias(model, name) for name in names)

    @override
    def adopt(self, model: nn.Module) -> None:
        names = [name for name in locate_parameters(model) if self.selects(name) and has_untied_bias(model, name)]
        if names and not self.is_applied(model):
            record(model, self, names)

    @override
    def change(self, model: nn.Module) -> list[str]:
        like = next(model.parameters())  # the weight may be lazy, without new_zeros
        return untie_biases(
            model, self.parameters, torch.zeros(1, *self.input_size, dtype=like.dtype, device=like.device)
        )

    @override
    def _how(self) -> str:
        return "with an entry for each position"


class WeightHashing(ModelTransform):
    """Read each weight, or all weights together, from a table; see :func:`tying.hashing.hash_weights`.

    When training starts, the loads of the tables' entries are drawn as ``hash_loads``, see
    :func:`tying.callbacks.figures.log_figure`. Logs ``tying/entropy``: the entropy of the entries' loads, in nats,
    averaged over the tables.

    Args:
        parameters: patterns of names; a leading ``!`` excludes. Weights of fewer than two dimensions are skipped.
        table_ratio: entries of a table per weight, in (0, 1]; by default 0.1, or the ratio that the hash fixes.
        hash: maps each weight to its slot in the table.
        scope: a table for each weight, or one table for all.
        init: draw entries from the initialised weights, or take the mean of the weights that read an entry.
        sign: multiply by ±1, as HashedNets do.
        density: fraction of weights that are kept.
        index: how the hash is evaluated.
        scaled: with ``scope="network"``, multiply by each weight's own scale; see :func:`tying.hashing.hash_weights`.

    Example:
        >>> WeightHashing(["**.weight", "!**.norm*"], table_ratio=1 / 64, scope="network").scope
        'network'
    """

    def __init__(
        self,
        parameters: list[str],
        table_ratio: float | None = None,
        hash: Hash = UniformHash(),  # noqa: B008  # frozen
        scope: Literal["layer", "network"] = "layer",
        init: Literal["fresh", "mean"] = "fresh",
        sign: bool = False,
        density: float = 1.0,
        index: Literal["auto", "stored", "computed", "structured"] = "auto",
        scaled: bool = True,
    ) -> None:
        super().__init__(parameters)
        hash = from_mapping(hash, Hash, "hash")
        check_choices(table_ratio, hash, scope, init)
        self.table_ratio, self.hash, self.scope, self.init = table_ratio, hash, scope, init
        self.sign, self.density, self.index, self.scaled = sign, density, index, scaled

    @override
    def selected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return select_hashable(model, self.parameters, self.hash).weights

    @override
    def _sharing(self, model: nn.Module) -> list[Sequence[str]]:
        return [[*self.selected(model)]] if self.scope == "network" else []

    @override
    def _would_compute(self, derived: DerivedWeight) -> bool:
        return isinstance(derived.steps[-1], HashedParametrization)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        loads = titled_loads(pl_module)
        log_figure(trainer, partial(loads_figure, loads), "hash_loads")
        self._entropy = sum(map(entropy, loads.values())) / len(loads)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("tying/entropy", self._entropy)

    @override
    def change(self, model: nn.Module) -> list[str]:
        report = hash_weights(
            model,
            self.parameters,
            self.table_ratio,
            self.hash,
            scope=self.scope,
            init=self.init,
            sign=self.sign,
            density=self.density,
            index=self.index,
            scaled=self.scaled,
        )
        return [weight.name for weight in report.weights]

    @override
    def describe(self, model: nn.Module) -> str:
        return table_counts(model, self.changed(model))

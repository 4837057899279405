"""Relaxed ties: layers share one weight, and each differs from it by a residual of few parameters."""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.errors import ConfigurationError, check_choice, check_range, listed
from tying.hard.residuals import LowRankResidual, WeightResidual
from tying.mappings import from_mapping
from tying.selection.relation import Relation
from tying.selection.resolve import resolve_named
from tying.selection.tie import AnyTie, TiedGroup, parse_ties
from tying.torch_workarounds import has_values, is_proxy, is_recorded
from tying.weights.calibration import input_scales
from tying.weights.derived import (
    DerivedWeight,
    Locations,
    Parametrizations,
    derived_weights,
    install,
    locate_parameters,
    own_memory,
    plain_class,
    put_in_place,
    redrawn,
    single_step,
    swap_plain_class,
)
from tying.weights.replace import check_free
from tying.weights.sharding import full
from tying.weights.state_dict import EXACT, forget_ties
from tying.weights.tie import mean_of, plan, tie, tie_groups
from tying.weights.values import check_finite

logger = logging.getLogger(__name__)

Init = Literal["nearest", "source"]


class SharedWeight(nn.Module):
    """The weight S that several layers share, and the factor ρ of their residuals.

    Args:
        weight: S, in the source's layout.

    Example:
        >>> [name for name, _ in SharedWeight(nn.Parameter(torch.ones(2, 2))).state_dict().items()]
        ['weight', 'factor']
    """

    factor: Tensor

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        own_memory(weight)
        self.weight = weight
        self.register_buffer("factor", torch.ones((), dtype=weight.dtype, device=weight.device))

    def reset_parameters(self) -> None:
        """Draw the weight as linear layers and convolutions do; set the factor to 1."""
        with redrawn(self):
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
            nn.init.ones_(self.factor)


class RelaxedWeight(nn.Module):
    """The parametrization of a layer's weight by a shared weight and a residual; see :class:`WeightResidual`.

    Assigning a weight stores the nearest residual; the shared weight stays. In-place writes to the weight are lost;
    see :func:`relax`.

    Args:
        shared: the shared weight, one object of all layers of a group.
        residual: the kind of the residual.
        relation: the map from the source's layout to the layer's.
        position: of the layer in its group, whose source is first.

    Example:
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> shared = SharedWeight(nn.Parameter(torch.ones(4, 6)))
        >>> relaxed_weight = RelaxedWeight(shared, LowRankResidual(4))
        >>> layer = register_parametrization(nn.Linear(6, 4), "weight", relaxed_weight)
        >>> layer.weight = torch.zeros(4, 6)
        >>> torch.allclose(layer.weight, torch.zeros(4, 6), atol=1e-6)
        True
    """

    def __init__(
        self,
        shared: SharedWeight,
        residual: WeightResidual,
        relation: Relation = Relation(),  # noqa: B008  # frozen
        position: int = 0,
    ) -> None:
        super().__init__()
        self.shared, self.relation, self.residual, self.position = shared, relation, residual, position
        self.start: tuple[Tensor, ...] | None = None  # the parameters that the first right_inverse returns

    @override
    def forward(self, *parameters: Tensor) -> Tensor:
        shared = self.relation(self.shared.weight)
        weight = self.residual.combine(shared.flatten(1), self.shared.factor, *parameters)
        return weight.reshape(shared.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the residual of the nearest weight."""
        return self._nearest(self.shared.weight.detach(), weight) if self.start is None else self.start

    def initial(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the residual of a module that is reset: none."""
        return self.residual.zero(self.relation(self.shared.weight.detach()).flatten(1))

    @staticmethod
    def joint_inverse(
        parts: "Sequence[tuple[RelaxedWeight, nn.Parameter | tuple[nn.Parameter, ...], Tensor]]",
    ) -> dict[nn.Parameter | nn.Module, Tensor]:
        """Return the shared weight and the residuals nearest to several weights; see :class:`WeightResidual`.

        Args:
            parts: for each weight, its parametrization, the parameters of its residual, and its values.
        """
        if all(step.holds(parameters, weight) for step, parameters, weight in parts):
            return {}
        step, shared = parts[0][0], parts[0][0].shared.weight
        weights, relations = [weight.double() for _, _, weight in parts], [step.relation for step, _, _ in parts]
        kind = step.residual if step.present_factor else WeightResidual()  # whose shared weight is the mean
        nearest = kind.nearest_shared(weights, relations).to(shared.dtype)
        values: dict[nn.Parameter | nn.Module, Tensor] = {shared: nearest}
        for step, parameters, weight in parts:
            values |= zip(_as_tuple(parameters), step._nearest(nearest, weight), strict=True)
        return values

    def holds(self, parameters: "nn.Parameter | tuple[nn.Parameter, ...]", weight: Tensor) -> bool:
        """Return whether the weight of given parameters is the given one, up to rounding."""
        return bool((self(*_as_tuple(parameters)) - weight).norm() <= EXACT * weight.norm())

    def describe_weight(self, weight: Tensor) -> str:
        """Describe the layer's weight for a report, and how far it is from the shared one."""
        how = f"a shared weight and {self.residual.describe()}"
        return f"{how}, {self.distance(weight):.1%} of its norm from it" if has_values(weight) else how

    def distance(self, weight: Tensor) -> float:
        """Return ``‖W − S‖ / ‖W‖`` of the layer's weight W; 0 if both are zero."""
        return _distance(weight, self.relation(full(self.shared.weight)))

    @property
    def present_factor(self) -> float:
        """The factor of the residual; 1 on the meta device."""
        return float(self.shared.factor) if has_values(self.shared.factor) else 1.0

    def _nearest(self, shared: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the residual nearest to a weight, given the shared weight and the present factor."""
        precise = torch.promote_types(weight.dtype, torch.float32)
        shared, weight = (tensor.flatten(1).to(precise) for tensor in (self.relation(shared), weight.detach()))
        factor = self.present_factor
        if factor == 0:
            return self.residual.zero(shared.to(self.shared.weight.dtype))
        values = self.residual.nearest(shared, shared + (weight - shared) / factor if factor != 1 else weight)
        return tuple(value.to(self.shared.weight.dtype) for value in values)

    @override
    def extra_repr(self) -> str:
        return f"residual={self.residual}" + f", relation={str(self.relation)!r}" * bool(self.relation.steps)


def _distance(weight: Tensor, shared: Tensor) -> float:
    norm, distance = float(weight.norm()), float((weight - shared).norm())
    return distance / norm if norm else math.inf if distance else 0.0


def _as_tuple(parameters: nn.Parameter | tuple[nn.Parameter, ...]) -> tuple[nn.Parameter, ...]:
    return parameters if isinstance(parameters, tuple) else (parameters,)


class RelaxedLinear(nn.Linear):
    """A linear layer with a relaxed weight of low rank: ``y = S x + b + ρ B (A x)``, without the weight.

    It computes the weight where that is cheaper: for many inputs at once.
    """

    computes_with = "weight"

    @override
    def forward(self, input: Tensor) -> Tensor:
        relaxed = None if is_proxy(input) else _relaxed_step(self)
        if relaxed is None or not self._is_cheaper(input):
            return F.linear(input, self.weight, self.bias)
        step, (left, right) = relaxed
        output = F.linear(input, step.relation(step.shared.weight), self.bias)
        return output + F.linear(F.linear(input, right) * step.shared.factor, left)

    def _is_cheaper(self, input: Tensor) -> bool:
        """Return whether products with the residual's factors take fewer operations than the weight does."""
        if is_recorded():  # the number of inputs may be another one later
            return False
        entries = self.in_features * self.out_features
        return input.numel() // self.in_features * (self.in_features + self.out_features) < entries


def _relaxed_step(layer: nn.Module) -> tuple[RelaxedWeight, list[nn.Parameter]] | None:
    """Return the one step that computes a layer's weight, if it is of low rank without a scale, and its parameters."""
    step, parameters = single_step(layer)
    if not isinstance(step, RelaxedWeight) or not _is_plain_low_rank(step.residual):
        return None
    return step, parameters


def _is_plain_low_rank(residual: WeightResidual) -> bool:
    return type(residual) is LowRankResidual and not residual.scale


@dataclass(frozen=True, eq=False)
class RelaxedGroup(TiedGroup):
    """Layers that share a weight, and a residual of each; ``parameters`` repeats the shared weight.

    Attributes:
        steps: the parametrization of each layer.
        residuals: the parameters of each layer's residual.
    """

    steps: tuple[RelaxedWeight, ...] = ()
    residuals: tuple[tuple[nn.Parameter, ...], ...] = ()

    @property
    def factor(self) -> float:
        """The present factor of the residuals."""
        return float(self.steps[0].shared.factor)

    @torch.no_grad()
    def distances(self) -> dict[str, float]:
        """Return ``‖W − S‖ / ‖W‖`` of each layer, by name; 0 if both are zero."""
        whole, distances = full(self.steps[0].shared.weight), dict[str, float]()  # they may be sharded
        for name, step, residual in zip(self.names, self.steps, self.residuals, strict=True):
            shared = step.relation(whole)
            weight = step.residual.combine(shared.flatten(1), step.shared.factor, *map(full, residual))
            distances[name] = _distance(weight.reshape(shared.shape), shared)
        return distances


def relax(
    model: nn.Module,
    ties: Sequence[AnyTie],
    residual: WeightResidual | None = None,
    calibration: Iterable[Any] | None = None,
    init: Init = "nearest",
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> list[TiedGroup]:
    """Let weights share one weight S up to a residual each, ``W = relation(S) + ρ R``; see :class:`WeightResidual`.

    Vectors that wildcards or names of modules match, such as biases, stay separate.
    In-place writes (``.data``, ``nn.init``, an adapter's merge) to a computed weight are lost: assign the weight, or
    load ``bake(model)`` into the untied model first.

    Args:
        model: the module whose names the patterns match; changed in place.
        ties: as of :func:`tying.hard.tie`.
        residual: the kind of residual, or a mapping that names it as YAML does; default: none, which is a hard tie.
        calibration: batches of inputs. The residuals are the nearest as the outputs of the layers see it then: errors
            of an entry count by the root mean square of its input.
        init: ``"nearest"``: S is the mean over the members, and each residual the nearest to what is left of the
            layer's weight. ``"source"``: S is the source's weight, and residuals are zero; for training from scratch.
        forward: calls the model with a batch; default: see :func:`tying.weights.calibration.call`.

    Returns:
        The groups, with the shared weight as ``parameters``; see :class:`RelaxedGroup`.

    Raises:
        ConfigurationError: as of :func:`tying.hard.tie`; or a tie spells out a vector, or a weight cannot have the
            residual, is computed already or is not real. The model is not changed.
        NonFiniteError: a weight is not finite.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        >>> [group] = relax(model, ["{0..3}"], LowRankResidual(rank=1))
        >>> group.names, sum(p.numel() for p in model.parameters()) == 8 * 8 + 4 * (8 + 8) + 4 * 8
        (('0.weight', '1.weight', '2.weight', '3.weight'), True)

    Source: S. Bae et al., Relaxed recursive transformers: effective parameter sharing with layer-wise LoRA, 2024.
    """
    check_choice("init", init, get_args(Init))
    residual = from_mapping(residual, WeightResidual, "residual")
    if calibration is not None and (residual is None or init == "source"):
        raise ConfigurationError("calibration needs a residual, and init='nearest'")
    if residual is None:
        return tie(model, ties, "mean" if init == "nearest" else "source")
    if not isinstance(residual, WeightResidual):
        raise ConfigurationError(f"residual must be a WeightResidual, such as LowRankResidual(8), not {residual!r}")
    measure = None if calibration is None else partial(input_scales, model, batches=calibration, forward=forward)
    return _relax(model, ties, residual, init, measure)


@torch.no_grad()
def _relax(
    model: nn.Module,
    ties: Sequence[AnyTie],
    residual: WeightResidual,
    init: Init,
    measure: Callable[[Sequence[str]], Mapping[str, Tensor]] | None,
) -> list[TiedGroup]:
    """Relax ties with a residual; ``measure`` returns the scales of the inputs of named weights."""
    locations = locate_parameters(model)
    groups, vectors = _matrices(model, ties, locations)
    _check_members(model, groups, residual, locations)
    names = [name for group in groups for name in group.names]
    scales = measure(names) if measure else {}
    starts = [_start(group, residual, init, scales) for group in groups]
    for group, (shared, values) in zip(groups, starts, strict=True):
        _install_group(group, residual, shared, values, locations)
    forget_ties(model, [alias for name in names for alias in locations.aliases(name)])
    if vectors:
        logger.info("relax leaves vectors separate: %s", ", ".join(vectors))
    chosen = {*names}
    return [group for group in relaxed(model) if not chosen.isdisjoint(group.names)]


def _matrices(model: nn.Module, ties: Sequence[AnyTie], locations: Locations) -> tuple[list[TiedGroup], list[str]]:
    """Return the groups of matrices and kernels that ties describe, and the names of the vectors.

    Raises:
        ConfigurationError: a tie spells out a vector, or there are only vectors, or a vector computes a weight.
    """
    parsed = parse_ties(ties)
    groups, _ = resolve_named(model, parsed)
    spelt = {pattern for tie in parsed for pattern in (tie.source, tie.target)}
    matrices, vectors = list[TiedGroup](), list[str]()
    for group in groups:
        if all(parameter.ndim > 1 for parameter in group.parameters):
            matrices.append(group)
        else:
            vectors += group.names
    wrong = [name for name in vectors if name in spelt] or (vectors if not matrices else [])
    for name in wrong:  # such as the coefficients of a weight that is mixed from templates
        check_free(name, locations)
    if wrong:
        raise ConfigurationError(
            f"{listed(map(repr, wrong))}: a vector has no residual that costs less than itself: leave it separate, or "
            "tie it by HardTying or tying.hard.tie"
        )
    return matrices, vectors


def _check_members(
    model: nn.Module, groups: Sequence[TiedGroup], residual: WeightResidual, locations: Locations
) -> None:
    """Raise an error unless all weights of groups can be one weight and a residual each."""
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            check_free(name, locations)
            if not parameter.is_floating_point():
                raise ConfigurationError(
                    f"{name!r} is {parameter.dtype}, and only real floating-point weights can be relaxed: exclude it"
                )
            check_finite(name, parameter)
            try:
                residual.check(parameter.flatten(1).shape)
            except ConfigurationError as error:
                raise ConfigurationError(f"{name!r}: {error}") from None
    plan(model, groups, locations)


def _start(
    group: TiedGroup, residual: WeightResidual, init: Init, scales: Mapping[str, Tensor]
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Return the initial shared weight of a group, and the parameters of each layer's residual."""
    shared = mean_of(group) if init == "nearest" else group.parameters[0].detach().clone()
    precise = torch.promote_types(shared.dtype, torch.float32)
    values = []
    for name, parameter, relation in zip(group.names, group.parameters, group.relations, strict=True):
        matrix = relation(shared).flatten(1)
        if init == "source":
            values.append(residual.zero(matrix))
            continue
        scale = scales.get(name)
        if scale is not None:  # (1, in, 1, 1) of a convolution, or (in, 1) of a layer that stores its weight transposed
            scale = scale.expand(1, *parameter.shape[1:]).flatten(1) if len(scale) == 1 else scale.flatten(1)
        nearest = residual.nearest(matrix.to(precise), parameter.detach().flatten(1).to(precise), scale)
        values.append(tuple(value.to(shared.dtype) for value in nearest))
    return shared, values


def _install_group(
    group: TiedGroup,
    residual: WeightResidual,
    value: Tensor,
    starts: Sequence[tuple[Tensor, ...]],
    locations: Locations,
) -> None:
    """Let the layers of a group compute their weights from the source's parameter, which gets a value."""
    group.parameters[0].copy_(value)
    shared = SharedWeight(group.parameters[0])
    members = zip(group.names, group.parameters, group.relations, starts, strict=True)
    for position, (name, parameter, relation, start) in enumerate(members):
        step = RelaxedWeight(shared, residual, relation, position)
        step.start = start
        parametrizations = Parametrizations([step], parameter)
        step.start = None
        for location in locations.owners(name):
            install(location.owner, location.attribute, parametrizations)
            if _is_plain_low_rank(residual) and (plain_class(location.owner), location.attribute) == (
                nn.Linear,
                "weight",
            ):
                swap_plain_class(location.owner, RelaxedLinear)


def relaxed(model: nn.Module) -> list[RelaxedGroup]:
    """Return the groups of weights that :func:`relax` relates. This changes nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> _ = relax(model, ["*.weight"], LowRankResidual(1))
        >>> [group] = relaxed(model)
        >>> group.names, group.factor, group.parameters[0].shape
        (('0.weight', '1.weight'), 1.0, torch.Size([4, 4]))
    """
    members: dict[SharedWeight, list[tuple[int, str, DerivedWeight]]] = {}
    for name, derived in derived_weights(model).items():
        step = derived.steps[0]
        if len(derived.steps) == 1 and isinstance(step, RelaxedWeight):
            members.setdefault(step.shared, []).append((step.position, name, derived))
    return [_group(shared, sorted(layers, key=lambda layer: layer[0])) for shared, layers in members.items()]


def _group(shared: SharedWeight, layers: Sequence[tuple[int, str, DerivedWeight]]) -> RelaxedGroup:
    steps: Any = tuple(derived.steps[0] for _, _, derived in layers)
    residuals: Any = tuple((*derived.inputs,) for _, _, derived in layers)
    names = tuple(name for _, name, _ in layers)
    relations = tuple(step.relation for step in steps)
    return RelaxedGroup(names, (shared.weight,) * len(names), relations, True, steps, residuals)


def harden(model: nn.Module, names: Collection[str] | None = None) -> list[TiedGroup]:
    """Drop the residuals of relaxed weights, which become a hard tie of the shared weight; see :func:`tying.hard.tie`.

    The shared weight stays the same ``Parameter``, so that its optimizer state stays.

    Args:
        model: changed in place.
        names: harden only groups that contain one of these names; default: all groups.

    Returns:
        The tied groups.

    Raises:
        ConfigurationError: a relation computes a weight from a source that is not in the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> [group] = relax(model, ["*.weight"], LowRankResidual(1))
        >>> [tied] = harden(model)
        >>> model[0].weight is model[1].weight is group.parameters[0], tied.names
        (True, ('0.weight', '1.weight'))
    """
    chosen = None if names is None else {*names}
    groups = [group for group in relaxed(model) if chosen is None or not chosen.isdisjoint(group.names)]
    parts, separate = list[TiedGroup](), dict[str, nn.Parameter]()
    for group in groups:
        shared = group.parameters[0]
        if group.relations[0].steps:
            raise ConfigurationError(
                f"{group.names[0]!r}: the source of its tie is not a part of this model. Harden the whole model"
            )
        members = [shared]
        members += [nn.Parameter(relation(shared.detach()), shared.requires_grad) for relation in group.relations[1:]]
        separate |= zip(group.names, members, strict=True)
        if len(group) > 1:  # else it is a part of a relaxed model
            parts.append(TiedGroup(group.names, (*members,), group.relations))
    put_in_place(model, separate)
    return tie_groups(model, parts)


def set_residual_factor(model: nn.Module | RelaxedGroup, factor: float) -> None:
    """Set the factor ρ of the residuals of a group, or of all groups of a model.

    Args:
        model: the model, or a group that :func:`relaxed` returned.
        factor: in [0, 1]: 0 is the hard tie.

    Raises:
        ConfigurationError: the factor is not in [0, 1].

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> [group] = relax(model, ["*.weight"], LowRankResidual(1))
        >>> set_residual_factor(model, 0.0)
        >>> torch.equal(model[0].weight, group.parameters[0])
        True
    """
    check_range("factor", factor, "[0, 1]")
    with torch.no_grad():
        for group in [model] if isinstance(model, RelaxedGroup) else relaxed(model):
            group.steps[0].shared.factor.fill_(factor)

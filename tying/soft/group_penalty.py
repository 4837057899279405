"""The penalty on all groups of a model: its value, its gradient, an explicit step and a proximal step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.errors import ConfigurationError, listed, nearest
from tying.mappings import from_mapping
from tying.selection.index import check_shape
from tying.selection.relation import Relation
from tying.selection.tie import TiedGroup
from tying.soft.penalties import L1, L2, Penalty, WeightedL2, group_mean, squared_norm
from tying.weights.derived import own_memory
from tying.weights.sharding import (
    Placements,
    aligned,
    check_meshes,
    is_sharded,
    is_view,
    largest,
    local,
    local_member,
    local_tensors,
    reduce_gradient,
    replicated,
    shard_like,
    total,
)

CPU_BATCH = 2**19  # entries: the differences of a batch fit in the cache
STRIDED = 2**14  # entries: from there on, arithmetic on a transposed copy is faster than on a transposed view
DEVICE_BATCH = 2**26  # entries: few kernel launches, and a buffer of bounded size
PENALTIES: dict[str, Penalty] = {"l2": L2(), "l1": L1()}
Rates = Mapping[nn.Parameter, float]
Lane = Sequence[Any]  # m tensors of a group, and m tensors (or None) to which their gradients are added


class TyingPenalty(nn.Module):
    """The penalty Ω of all groups of a model, and three ways to lower it.

    The in-place methods change the members that require gradients. With ``rates``, they change only the parameters in
    it, each in proportion to its rate (for example, its learning rate). All other members are constants.

    Groups may be sharded over processes by FSDP2 or tensor parallelism; every process must then call the same methods.
    Each process changes its shards. Members with equal shards need no communication; a member with others, such as a
    transposed one, is sent to the shards of the source and back. A penalty that is not elementwise needs the whole
    tensors in each process.

    Args:
        groups: tied groups, from :func:`tying.resolve`.
        penalty: ``"l2"``, ``"l1"``, ``Huber(delta)`` or an instance of a subclass of :class:`Penalty`.
        strength: the factor on Ω that a callback applies. The methods of this class do not use it: they take a factor
            as an argument.

    Raises:
        ConfigurationError: the penalty is unknown, or it accepts only pairs and a group is larger, or only real weights
            and some are complex; or members of a group are sharded over different meshes, or not all of them.

    Example:
        >>> from tying import resolve
        >>> model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
        >>> _ = nn.init.constant_(model["a"].weight, 1.0), nn.init.constant_(model["b"].weight, 3.0)
        >>> penalty = TyingPenalty(resolve(model, ["a.weight ~ b.weight"]))
        >>> penalty().item()
        2.0
        >>> penalty.pull_(0.25)
        >>> model["a"].weight.item(), model["b"].weight.item()
        (1.5, 2.5)
        >>> penalty.prox_(float("inf"))
        >>> model["a"].weight.item(), model["b"].weight.item()
        (2.0, 2.0)
    """

    explicit_step = "lr · strength"  # what the stability bound limits, in words

    def __init__(self, groups: Sequence[TiedGroup], penalty: str | Penalty = "l2", strength: float = 1.0) -> None:
        super().__init__()
        self.groups = list(groups)  # not registered: the parameters belong to their model
        self.penalty = as_penalty(penalty)
        self.strength = strength
        self._placements: dict[TiedGroup, Placements] = {}  # of the local shards of sharded groups
        for group in self.groups:
            check_meshes(dict(zip(group.names, group.parameters, strict=True)))
            if is_sharded(source := group.parameters[0]):
                self._placements[group] = source.placements if self.penalty.elementwise else replicated(source)
            are_complex = {parameter.is_complex() for parameter in group.parameters}
            if len(are_complex) > 1:
                raise ConfigurationError(
                    f"{listed(group.names)}: some are complex and some real: tie weights of one kind"
                )
            if self.penalty.real_only and are_complex == {True}:
                raise ConfigurationError(
                    f"{group.names[0]!r} is complex, and {type(self.penalty).__name__} takes real weights: use 'l2'"
                )
        if self.penalty.pairs_only and (names := next((group.names for group in self.groups if len(group) > 2), None)):
            raise ConfigurationError(
                f"{self.penalty} takes pairs, but {listed(names)} are one group of {len(names)}: "
                "use 'l2' or 'l1', or ties that share no weight"
            )

    def operands(self, group: TiedGroup) -> list[Tensor]:
        """Return the tensors from which the penalty on a group is computed, in the source's layout, or their shards."""
        return local_tensors(group, self._placements[group]) if group in self._placements else group.tensors()

    def curvature(self, group: TiedGroup) -> float:
        """Return the largest second derivative of ρ for a group; 0 if unknown."""
        return self.penalty.curvature

    def forward(self) -> Tensor:
        """Return Ω summed over all groups, a differentiable scalar; half-precision weights are summed in float32."""
        values = [
            self.penalty.value([w.to(torch.promote_types(w.dtype, torch.float32)) for w in self.operands(group)])
            for group in self.groups
        ]
        if self._placements and self.penalty.elementwise:  # else each process has whole tensors
            totals = total([value.detach() for value in values], [group.parameters[0] for group in self.groups])
            # the gradient of the local sum is that of the local shards
            values = [value + (whole - value.detach()) for value, whole in zip(values, totals, strict=True)]
        return torch.stack(values).sum() if values else torch.zeros(())

    @torch.no_grad()
    def add_gradients_(self, strength: float, rates: Rates | None = None) -> None:
        """Add ``strength · ∂Ω`` (times the rate) to the gradients; create missing gradients."""
        for group in self._placements:
            for parameter in group.parameters:
                reduce_gradient(parameter)
        self._add_(self._factors(strength, rates), gradient_of)

    @torch.no_grad()
    def pull_(self, s: float, rates: Rates | None = None) -> None:
        """Take the explicit step ``w ← w − s ∂Ω`` (times the rate)."""
        self._add_(self._factors(-s, rates), _itself)

    @torch.no_grad()
    def prox_(self, s: float, rates: Rates | None = None) -> None:
        """Take the proximal step ``w ← argmin_v Σ_i ‖v_i − w_i‖² / (2 rate_i) + s Ω(v)``; s may be infinite."""
        if s == 0:
            return
        explicit: dict[TiedGroup, Sequence[float]] = {}
        for group in self.groups:
            speeds = _rates(group, rates)
            if any(speeds):
                if (steps := self.penalty.explicit_steps(s, speeds)) is not None:
                    explicit[group] = [-step for step in steps]
                else:
                    self._prox_group_(group, s, speeds)
        self._add_(explicit, _itself)

    def _prox_group_(self, group: TiedGroup, s: float, speeds: Sequence[float]) -> None:
        for i, value in enumerate(self.penalty.prox(self.operands(group), s, speeds)):
            if speeds[i] and group in self._placements:
                local(group.parameters[i]).copy_(local_member(group, i, value, self._placements[group]))
            elif speeds[i]:
                group.parameters[i].copy_(group.relations[i](value))

    def _factors(self, scale: float, rates: Rates | None) -> dict[TiedGroup, Sequence[float]]:
        """Return the factor of each member's gradient, for the groups that change."""
        if scale == 0:
            return {}
        factors: dict[TiedGroup, Sequence[float]] = {}
        for group in self.groups:
            speeds = _rates(group, rates)
            if any(speeds):
                factors[group] = speeds if scale == 1 else [scale * rate for rate in speeds]
        return factors

    def check_rates(self, rates: Rates) -> None:
        """Raise an error if the penalty has no proximal step for these rates; change no weight.

        Raises:
            ConfigurationError: the penalty needs equal rates within a group, and they differ.
        """
        for speeds, group in {_rates(group, rates): group for group in self.groups}.items():
            try:
                self.penalty.prox([torch.zeros(1)] * len(self.operands(group)), 1.0, speeds)
            except ConfigurationError as error:
                raise ConfigurationError(f"{listed(group.names)}: {error}") from None

    def stability_warning(self, step: float, rates: Rates) -> str | None:
        """Describe the first group for which explicit steps ``w ← w − step · rate · ∂Ω`` diverge, or return ``None``.

        A group of m members diverges when ``rate · step · curvature > 2 / m``. The bound is ``2 / (m − 1)`` if a single
        member changes.
        """
        largest = max(map(self.curvature, self.groups), default=0.0)
        if max(rates.values(), default=0.0) * step * largest <= 2 / max(map(len, self.groups), default=1):
            return None
        for group in self.groups:
            speeds = _rates(group, rates)
            single = sum(map(bool, speeds)) == 1
            bound = 2 / (len(group) - single)
            if (product := max(speeds) * step * self.curvature(group)) > bound:
                return (
                    f"{self.explicit_step} = {product:.3g} is past the stability bound "
                    f"2/{'(m − 1)' if single else 'm'} = {bound:.3g} of the group of {group.names[0]!r}: its weights "
                    "will oscillate apart. Lower the strength, or use update='proximal', which is stable at any "
                    "strength"
                )
        return None

    def _add_(self, factors: Mapping[TiedGroup, Sequence[float]], receiver: Callable[[nn.Parameter], Tensor]) -> None:
        """Add the gradient of each member, times a factor, to what ``receiver`` returns for it."""
        lanes: dict[tuple[float, ...], list[Lane]] = {}
        copies: list[tuple[TiedGroup, int, Tensor, Tensor]] = []
        for group, scales in factors.items():
            operands = self.operands(group)
            views: list[Tensor | None] = [None] * len(group)
            for i, parameter in enumerate(group.parameters):
                if scales[i]:
                    target = receiver(parameter)
                    if group in self._placements:
                        view = _local_view(target, group.to_source[i], self._placements[group])
                    else:
                        view = group.to_source[i](target)
                        view = view if view.data_ptr() == target.data_ptr() else None
                    if view is None:  # a copy: add it to the target at the end
                        view = torch.zeros_like(operands[i])
                        copies.append((group, i, target, view))
                    views[i] = view
            lanes.setdefault(tuple(scales), []).append([*operands, *views])
        for scales, alike in lanes.items():
            for batch in _batches(alike):
                self._add_batch_(batch, scales)
        for group, i, target, gradient in copies:
            if group in self._placements:
                local(target).add_(local_member(group, i, gradient, self._placements[group]))
            else:
                target.add_(group.relations[i](gradient))

    def _add_batch_(self, batch: list[Lane], scales: Sequence[float]) -> None:
        """Add the gradients of pieces of groups that have equal factors."""
        m, strided = len(scales), list[tuple[Tensor, Tensor]]()
        for number, lane in enumerate(batch):
            if places := _strided(lane):
                pieces = [*lane]
                for place in places:
                    pieces[place] = (
                        lane[place].contiguous() if place < len(lane) - m else _contiguous_zeros(lane[place])
                    )
                    if place >= len(lane) - m:
                        strided.append((lane[place], pieces[place]))
                batch[number] = pieces
        columns = [[*column] for column in zip(*batch, strict=True)]
        self.penalty.add_gradient_(columns[:-m], columns[-m:], scales)
        for view, values in strided:
            _add_in_order_(view, values)


class ImportancePenalty(TyingPenalty):
    """The penalty ``½ Σ F (w − w⁰)²`` of weights w with anchors w⁰ and importances F; :func:`anchored` creates it.

    Args:
        groups: pairs of a weight and its anchor.
        importances: F ≥ 0, by the name of the weight; ``inf`` only for proximal steps.
        strength: see :class:`TyingPenalty`.

    Raises:
        ConfigurationError: an importance has another shape than its weight, or is negative or NaN, or a weight is
            complex.
    """

    explicit_step = "lr · strength · largest importance"

    def __init__(self, groups: Sequence[TiedGroup], importances: Mapping[str, Tensor], strength: float = 1.0) -> None:
        super().__init__(groups, WeightedL2(), strength)
        self.importances: dict[str, Tensor] = {}
        self._largest: dict[str, float] = {}
        for group in self.groups:
            name, weight = group.names[0], group.parameters[0]
            importance = importances[name].detach().to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            if importance.shape != weight.shape:
                raise ConfigurationError(
                    f"the importance of {name!r} is {tuple(importance.shape)}, and the weight {tuple(weight.shape)}"
                )
            shard = local(importance)
            refused, bound = not bool((shard >= 0).all()), float(shard.max()) if shard.numel() else 0.0
            if is_sharded(importance):
                refused, bound = largest(torch.tensor([float(refused), bound], device=shard.device)).tolist()
            if refused:
                raise ConfigurationError(f"the importance of {name!r} must be 0 or more throughout, and some is not")
            self.importances[name] = local(shard_like(importance, weight))
            self._largest[name] = bound

    @override
    def operands(self, group: TiedGroup) -> list[Tensor]:
        return [*super().operands(group), self.importances[group.names[0]]]

    @override
    def curvature(self, group: TiedGroup) -> float:
        return self._largest[group.names[0]]


def anchored(
    weights: Mapping[str, nn.Parameter],
    anchors: Mapping[str, Tensor],
    strength: float = 1.0,
    importances: Mapping[str, Tensor] | None = None,
) -> TyingPenalty:
    """Return the penalty ``½ Σ F (w − w⁰)²``, which ties each weight softly to a constant; without F, ``½ ‖w − w⁰‖²``.

    Args:
        weights: w, by name.
        anchors: w⁰, by the same names.
        strength: see :class:`TyingPenalty`.
        importances: F ≥ 0, by the same names: entries with F = 0 are free, and an infinite F freezes an entry in
            proximal steps.

    Raises:
        ConfigurationError: see :class:`ImportancePenalty`.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 4.0]))
        >>> penalty = anchored({"w": w}, {"w": torch.tensor([1.0, 2.0])})
        >>> penalty.prox_(1.0)
        >>> w.tolist()
        [1.0, 3.0]
        >>> anchored({"w": w}, {"w": torch.zeros(2)}, importances={"w": torch.tensor([0.0, 3.0])}).prox_(1.0)
        >>> w.tolist()
        [1.0, 0.75]

    Source: X. Li, Y. Grandvalet and F. Davoine, Explicit inductive bias for transfer learning with convolutional
    networks, 2018; J. Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2017.
    """
    groups = []
    for name, weight in weights.items():
        check_shape(name, weight)
        value = shard_like(anchors[name].detach(), weight)
        # a state dict's tensor changes with its weight
        aliased = local(value).untyped_storage().data_ptr() == local(weight).untyped_storage().data_ptr()
        anchor = nn.Parameter(value.to(dtype=weight.dtype, device=weight.device, copy=aliased), requires_grad=False)
        own_memory(anchor)
        groups.append(TiedGroup((name, f"anchor of {name}"), (weight, anchor), (Relation(), Relation())))
    if importances is None:
        return TyingPenalty(groups, strength=strength)
    return ImportancePenalty(groups, importances, strength)


def as_penalty(penalty: str | Penalty | Mapping[str, Any]) -> Penalty:
    """Return the penalty with a name, or that a mapping describes; return a penalty unchanged.

    Raises:
        ConfigurationError: there is no such penalty.
    """
    penalty = from_mapping(penalty, Penalty, "penalty")
    if not isinstance(penalty, Penalty) and not (isinstance(penalty, str) and penalty in PENALTIES):
        raise ConfigurationError(
            f"unknown penalty {penalty!r}: use {', '.join(map(repr, PENALTIES))}, Huber(delta) or a subclass of "
            f"tying.soft.Penalty.{nearest(str(penalty), [*PENALTIES, 'Huber(delta)'])}"
        )
    return penalty if isinstance(penalty, Penalty) else PENALTIES[penalty]


def _rates(group: TiedGroup, rates: Rates | None) -> tuple[float, ...]:
    """Return the rate of each member of a group; constants have the rate 0."""
    speeds = []
    for parameter in group.parameters:  # a generator would cost a call for each
        rate = 1.0 if rates is None else rates.get(parameter, 0.0)
        speeds.append(rate if parameter.requires_grad else 0.0)
    return tuple(speeds)


def _itself(parameter: nn.Parameter) -> Tensor:
    return parameter


def _strided(lane: Lane) -> list[int]:
    """Return the positions of large tensors that are not in the order of their memory, such as transposed ones.

    There are none if all have the same order, as in a model with channels last.
    """
    places, same = [], True
    for place, tensor in enumerate(lane):  # a comprehension would cost a call
        if tensor is not None:
            same = same and tensor.stride() == lane[0].stride()
            if not tensor.is_contiguous() and tensor.numel() >= STRIDED and tensor.is_cpu:
                places.append(place)
    return [] if same else places


def _contiguous_zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)


def _add_in_order_(view: Tensor, values: Tensor) -> None:
    """Add values to a view in the order of its memory: a transposed copy takes less time than strided additions."""
    order = sorted(range(view.ndim), key=view.stride, reverse=True)
    view.permute(order).add_(values.permute(order).contiguous())


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter; create it if it is missing.

    Raises:
        ConfigurationError: the gradient is sparse.
    """
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.is_sparse:
        raise ConfigurationError(
            f"a tied weight of shape {tuple(parameter.shape)} has sparse gradients, and the penalty's are dense: "
            "use sparse=False, or update='decoupled' or 'proximal'"
        )
    return parameter.grad


def _local_view(target: Tensor, relation: Relation, placements: Placements) -> Tensor | None:
    """Return the local shard of a sharded tensor in other placements if it shares memory; else None."""
    return local(aligned(target, relation, placements)) if is_view(target, relation, placements) else None


def _batches(lanes: Iterable[Lane]) -> Iterable[list[Lane]]:
    """Split large groups and collect small ones into batches whose differences fit in the processor's cache."""
    batch: list[Lane] = []
    filled = 0
    for lane in lanes:
        limit = CPU_BATCH if lane[0].device.type == "cpu" else DEVICE_BATCH
        for piece in _pieces(lane, limit):
            batch.append(piece)
            filled += piece[0].numel()
            if filled >= limit:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch


def _pieces(lane: Lane, limit: int) -> Iterable[Lane]:
    """Split a group into pieces of about ``limit`` entries; flatten contiguous tensors, else split dimension 0."""
    weight = lane[0]
    if weight.numel() <= limit or not weight.dim():
        return [lane]
    flat = all(tensor is None or tensor.is_contiguous() for tensor in lane)
    rows = limit if flat else max(1, limit * weight.shape[0] // weight.numel())
    splits = (repeat(None) if t is None else torch.split(t.view(-1) if flat else t, rows) for t in lane)
    return zip(*splits, strict=False)


def gap(tensors: Sequence[Tensor]) -> float:
    """Return ``sqrt(Σ‖w_i − w̄‖² / Σ‖w_i‖²)``: 0 for equal tensors, 1 for opposite ones.

    If the tensors are sharded, in equal layouts or not, every process must call this, and gets the same value.

    Example:
        >>> gap([torch.tensor([1.0]), torch.tensor([-1.0])])
        1.0
    """
    names, parameters = tuple(map(str, range(len(tensors)))), cast(tuple[nn.Parameter, ...], tuple(tensors))
    return gaps([TiedGroup(names, parameters, (Relation(),) * len(tensors))])[0]


@torch.no_grad()
def gaps(groups: Sequence[TiedGroup]) -> list[float]:
    """Return the :func:`gap` of each group; if some are sharded, every process must call this.

    Example:
        >>> from tying import resolve
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> groups = resolve(model, ["0.weight ~ 1.weight", "0.bias ~ 1.bias"])
        >>> gaps(groups) == [gap(group.tensors()) for group in groups]
        True
    """
    sums = [torch.tensor(_squares(local_tensors(group)), dtype=torch.float64) for group in groups]
    sums = total(sums, [group.parameters[0] for group in groups])
    return [math.sqrt(deviation / norm) if deviation else 0.0 for deviation, norm in map(Tensor.tolist, sums)]


def _squares(tensors: Sequence[Tensor]) -> tuple[float, float]:
    """Return ``Σ‖w_i − w̄‖²`` and ``Σ‖w_i‖²``."""
    tensors = [w.to(torch.promote_types(w.dtype, torch.float64)) for w in tensors]
    mean = group_mean(tensors)
    return sum(float(squared_norm(w - mean)) for w in tensors), sum(float(squared_norm(w)) for w in tensors)

"""Choose the weights to replace by derived weights, and parametrize them."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from tying.errors import ConfigurationError, listed
from tying.selection.index import covers
from tying.selection.patterns import Pattern
from tying.selection.resolve import select
from tying.weights.derived import Locations, Parametrizations, install, locate_parameters
from tying.weights.state_dict import forget_ties
from tying.weights.values import check_finite, check_real, check_whole

logger = logging.getLogger(__name__)


def parametrize_all(
    model: nn.Module,
    parameters: Sequence[str],
    make: Callable[[str, nn.Parameter], nn.Module],
    context: str = "parametrize_all",
) -> list[str]:
    """Parametrize the weights that match patterns; return their names.

    A tied weight becomes one computed weight of all modules that share it.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` excludes.
        make: returns the parametrization of a weight; it must have a ``right_inverse``.
        context: name of the calling function, for messages.

    Raises:
        ConfigurationError: a pattern matches nothing, or a weight is parametrized already, is tied through a relation,
            or is not real; or a weight that is spelt out, or every weight, does not fit its parametrization. The model
            is not changed.
        NonFiniteError: a weight is not finite.

    Warns:
        UserWarning: wildcards match weights that are left out, since they do not fit or a relation ties them.
    """
    locations, steps = locate_parameters(model), dict[str, nn.Module]()
    selection = select_weights(model, parameters, least_dims=2)
    for name in selection.skipped:
        if name in selection.spelt:
            raise ConfigurationError(f"{name!r} has fewer than two dimensions: leave it out")
    for name, weight in selection.weights.items():
        check_free(name, locations)
        check_real(name, weight)
        check_finite(name, weight)

    def fit(name: str, weight: nn.Parameter) -> None:
        step = make(name, weight)
        step.right_inverse(weight.detach())  # type: ignore[operator]  # a method
        steps[name] = step

    selection = selection.fitting(fit)
    for name, weight in selection.weights.items():
        _check_shared(name, weight, steps[name])
    selection.report(context)
    for name, weight in selection.weights.items():
        parametrizations = Parametrizations([steps[name]], weight)
        for location in locations.owners(name):
            install(location.owner, location.attribute, parametrizations)
    forget_ties(model, [alias for name in selection.weights for alias in locations.aliases(name)])
    return [*selection.weights]


def _check_shared(name: str, weight: nn.Parameter, step: nn.Module) -> None:
    """Raise an error if what a parametrization shares has another dtype or device than a weight."""
    for shared in step.parameters():
        if (shared.dtype, shared.device) != (weight.dtype, weight.device):
            raise ConfigurationError(
                f"{name!r} is {weight.dtype} on {weight.device}, and the parameters that it would share are "
                f"{shared.dtype} on {shared.device}: exclude it, or name only weights of one dtype and device"
            )


@dataclass(frozen=True)
class Selection:
    """The weights that patterns match, by whether they can become computed weights.

    Attributes:
        weights: the parameters to replace, by name: a tied weight once, by the first of its names that matches.
        spelt: those of all names below whose weight a pattern spells out; wildcards match the others.
        tied: names of weights that are left out since a relation ties them, and the names that they are tied to.
        skipped: names of parameters of too few dimensions.
        unfit: names of other weights that are left out, and the reasons.
    """

    weights: dict[str, nn.Parameter]
    spelt: frozenset[str] = frozenset()
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    unfit: dict[str, str] = field(default_factory=dict)

    def fitting(self, check: Callable[[str, nn.Parameter], object]) -> "Selection":
        """Return the selection without the weights that only wildcards match and that do not pass a check.

        Args:
            check: raises a ConfigurationError if the weight of a name does not fit.

        Raises:
            ConfigurationError: a weight that is spelt out, or every weight, does not fit.
        """
        unfit: dict[str, str] = {}
        for name, weight in self.weights.items():
            try:
                check(name, weight)
            except ConfigurationError as error:
                unfit[name] = str(error)
                if name in self.spelt:
                    raise ConfigurationError(f"{name!r}: {error}") from None
        if unfit.keys() == self.weights.keys():
            name, reason = next(iter(unfit.items()))
            raise ConfigurationError(f"{name!r}: {reason}")
        weights = {name: weight for name, weight in self.weights.items() if name not in unfit}
        return replace(self, weights=weights, unfit=self.unfit | unfit)

    def describe_tied(self) -> str:
        """Return the names of the weights that a relation ties, each with the names that it is tied to."""
        return listed(f"{name!r} (tied to {listed(map(repr, partners))})" for name, partners in self.tied.items())

    def report(self, context: str) -> None:
        """Warn of the weights that are left out; log the names of the parameters of too few dimensions."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.unfit.items():
            reasons.setdefault(reason, []).append(repr(name))
        left_out = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
        if self.tied:
            left_out.append(f"{self.describe_tied()}: a relation computes one from the other")
        if left_out:
            warnings.warn(
                f"{context} leaves out {'; '.join(left_out)}. Exclude them to silence this warning", stacklevel=4
            )
        if self.skipped:
            logger.info("%s skips parameters of fewer than two dimensions: %s", context, ", ".join(self.skipped))


def select_weights(model: nn.Module, parameters: Sequence[str], least_dims: int = 0) -> Selection:
    """Return the weights that match patterns. This changes nothing.

    A tied weight is selected once, unless one of its names is excluded. A weight that is tied through a relation is
    selected only if it is spelt out, and :func:`check_free` refuses it; so is one that another library
    parametrizes, as torch's ``weight_norm`` does.

    Args:
        model: any module.
        parameters: patterns of names; a leading ``!`` excludes.
        least_dims: the least number of dimensions of a weight.

    Raises:
        ConfigurationError: a pattern matches nothing, or nothing that matches can be selected.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> selection = select_weights(model, ["*.*"], least_dims=2)
        >>> [*selection.weights], selection.skipped
        (['0.weight', '2.weight'], ('0.bias', '1.bias', '2.bias'))
    """
    locations = locate_parameters(model)
    excluded = [Pattern(pattern[1:]) for pattern in parameters if pattern.startswith("!")]
    matched = {
        name: weight
        for name, weight in select(model, parameters).items()
        if not any(covers(pattern, alias) for pattern in excluded for alias in locations.aliases(name))
    }
    if not matched:
        raise ConfigurationError(f"parameters {[*parameters]} exclude all that they match, by one of its names")
    spelt = frozenset(name for name in matched if not {*parameters}.isdisjoint(locations.aliases(name)))
    skipped = tuple(name for name, weight in matched.items() if weight.ndim < least_dims)
    related = {name: related_to(name, locations) for name in matched if name not in skipped and name not in spelt}
    tied = {name: partners for name, partners in related.items() if partners}
    candidates = {name: weight for name, weight in matched.items() if name not in tied and name not in skipped}
    foreign = [name for name in candidates if name not in spelt and is_parametrized(name, locations)]
    weights = {name: weight for name, weight in candidates.items() if name not in foreign}
    selection = Selection(weights, spelt, tied, skipped, dict.fromkeys(foreign, "parametrized already"))
    if not weights and foreign:
        raise ConfigurationError(f"{listed(map(repr, foreign))}: parametrized already: choose other weights")
    if not weights:
        raise ConfigurationError(
            f"parameters {[*parameters]} match only weights that a relation ties: {selection.describe_tied()}. Untie "
            "them, or choose others"
            if tied
            else f"parameters {[*parameters]} match nothing of two dimensions or more"
        )
    return selection


def is_parametrized(name: str, locations: Locations) -> bool:
    """Return whether a weight is one of those from which a parametrization of another library computes."""
    holders = [location.holder for location in locations.owners(name)]
    return any(
        isinstance(holder, ParametrizationList) and not isinstance(holder, Parametrizations) for holder in holders
    )


def related_to(name: str, locations: Locations) -> tuple[str, ...]:
    """Return the other names of a weight if it is tied through a relation, else nothing."""
    partners = tuple(alias for alias in locations.aliases(name) if locations[alias] != locations[name])
    linked = (location for location in locations.owners(name) if location.holder is not location.owner)
    return partners if any(location.relation is not None for location in linked) else ()


def check_free(name: str, locations: Locations) -> None:
    """Raise an error unless a weight can be replaced by a derived weight.

    Args:
        name: the weight's name.
        locations: the locations of all parameters of the model.

    Raises:
        ConfigurationError: the weight is parametrized, tied through a relation, or sharded.
    """
    if partners := related_to(name, locations):
        raise ConfigurationError(
            f"{name!r} is tied to {partners[0]!r} through a relation, which computes one from the other: untie them, "
            "or choose others"
        )
    if any(location.holder is not location.owner for location in locations.owners(name)):
        raise ConfigurationError(f"{name!r} is parametrized already")
    check_whole(name, locations[name].parameter)

"""Choose the weights to replace by derived weights, and parametrize them."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from tying.errors import ConfigurationError, listed
from tying.selection.resolve import select
from tying.weights.derived import Locations, install, locate_parameters
from tying.weights.values import check_finite, check_real


def parametrize_all(
    model: nn.Module,
    parameters: Sequence[str],
    make: Callable[[str, nn.Parameter], nn.Module],
    context: str = "parametrize_all",
) -> list[str]:
    """Parametrize the weights that match patterns; return their names.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` excludes.
        make: returns the parametrization of a weight; it must have a ``right_inverse``.
        context: name of the calling function, for messages.

    Raises:
        ConfigurationError: a pattern matches nothing, or a weight is already tied or parametrized, not real, or does
            not fit its parametrization. The model is not changed.
        NonFiniteError: a weight is not finite.

    Warns:
        UserWarning: wildcards match tied weights, which are left out.
    """
    locations = locate_parameters(model)
    selection = select_untied(model, parameters)
    steps: dict[str, nn.Module] = {}
    for name, weight in selection.untied.items():
        check_free(name, locations, ", which would not follow it")
        check_real(name, weight)
        check_finite(name, weight)
        try:
            steps[name] = make(name, weight)
            for shared in steps[name].parameters():
                if (shared.dtype, shared.device) != (weight.dtype, weight.device):
                    raise ConfigurationError(
                        f"it is {weight.dtype} on {weight.device}, and what it would share is {shared.dtype} on "
                        f"{shared.device}: exclude it, or share it among weights of its own dtype and device"
                    )
            steps[name].right_inverse(weight.detach())  # type: ignore[operator]  # a method
        except ConfigurationError as error:
            raise ConfigurationError(f"{name!r}: {error}") from None
    selection.warn(context)
    for name, step in steps.items():
        install(locations[name].owner, locations[name].attribute, step)
    return list(steps)


@dataclass(frozen=True)
class Selection:
    """The weights that patterns match, by whether they can become computed weights.

    Attributes:
        untied: the parameters to replace, by name.
        tied: names of tied weights that only wildcards match, which are left out, and the names that they are tied to.
        skipped: names of parameters of too few dimensions.
    """

    untied: dict[str, nn.Parameter]
    tied: dict[str, tuple[str, ...]]
    skipped: tuple[str, ...]

    def describe_tied(self) -> str:
        """Return the names of the weights that are left out, each with the names that it is tied to."""
        return listed(f"{name!r} (tied to {listed(map(repr, partners))})" for name, partners in self.tied.items())

    def warn(self, context: str) -> None:
        """Warn of the tied weights that are left out."""
        if self.tied:
            warnings.warn(
                f"{context} leaves out {self.describe_tied()}: a weight is either tied or computed. Exclude them to "
                "silence this warning, or untie them",
                stacklevel=4,
            )


def select_untied(model: nn.Module, parameters: Sequence[str], least_dims: int = 0) -> Selection:
    """Return the weights that match patterns, without the tied ones that only wildcards match.

    A tied weight that a pattern spells out is kept, and :func:`check_free` refuses it.

    Args:
        model: any module.
        parameters: patterns of names; a leading ``!`` excludes.
        least_dims: the least number of dimensions of a weight.

    Raises:
        ConfigurationError: a pattern matches nothing, or all matches are excluded or tied.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> selection = select_untied(model, ["*.weight"])
        >>> [*selection.untied], selection.tied
        (['2.weight'], {'0.weight': ('1.weight',)})
    """
    locations, matched = locate_parameters(model), select(model, parameters)
    candidates = {name: weight for name, weight in matched.items() if is_lazy(weight) or weight.ndim >= least_dims}
    tied = {
        name: partners
        for name, weight in candidates.items()
        if not {*parameters}.intersection(locations.names[id(weight)])
        and (partners := tuple(other for other in locations.names[id(weight)] if locations[other] != locations[name]))
    }
    selection = Selection(
        untied={name: weight for name, weight in candidates.items() if name not in tied},
        tied=tied,
        skipped=tuple(name for name in matched if name not in candidates),
    )
    if tied and not selection.untied:
        raise ConfigurationError(
            f"parameters {list(parameters)} match tied weights only: {selection.describe_tied()}. Untie them, or "
            "choose others"
        )
    return selection


def check_free(name: str, locations: Locations, because: str = "") -> None:
    """Raise an error unless a weight can be replaced by a derived weight.

    Args:
        name: the weight's name.
        locations: the locations of all parameters of the model.
        because: a reason, which is added to the message if the weight is tied.

    Raises:
        ConfigurationError: the weight is parametrized, or tied.
    """
    location = locations[name]
    if location.holder is not location.owner:
        raise ConfigurationError(f"{name!r} is parametrized already")
    names = locations.names[id(location.parameter)]
    if tied := [other for other in names if locations[other] != location]:  # two names of one module are no tie
        raise ConfigurationError(f"{name!r} is tied to {tied[0]!r}{because}: untie them, or choose others")

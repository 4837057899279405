"""Where a model holds its weights, whether as parameters or computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from tying.errors import ConfigurationError
from tying.hard.related import related
from tying.names import clean_name
from tying.relations import Relation


@dataclass(frozen=True)
class Place:
    """Where a model holds a parameter.

    Attributes:
        owner: the module whose weight it is.
        attribute: the weight's name there.
        holder: the module that holds the parameter: the owner, or a parametrization of its weight.
        original: the parameter's name there.
    """

    owner: nn.Module
    attribute: str
    holder: nn.Module
    original: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter there."""
        parameter = self.holder._parameters[self.original]  # many are asked for: get_parameter looks further
        assert parameter is not None
        return parameter

    @property
    def relation(self) -> Relation | None:
        """The map from the parameter to the weight; ``None`` if others than :func:`tie` have made one."""
        if self.holder is self.owner:
            return Relation()
        image = related(self.owner).get(self.attribute)
        return None if image is None else image.relation


def places_of(model: nn.Module) -> dict[str, Place]:
    """Return where a model holds its parameters, by clean names, aliases included."""
    places = {}
    for path, module in model.named_modules(remove_duplicate=False):
        owner, weight = module, None
        if isinstance(module, ParametrizationList):
            above, _, weight = path.rpartition("parametrizations.")
            owner = model.get_submodule(above.removesuffix("."))
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = clean_name(f"{path}.{attribute}".lstrip("."))
                places[name] = Place(owner, weight or attribute, module, attribute)
    return places


def check_free(name: str, places: Mapping[str, Place], because: str = "") -> None:
    """Raise where a weight cannot be replaced by one that is computed.

    Args:
        name: of the weight.
        places: of the whole model's weights.
        because: what the message says further of a weight that is tied.

    Raises:
        ConfigurationError: it is parametrized, or tied.
    """
    place = places[name]
    if place.holder is not place.owner:
        raise ConfigurationError(f"{name!r} is parametrized already")
    weight = place.parameter  # another name of its module is no tie
    if aliases := [other for other, one in places.items() if one.parameter is weight and one != place]:
        raise ConfigurationError(f"{name!r} is tied to {aliases[0]!r}{because}: untie them, or choose others")

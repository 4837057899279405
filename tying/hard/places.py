"""Where a model holds its weights, whether as parameters or computed from them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

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
        parameter = self.holder._parameters[self.original]
        assert parameter is not None
        return parameter

    @property
    def relation(self) -> Relation | None:
        """The map from the parameter to the weight; ``None`` if others than :func:`tie` have made one."""
        if self.holder is self.owner:
            return Relation()
        return next((one.relation for name, _, one in related(self.owner) if name == self.attribute), None)


def places_of(model: nn.Module) -> dict[str, Place]:
    """Return where a model holds its parameters, by clean names, aliases included."""
    places = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute in module._parameters:
            if module._parameters[attribute] is None:
                continue
            name = clean_name(f"{path}.{attribute}" if path else attribute)
            places[name] = Place(module, attribute, module, attribute)
            if isinstance(module, ParametrizationList):
                *_, weight = path.split(".")
                owner = model.get_submodule(path.rpartition("parametrizations.")[0].removesuffix("."))
                places[name] = Place(owner, weight, module, attribute)
    return places

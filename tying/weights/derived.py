"""Weights that are computed from parameters: find, read, write, install and count them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

from tying.errors import ConfigurationError
from tying.selection.index import clean_name
from tying.selection.relation import Relation
from tying.selection.resolve import select


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module in place: the only function of this package that does."""
    module.__class__ = cls


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Look at a model, evaluated and without gradients, and leave it as it was: some parametrizations learn by use."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class DerivedWeight:
    """A weight that a module computes from parameters.

    Attributes:
        owner: the module.
        name: of the weight, an attribute of the owner.
        steps: modules that compute it, one after another; each may have a ``right_inverse``.
        prefixes: with which the keys begin, in the owner's state dict, that stand for the weight.
    """

    owner: nn.Module
    name: str
    steps: tuple[nn.Module, ...]
    prefixes: tuple[str, ...]

    @property
    def originals(self) -> list[nn.Parameter]:
        """The parameters that it is computed from."""
        own = self.owner.named_parameters(remove_duplicate=False)
        return [parameter for name, parameter in own if name.startswith(self.prefixes)]


def derived_in(module: nn.Module) -> list[DerivedWeight]:
    """Return the weights that a module computes: by parametrizations, or as its class says by ``computes``.

    ``computes`` maps the name of a weight to those of the parameter, and of the module that maps one to the other.
    """
    held: Mapping[str, ParametrizationList] = getattr(module, "parametrizations", {})
    found = [DerivedWeight(module, name, (*steps,), (f"parametrizations.{name}.",)) for name, steps in held.items()]
    computes: Mapping[str, tuple[str, str]] = getattr(type(module), "computes", {})
    for name, (parameter, step) in computes.items():
        found.append(DerivedWeight(module, name, (getattr(module, step),), (parameter, f"{step}.")))
    return found


def derived_weights(model: nn.Module, aliases: bool = False) -> dict[str, DerivedWeight]:
    """Return the weights that a model computes, by clean names: the first of each, or all."""
    return {
        clean_name(f"{path}.{one.name}".lstrip(".")): one
        for path, module in model.named_modules(remove_duplicate=not aliases)
        for one in derived_in(module)
    }


def effective_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield each weight that a model computes with, aliases again; of a computed one, what it is computed to.

    Where its last step knows the shape (``shape``), it is not computed: a tensor on the meta device stands for it.
    """
    with eval_mode(model):
        for path, module in model.named_modules(remove_duplicate=False):
            if "parametrizations" in path.split("."):
                continue
            computed = derived_in(module)
            yield from map(_use, computed)
            for name, parameter in module._parameters.items():
                if parameter is not None and not any(name in one.prefixes for one in computed):
                    yield parameter


def _use(one: DerivedWeight) -> Tensor:
    shape = getattr(one.steps[-1], "shape", None)
    if isinstance(shape, torch.Size) and one.prefixes[0] in one.owner._parameters:
        return torch.empty(shape, dtype=one.owner.get_parameter(one.prefixes[0]).dtype, device="meta")
    weight: Tensor = getattr(one.owner, one.name)
    return weight


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameter values that are stored, and of those that the model computes with.

    The latter counts each alias again, and for a parametrized weight the entries of the weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> model[1].weight = model[0].weight
        >>> count_parameters(model)
        (4, 8)
    """
    return sum(parameter.numel() for parameter in model.parameters()), sum(
        weight.numel() for weight in effective_weights(model)
    )


def saved_bytes(model: nn.Module) -> int:
    """Return by how much the weights that a model computes with exceed what is stored."""
    stored, used = (
        sum(t.numel() * t.element_size() for t in held) for held in (model.parameters(), effective_weights(model))
    )
    return used - stored


@dataclass(frozen=True)
class ParameterLocation:
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
        steps = self.owner.parametrizations[self.attribute]  # type: ignore[index]  # a ModuleDict
        relation = getattr(steps[0], "relation", None) if len(steps) == 1 else None
        return relation if isinstance(relation, Relation) else None


def locate_parameters(model: nn.Module) -> dict[str, ParameterLocation]:
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
                places[name] = ParameterLocation(owner, weight or attribute, module, attribute)
    return places


def check_free(name: str, places: Mapping[str, ParameterLocation], because: str = "") -> None:
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


def privatize_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own, which a deepcopy would share.

    Parametrizations are properties of that class: to add or remove one would change, or break, the other copy.
    """
    if parametrize.is_parametrized(module):
        kind = type(module)
        kept = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, kept)


def parametrize_all(
    model: nn.Module, parameters: Sequence[str], make: Callable[[str, nn.Parameter], nn.Module]
) -> list[str]:
    """Parametrize the weights that patterns name; return their names.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` leaves out.
        make: returns the parametrization of a weight; it must have a ``right_inverse``.

    Raises:
        ConfigurationError: a pattern matches nothing, or a weight is tied or parametrized already, or does not fit its
            parametrization; nothing is changed.
    """
    chosen = select(model, parameters)
    places = locate_parameters(model)
    made: dict[str, nn.Module] = {}
    for name, weight in chosen.items():
        check_free(name, places, ", which would not follow it")
        try:
            made[name] = make(name, weight)
            for shared in made[name].parameters():
                if (shared.dtype, shared.device) != (weight.dtype, weight.device):
                    raise ConfigurationError(
                        f"it is {weight.dtype} on {weight.device}, and what it would share is {shared.dtype} on "
                        f"{shared.device}: leave it out, and let it share with its like"
                    )
            made[name].right_inverse(weight.detach())  # type: ignore[operator]  # a method
        except ConfigurationError as error:
            raise ConfigurationError(f"{name!r}: {error}") from None
    for name, parametrization in made.items():
        privatize_class(places[name].owner)
        register_parametrization(places[name].owner, places[name].attribute, parametrization)
    return list(made)


def are_computed(model: nn.Module, names: Sequence[str]) -> bool:
    """Tell whether these weights of a model, at least one, are computed."""
    return bool(names) and derived_weights(model, aliases=True).keys() >= {*names}

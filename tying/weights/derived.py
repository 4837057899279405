"""Derived weights, which a module computes from its parameters: find, install, remove and count them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from tying.errors import ConfigurationError
from tying.selection.index import clean_name
from tying.selection.relation import Relation
from tying.selection.resolve import select
from tying.torch_workarounds import compute_or_cached


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Temporarily switch to eval mode without gradients: some parametrizations update buffers in training mode."""
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
        name: the weight's attribute name in the owner.
        steps: the modules that compute the weight, one after another; each may have a ``right_inverse``, and a
            ``describe() -> str`` for reports.
        prefixes: prefixes of the weight's keys in the owner's state dict.
    """

    owner: nn.Module
    name: str
    steps: tuple[nn.Module, ...]
    prefixes: tuple[str, ...]

    @property
    def originals(self) -> list[nn.Parameter]:
        """The parameters from which the weight is computed."""
        parameters = self.owner.named_parameters(remove_duplicate=False)
        return [parameter for name, parameter in parameters if name.startswith(self.prefixes)]

    def describe(self) -> str:
        """Say in a few words how the weight is computed.

        Example:
            >>> from tying.hard import LowRank
            >>> layer = parametrize.register_parametrization(nn.Linear(6, 4), "weight", LowRank(2))
            >>> derived_in(layer)[0].describe()
            'LowRank(rank=2)'
        """
        last = self.steps[-1]
        describe: Callable[[], str] | None = getattr(last, "describe", None)
        return f"{type(last).__name__}({last.extra_repr()})" if describe is None else describe()


def derived_in(module: nn.Module) -> list[DerivedWeight]:
    """Return the weights that a module computes: by parametrizations, or by the ``computes`` of its class.

    ``computes`` maps the weight's name to the names of a parameter and of the submodule that maps it to the weight.
    """
    parametrized = [
        DerivedWeight(module, name, (*steps,), (f"parametrizations.{name}.",))
        for name, steps in _parametrizations(module).items()
    ]
    return parametrized + [
        DerivedWeight(module, name, (getattr(module, step),), (parameter, f"{step}."))
        for name, (parameter, step) in _computes(type(module)).items()
    ]


def derived_weights(model: nn.Module, aliases: bool = False) -> dict[str, DerivedWeight]:
    """Return the weights that the modules of a model compute, by clean name.

    Args:
        model: any module.
        aliases: also return the further names of a module that has several.
    """
    return {
        clean_name(f"{path}.{derived.name}".lstrip(".")): derived
        for path, module in model.named_modules(remove_duplicate=not aliases)
        for derived in derived_in(module)
    }


def are_computed(model: nn.Module, names: Sequence[str]) -> bool:
    """Tell whether all of these weights of a model, at least one, are derived."""
    return bool(names) and derived_weights(model, aliases=True).keys() >= {*names}


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module, whose state stays."""
    module.__class__ = cls


class _Generated:
    """The second base of each generated class, in which the weights of one module are properties.

    A generated class is never changed, and serves one module: a copy gets another one, because torch's
    ``register_parametrization`` and ``remove_parametrizations`` write into the class of a parametrized module.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied: Any = type(self).__new__(type(self))
        memo[id(self)] = copied
        with torch.no_grad():  # the state of a recurrent layer has its weights: without a graph they can be copied
            copied.__setstate__(deepcopy(self.__getstate__(), memo))
        _renew_class(copied, _computes(type(copied)))
        result: Self = copied
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self, nn.Module) and is_parametrized(self):
            raise RuntimeError("Serialization of parametrized modules is only supported through state_dict()")
        with torch.no_grad():
            return super().__reduce_ex__(protocol)


def install(
    module: nn.Module,
    name: str,
    step: nn.Module,
    table: nn.Parameter | None = None,
    keys: tuple[str, str] | None = None,
) -> None:
    """Let a module compute one of its weights.

    The module's class becomes a generated subclass in which the weight is a property. Without ``table``, this is what
    ``torch.nn.utils.parametrize.register_parametrization`` does: the weight's parameters are
    ``parametrizations.{name}.original`` and so on.

    Args:
        module: changed in place.
        name: the weight's attribute name.
        step: computes the weight; or a ``ParametrizationList`` that holds its parameters already.
        table: a parameter to take the weight's place in the order of parameters; ``step`` needs a ``joint_inverse``.
        keys: the names of the table and of ``step`` in the module.

    Example:
        >>> from tying.hard import LowRank
        >>> layer = nn.Linear(6, 4)
        >>> install(layer, "weight", LowRank(2))
        >>> parametrize.is_parametrized(layer, "weight"), [name for name, _ in layer.named_parameters()]
        (True, ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1'])
        >>> remove(layer, "weight").shape, type(layer).__name__
        (torch.Size([4, 6]), 'Linear')
    """
    computes = _computes(type(module))
    if table is not None and keys is not None:
        _put_parameter(module, name, keys[0], table)
        module.register_module(keys[1], step)
        computes = {**computes, name: keys}
    else:
        is_list = isinstance(step, ParametrizationList)
        parametrizations = step if is_list else ParametrizationList([step], module.get_parameter(name))
        delattr(module, name)
        if not is_parametrized(module):
            module.parametrizations = nn.ModuleDict()
        module.get_submodule("parametrizations").add_module(name, parametrizations.train(module.training))
    _renew_class(module, computes)


def remove(module: nn.Module, name: str) -> nn.Parameter:
    """Make a derived weight a parameter again, with the values that it has; return it.

    A table gives the weight its place in the order of parameters back; a parametrized weight becomes the last one.
    """
    [derived] = [derived for derived in derived_in(module) if derived.name == name]
    trained = any(parameter.requires_grad for parameter in derived.originals)
    weight = nn.Parameter(getattr(module, name).detach().clone(), trained)
    computes = {other: keys for other, keys in _computes(type(module)).items() if other != name}
    if name in _computes(type(module)):
        table, step = _computes(type(module))[name]
        _put_parameter(module, table, name, weight)
        delattr(module, step)
    else:
        parametrizations = module.get_submodule("parametrizations")
        delattr(parametrizations, name)
        if not is_parametrized(module):
            del module.parametrizations
    _renew_class(module, computes)
    setattr(module, name, weight)
    return weight


def computed_property(parameter: str, step: str) -> property:
    """Return the property of a weight that the submodule ``step`` computes; assigning it writes the nearest parameter.

    Args:
        parameter: name of the parameter.
        step: name of the submodule, which must have a ``joint_inverse``.
    """

    def read(module: nn.Module) -> Tensor:
        weight: Tensor = getattr(module, step)(getattr(module, parameter))
        return weight

    @torch.no_grad()
    def write(module: nn.Module, weight: Tensor) -> None:
        table, virtual = getattr(module, parameter), getattr(module, step)
        table.copy_(virtual.joint_inverse([(virtual, weight)], table))

    return property(read, write, doc="The virtual weight.")


def _parametrized_property(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        return compute_or_cached(module, name, _parametrizations(module)[name])

    def write(module: nn.Module, weight: Tensor) -> None:
        _parametrizations(module)[name].right_inverse(weight)

    return property(read, write)


def _parametrizations(module: nn.Module) -> Mapping[str, ParametrizationList]:
    return getattr(module, "parametrizations", {})


def _computes(cls: type) -> dict[str, tuple[str, str]]:
    return getattr(cls, "computes", {})


def _put_parameter(module: nn.Module, former: str, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of another one: the state of optimizers depends on their order."""
    items = module._parameters.items()
    module._parameters = dict((name, parameter) if key == former else (key, value) for key, value in items)


def _renew_class(module: nn.Module, computes: dict[str, tuple[str, str]]) -> None:
    """Give a module a new class with a property for each weight that it computes; without any, its plain class.

    Parametrizations come last: torch takes their class away with the last of them.
    """
    kind = next(
        cls
        for cls in type(module).__mro__
        if _Generated not in cls.__bases__
        and cls.__module__ != parametrize.__name__  # where torch generates a class
        and _computes(cls).items() <= computes.items()
    )
    if added := {name: keys for name, keys in computes.items() if name not in _computes(kind)}:
        resets = {name: _reset(kind, name, added) for name in ("reset_parameters", "_reset_parameters")}
        members = {name: reset for name, reset in resets.items() if hasattr(kind, name)}
        properties = {name: computed_property(*keys) for name, keys in added.items()}
        kind = _generate(
            f"Hashed{kind.__name__.removeprefix('Hashed')}", kind, members | properties | {"computes": computes}
        )
    if is_parametrized(module):
        properties = {name: _parametrized_property(name) for name in _parametrizations(module)}
        kind = _generate(f"Parametrized{kind.__name__}", kind, properties)
    swap_class(module, kind)


def _generate(name: str, kind: type, members: Mapping[str, Any]) -> type[nn.Module]:
    return type(name, (kind, _Generated), {"__module__": kind.__module__, **members})


def _reset(plain: type[nn.Module], method: str, computes: Mapping[str, tuple[str, str]]) -> Callable[[nn.Module], None]:
    """Return a method that draws tables, and all else, as the plain class's method of that name draws weights."""

    @torch.no_grad()
    def reset(module: nn.Module) -> None:
        generated = type(module)
        parts = {name: (getattr(module, key), getattr(module, step)) for name, (key, step) in computes.items()}
        weights = {name: nn.Parameter(table.new_empty(step.shape)) for name, (table, step) in parts.items()}
        swap_class(module, plain)
        module._parameters |= weights
        try:
            getattr(module, method)()
        finally:
            for name in weights:
                del module._parameters[name]
            swap_class(module, generated)
        for name, (table, step) in parts.items():
            table.copy_(step.drawn_from(weights[name].flatten() / step.scale))

    return reset


def parametrize_all(
    model: nn.Module, parameters: Sequence[str], make: Callable[[str, nn.Parameter], nn.Module]
) -> list[str]:
    """Parametrize the weights that match patterns; return their names.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` excludes.
        make: returns the parametrization of a weight; it must have a ``right_inverse``.

    Raises:
        ConfigurationError: a pattern matches nothing, or a weight is tied or parametrized already, or does not fit its
            parametrization; nothing is changed.
    """
    chosen = select(model, parameters)
    locations = locate_parameters(model)
    steps: dict[str, nn.Module] = {}
    for name, weight in chosen.items():
        check_free(name, locations, ", which would not follow it")
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
    for name, step in steps.items():
        install(locations[name].owner, locations[name].attribute, step)
    return list(steps)


def effective_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield every weight that the forward pass uses; shared weights appear once per use.

    A derived weight whose last step knows its shape (``shape``) is not computed: a meta tensor stands for it.
    """
    with eval_mode(model):
        for path, module in model.named_modules(remove_duplicate=False):
            if "parametrizations" in path.split("."):
                continue
            derived = derived_in(module)
            yield from map(_effective, derived)
            tables = {prefix for weight in derived for prefix in weight.prefixes}
            for name, parameter in module._parameters.items():
                if parameter is not None and name not in tables:
                    yield parameter


def _effective(derived: DerivedWeight) -> Tensor:
    shape = getattr(derived.steps[-1], "shape", None)
    table = derived.owner._parameters.get(derived.prefixes[0])
    if isinstance(shape, torch.Size) and table is not None:
        return torch.empty(shape, dtype=table.dtype, device="meta")
    weight: Tensor = getattr(derived.owner, derived.name)
    return weight


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of stored parameter values, and of the values that the forward pass uses.

    The latter counts a shared weight once per use, and of a derived weight its entries.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> model[1].weight = model[0].weight
        >>> count_parameters(model)
        (4, 8)
    """
    used = sum(weight.numel() for weight in effective_weights(model))
    return sum(parameter.numel() for parameter in model.parameters()), used


def saved_bytes(model: nn.Module) -> int:
    """Return by how many bytes the weights that the forward pass uses exceed the stored parameters."""
    return sum(t.nbytes for t in effective_weights(model)) - sum(t.nbytes for t in model.parameters())


@dataclass(frozen=True)
class ParameterLocation:
    """Where a model holds a parameter.

    Attributes:
        owner: the module whose weight it is.
        attribute: the weight's attribute name in the owner.
        holder: the module that holds the parameter: the owner, or the list of parametrizations of its weight.
        original: the parameter's name in the holder.
    """

    owner: nn.Module
    attribute: str
    holder: nn.Module
    original: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter at this location."""
        parameter = self.holder._parameters[self.original]  # called for every parameter: get_parameter is slower
        assert parameter is not None
        return parameter

    @property
    def relation(self) -> Relation | None:
        """The map from the parameter to the weight; ``None`` where a parametrization is not by :func:`tie`."""
        if self.holder is self.owner:
            return Relation()
        steps = _parametrizations(self.owner)[self.attribute]
        relation = getattr(steps[0], "relation", None) if len(steps) == 1 else None
        return relation if isinstance(relation, Relation) else None


def locate_parameters(model: nn.Module) -> dict[str, ParameterLocation]:
    """Return where a model holds its parameters, by clean name, aliases included."""
    locations = {}
    for path, module in model.named_modules(remove_duplicate=False):
        owner, weight = module, None
        if isinstance(module, ParametrizationList):
            above, _, weight = path.rpartition("parametrizations.")
            owner = model.get_submodule(above.removesuffix("."))
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = clean_name(f"{path}.{attribute}".lstrip("."))
                locations[name] = ParameterLocation(owner, weight or attribute, module, attribute)
    return locations


def check_free(name: str, locations: Mapping[str, ParameterLocation], because: str = "") -> None:
    """Raise where a weight cannot be replaced by a derived one.

    Args:
        name: the weight's name.
        locations: of all parameters of the model.
        because: what the message adds where the weight is tied.

    Raises:
        ConfigurationError: the weight is parametrized, or tied.
    """
    location = locations[name]
    if location.holder is not location.owner:
        raise ConfigurationError(f"{name!r} is parametrized already")
    weight = location.parameter
    for other, alias in locations.items():
        if alias.parameter is weight and alias != location:  # another name of its module is no tie
            raise ConfigurationError(f"{name!r} is tied to {other!r}{because}: untie them, or choose others")

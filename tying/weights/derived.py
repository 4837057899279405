"""Derived weights, which a module computes from its parameters: find, install, remove and count them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from typing_extensions import override

from tying.errors import ConfigurationError
from tying.selection.index import clean_name, plain_name, unwrapped
from tying.selection.relation import Relation
from tying.torch_workarounds import contiguous_view, inject_property, load_elsewhere, viewed
from tying.weights.first_call import check_at_first_call
from tying.weights.sharding import full, is_sharded, related, sharded_class, take_first, unsharded_class


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module in place: the only function of this package that does.

    A module that ``fully_shard`` has been called on keeps the methods that this adds.
    """
    module.__class__ = sharded_class(cls, former=type(module))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Temporarily switch to eval mode without gradients: some parametrizations update buffers in training mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield model.eval()
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
            ``describe() -> str``, which reports show.
        prefixes: prefixes of the weight's keys in the owner's state dict.
    """

    owner: nn.Module
    name: str
    steps: tuple[nn.Module, ...]
    prefixes: tuple[str, ...]

    @property
    def identity(self) -> tuple[int, ...]:
        """Equal for all names of one weight: the owners of a tied weight share what computes it."""
        prefix = self.prefixes[0]
        if prefix.endswith("."):
            return (id(self.owner.get_submodule(prefix.removesuffix("."))),)
        return (id(self.owner._parameters.get(prefix, self.owner)), *map(id, self.steps))  # a table can be computed

    @property
    def originals(self) -> list[nn.Parameter]:
        """The parameters from which the weight is computed."""
        return [
            parameter
            for name, parameter in self.owner.named_parameters(remove_duplicate=False)
            if name.startswith(self.prefixes)
        ]

    def value(self) -> Any:
        """Compute the weight; if its parameters are sharded, every process must call this, and gets all of it."""
        with gathered([self]):
            return getattr(self.owner, self.name)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that the first step takes. The steps can hold other parameters, which weights may share."""
        prefix = self.prefixes[0]
        if not prefix.endswith("."):
            return [self.owner.get_parameter(prefix)]
        parametrizations = self.owner.get_submodule(prefix.removesuffix("."))
        return [*parametrizations.parameters(recurse=False), *parametrizations.buffers(recurse=False)]


def derived_in(module: nn.Module) -> list[DerivedWeight]:
    """Return the weights that a module computes: by parametrizations, or by the ``computes`` of its class.

    ``computes`` maps the weight's name to the names of a parameter and of the submodule that maps it to the weight.
    """
    return [
        *(
            DerivedWeight(module, name, (*steps,), (f"parametrizations.{name}.",))
            for name, steps in _parametrizations(module).items()
        ),
        *(
            DerivedWeight(module, name, (getattr(module, step),), (parameter, f"{step}."))
            for name, (parameter, step) in _computes(module).items()
        ),
    ]


def derived_weights(model: nn.Module, aliases: bool = False) -> dict[str, DerivedWeight]:
    """Return the weights that the modules of a model compute, by clean name.

    Args:
        model: any module.
        aliases: also return the further names of a tied weight, and of a module that has several.
    """
    weights = {
        clean_name(f"{path}.{derived.name}".lstrip(".")): derived
        for path, module in model.named_modules(remove_duplicate=not aliases)
        for derived in derived_in(module)
    }
    if aliases:
        return weights
    first = {derived.identity: name for name, derived in reversed(weights.items())}
    return {name: derived for name, derived in weights.items() if first[derived.identity] == name}


def names_by_weight(weights: Mapping[str, DerivedWeight]) -> list[tuple[str, ...]]:
    """Return the names of each derived weight: several if it is tied, or if its module has several."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, derived in weights.items():
        names.setdefault(derived.identity, []).append(name)
    return [tuple(aliases) for aliases in names.values()]


def derived_by_others(model: nn.Module) -> dict[str, DerivedWeight]:
    """Return all derived weights that no tie made, by name."""
    return {
        key: derived
        for key, derived in derived_weights(model, aliases=True).items()
        if derived.name not in links_in(derived.owner)
    }


@contextmanager
def gathered(weights: Iterable[DerivedWeight], whole_of: Callable[[Tensor], Tensor] = full) -> Iterator[None]:
    """Temporarily replace the sharded parameters of derived weights by whole ones; every process must call it.

    Args:
        weights: the derived weights.
        whole_of: returns the whole of a sharded tensor; default: gathers it.
    """
    whole: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for derived in weights:
        if sharded := {id(parameter) for parameter in derived.originals if is_sharded(parameter)}:
            for module in derived.owner.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) in sharded:
                        if id(parameter) not in whole:
                            whole[id(parameter)] = nn.Parameter(whole_of(parameter.detach()), parameter.requires_grad)
                        replaced.append((module, name, parameter))
                        module._parameters[name] = whole[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


@contextmanager
def redrawn(module: nn.Module) -> Iterator[None]:
    """Temporarily replace a module's sharded parameters by whole ones, whose values they then take.

    Each process may draw other values: all take those of the first. Every process must call it.
    """
    sharded = [
        (part, name, part.get_parameter(name))
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    whole = {p: nn.Parameter(full(p.detach()).clone(), p.requires_grad) for p in dict.fromkeys(p for *_, p in sharded)}
    for part, name, parameter in sharded:
        part._parameters[name] = whole[parameter]
    try:
        yield
    finally:
        for part, name, parameter in sharded:
            part._parameters[name] = parameter
    for parameter, value in whole.items():
        take_first(parameter, value.detach())


def check_inputs(module: nn.Module) -> None:
    """Raise an error if a module computes a weight from shards when it is called, as under tensor parallelism.

    Raises:
        ConfigurationError: it does. FSDP2 gathers the parameters before the call.
    """
    for derived in derived_in(module):
        if derived.name not in links_in(module) and any(map(is_sharded, derived.originals)):
            raise ConfigurationError(
                f"the {derived.name} of a {plain_class(module).__name__} is computed from other parameters, which are "
                "sharded: tensor parallelism does not support computed weights, and FSDP2 must shard the modules that "
                "share parameters together, as tying.hard.shard_groups(model, units) lists them. Exclude the weight, "
                "or leave its module out of parallelize_module"
            )


def own_memory(tensor: Tensor) -> None:
    """Move a tensor that is a view to memory of its own, in place; a view keeps, and saves, the whole storage."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return  # other classes, such as sharded tensors, have no storage
    tensor.data = tensor.data.clone()


class Parametrizations(ParametrizationList):
    """Holds the parameters of a derived weight, each in its own memory, even if ``right_inverse`` returns views."""

    def __init__(self, steps: Sequence[nn.Module], weight: nn.Parameter) -> None:
        super().__init__(steps, weight)
        for parameter in self.parameters(recurse=False):
            own_memory(parameter)

    @override
    def right_inverse(self, value: Tensor) -> None:
        super().right_inverse(value)
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.clone()  # torch takes the memory of what right_inverse returns

    def redraw(self, weight: Tensor) -> None:
        """Set the parameters to those of a module whose reset drew the given weight.

        Each step, from the last to the first, maps the weight to parameters by its ``initial`` or, without one, its
        ``right_inverse``.
        """
        values: Any = weight
        for step in reversed(self):
            values = step.initial(values) if hasattr(step, "initial") else step.right_inverse(values)  # type: ignore[operator]  # methods
        parameters = self.parameters(recurse=False)
        for parameter, value in zip(parameters, [values] if self.is_tensor else values, strict=True):
            parameter.copy_(value)


_GENERATED = (parametrize.__name__, __name__)  # modules of generated classes


class _Generated:
    """The second base of each generated class. The class defines the derived weights of one module as properties.

    Modules, and copies of a module, do not share generated classes, because torch's ``register_parametrization`` and
    ``remove_parametrizations`` change the class of a parametrized module.
    """

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = object.__new__(type(self))
        with torch.no_grad():  # a recurrent layer's state lists its weights; tensors with a graph cannot be copied
            copied.__setstate__(deepcopy(self.__getstate__(), memo))
        _renew_class(copied, _computes(copied))
        return copied

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        plain = next(cls for cls in type(self).__mro__ if cls.__module__ not in _GENERATED)
        with torch.no_grad():
            return rebuild, (plain, _computes(self), (*_parametrizations(self),)), self.__getstate__()


def rebuild(kind: type[nn.Module], computes: dict[str, tuple[str, str]], parametrized: Sequence[str]) -> nn.Module:
    """Return a module of a newly generated class, without state: pickled modules are loaded by it.

    Args:
        kind: the module's plain class.
        computes: the generated class's ``computes``.
        parametrized: names of the parametrized weights.
    """
    module: nn.Module = object.__new__(kind)
    _renew_class(module, computes, parametrized)
    return module


def as_assigned(module: nn.Module, name: str, value: Any) -> Any:
    """Return the value to store when an attribute is assigned: of a Parameter, its values if the weight is derived."""
    is_derived = isinstance(value, nn.Parameter) and isinstance(getattr(type(module), name, None), property)
    return value.detach() if is_derived else value


def install(
    module: nn.Module,
    name: str,
    step: nn.Module,
    table: nn.Parameter | None = None,
    keys: tuple[str, str] = ("table", "virtual"),
) -> None:
    """Let a module compute one of its weights.

    The module's class becomes a generated subclass with a property for the weight. Without ``table``, this is like
    ``torch.nn.utils.parametrize.register_parametrization``: the weight's parameters are
    ``parametrizations.{name}.original`` and so on.

    Args:
        module: changed in place.
        name: the weight's attribute name.
        step: computes the weight; or a ``ParametrizationList`` that holds its parameters already. All owners of a
            tied weight share one list, or one table and step.
        table: a parameter that replaces the weight in the order of parameters; ``step`` needs a ``nearest_table``.
        keys: the attribute names of the table and of ``step`` in the module.

    Example:
        >>> from tying.hard import LowRank
        >>> layer = nn.Linear(6, 4)
        >>> install(layer, "weight", LowRank(2))
        >>> parametrize.is_parametrized(layer, "weight"), [name for name, _ in layer.named_parameters()]
        (True, ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1'])
        >>> remove(layer, "weight").shape, type(layer).__name__, [name for name, _ in layer.named_parameters()]
        (torch.Size([4, 6]), 'Linear', ['weight', 'bias'])
    """
    check_at_first_call(module, check_inputs)
    if table is None:
        parametrizations: Any = (
            step if isinstance(step, ParametrizationList) else Parametrizations([step], module.get_parameter(name))
        )
        preceding = [*takewhile(lambda key: key != name, module._parameters)]
        delattr(module, name)
        if not is_parametrized(module):
            module.parametrizations = nn.ModuleDict()
        lists = module.get_submodule("parametrizations")
        lists.add_module(name, parametrizations.train(module.training))
        lists.__dict__.setdefault("preceding", {})[name] = preceding
        _renew_class(module, _computes(module))
    else:
        own_memory(table)
        _replace_parameter(module, name, keys[0], table)
        module.register_module(keys[1], step)
        _renew_class(module, {**_computes(module), name: keys})


def remove(model: nn.Module, name: str) -> nn.Parameter:
    """Replace a derived weight by a parameter of equal value, at its former position; return the parameter.

    All names of the weight in the model hold the parameter.

    Args:
        model: changed in place; a module that owns the weight, or contains its owners.
        name: a name of the weight.
    """
    parameter = _as_parameter(derived_weights(model, aliases=True)[name])
    put_in_place(model, {name: parameter})
    return parameter


def put_in_place(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Replace derived weights by given parameters, each at its former position and under all names of the weight.

    Args:
        model: changed in place; it contains all owners of the weights.
        parameters: by a name of the weight.
    """
    weights = derived_weights(model, aliases=True)
    given = {weights[name].identity: parameter for name, parameter in parameters.items()}
    owners = {(weight.owner, weight.name): weight.identity for weight in weights.values() if weight.identity in given}
    for (owner, attribute), identity in reversed(owners.items()):  # the last first: positions are relative to earlier
        _put_back(owner, attribute, given[identity])


def _as_parameter(derived: DerivedWeight) -> nn.Parameter:
    """Return a parameter of the value of a derived weight."""
    value = getattr(derived.owner, derived.name)
    return nn.Parameter(value.detach().clone(), any(original.requires_grad for original in derived.originals))


def _put_back(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Replace a derived weight of a module by a parameter, at the weight's former position."""
    computes = _computes(module)
    if name in computes:
        table, step = computes[name]
        delattr(module, step)
        _replace_parameter(module, table, name, weight)
    else:
        preceding = getattr(module.parametrizations, "preceding", {}).get(name, module._parameters)
        before = {key: value for key, value in module._parameters.items() if key in preceding}
        module._parameters = before | {name: weight} | module._parameters
        delattr(module.parametrizations, name)
        if not is_parametrized(module):
            del module.parametrizations
    _renew_class(module, {other: keys for other, keys in computes.items() if other != name})


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module below those generated for its derived weights, and by ``fully_shard``."""
    return next(cls for cls in unsharded_class(type(module)).__mro__ if cls.__module__ not in _GENERATED)


def swap_plain_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module that :func:`plain_class` returns; its derived weights stay.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> swap_plain_class(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
        >>> is_parametrized(layer), plain_class(layer).__name__
        (True, 'NonDynamicallyQuantizableLinear')
    """
    computes = _computes(module)
    swap_class(module, cls)
    if _parametrizations(module) or computes != _computes(cls):
        _renew_class(module, computes)


def single_step(layer: nn.Module, name: str = "weight") -> tuple[nn.Module | None, list[nn.Parameter]]:
    """Return the one parametrization of a weight, and its parameters; None and nothing if there is none, or several."""
    steps: Any = _parametrizations(layer)[name] if name in _parametrizations(layer) else ()  # noqa: SIM401  # a module
    if len(steps) != 1:
        return None, []
    return steps[0], [value for _, value in steps.named_parameters(recurse=False, remove_duplicate=False)]


def computed_property(parameter: str, step: str) -> property:
    """Return the property of a weight that the submodule ``step`` computes.

    Assigning a weight stores the parameter whose computed weight is nearest to the assigned one.

    Args:
        parameter: name of the parameter.
        step: name of the submodule, which must have a ``nearest_table``.
    """

    def read(module: nn.Module) -> Any:
        return getattr(module, step)(getattr(module, parameter))

    @torch.no_grad()
    def write(module: nn.Module, weight: Tensor) -> None:
        table, virtual = getattr(module, parameter), getattr(module, step)
        table.copy_(virtual.nearest_table([(virtual, weight)], table))

    return property(read, write, doc="The virtual weight.")


def _parametrizations(module: nn.Module) -> Mapping[str, ParametrizationList]:
    return getattr(module, "parametrizations", {})


def _computes(module: nn.Module | type[nn.Module]) -> dict[str, tuple[str, str]]:
    return getattr(module, "computes", {})


def _replace_parameter(module: nn.Module, former: str, name: str, parameter: nn.Parameter) -> None:
    """Replace a parameter and keep the order of parameters, on which the state of optimizers depends."""
    module._parameters = {
        name if key == former else key: parameter if key == former else value
        for key, value in module._parameters.items()
    }


def _renew_class(
    module: nn.Module, computes: dict[str, tuple[str, str]], parametrized: Iterable[str] | None = None
) -> None:
    """Give a module a new class with a property for each derived weight, or its plain class if it has none.

    A plain class with an attribute ``computes_with``, the name of a parametrized weight, has a faster forward pass for
    it. The module returns to the base of that class when the weight is parametrized no more.

    The class that torch generates for parametrized modules is the outermost; torch removes it with the last
    parametrization.

    Args:
        module: changed in place.
        computes: the weights that are computed without a parametrization; see :func:`derived_in`.
        parametrized: names of the parametrized weights; default: those that the module has.
    """
    names = [*(_parametrizations(module) if parametrized is None else parametrized)]
    kind = next(
        cls
        for cls in unsharded_class(type(module)).__mro__
        if cls.__module__ not in _GENERATED
        and _computes(cls).items() <= computes.items()
        and getattr(cls, "computes_with", None) in (None, *names)
    )
    resets = {name: _reset(kind, name) for name in ("reset_parameters", "_reset_parameters") if hasattr(kind, name)}
    if added := {name: keys for name, keys in computes.items() if name not in _computes(kind)}:
        members: dict[str, Any] = {
            "computes": computes,
            **resets,
            **{name: computed_property(*keys) for name, keys in added.items()},
        }
        if kind.__module__.startswith("torch.nn"):  # torch.fx does not trace into torch's own modules
            members["__module__"] = parametrize.__name__
        kind = _generate(f"Hashed{kind.__name__.removeprefix('Hashed')}", kind, members)
    if names:
        kind = _generate(f"Parametrized{kind.__name__}", kind, {**resets, "__module__": parametrize.__name__})
    swap_class(module, kind)
    for name in names:
        inject_property(module, name)


def _generate(name: str, kind: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """Return a subclass of a module's class. Calling it creates a module of the plain class, which adapters rely on."""
    plain = next(
        cls for cls in kind.__mro__ if cls.__module__ not in _GENERATED and getattr(cls, "computes_with", None) is None
    )

    def create(cls: type[nn.Module], *arguments: Any, **keywords: Any) -> Any:
        return plain(*arguments, **keywords)

    def assign(module: nn.Module, attribute: str, value: Any) -> None:  # recurrent layers have their own
        kind.__setattr__(module, attribute, as_assigned(module, attribute, value))

    return type(name, (kind, _Generated), {**members, "__new__": create, "__setattr__": assign})


def _reset(plain: type[nn.Module], method: str) -> Callable[[nn.Module], None]:
    """Return a reset method: it calls that of the plain class, then draws parameters from the weights that it drew.

    What several weights share, such as a bank of templates, is a module with a reset method of its own. A table that
    several weights share, and a weight that several modules share, is drawn by each of them: the last counts. A weight
    that a tie computes is its source's.
    """

    @torch.no_grad()
    def reset(module: nn.Module) -> None:
        former = type(module)
        with redrawn(module):
            lists = {
                name: steps for name, steps in _parametrizations(module).items() if isinstance(steps, Parametrizations)
            }
            tables = {
                name: (getattr(module, step), getattr(module, table), (table, step))
                for name, (table, step) in _computes(module).items()
                if name not in _computes(plain)
            }
            replaced = [derived for derived in derived_in(module) if derived.name in lists or derived.name in tables]
            weights = {derived.name: _as_parameter(derived) for derived in replaced}
            for name, weight in weights.items():
                _put_back(module, name, weight)
            getattr(plain, method)(module)
            for name, parametrizations in lists.items():
                parametrizations.redraw(weights[name])
                install(module, name, parametrizations)
            for name, (step, table, keys) in tables.items():
                table.copy_(step.initial(weights[name]))
                install(module, name, step, table, keys)
        swap_class(module, former)  # its derived weights are the same

    return reset


class Link(nn.Module):
    """The parametrization ``weight = relation(source)``; assigning the weight writes through to the source.

    Args:
        relation: the map from the source's layout to the weight's.
    """

    def __init__(self, relation: Relation) -> None:
        super().__init__()
        self.relation = relation

    @override
    def forward(self, source: Tensor) -> Tensor:
        return self.relation(source)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the source whose image is the given weight."""
        return self.relation.inverse()(weight).contiguous()

    @override
    def extra_repr(self) -> str:
        return str(self.relation)


class LinkList(ParametrizationList):
    """Holds the source of a link, which torch must not overwrite when the parametrization is removed.

    With ``is_tensor = True``, torch would write the weight into the source, in the wrong layout for its other users.
    """

    def __init__(self, link: Link, source: nn.Parameter) -> None:
        nn.ModuleList.__init__(self, [link])
        self.unsafe = True
        self.is_tensor = False
        self.original = source

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "original" and is_sharded(value):  # its source has the same parameter
            load_elsewhere(self, name)

    @override
    def forward(self) -> Tensor:
        weight = self.original
        for step in self:
            weight = step(weight)
        return weight

    @override
    def right_inverse(self, value: Tensor) -> None:
        for step in reversed(self):
            value = step.right_inverse(value)  # type: ignore[operator]  # a method
        with torch.no_grad():
            self.original.copy_(value)


def link(module: nn.Module, name: str, source: nn.Parameter, relation: Relation) -> None:
    """Compute a weight of ``module`` as ``relation(source)``; state dicts keep the weight's plain name and layout."""
    if not links_in(module):
        module.register_state_dict_post_hook(_store_plainly)  # type: ignore[no-untyped-call]  # torch's
        module.register_load_state_dict_pre_hook(_read_plainly)  # type: ignore[no-untyped-call]  # torch's
    install(module, name, LinkList(Link(relation), source))


def links_in(module: nn.Module) -> dict[str, Link]:
    """Return the links of a module's weights, by the weight's attribute name."""
    return {
        derived.name: derived.steps[0]
        for derived in derived_in(module)
        if len(derived.steps) == 1 and isinstance(derived.steps[0], Link)
    }


def _store_plainly(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    for name, relation in links_in(module).items():
        key = f"{prefix}parametrizations.{name}.original"
        if key in state_dict:
            source = state_dict.pop(key)
            splits = is_sharded(source) and not relation.relation.permutes
            weight = related(source, relation.relation, source) if splits else relation(source)
            plain = type(source) is Tensor and not (source.is_meta or source.is_inference())  # not with keep_vars
            state_dict[prefix + name] = weight if weight.is_contiguous() or not plain else contiguous_view(weight)


def _read_plainly(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    *_: Any,
) -> None:
    for name, relation in links_in(module).items():
        key = f"{prefix}parametrizations.{name}.original"
        if prefix + name in state_dict:
            value, source = viewed(state_dict.pop(prefix + name)), module.get_parameter(key.removeprefix(prefix))
            state_dict[key] = related(value, relation.relation.inverse(), source).contiguous()
        elif key not in state_dict:  # torch would report this key as missing
            state_dict[key] = module.get_parameter(f"parametrizations.{name}.original")
            missing_keys.append(prefix + name)


def effective_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield every weight that the forward pass uses, shared weights once per use; see :func:`effective_weight`."""
    with eval_mode(model):
        for path, module in model.named_modules(remove_duplicate=False):
            if "parametrizations" not in path.split("."):
                derived = derived_in(module)
                tables = {prefix for weight in derived for prefix in weight.prefixes}
                yield from map(effective_weight, derived)
                yield from (p for name, p in module._parameters.items() if p is not None and name not in tables)


def effective_weight(derived: DerivedWeight) -> Any:
    """Return a derived weight; if the last step has a ``shape`` or parameters are sharded, a meta tensor of its shape.

    A step that cannot compute on meta tensors, since it mixes them with others, gets gathered parameters.
    """
    shape = getattr(derived.steps[-1], "shape", None)
    table = derived.owner._parameters.get(derived.prefixes[0])
    if isinstance(shape, torch.Size) and table is not None:
        return torch.empty(shape, dtype=table.dtype, device="meta")
    if any(map(is_sharded, derived.originals)):
        with suppress(RuntimeError), gathered([derived], _without_values):
            return getattr(derived.owner, derived.name)
    return derived.value()


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of stored parameter values, and of the values that the forward pass uses.

    The second number counts a shared weight once per use, and all entries of a derived weight. If the parameters of a
    derived weight are sharded, every process must call this: see :func:`effective_weight`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> model[1].weight = model[0].weight
        >>> count_parameters(model)
        (4, 8)
    """
    return sum(p.numel() for p in model.parameters()), sum(weight.numel() for weight in effective_weights(model))


_IDENTITY = Relation()  # one object, since it is read for every parameter


@dataclass(frozen=True, slots=True)
class ParameterLocation:
    """Where a model holds a parameter.

    Attributes:
        owner: the module that uses the weight.
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
        # read for every parameter: get_parameter would be slower
        return cast(nn.Parameter, self.holder._parameters[self.original])

    @property
    def relation(self) -> Relation | None:
        """The map from the parameter to the weight; ``None`` for a parametrization that :func:`tie` did not make."""
        if self.holder is self.owner:
            return _IDENTITY
        link = links_in(self.owner).get(self.attribute)
        return link.relation if link else None


class Locations(dict[str, ParameterLocation]):
    """The locations of a model's parameters, by clean name, including aliases."""

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """The names of each parameter, by its identity, when they are first read."""
        names: dict[int, list[str]] = {}
        for name, location in self.items():
            names.setdefault(id(location.parameter), []).append(name)
        return names

    @cached_property
    def _aliases(self) -> dict[str, list[str]]:
        return {alias: names for names in self.names.values() for alias in names}

    def aliases(self, name: str) -> list[str]:
        """Return all names of the parameter that has a given name; those of the first call, if the model changes."""
        return self._aliases[name]

    def owners(self, name: str) -> list[ParameterLocation]:
        """Return the locations of a parameter: several if it is tied. A module of several names counts once."""
        return [*dict.fromkeys(self[alias] for alias in self.aliases(name))]


def locate_parameters(model: nn.Module) -> Locations:
    """Return the locations of a model's parameters."""
    locations = Locations()
    for path, module in model.named_modules(remove_duplicate=False):
        owner, weight, name = module, None, unwrapped(path)
        if isinstance(module, ParametrizationList):
            above, _, weight = path.rpartition("parametrizations.")
            owner = model.get_submodule(above.removesuffix("."))
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                location = ParameterLocation(owner, weight or attribute, module, attribute)
                full = f"{name}.{attribute}".lstrip(".")
                locations[plain_name(full) if weight else full] = location
    return locations

"""State dicts of models with shared or derived weights: load them without breaking ties, and save plain weights."""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from os.path import commonprefix
from typing import Any, Literal, Self
from uuid import uuid4

import torch
from einops import EinopsError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from tying.errors import ConfigurationError, check_choice, listed
from tying.selection.index import clean_name, plain_name, unwrapped
from tying.selection.relation import Relation
from tying.selection.tie import Tie
from tying.torch_workarounds import has_values, is_strict_load, viewed
from tying.weights.derived import (
    DerivedWeight,
    ParameterLocation,
    derived_by_others,
    effective_weight,
    eval_mode,
    gathered,
    link,
    locate_parameters,
    names_by_weight,
    remove,
)
from tying.weights.first_call import check_at_first_call
from tying.weights.sharding import all_gather_object, anywhere, full, is_sharded, local, related, shard_like

RECORD = "_hard_ties"  # the attribute of a module that holds its record
EXACT = 1e-6  # loaded weights with a relative error up to this are as given
LARGE = 1e-3  # above this, loading warns
Unequal = Literal["error", "source", "mean"]


@dataclass(frozen=True)
class TieRecord:
    """The names that hold one parameter, the source first, and the relation of each to the source.

    Attributes:
        names: all names that hold the parameter.
        relations: the map from the source's layout to each name's.
        members: an identifier of the parameter that each name held before; equal for names of the same parameter.
        root: the token of the model that was tied.
        is_table: whether the parameter is the table of derived weights, which disappears where they are removed.
    """

    names: tuple[str, ...]
    relations: tuple[Relation, ...]
    members: tuple[object, ...]
    root: str = ""
    is_table: bool = False

    def within(self, path: str) -> Self:
        """Return the record with names relative to a model that holds the record's module at ``path``."""
        if not path:
            return self
        return replace(self, names=tuple(f"{path}.{name}" for name in self.names))

    def among(self, locations: Mapping[str, ParameterLocation]) -> Self:
        """Return the record; of a table, without the names where it has been removed."""
        if not self.is_table:
            return self
        kept = [row for row in zip(self.names, self.relations, self.members, strict=True) if row[0] in locations]
        names, relations, members = zip(*kept, strict=True) if len(kept) > 1 else ((), (), ())
        return replace(self, names=names, relations=relations, members=members)


@dataclass
class ModuleRecord:
    """The record that :func:`tie` keeps in a module.

    Attributes:
        ties: the ties made with this module as the model, each with the names that it has tied.
        groups: the groups of tied names for which this is the innermost common module. Because they are stored here,
            loading this module alone is checked too, and a copy of it stays tied.
        token: identifies this module, and its copies, as the model of a tie.
    """

    ties: dict[Tie, frozenset[str]] = field(default_factory=dict)
    groups: list[TieRecord] = field(default_factory=list)
    token: str = field(default_factory=lambda: uuid4().hex)


def record_in(module: nn.Module) -> ModuleRecord:
    """Return the record of a module, or an empty record if it has none."""
    return module.__dict__.get(RECORD) or ModuleRecord()


def records_below(model: nn.Module) -> list[tuple[str, ModuleRecord]]:
    """Return the records of a model and of its parts, each with the clean name of its module.

    A module with several names is listed under its last name.
    """
    paths = {module: path for path, module in model.named_modules(remove_duplicate=False) if RECORD in module.__dict__}
    return [(clean_name(path), record_in(module)) for module, path in paths.items()]


def tie_records(model: nn.Module) -> list[TieRecord]:
    """Return all groups of tied names in a model, whether tied in it, in a submodule, or in a containing model."""
    return [group.within(path) for path, record in records_below(model) for group in record.groups]


def install_record(model: nn.Module, groups: Sequence[TieRecord]) -> None:
    """Record groups of tied names, each in the innermost module that holds all of them."""
    token = _writable_record(model).token  # loading checks the whole model before it changes a weight
    modules = {clean_name(path): module for path, module in model.named_modules()}
    for group in groups:
        common = commonprefix([name.split(".")[:-1] for name in group.names])  # noqa: RUF071  # lists, compared by parts
        path = ".".join(common) if ".".join(common) in modules else ""
        inside = replace(group, names=tuple(name.removeprefix(f"{path}.") for name in group.names), root=token)
        _writable_record(modules[path]).groups.append(inside)


def _writable_record(module: nn.Module) -> ModuleRecord:
    if RECORD not in module.__dict__:
        module.__dict__[RECORD] = ModuleRecord()
        module.register_load_state_dict_pre_hook(_reconcile_before_load)  # type: ignore[no-untyped-call]  # torch's
        module.register_load_state_dict_post_hook(restore_ties)  # type: ignore[no-untyped-call]  # torch's
        check_at_first_call(module, check_shards)
    return record_in(module)


def check_shards(model: nn.Module) -> None:
    """Raise an error if tied weights have been sharded separately, which would train apart.

    Raises:
        ConfigurationError: a tied weight is several sharded tensors.
    """
    groups = tie_records(model)
    locations = locate_parameters(model) if groups else {}
    for group in groups:
        parameters = {name: locations[name].parameter for name in group.names if name in locations}
        if not any(map(is_sharded, parameters.values())):
            continue
        first = next(iter(parameters))
        if others := [name for name, parameter in parameters.items() if parameter is not parameters[first]]:
            owners = listed(dict.fromkeys(name.rpartition(".")[0] or "the model" for name in parameters))
            raise ConfigurationError(
                f"{first!r} and {others[0]!r} were tied before the model was sharded, and are separate shards now, "
                "which would train apart. Under tensor parallelism, tie after parallelize_module; with FSDP2, tie "
                f"before fully_shard, and shard {owners} together, as tying.hard.shard_groups(model, units) lists them"
            )


def forget_ties(model: nn.Module, names: Collection[str]) -> None:
    """Drop the records of the groups that contain one of these names: other modules hold their weights together now."""
    forgotten = {*names}
    for path, record in records_below(model):
        record.groups = [group for group in record.groups if forgotten.isdisjoint(group.within(path).names)]


def share_parameter(group: TieRecord, source: nn.Parameter, locations: Mapping[str, ParameterLocation]) -> None:
    """Set the parameter of all names of a group to ``source``, each through its relation."""
    relations = {locations[name]: relation for name, relation in zip(group.names, group.relations, strict=True)}
    for location, relation in relations.items():  # only once if a module has several names
        put_parameter(location, source, relation)


def put_parameter(location: ParameterLocation, parameter: nn.Parameter, relation: Relation) -> None:
    """Replace the parameter at a location; the weight there becomes ``relation(parameter)``."""
    if location.relation in (relation, None):  # other code may have parametrized the weight
        setattr(location.holder, location.original, parameter)
    else:
        if location.holder is not location.owner:
            remove(location.owner, location.attribute)
        if relation.steps:
            link(location.owner, location.attribute, parameter, relation)
        else:
            setattr(location.owner, location.attribute, parameter)


def restore_ties(module: nn.Module, *_: Any) -> None:
    """Repair ties that ``load_state_dict(assign=True)`` or moving to the meta device has broken.

    Weights that have been parametrized since, or replaced by weights of another shape, stay unchanged;
    :func:`tying.hard.tied` raises for them.
    """
    groups = tie_records(module)
    locations = locate_parameters(module) if groups else {}
    for group in (group.among(locations) for group in groups):
        members = [locations[name] for name in group.names if name in locations]
        whole = bool(members) and len(members) == len(group.names)
        if whole and not any(member.relation is None or is_lazy(member.parameter) for member in members):
            source = members[0].parameter
            shapes = [getattr(member.owner, member.attribute).shape for member in members]
            with suppress(EinopsError):  # the source has another shape now
                if shapes == [relation(source).shape for relation in group.relations]:
                    share_parameter(group, source, locations)


def _reconcile_before_load(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    *_: Any,
) -> None:
    present = {*state_dict}
    reconcile(model, state_dict, prefix)
    if not is_strict_load():  # as for a weight tied by hand: safetensors compares them with the names it left out
        missing_keys += [key for key in state_dict if key not in present]


def reconcile(model: nn.Module, state_dict: dict[str, Any], prefix: str = "", unequal: Unequal = "error") -> list[str]:
    """Make the copies of each tied weight in a state dict equal, and add missing copies.

    Args:
        model: the tied model.
        state_dict: changed in place.
        prefix: of the model's keys.
        unequal: what to do if copies differ: raise an error, use the source's copy, or use their mean.

    Returns:
        The names of the weights with different copies.

    Raises:
        ConfigurationError: two copies differ, or an entry is not a tensor of the weight's shape.
    """
    computed = _computed_groups(model)
    groups = [*tie_records(model), *computed]
    keys = {unwrapped(key[len(prefix) :]): key for key in state_dict if key.startswith(prefix)} if groups else {}
    raw_names = {clean_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)} if groups else {}
    locations = locate_parameters(model) if groups else {}
    known = {name for name, location in locations.items() if location.relation is not None}
    known |= {name for group in computed for name in group.names}
    present = [
        {
            name: _to_source(keys[name], state_dict[keys[name]], relation, locations.get(group.names[0]))
            for name, relation in zip(group.names, group.relations, strict=True)
            if name in keys
        }
        for group in groups
    ]
    differing: list[str] = []
    for group, copies, others in zip(groups, present, _differing(model, present), strict=True):
        if not copies:
            continue
        relations = dict(zip(group.names, group.relations, strict=True))
        first, weight = next(iter(copies.items()))
        if others:
            if unequal == "error" or copies[others[0]].shape != weight.shape:
                raise _unequal_error(keys[first], keys[others[0]], copies[others[0]].shape == weight.shape)
            if unequal == "mean":
                weight = torch.stack([full(copy) for copy in copies.values()]).mean(dim=0)
            state_dict.update({keys[name]: relations[name](full(weight)) for name in copies})
            differing += copies
        for name, relation in relations.items():
            if name not in keys and name in known:
                written = plain_name(raw_names.get(name, name)).replace("_checkpoint_wrapped_module.", "")
                state_dict[prefix + written] = related(weight, relation, weight) if relation.steps else weight
    return differing


def _unequal_error(first: str, other: str, have_one_shape: bool) -> ConfigurationError:
    """Return the error for two copies of a tied weight that differ, given their keys."""
    how = "but differ" if have_one_shape else "and differ in shape"
    return ConfigurationError(
        f"{first!r} and {other!r} are tied, {how} in this state dict. To load copies that differ, use "
        "tying.hard.load_plain(model, state_dict, unequal='source') or 'mean'; to load them as they are, "
        "tying.hard.untie(model) first"
    )


def _differing(model: nn.Module, present: Sequence[Mapping[str, Tensor]]) -> list[list[str]]:
    """Return, for each group of copies, the names of those that differ from the first, in any process."""
    here = [
        [name for name, copy in copies.items() if not _agree_here(next(iter(copies.values())), copy)]
        for copies in present
    ]
    copies_here = (copy for copies in present for copy in copies.values())
    if not here or not any(map(is_sharded, chain(model.parameters(), copies_here))):
        return here
    everywhere = all_gather_object(here)  # once: some processes may have read fewer copies
    return [[*dict.fromkeys(name for names in groups for name in names)] for groups in zip(*everywhere, strict=True)]


def _computed_groups(model: nn.Module) -> list[TieRecord]:
    """Return the names of each derived weight of several modules as a group."""
    return [
        TieRecord(names, (Relation(),) * len(names), names[:1] * len(names))
        for names in names_by_weight(derived_by_others(model))
        if len(names) > 1
    ]


def _to_source(key: str, value: Any, relation: Relation, source: ParameterLocation | None) -> Tensor:
    """Return an entry of a state dict in the layout of the source of its tie."""
    if not isinstance(value, Tensor):
        raise ConfigurationError(f"{key!r} is not a tensor in this state dict, but a {type(value).__name__}")
    try:
        if is_sharded(value) and relation.steps:
            return related(value, relation.inverse(), source.parameter if source else value)
        return relation.inverse()(viewed(value))
    except EinopsError:
        raise ConfigurationError(
            f"{key!r} has shape {tuple(value.shape)} in this state dict, which is not that of the model"
        ) from None


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are bitwise equal; if one is sharded, every process must call it.

    Example:
        >>> are_equal(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, float("nan")]))
        True
        >>> are_equal(torch.tensor(0.0), torch.tensor(-0.0))
        False
    """
    if not (is_sharded(first) or is_sharded(second)):
        return _agree_here(first, second)
    return not anywhere(not _agree_here(first, second), first.device)


def _agree_here(first: Tensor, second: Tensor) -> bool:
    """Return whether the parts of two tensors that this process holds are bitwise equal."""
    if first is second:
        return True
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not (has_values(first) and has_values(second)):
        return True
    first = shard_like(first, second)
    first, second = local(first).detach(), local(related(second, Relation(), first)).detach()
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (first, second.to(first.device))))


def bake(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict that the untied model loads without this package.

    Every tensor is a separate contiguous copy on the CPU, which any format can store, including safetensors; extra
    state that is not a tensor stays unchanged. All derived weights are computed, even if this package did not
    parametrize them, and the masks of ``torch.nn.utils.prune`` are applied. The state dict holds weights only: other
    changes to the forward pass, such as a merge that scales branches at test time, are not in it.

    Example:
        >>> from tying.hard import tie
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight | o i -> i o"])
        >>> nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).load_state_dict(bake(model))
        <All keys matched successfully>
    """
    derived = derived_by_others(model)
    hidden = tuple(prefix for key, weight in derived.items() for prefix in _prefixes(key, weight))
    plain = {
        clean_name(key): value for key, value in model.state_dict().items() if not unwrapped(key).startswith(hidden)
    }
    with eval_mode(model):
        plain |= {key: weight.value() for key, weight in derived.items()}
    plain = _masked(model, plain)
    return {
        key: full(value).detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        if isinstance(value, Tensor) and not is_lazy(value)
        else value
        for key, value in plain.items()
    }


def _masked(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict in which pruned weights replace their originals and masks."""
    if not prune.is_pruned(model):
        return {**state}
    pruned = {
        clean_name(f"{path}.{name}".lstrip(".")).removesuffix("_mask")
        for path, module in model.named_modules(remove_duplicate=False)
        if prune.is_pruned(module)
        for name, _ in module.named_buffers(recurse=False)
        if name.endswith("_mask") and hasattr(module, f"{name.removesuffix('_mask')}_orig")
    }
    masked = {}
    for key, value in state.items():
        if (name := key.removesuffix("_orig")) != key and name in pruned:
            masked[name] = value * state[f"{name}_mask"]
        elif key.removesuffix("_mask") not in pruned:
            masked[key] = value
    return masked


def load_plain(model: nn.Module, state_dict: Mapping[str, Tensor], unequal: Unequal = "error") -> dict[str, float]:
    """Load a state dict of the untied model into a tied one, even if its copies of a tied weight differ.

    Derived weights become the nearest to the given ones. Weights that share parameters, such as mixtures of the same
    templates, are fitted together, by the ``joint_inverse`` of their class if it has one.

    Args:
        model: the tied model; may have derived weights whose steps have a ``right_inverse``.
        state_dict: a state dict with the names of the untied model.
        unequal: what to do if copies differ: raise an error, use the source's copy, or use their mean.

    Returns:
        The relative error ``‖stored − given‖ / ‖given‖`` of each tied or derived weight whose error is above 1e-6, by
        name; empty if the model holds all weights as given; infinity if a weight is given as zero and stored otherwise.
        Values are compared in the model's precision.

    Raises:
        ConfigurationError: copies differ and ``unequal`` is ``"error"``, or a weight cannot be parametrized. Nothing
            is loaded.
        RuntimeError: names or shapes do not fit; see ``load_state_dict``. Nothing is loaded.

    Warns:
        UserWarning: an error is above 1e-3.

    Example:
        >>> from tying.hard import share_templates
        >>> plain, model = (nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))) for _ in range(2))
        >>> _ = share_templates(model, ["*.weight"], templates=4)
        >>> load_plain(model, plain.state_dict())
        {}
    """
    check_choice("unequal", unequal, ("error", "source", "mean"))
    given = {unwrapped(key): value for key, value in state_dict.items()}
    plain = dict(given)
    differing = reconcile(model, plain, unequal=unequal)
    derived = {key: weight for key, weight in derived_by_others(model).items() if key in plain}
    _replace_derived(model, plain, derived)
    current = model.state_dict(keep_vars=True)
    keys = {unwrapped(key): key for key in current}
    before = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in current.items() if not is_lazy(v)}
    try:
        targets = {keys.get(key, key): value for key, value in plain.items()}
        model.load_state_dict({key: _like(value, current.get(key)) for key, value in targets.items()})
    except Exception:  # torch has loaded what fits
        model.load_state_dict(before, strict=False)
        raise
    errors = _relative_errors(model, {key: given[key] for key in (*differing, *derived) if key in given})
    _warn_of(errors)
    return errors


def _like(value: Any, current: Any) -> Any:
    """Return an entry of a state dict in the layout of the model's, which may be sharded."""
    return shard_like(value, current) if isinstance(value, Tensor) and isinstance(current, Tensor) else value


def _warn_of(errors: Mapping[str, float]) -> None:
    """Warn of large errors of loaded weights."""
    if large := sorted(((error, key) for key, error in errors.items() if error > LARGE), reverse=True):
        worst = ", ".join(
            f"{key!r} is off by {error:.1%} of its norm" if error < math.inf else f"{key!r} is not zero as given"
            for error, key in large[:3]
        )
        more = f", and {len(large) - 3} more by over {LARGE:.1%}" if len(large) > 3 else ""
        warnings.warn(
            f"the model cannot hold all weights as they are given: {worst}{more}. Train it on, give it more parameters "
            "(a higher rank, more templates, a larger table), or untie these weights",
            stacklevel=3,
        )


def _relative_errors(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the relative errors above 1e-6 of a model's weights."""
    derived, errors = derived_by_others(model), {}
    with eval_mode(model):
        stored = {unwrapped(key): value for key, value in model.state_dict().items()}
        for key, wanted in given.items():
            value = derived[key].value() if key in derived else stored[key]
            value, wanted = full(value), full(wanted)
            if not value.is_meta:
                precise = torch.promote_types(value.dtype, torch.float64)
                target = wanted.to(value).to(precise)
                distance, norm = float((value.to(precise) - target).norm()), float(target.norm())
                error = distance / norm if norm else math.inf if distance else 0.0
                if not error <= EXACT:
                    errors[key] = error
    return errors


@torch.no_grad()
def _replace_derived(model: nn.Module, plain: dict[str, Any], weights: Mapping[str, DerivedWeight]) -> None:
    """Replace the entries of derived weights, in a plain state dict, by those of what they are computed from.

    Args:
        model: is not changed.
        plain: changed in place.
        weights: the derived weights, by name.

    Raises:
        ConfigurationError: a derived weight cannot be set to its entry.
    """
    with gathered(weights.values()):
        _fit_derived(model, plain, weights)


def _fit_derived(model: nn.Module, plain: dict[str, Any], weights: Mapping[str, DerivedWeight]) -> None:
    """Replace entries as :func:`_replace_derived` does, in a model whose derived weights have whole parameters."""
    current = {unwrapped(key): value for key, value in model.state_dict(keep_vars=True).items()}
    values: dict[DerivedWeight, Tensor] = {}
    once = {names[0] for names in names_by_weight(weights)}  # the names of a tied weight have equal values
    with eval_mode(model):
        for key, derived in weights.items():
            value, shape = plain.pop(key), effective_weight(derived).shape
            if value.shape != shape:
                raise ConfigurationError(
                    f"{key!r} has shape {tuple(value.shape)} in this state dict, and {tuple(shape)} in the model"
                )
            if key in once:
                values[derived] = value.to(derived.inputs[0])
    fitted: dict[int, Tensor] = {}  # by the id of a parameter, or of a module with an extra state
    names = {derived: key for key, derived in weights.items()}
    for group in _sharing([derived for derived, value in values.items() if has_values(value)]):
        if _fits_jointly(group):
            inputs = ((*derived.inputs,) for derived in group)
            parts = [
                (derived.steps[0], tensors[0] if len(tensors) == 1 else tensors, values[derived])
                for derived, tensors in zip(group, inputs, strict=True)
            ]
            new: Any = group[0].steps[0].joint_inverse(parts)  # type: ignore[operator]  # a method
            fitted |= {id(part): value for part, value in new.items()}
        else:
            for derived in group:
                pairs = zip(derived.inputs, _inverse(names[derived], derived, values[derived]), strict=True)
                fitted |= {id(part): value for part, value in pairs}
    prefixes = tuple(prefix for key, derived in weights.items() for prefix in _prefixes(key, derived))
    modules = {f"{unwrapped(name)}._extra_state": step for name, step in model.named_modules(remove_duplicate=False)}
    plain |= {
        name: fitted.get(id(modules.get(name, value)), value)
        for name, value in current.items()
        if name.startswith(prefixes)
    }


def _fits_jointly(weights: Sequence[DerivedWeight]) -> bool:
    """Return whether one ``joint_inverse`` finds the parameters of all these weights."""
    steps = [derived.steps[0] for derived in weights]
    return (
        hasattr(steps[0], "joint_inverse")
        and len({(type(step), *map(id, step.parameters())) for step in steps}) == 1
        and all(len(derived.steps) == 1 for derived in weights)
    )


def _inverse(key: str, derived: DerivedWeight, weight: Tensor) -> Sequence[Tensor]:
    """Return the values of a derived weight's inputs for a given weight, if what it shares stays as it is."""
    value: Any = weight
    for step in reversed(derived.steps):
        if not hasattr(step, "right_inverse"):
            raise ConfigurationError(f"{key!r} is parametrized without a right_inverse: it cannot take a plain weight")
        value = step.right_inverse(value)  # type: ignore[operator]  # a method
    return [value] if isinstance(value, Tensor) else value


def _sharing(weights: Sequence[DerivedWeight]) -> list[list[DerivedWeight]]:
    """Group derived weights that share parameters, directly or through others."""
    groups: dict[int, list[DerivedWeight]] = {}  # the group of each parameter, by identity
    for weight in weights:
        keys = [*map(id, weight.originals)] or [id(weight)]
        touched = {id(groups[key]): groups[key] for key in keys if key in groups}
        group = max(touched.values(), key=len, default=[])
        for other in touched.values():
            if other is not group:
                group += other
                groups |= {id(parameter): group for member in other for parameter in member.originals}
        group.append(weight)
        groups |= dict.fromkeys(keys, group)
    return [*{id(group): group for group in groups.values()}.values()]


def _prefixes(key: str, derived: DerivedWeight) -> tuple[str, ...]:
    """Return the prefixes, in the model's state dict, of the keys that belong to a derived weight."""
    return tuple(key.removesuffix(derived.name) + prefix for prefix in derived.prefixes)

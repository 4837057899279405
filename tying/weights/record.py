"""What keeps shared weights shared: a record in the model, and hooks on loading."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from einops import EinopsError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tying.errors import ConfigurationError
from tying.selection.index import clean_name, plain_name, unwrapped
from tying.selection.relation import Relation
from tying.selection.tie import Tie
from tying.weights.derived import ParameterLocation, locate_parameters
from tying.weights.link import link, unlink

RECORD, GUARD = "_hard_ties", "_hard_guard"  # attributes of modules


@dataclass(frozen=True)
class TieRecord:
    """The names of one weight, the source first, and the map from the source's layout to that of each.

    Attributes:
        names: all names that hold it.
        relations: from the source's layout to each name's.
        members: which parameter each name held before; names that held one already share a number.
    """

    names: tuple[str, ...]
    relations: tuple[Relation, ...]
    members: tuple[int, ...]

    @property
    def module(self) -> str:
        """The innermost module that holds all of them."""
        parts = [name.split(".")[:-1] for name in self.names]
        common = takewhile(lambda level: len({*level}) == 1, zip(*parts, strict=False))
        return ".".join(level[0] for level in common)

    def below(self, prefix: str) -> TieRecord:
        """Return the same with names relative to a module."""
        return replace(self, names=tuple(name.removeprefix(prefix + ".") for name in self.names))

    def within(self, prefix: str) -> TieRecord:
        """Return the same with names as a module's parent sees them."""
        return replace(self, names=tuple(f"{prefix}.{name}".lstrip(".") for name in self.names))


@dataclass
class Record:
    """What is tied in a model; kept in it, to tie again what loading or moving takes apart."""

    ties: dict[Tie, frozenset[str]] = field(default_factory=dict)  # with the names that each has tied
    groups: list[TieRecord] = field(default_factory=list)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)  # under which parts of the model are guarded


def record_in(model: nn.Module) -> Record:
    """Return what has been tied in this model, as the root of names."""
    record: Record = model.__dict__.get(RECORD) or Record()
    return record


def tie_records(model: nn.Module) -> list[TieRecord]:
    """Return what has been tied in a model, or in a part of it; also from a module that holds it."""
    records = [(clean_name(path), record_in(module)) for path, module in model.named_modules()]
    own = [shared.within(path) for path, record in records for shared in record.groups]
    return own + [guard.whole for guard in orphaned_guards(model)]


@dataclass(frozen=True)
class Guard:
    """What a part of a model guards.

    Attributes:
        path: of the part.
        part: whose ``state_dict`` is guarded.
        token: of the record that it was guarded for.
        shared: with names relative to the part.
    """

    path: str
    part: nn.Module
    token: str
    shared: TieRecord

    @property
    def whole(self) -> TieRecord:
        """What it guards, with names as the model sees them."""
        return self.shared.within(self.path)


def orphaned_guards(model: nn.Module) -> list[Guard]:
    """Return the guards in a model whose ties no record in it holds: of a model above, or copied with a part."""
    parts = dict(model.named_modules())
    held = {(part, record_in(module).token, shared) for module in parts.values() for part, shared in _guarding(module)}
    guards = [
        Guard(clean_name(path), part, token, shared)
        for path, part in parts.items()
        for token, own in part.__dict__.get(GUARD, {}).items()
        for shared in own
    ]
    return [guard for guard in guards if (guard.part, guard.token, guard.shared) not in held]


def record_tokens(model: nn.Module) -> set[str]:
    """Return the tokens of the records in a model."""
    return {record_in(module).token for module in model.modules() if RECORD in module.__dict__}


def install_record(model: nn.Module, record: Record) -> None:
    """Keep a record in a model, and guard what it holds: also where only a part of the model is loaded."""
    for part, _ in _guarding(model):
        part.__dict__.get(GUARD, {}).pop(record.token, None)
    model.__dict__[RECORD] = record
    _hook(model)
    for part, shared in _guarding(model):
        part.__dict__.setdefault(GUARD, {}).setdefault(record.token, []).append(shared)
        _hook(part)


def _guarding(model: nn.Module) -> list[tuple[nn.Module, TieRecord]]:
    """Return the parts that guard what the record of a model holds, and what each guards."""
    groups = record_in(model).groups
    parts = {clean_name(path): part for path, part in model.named_modules()} if groups else {}
    found = [(parts.get(shared.module, model), shared.below(shared.module)) for shared in groups]
    return [(part, shared) for part, shared in found if part is not model]


def share_parameter(shared: TieRecord, source: nn.Parameter, places: dict[str, ParameterLocation]) -> None:
    """Let all names hold ``source``, each in its own layout."""
    done: set[ParameterLocation] = set()  # a module may have several names
    for name, relation in zip(shared.names, shared.relations, strict=True):
        place = places[name]
        if place in done:
            continue
        done.add(place)
        if place.relation == relation:
            setattr(place.holder, place.original, source)
            continue
        if place.relation and place.relation.steps:
            unlink(place.owner, place.attribute)
        if relation.steps:
            link(place.owner, place.attribute, source, relation)
        else:
            setattr(place.owner, place.attribute, source)


def restore_ties(module: nn.Module, *_: Any) -> None:
    """Mend what ``load_state_dict(assign=True)`` or moving to the meta device has taken apart.

    Weights that somebody has parametrized since, or replaced by others of another shape, are left as they are:
    :func:`tying.hard.tied` tells of them.
    """
    guarded = _guarded(module)
    places = locate_parameters(module) if guarded else {}
    for shared in guarded:
        if all(name in places and places[name].relation is not None for name in shared.names) and _fit(shared, places):
            share_parameter(shared, places[shared.names[0]].parameter, places)


def reject_unequal_copies(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raise unless the copies of each tied weight are equal; add those that are missing."""
    guarded = _guarded(module)
    if not guarded:
        return
    keys = {unwrapped(key[len(prefix) :]): key for key in state_dict if key.startswith(prefix)}
    raw = {clean_name(name): name for name, _ in module.named_parameters(remove_duplicate=False)}
    places = locate_parameters(module)
    for shared in guarded:
        known = [pair for pair in zip(shared.names, shared.relations, strict=True) if pair[0] in keys]
        copies = [in_source(keys[name], state_dict[keys[name]], relation) for name, relation in known]
        for (name, _relation), copy in zip(known[1:], copies[1:], strict=True):
            if not are_equal(copies[0], copy):
                raise ConfigurationError(
                    f"{keys[known[0][0]]!r} and {keys[name]!r} are tied, but differ in this state dict. To load it all "
                    "the same, use tying.hard.load_plain(model, state_dict, unequal='source') or 'mean'; to load it as "
                    "it is, tying.hard.untie(model) first"
                )
        for name, relation in zip(shared.names, shared.relations, strict=True):
            if known and name not in keys and name in places and places[name].relation is not None:
                written = plain_name(raw.get(name, name)).replace("_checkpoint_wrapped_module.", "")
                state_dict[prefix + written] = relation(copies[0])


def in_source(key: str, value: Any, relation: Relation) -> Tensor:
    """Return an entry of a state dict in the layout of the source of its tie."""
    if not isinstance(value, Tensor):
        raise ConfigurationError(f"{key!r} is no tensor in this state dict, but {type(value).__name__}")
    try:
        return relation.inverse()(value)
    except EinopsError:
        raise ConfigurationError(
            f"{key!r} has shape {tuple(value.shape)} in this state dict, which is not that of the model"
        ) from None


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal bit by bit.

    Example:
        >>> are_equal(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, float("nan")]))
        True
        >>> are_equal(torch.tensor(0.0), torch.tensor(-0.0))
        False
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_meta or other.is_meta:
        return True
    bits = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other.to(one.device))]
    return torch.equal(*bits)


def _guarded(module: nn.Module) -> list[TieRecord]:
    return [*record_in(module).groups, *(shared for held in module.__dict__.get(GUARD, {}).values() for shared in held)]


def _fit(shared: TieRecord, places: dict[str, ParameterLocation]) -> bool:
    """Tell whether what each name holds still has the shape that its tie needs."""
    source = places[shared.names[0]].parameter
    for name, relation in zip(shared.names, shared.relations, strict=True):
        place = places[name]
        held = Relation() if place.relation == relation else relation  # what is replaced has its own layout
        if is_lazy(source) or is_lazy(place.parameter) or held(source).shape != place.parameter.shape:
            return False
    return True


def _hook(module: nn.Module) -> None:
    if not any(
        getattr(hook, "hook", None) is reject_unequal_copies for hook in module._load_state_dict_pre_hooks.values()
    ):
        module.register_load_state_dict_pre_hook(reject_unequal_copies)  # type: ignore[no-untyped-call]  # torch's
        module.register_load_state_dict_post_hook(restore_ties)  # type: ignore[no-untyped-call]  # torch's

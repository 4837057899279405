"""From name patterns to groups of named tensors: who belongs together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from tying.errors import ConfigurationError, listed, nearest
from tying.selection.index import Match, Names
from tying.selection.patterns import Pattern, mirror_ranks
from tying.selection.relation import Relation, bind, check
from tying.selection.tie import Tie, TiedGroup


def resolve(model: nn.Module, ties: Sequence[Tie | str]) -> list[TiedGroup]:
    """Return the groups of tensors in ``model`` that ``ties`` put together.

    Aliases of one tensor count once. A tie is an equivalence: groups that share a tensor are merged. Names are
    those seen without the wrappers of compilation, activation checkpointing and parametrization.

    Args:
        model: the module whose names the patterns match.
        ties: ties, or their string form ``"source ~ target | relation"``.

    Raises:
        ConfigurationError: a pattern matches nothing, a binding has no partner, shapes do not meet, a weight is
            tied to itself, or composed relations disagree. The message names the pattern and the tensors.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(8, 3), "decoder": nn.Linear(3, 8)})
        >>> [group] = resolve(model, ["encoder.weight ~ decoder.weight | o i -> i o"])
        >>> group.names
        ('encoder.weight', 'decoder.weight')
        >>> [tuple(tensor.shape) for tensor in group.tensors()]
        [(3, 8), (3, 8)]
    """
    if isinstance(ties, str | Tie):
        raise ConfigurationError(f"ties must be a list; write [{str(ties)!r}]")
    names = Names(model)
    merged: dict[int, _Group] = {}  # by identity of each tensor: the group that holds it
    for tie in ties:
        _add(tie, names, merged)
    return _ordered(merged)


def select(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that a list of patterns names; a leading ``!`` leaves out. Aliases count once.

    Raises:
        ConfigurationError: a pattern matches nothing, or nothing is left.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> list(select(model, ["*.weight", "!0"]))
        ['1.weight']
    """
    if isinstance(patterns, str) or not patterns:
        raise ConfigurationError(f"parameters must be a list of patterns, not {patterns!r}")
    names = Names(model)
    exclude = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for pattern in patterns:
        if not pattern.startswith("!"):
            for match in names.find(pattern, exclude, f"parameters {list(patterns)}"):
                found.setdefault(id(match.parameter), (match.name, match.parameter))
    if not found:
        raise ConfigurationError(f"parameters {list(patterns)} name only what to leave out")
    return dict(found.values())


def resolve_each(model: nn.Module, ties: Sequence[Tie | str]) -> list[list[TiedGroup] | ConfigurationError]:
    """Return what each tie would put together alone: its groups, or what is wrong with it.

    Example:
        >>> resolve_each(nn.Linear(2, 2), ["weigth"])
        [ConfigurationError("tie 'weigth': pattern 'weigth' matches no parameter or module. Nearest ...")]
    """
    names = Names(model)
    found: list[list[TiedGroup] | ConfigurationError] = []
    for tie in ties:
        merged: dict[int, _Group] = {}
        try:
            _add(tie, names, merged)
            found.append(_ordered(merged))
        except ConfigurationError as error:
            found.append(error)
    return found


Member = tuple[str, nn.Parameter, Relation]


@dataclass
class _Group:
    members: dict[int, Member]  # by identity of the parameter, the source first
    created: int = 0


def _add(tie: Tie | str, names: Names, merged: dict[int, _Group]) -> None:
    tie = Tie.parse(tie) if isinstance(tie, str) else tie
    for members in _groups_of(tie, names):
        _merge(members, merged, tie)


def _ordered(merged: dict[int, _Group]) -> list[TiedGroup]:
    unique = {id(group): group for group in merged.values()}
    ordered = sorted(unique.values(), key=lambda group: group.created)
    columns = (zip(*group.members.values(), strict=True) for group in ordered)
    return [TiedGroup(names, parameters, relations) for names, parameters, relations in columns]


def _groups_of(tie: Tie, names: Names) -> Iterable[dict[int, Member]]:
    """Yield the members of each group that one tie makes, the source first."""
    source = Pattern(tie.source)
    if tie.target is None:
        if tie.relation or source.mirrored:
            what = f"relation {tie.relation!r}" if tie.relation else f"mirrored capture in {tie.source!r}"
            raise ConfigurationError(f"tie '{tie}': {what} needs a target")
        sources = _by_binding(names.find(tie.source, tie.exclude, f"tie '{tie}'"), source.captures, ())
        targets: dict[tuple[object, ...], list[Match]] = {}
    else:
        if tie.relation:
            check(tie.relation)
        target = Pattern(tie.target)
        if alone := [capture for capture in target.captures if capture not in source.captures]:
            raise ConfigurationError(f"tie '{tie}': capture {{{alone[0]}}} stands only in the target {tie.target!r}")
        if alone := [capture for capture in source.mirrored if capture not in target.captures]:
            raise ConfigurationError(
                f"tie '{tie}': mirrored capture {{-{alone[0]}}} needs {{{alone[0]}}} in the target"
            )
        shared = tuple(capture for capture in source.captures if capture in target.captures)
        mirrored = tuple(source.mirrored ^ target.mirrored)
        sources = _by_binding(names.find(tie.source, tie.exclude, f"tie '{tie}'"), shared, mirrored)
        targets = _by_binding(names.find(tie.target, tie.exclude, f"tie '{tie}'"), shared, mirrored, backwards=True)
        for found, others, pattern in [(sources, targets, tie.target), (targets, sources, tie.source)]:
            for binding in found:
                if binding not in others:
                    name = found[binding][0].name
                    partners = [match.name for matches in others.values() for match in matches]
                    raise ConfigurationError(
                        f"tie '{tie}': {name!r} has no partner among what {pattern!r} matches: {listed(partners)}."
                        + nearest(name, partners)
                    )
    for binding, matches in sources.items():
        yield _members(tie, matches, targets.get(binding, []), names.plain)


def _by_binding(
    matches: list[Match], shared: Sequence[str], mirrored: Sequence[str], backwards: bool = False
) -> dict[tuple[object, ...], list[Match]]:
    """Sort matches by the values of the shared captures; a mirrored one counts by rank, from one end or the other."""
    distinct = list(dict.fromkeys(match.captures for match in matches))
    plain = [capture for capture in shared if capture not in mirrored]
    ranks = {capture: mirror_ranks(distinct, capture, within=plain) for capture in mirrored}
    found: dict[tuple[object, ...], list[Match]] = {}
    for match in matches:
        binding: list[object] = [match.relative]
        for capture in shared:
            if capture in ranks:
                rank, count = ranks[capture][match.captures]
                binding.append(count - 1 - rank if backwards else rank)
            else:
                binding.append(dict(match.captures)[capture])
        found.setdefault(tuple(binding), []).append(match)
    return found


def _members(tie: Tie, sources: list[Match], targets: list[Match], names: dict[int, str]) -> dict[int, Member]:
    first = sources[0]
    members: dict[int, Member] = {}
    if lazy := next((match.name for match in [*sources, *targets] if is_lazy(match.parameter)), None):
        raise ConfigurationError(f"tie '{tie}': {lazy!r} has no shape yet. Let the model see a batch first")
    for match, pattern in [*((m, None) for m in sources), *((m, tie.relation) for m in targets)]:
        try:
            relation = bind(pattern, first.shape, match.shape)
        except ConfigurationError as error:
            shapes = first.shape, match.shape
            hint = "name a relation, or exclude one of them"
            if shapes[0] == shapes[1][::-1] != shapes[1]:
                hint = "the relation 'o i -> i o' would fit"
            raise ConfigurationError(
                f"tie '{tie}': {first.name!r} and {match.name!r} do not meet: {error}; {hint}"
            ) from None
        # between the parameters themselves: a weight may be another layout of its own already
        between = first.layout.then(relation).then(match.layout.inverse())
        name = names.get(id(match.parameter), match.name) if match.layout.steps else match.name
        _, _, known = members.setdefault(id(match.parameter), (name, match.parameter, between))
        if not known.agrees_with(between, first.parameter.shape):
            raise ConfigurationError(f"tie '{tie}' ties {match.name!r} to itself through {str(between)!r}")
    if len(members) == 1:
        same = [match.name for match in [*sources, *targets] if match.name != first.name]
        what = f"{same[0]!r} is already the same tensor as {first.name!r}" if same else f"only {first.name!r} is in it"
        raise ConfigurationError(
            f"tie '{tie}' would tie a weight to itself: {what}. Name two different tensors, exclude this one, or "
            "write * in place of a capture to put all matches in one group"
        )
    return members


def _merge(members: dict[int, Member], merged: dict[int, _Group], tie: Tie) -> None:
    """Join ``members`` with the groups that hold any of them, in the layout of the oldest of these."""
    held = {id(group): group for key in members if (group := merged.get(key))}
    if not held:
        group = _Group(members, created=len(merged))
        merged.update(dict.fromkeys(members, group))
        return
    oldest, *younger = sorted(held.values(), key=lambda group: group.created)
    _absorb(oldest, members, merged, tie)
    for group in younger:
        _absorb(oldest, group.members, merged, tie)


def _absorb(group: _Group, members: dict[int, Member], merged: dict[int, _Group], tie: Tie) -> None:
    """Add ``members`` to ``group``, with which they share at least one tensor."""
    name, source, _ = next(iter(group.members.values()))
    shared = next(key for key in members if key in group.members)
    # from the group's layout to that of `members`
    between = group.members[shared][2].then(members[shared][2].inverse())
    for key, (member, parameter, relation) in members.items():
        composed = between.then(relation)
        known = group.members.setdefault(key, (member, parameter, composed))[2]
        if not known.agrees_with(composed, source.shape):
            raise ConfigurationError(
                f"tie '{tie}' disagrees with an earlier one: {name!r} would reach {member!r} "
                f"both by {str(known) or 'equality'!r} and by {str(composed) or 'equality'!r}"
            )
        merged[key] = group

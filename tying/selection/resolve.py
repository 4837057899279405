"""Resolve ties to groups of tensors."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from tying.errors import ConfigurationError, listed, nearest
from tying.selection.index import Match, Names, check_shape
from tying.selection.patterns import Pattern, mirror_ranks
from tying.selection.relation import Relation, bind, check, transposing
from tying.selection.tie import AnyTie, Tie, TiedGroup, parse_ties

LETTERS = "ijklmnopqrstuvwxyz"  # names of captures
WILDCARD = re.compile(r"\{(\d+\.\.\d+)\}|\[[^\].]+\]|(?<!\*)\*(?!\*)|\?")
PARAMETRIZED = re.compile(r"\.parametrizations\.(\w+)\..*")  # the part of a name that hides a computed weight


def resolve(model: nn.Module, ties: Sequence[AnyTie]) -> list[TiedGroup]:
    """Return the groups of tensors that ties describe.

    Aliases of a tensor count once. Groups that share a tensor are merged into one. Names do not contain the parts that
    compilation, activation checkpointing and parametrization add.

    Args:
        model: the module with the parameters to tie.
        ties: ties, their string form ``"source ~ target | relation"``, or mappings of :class:`Tie`'s arguments.

    Raises:
        ConfigurationError: a pattern matches nothing, a weight has no partner, shapes do not fit, a weight is tied to
            itself, or composed relations disagree. The message names the pattern and the tensors.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(8, 3), "decoder": nn.Linear(3, 8)})
        >>> [group] = resolve(model, ["encoder.weight ~ decoder.weight | o i -> i o"])
        >>> group
        TiedGroup(encoder.weight ~ decoder.weight | o i -> i o, (3, 8))
        >>> [tuple(tensor.shape) for tensor in group.tensors()]
        [(3, 8), (3, 8)]
    """
    return resolve_named(model, parse_ties(ties) if ties else [])[0]


def select(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that match a list of patterns; a leading ``!`` excludes matches. Aliases count once.

    Raises:
        ConfigurationError: a pattern matches nothing, all matches are excluded, or a parameter has no shape yet.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> list(select(model, ["*.weight", "!0"]))
        ['1.weight']
    """
    patterns = parse_patterns(patterns)
    names = Names(model)
    exclude = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    matches = [
        match
        for pattern in patterns
        if not pattern.startswith("!")
        for match in names.find(pattern, exclude, f"parameters {patterns}")
    ]
    if lazy := next((match for match in matches if is_lazy(match.parameter)), None):
        check_shape(lazy.name, lazy.parameter, f"parameters {patterns}: ")
    first_names = {id(match.parameter): match.name for match in reversed(matches)}
    return {first_names[id(match.parameter)]: match.parameter for match in matches}


def parse_patterns(patterns: Sequence[str], argument: str = "parameters") -> list[str]:
    """Return patterns of parameters as a list; ``argument`` is the name that an error says.

    Raises:
        ConfigurationError: they are one string, or none of them selects parameters.

    Example:
        >>> parse_patterns("encoder.*")
        Traceback (most recent call last):
        tying.errors.ConfigurationError: parameters must be a list of patterns; write ['encoder.*']
    """
    if isinstance(patterns, str):
        raise ConfigurationError(f"{argument} must be a list of patterns; write [{patterns!r}]")
    if (
        not isinstance(patterns, Sequence)
        or not all(isinstance(pattern, str) for pattern in patterns)
        or all(pattern.startswith("!") for pattern in patterns)
    ):
        raise ConfigurationError(f"{argument} must be a list of patterns, at least one without '!', not {patterns!r}")
    return [*patterns]


def resolve_each(model: nn.Module, ties: Sequence[AnyTie]) -> list[list[TiedGroup] | ConfigurationError]:
    """Resolve each tie separately; return its groups, or the error that it raises.

    Example:
        >>> resolve_each(nn.Linear(2, 2), ["weigth"])
        [ConfigurationError("tie 'weigth': pattern 'weigth' matches no parameter or module. Nearest ...")]
    """
    names = Names(model)
    results: list[list[TiedGroup] | ConfigurationError] = []
    for tie in parse_ties(ties) if ties else []:
        try:
            results.append(_merge({tie: _groups_of(tie, names)}))
        except ConfigurationError as error:
            results.append(error)
    return results


def resolve_named(model: nn.Module, ties: Sequence[Tie]) -> tuple[list[TiedGroup], dict[Tie, frozenset[str]]]:
    """Return the groups of tensors that ties describe, and the names that each tie describes.

    Raises:
        ConfigurationError: as :func:`resolve`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> groups, names = resolve_named(model, [Tie("*.weight")])
        >>> groups[0].names, sorted(names[Tie("*.weight")])
        (('0.weight', '1.weight'), ['0.weight', '1.weight'])
    """
    index = Names(model)
    described = {tie: _groups_of(tie, index) for tie in ties}
    names = {
        tie: frozenset(name for members in groups for name, _, _ in members.values())
        for tie, groups in described.items()
    }
    return _merge(described), names


Member = tuple[str, nn.Parameter, Relation]


@dataclass
class _Group:
    members: dict[int, Member]  # by identity of the parameter, the source first
    age: int  # groups with a smaller number were made earlier


def _merge(described: Mapping[Tie, list[dict[int, Member]]]) -> list[TiedGroup]:
    """Return the groups that ties describe together: those that share a parameter are one."""
    groups: dict[int, _Group] = {}  # the group of each parameter, by identity
    for tie, parts in described.items():
        for members in parts:
            _unite(members, groups, tie)
    # in order of creation
    columns = {id(group): zip(*group.members.values(), strict=True) for group in groups.values()}
    return [TiedGroup(names, parameters, relations) for names, parameters, relations in columns.values()]


def _groups_of(tie: Tie, names: Names) -> list[dict[int, Member]]:
    """Return the members of each group that one tie describes, the source first."""
    source, target = Pattern(tie.source), Pattern(tie.target or "")
    shared, mirrored = source.captures, source.mirrored
    if tie.target is not None:
        if tie.relation:
            check(tie.relation, f"tie '{tie}': ")
        if alone := [capture for capture in target.captures if capture not in source.captures]:
            raise ConfigurationError(f"tie '{tie}': capture {{{alone[0]}}} is only in the target {tie.target!r}")
        if alone := [capture for capture in source.mirrored if capture not in target.captures]:
            raise ConfigurationError(
                f"tie '{tie}': mirrored capture {{-{alone[0]}}} needs {{{alone[0]}}} in the target"
            )
        shared, mirrored = target.captures, source.mirrored ^ target.mirrored
    elif tie.relation or mirrored:
        part = f"relation {tie.relation!r}" if tie.relation else f"mirrored capture in {tie.source!r}"
        form = str(Tie(tie.source, "target", tie.relation))
        raise ConfigurationError(f"tie '{tie}': {part} needs a target: write {form!r}")
    sources = _by_binding(names.find(tie.source, tie.exclude, f"tie '{tie}'"), shared, mirrored)
    targets: dict[tuple[object, ...], list[Match]] = {}
    if tie.target is not None:
        targets = _by_binding(names.find(tie.target, tie.exclude, f"tie '{tie}'"), shared, mirrored, backwards=True)
        for side, others, pattern in [(sources, targets, tie.target), (targets, sources, tie.source)]:
            if alone := [matches[0].name for binding, matches in side.items() if binding not in others]:
                partners = [match.name for matches in others.values() for match in matches]
                raise ConfigurationError(
                    f"tie '{tie}': {alone[0]!r} has no partner among what {pattern!r} matches: {listed(partners)}."
                    + nearest(alone[0], partners)
                )
    return [_members(tie, matches, targets.get(binding, []), names.plain) for binding, matches in sources.items()]


def _by_binding(
    matches: list[Match], shared: Sequence[str], mirrored: Iterable[str], backwards: bool = False
) -> dict[tuple[object, ...], list[Match]]:
    """Group matches by the values of the shared captures; for a mirrored capture, by the rank of its value."""
    ranks = {
        capture: mirror_ranks(
            [match.captures for match in matches], capture, [other for other in shared if other not in mirrored]
        )
        for capture in mirrored
    }
    bindings: dict[tuple[object, ...], list[Match]] = {}
    for match in matches:
        values: dict[str, object] = dict(match.captures)
        for capture in mirrored:
            rank, count = ranks[capture][match.captures]
            values[capture] = count - 1 - rank if backwards else rank
        bindings.setdefault((match.relative, *(values[capture] for capture in shared)), []).append(match)
    return bindings


def _members(tie: Tie, sources: list[Match], targets: list[Match], names: dict[int, str]) -> dict[int, Member]:
    """Return the members of one group by identity; ``names`` gives the name of each parameter in its own layout."""
    first = sources[0]
    matches = [*sources, *targets]
    if lazy := next((match for match in matches if is_lazy(match.parameter)), None):
        check_shape(lazy.name, lazy.parameter, f"tie '{tie}': ")
    members: dict[int, Member] = {}
    for position, match in enumerate(matches):
        try:
            relation = bind(tie.relation if position >= len(sources) else None, first.shape, match.shape)
        except ConfigurationError as error:
            hint = _unequal_hint(tie, matches, match, is_target=position >= len(sources))
            raise ConfigurationError(
                f"tie '{tie}': {first.name!r} and {match.name!r} do not fit: {error}; {hint}"
            ) from None
        # map between parameters, whose layouts may differ from the layouts of the weights
        between = first.layout.then(relation).then(match.layout.inverse())
        name = names.get(id(match.parameter), match.name) if match.layout.steps else match.name
        _, _, known = members.setdefault(id(match.parameter), (name, match.parameter, between))
        if not known.agrees_with(between, first.parameter.shape):
            raise ConfigurationError(f"tie '{tie}' ties {match.name!r} to itself through {str(between)!r}")
    if len(members) == 1:
        same = [match.name for match in matches if match.name != first.name]
        if same and ".parametrizations." in first.name and ".parametrizations." in same[0]:
            computed = listed(repr(PARAMETRIZED.sub(r".\1", name)) for name in (first.name, same[0]))
            raise ConfigurationError(
                f"tie '{tie}': {computed} are computed from one tensor already. Exclude them, or load "
                "tying.hard.bake(model) into the untied model first"
            )
        raise ConfigurationError(
            f"tie '{tie}' would tie a weight to itself: "
            + (f"{same[0]!r} is already the same tensor as {first.name!r}" if same else f"only {first.name!r} is in it")
            + ". Name two different tensors, exclude this one, or write * in place of a capture to put all matches in "
            "one group"
        )
    return members


def _unequal_hint(tie: Tie, matches: Sequence[Match], match: Match, is_target: bool) -> str:
    """Return what to write in place of a tie whose weights have different shapes."""
    fitting = transposing(matches[0].shape, match.shape)
    if is_target:
        return f"the relation {fitting!r} would fit" if fitting else "give a relation that fits, or exclude one of them"
    if tie.target is None and (captured := _with_capture(tie.source, matches)):
        return f"write {captured!r}: one group of equal shapes for each capture"
    if tie.target is None and fitting and len(matches) == 2:
        return f"a relation needs a target: write '{matches[0].name} ~ {match.name} | {fitting}'"
    return "write one tie for each shape, or exclude one of them"


def _with_capture(pattern: str, matches: Sequence[Match]) -> str | None:
    """Return a pattern in which a capture replaces a wildcard so that each group has one shape; None if none does."""
    name = next(letter for letter in LETTERS if letter not in Pattern(pattern).captures)
    for wildcard in WILDCARD.finditer(pattern):
        capture = f"{{{name}:{wildcard[1]}}}" if wildcard[1] else f"{{{name}}}"
        captured = Pattern(pattern[: wildcard.start()] + capture + pattern[wildcard.end() :])
        shapes: dict[object, list[tuple[int, ...]]] = {}
        for match in matches:
            path = match.name.removesuffix(f".{match.relative}") if match.relative else match.name
            shapes.setdefault((match.relative, captured.match(path)), []).append(match.shape)
        if all(len(group) > 1 and len({*group}) == 1 for group in shapes.values()):
            return captured.text
    return None


def _unite(members: dict[int, Member], groups: dict[int, _Group], tie: Tie) -> None:
    """Merge a new group with the groups that share a parameter with it, in the layout of the oldest group."""
    touching = {id(group): group for key in members if (group := groups.get(key))}
    if not touching:
        groups.update(dict.fromkeys(members, _Group(members, age=len(groups))))
        return
    oldest, *younger = sorted(touching.values(), key=lambda group: group.age)
    name, source, _ = next(iter(oldest.members.values()))
    for others in (members, *(group.members for group in younger)):
        shared = next(key for key in others if key in oldest.members)
        # from the oldest group's layout to the others' layouts
        between = oldest.members[shared][2].then(others[shared][2].inverse())
        for key, (member, parameter, relation) in others.items():
            composed = between.then(relation)
            _, _, known = oldest.members.setdefault(key, (member, parameter, composed))
            if not known.agrees_with(composed, source.shape):
                raise ConfigurationError(
                    f"tie '{tie}' disagrees with an earlier one: {name!r} would reach {member!r} "
                    f"both by {str(known) or 'equality'!r} and by {str(composed) or 'equality'!r}"
                )
            groups[key] = oldest

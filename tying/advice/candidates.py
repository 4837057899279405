"""Find the groups of weights that a model may tie: equal shapes in repeated blocks, neighbours, transposed pairs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from tying.selection.patterns import Pattern
from tying.selection.resolve import select
from tying.weights.derived import locate_parameters

TRANSPOSED = "o i -> i o"
EVERY_RUN = 8  # of a deeper stack, long runs begin at fewer blocks, so that their number stays linear in the depth
SAMPLED = 1024  # values of a weight, at most, by which duplicates are found, and at most an eighth of them
NEAR = 0.1  # largest distance of duplicates, relative to the larger weight

Weights = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Candidate:
    """Weights that may become one.

    Attributes:
        names: names of the weights, in the order of the model.
        relation: the relation from the first weight to the second, if it is not equality.
    """

    names: tuple[str, ...]
    relation: str | None = None

    def saved(self, weights: Weights) -> int:
        """Return the number of values that a tie saves."""
        return (len(self.names) - 1) * weights[self.names[0]].numel()

    def in_source_layout(self, weights: Weights) -> list[Tensor]:
        """Return the weights, in the layout of the first."""
        first, *others = (weights[name].detach() for name in self.names)
        return [first, *(other.mT if self.relation else other for other in others)]


def tieable_weights(model: nn.Module, parameters: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the weights among which to look for ties: real, of two dimensions or more, and not computed.

    Args:
        model: any module.
        parameters: patterns of names; a leading ``!`` excludes.
    """
    locations = locate_parameters(model)
    return {
        name: weight
        for name, weight in select(model, parameters).items()
        if weight.ndim > 1
        and weight.is_floating_point()
        and all(location.holder is location.owner for location in locations.owners(name))
    }


def find_candidates(weights: Weights) -> list[Candidate]:
    """Return the groups of weights that may be tied, in the order of the model.

    These are runs of consecutive blocks, by the name of a weight in them; pairs of neighbours of equal or transposed
    shape; and weights that are nearly equal, wherever they are.

    Args:
        weights: the weights, by name, in the order of the model.

    Example:
        >>> model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> [candidate.names for candidate in find_candidates(tieable_weights(model, ["**"]))]
        [('0.weight', '1.weight'), ('1.weight', '2.weight'), ('0.weight', '1.weight', '2.weight')]
    """
    groups: list[Candidate] = [Candidate((*run,)) for family in families(weights) for run in runs(family)]
    alike: dict[object, list[str]] = {}
    for name, weight in weights.items():
        alike.setdefault(_kind(weight), []).append(name)
    for names in alike.values():
        groups += [Candidate(pair) for pair in pairwise(names)]
        groups += [Candidate((*cluster,)) for cluster in _duplicates(names, weights)]
    groups += _transposed(weights, alike)
    unique: dict[object, Candidate] = {}
    for group in groups:
        unique.setdefault((frozenset(group.names), group.relation), group)
    return [*unique.values()]


def _kind(weight: nn.Parameter, transposed: bool = False) -> tuple[object, ...]:
    """Return what the members of a group have in common."""
    shape = tuple(weight.shape[::-1] if transposed else weight.shape)
    return shape, weight.dtype, weight.device, weight.requires_grad


def families(weights: Weights) -> list[list[str]]:
    """Return the names of weights that differ in one number and follow one another with equal shapes.

    Example:
        >>> families({f"{i}.weight": nn.Parameter(torch.ones(n, 2)) for i, n in enumerate([3, 2, 2, 3])})
        [['1.weight', '2.weight']]
    """
    members: dict[tuple[str | None, ...], list[tuple[int, str]]] = {}
    for name in weights:
        parts = name.split(".")
        for position, part in enumerate(parts):
            if part.isdecimal():
                members.setdefault((*parts[:position], None, *parts[position + 1 :]), []).append((int(part), name))
    stacks = ([name for _, name in sorted(numbered)] for numbered in members.values())
    alike = [[*part] for stack in stacks for _, part in groupby(stack, lambda name: _kind(weights[name]))]
    return [part for part in alike if len(part) > 1]


def runs(stack: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the runs of two or more of a stack: all of a short one; of a deep one, a number linear in its depth.

    Example:
        >>> [*runs("abc")]
        ['ab', 'bc', 'abc']
    """
    depth = len(stack)
    if depth <= EVERY_RUN:
        lengths = [*range(2, depth + 1)]
    else:
        lengths = [
            *dict.fromkeys([2, 3, *(2**power for power in range(2, depth.bit_length()) if 2**power < depth), depth])
        ]
    for length in lengths:
        step = 1 if depth <= EVERY_RUN else max(1, length // 2)
        yield from (stack[start : start + length] for start in range(0, depth - length + 1, step))


def _sample(weight: Tensor, index: Tensor) -> Tensor:
    return weight.detach().reshape(-1)[index.to(weight.device)].double().cpu()


def _index(shape: Sequence[int]) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(0, count - 1, min(count, max(8, min(count // 8, SAMPLED))), dtype=torch.float64).long()


def _near(first: Tensor, second: Tensor) -> Tensor:
    """Return which rows of two matrices are nearly equal."""
    products, squares = first @ second.mT, (first.square().sum(1), second.square().sum(1))
    distances = squares[0][:, None] + squares[1] - 2 * products
    return distances <= NEAR**2 * torch.maximum(squares[0][:, None], squares[1])


def _duplicates(names: Sequence[str], weights: Weights) -> Iterator[list[str]]:
    """Yield the groups of weights of equal shape that are nearly equal."""
    index = _index(weights[names[0]].shape)
    samples = torch.stack([_sample(weights[name], index) for name in names])
    near, left = _near(samples, samples), [*range(len(names))]
    while left:
        cluster = [other for other in left if near[left[0], other]]
        left = [other for other in left[1:] if other not in cluster]
        if len(cluster) > 1:
            yield [names[number] for number in cluster]


def _transposed(weights: Weights, alike: Mapping[object, Sequence[str]]) -> Iterator[Candidate]:
    """Yield pairs of matrices of which one may be the other, transposed: neighbours, and nearly equal ones."""
    order = {name: number for number, name in enumerate(weights)}
    for names in alike.values():
        first = weights[names[0]]
        partners = alike.get(_kind(first, transposed=True), ())
        if first.ndim != 2 or not partners or order[names[0]] > order[partners[0]]:
            continue
        if first.shape[0] != first.shape[1]:
            together = sorted([*names, *partners], key=order.__getitem__)
            shapes = {name: weights[name].shape for name in together}
            yield from (
                Candidate(pair, TRANSPOSED) for pair in pairwise(together) if shapes[pair[0]] != shapes[pair[1]]
            )
        index = _index(first.shape)
        across = index % first.shape[1] * first.shape[0] + index // first.shape[1]  # the same places, transposed
        samples = torch.stack([_sample(weights[name], index) for name in names])
        near = _near(samples, torch.stack([_sample(weights[name], across) for name in partners]))
        for row, column in near.nonzero().tolist():
            pair = (names[row], partners[column])
            if order[pair[0]] < order[pair[1]]:
                yield Candidate(pair, TRANSPOSED)
            elif names is not partners and pair[0] != pair[1]:
                yield Candidate(pair[::-1], TRANSPOSED)


def as_ties(names: Sequence[str], relation: str | None, model: nn.Module) -> list[str]:
    """Return ties that make weights one: a range of numbers where their names have one, else pairs.

    Example:
        >>> model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> as_ties(["0.weight", "1.weight"], None, model), as_ties(["0.weight", "2.weight"], None, model)
        (['{0..1}.weight'], ['0.weight ~ 2.weight'])
    """
    pattern = as_range(names, locate_parameters(model))
    if pattern and not relation:
        return [pattern]
    return [f"{names[0]} ~ {other}" + (f" | {relation}" if relation else "") for other in names[1:]]


def as_range(names: Sequence[str], among: Iterable[str]) -> str | None:
    """Return a pattern with a range of numbers that matches the given names and no others, if there is one.

    Args:
        names: names of weights, several.
        among: all names that the pattern could match.
    """
    columns = [*zip(*(name.split(".") for name in names), strict=False)]
    varying = [position for position, parts in enumerate(columns) if len({*parts}) > 1]
    if len(varying) != 1 or len({name.count(".") for name in names}) > 1:
        return None
    parts = columns[varying[0]]
    if not all(part.isdecimal() for part in parts):
        return None
    low, high = min(map(int, parts)), max(map(int, parts))
    pieces = names[0].split(".")
    pieces[varying[0]] = f"{{{low}..{high}}}"
    pattern = Pattern(".".join(pieces))
    matched = {name for name in among if pattern.match(name) is not None}
    return pattern.text if matched == {*names} else None

"""Plans: which weights to tie, to relax and to store at low rank, so that a model meets a budget."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml
from torch import nn

from tying.advice.candidates import Candidate, Weights, as_range, as_ties, families
from tying.hard import LowRankResidual, lower_rank, relax, tie

Ranked = dict[int, tuple[str, ...]]
HALVINGS = 40  # of the interval in which the fraction of a low rank is sought


@dataclass(frozen=True)
class Plan:
    """Ties and low rank that together meet a budget.

    Attributes:
        kind: ``"hard"``, ``"relaxed"``, ``"low rank"`` or ``"mixed"``.
        ties: hard ties, of the mean.
        relaxed: relaxed ties, by the rank of their residuals.
        low_rank: patterns of weights, by their rank.

    Example:
        >>> plan = Plan("hard", ties=("{0..1}.weight",))
        >>> print(plan.yaml())
        trainer:
          callbacks+:
          - class_path: tying.callbacks.HardTying
            init_args:
              ties:
              - '{0..1}.weight'
              init: mean
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> plan.apply(model)
        >>> model[0].weight is model[1].weight
        True
    """

    kind: str
    ties: tuple[str, ...] = ()
    relaxed: Ranked = field(default_factory=dict)
    low_rank: Ranked = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Change a model according to the plan, in place."""
        if self.ties:
            tie(model, self.ties, init="mean")
        for rank, ties in self.relaxed.items():
            relax(model, ties, residual=LowRankResidual(rank))
        for rank, names in self.low_rank.items():
            lower_rank(model, names, rank)

    def callbacks(self) -> list[dict[str, Any]]:
        """Return the callbacks that apply the plan, as a configuration has them."""
        several = len(self.relaxed) > 1
        return [
            *([_callback("HardTying", ties=[*self.ties], init="mean")] if self.ties else []),
            *(
                _callback(
                    "RelaxedTying",
                    ties=[*ties],
                    residual={"class_path": "tying.hard.LowRankResidual", "init_args": {"rank": rank}},
                    **({"name": f"rank_{rank}"} if several else {}),
                )
                for rank, ties in self.relaxed.items()
            ),
            *(_callback("LowRankWeights", parameters=[*names], rank=rank) for rank, names in self.low_rank.items()),
        ]

    def yaml(self) -> str:
        """Return the configuration that applies the plan: ``tying fit --config run.yaml --config plan.yaml``."""
        return yaml.safe_dump({"trainer": {"callbacks+": self.callbacks()}}, sort_keys=False)

    def describe(self) -> str:
        """Describe the plan by the numbers of its parts."""
        ranks = ", ".join(map(str, self.low_rank))
        relaxed = (f"{_counted(ties, 'relaxed tie')}, residuals of rank {rank}" for rank, ties in self.relaxed.items())
        hard = [_counted(self.ties, "tie")] if self.ties else []
        return "; ".join([*hard, *relaxed, *([f"low rank ({ranks})"] if self.low_rank else [])])

    def key(self) -> str:
        """Return a string that is equal for equal plans."""
        return repr(asdict(self))


def _counted(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) > 1)}"


def _callback(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"tying.callbacks.{kind}", "init_args": arguments}


def sides(weight: nn.Parameter) -> int:
    """Return the sum of the sides of a weight as a matrix: the values that each rank costs."""
    return weight.shape[0] + weight.numel() // weight.shape[0]


def rank_of_share(weight: nn.Parameter, fraction: float) -> int:
    """Return the largest rank whose factors have at most a fraction of the values of a weight; 0 if there is none."""
    return int(fraction * weight.numel() / sides(weight))


class Grouping:
    """Groups of weights that are to become one each; groups that meet become one group.

    Args:
        weights: the weights, by name.
        candidates: groups to begin with.
    """

    def __init__(self, weights: Weights, candidates: Iterable[Candidate] = ()) -> None:
        self.weights = weights
        self.groups: dict[str, Candidate] = {}  # the group of each name
        for candidate in candidates:
            self.add(candidate)

    def saved_by(self, candidate: Candidate) -> int:
        """Return the number of values that a further candidate saves; 0 if a relation keeps it from joining."""
        groups = [group for name in candidate.names if (group := self.groups.get(name))]
        if groups and (candidate.relation or any(group.relation for group in groups)):
            return 0
        return self._joined(candidate).saved(self.weights) - sum(group.saved(self.weights) for group in {*groups})

    def add(self, candidate: Candidate) -> None:
        """Make the weights of a candidate one, and one with what they are tied to."""
        joined = self._joined(candidate)
        self.groups.update(dict.fromkeys(joined.names, joined))

    def _joined(self, candidate: Candidate) -> Candidate:
        names = {other for name in candidate.names for other in self.groups.get(name, candidate).names}
        names |= {*candidate.names}
        return Candidate(tuple(name for name in self.weights if name in names), candidate.relation)

    def distinct(self) -> list[Candidate]:
        """Return the groups."""
        return [*dict.fromkeys(self.groups.values())]

    def saved(self) -> int:
        """Return the number of values that the groups save."""
        return sum(group.saved(self.weights) for group in self.distinct())


def most_saved(candidates: Iterable[Candidate], weights: Weights) -> int:
    """Return the number of values that ties of all candidates save."""
    grouping = Grouping(weights)
    for candidate in sorted(candidates, key=lambda candidate: -candidate.saved(weights)):
        if grouping.saved_by(candidate):
            grouping.add(candidate)
    return grouping.saved()


@dataclass(frozen=True)
class Planner:
    """Makes plans for a model.

    Attributes:
        model: the model.
        weights: the weights that may change, by name.
        needed: number of values to save.
    """

    model: nn.Module
    weights: Weights
    needed: int

    def plans(self, errors: Mapping[Candidate, float], verdicts: Sequence[Candidate]) -> Iterator[Plan]:
        """Yield plans that meet the budget.

        Args:
            errors: the output error of each candidate, tied alone.
            verdicts: the candidates that err no more than low rank of equal size, the best first.
        """
        names = [name for name in self.weights if any(name in candidate.names for candidate in errors)]
        yield from filter(None, [self.greedy(errors)])
        yield from self.chunks()
        yield from self.relaxations()
        yield from filter(None, [self.lowered(names)])
        yield from self.mixtures(verdicts, names)

    def ties(self, groups: Iterable[Candidate]) -> tuple[str, ...]:
        """Return the ties that make each group one weight."""
        return tuple(tie for group in groups for tie in as_ties(group.names, group.relation, self.model))

    def greedy(self, errors: Mapping[Candidate, float]) -> Plan | None:
        """Return the plan of ties of the smallest errors per saved value, in this order; None if they save too little.

        Args:
            errors: the output error of each candidate, tied alone.
        """
        grouping, chosen, left = Grouping(self.weights), list[Candidate](), {*errors}
        while grouping.saved() < self.needed:
            gains = {candidate: saved for candidate in left if (saved := grouping.saved_by(candidate))}
            if not gains:
                return None
            best = min(gains, key=lambda candidate: (errors[candidate] / gains[candidate], candidate.names))
            grouping.add(best)
            chosen.append(best)
            left &= gains.keys() - {best}
        for candidate in sorted(chosen, key=lambda candidate: -errors[candidate]):  # the last ones may save enough
            without = Grouping(self.weights, [other for other in chosen if other is not candidate])
            if without.saved() >= self.needed:
                grouping, chosen = without, [other for other in chosen if other is not candidate]
        return Plan("hard", self.ties(grouping.distinct()))

    def _stacks(self) -> list[list[str]]:
        """Return the stacks of repeated blocks, the longest first; each weight is in one."""
        stacks, taken = [], set[str]()
        for family in sorted(families(self.weights), key=len, reverse=True):
            if taken.isdisjoint(family):
                taken |= {*family}
                stacks.append(family)
        return stacks

    def _chunked(self, size: int) -> list[Candidate]:
        """Return groups of at most a number of consecutive blocks."""
        chunks = (stack[start : start + size] for stack in self._stacks() for start in range(0, len(stack), size))
        return [Candidate((*chunk,)) for chunk in chunks if len(chunk) > 1]

    def _sizes(self) -> range:
        return range(2, max(map(len, self._stacks()), default=0) + 1)

    def chunks(self) -> Iterator[Plan]:
        """Yield the plan of ties in groups of consecutive blocks, all of one size, the smallest that saves enough."""
        for size in self._sizes():
            groups = self._chunked(size)
            if sum(group.saved(self.weights) for group in groups) >= self.needed:
                yield Plan("hard", self.ties(groups))
                return

    def relaxations(self) -> Iterator[Plan]:
        """Yield plans of relaxed ties of consecutive blocks: for each number of blocks, the largest ranks that fit."""
        for size in self._sizes():
            groups = self._chunked(size)

            def saved(fraction: float, groups: Sequence[Candidate] = groups) -> int:
                return sum(
                    group.saved(self.weights) - len(group.names) * rank_of_share(first, fraction) * sides(first)
                    for group in groups
                    for first in [self.weights[group.names[0]]]
                )

            fraction = self._largest_share(saved)
            ranks: dict[int, list[Candidate]] = {}
            for group in groups:
                ranks.setdefault(rank_of_share(self.weights[group.names[0]], fraction), []).append(group)
            if fraction and ranks and 0 not in ranks:
                yield Plan("relaxed", relaxed={rank: self.ties(members) for rank, members in ranks.items()})

    def _largest_share(self, saved: Callable[[float], int]) -> float:
        """Return the largest fraction of a weight for its factors at which enough is saved; 0 if there is none."""
        if saved(0) < self.needed:
            return 0
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if saved(middle) >= self.needed else (low, middle)
        return low

    def lowered(self, names: Sequence[str], groups: Sequence[Candidate] = ()) -> Plan | None:
        """Return the plan of groups tied and other weights at low rank, each at the same fraction; None if none fits.

        Args:
            names: names of the weights that may be of low rank.
            groups: groups of other weights to tie.
        """
        tied = sum(group.saved(self.weights) for group in groups)

        def rank(name: str, fraction: float) -> int:
            return max(1, rank_of_share(self.weights[name], fraction))

        def saved_by(name: str, fraction: float) -> int:
            weight = self.weights[name]
            return max(0, weight.numel() - rank(name, fraction) * sides(weight))

        fraction = self._largest_share(lambda fraction: tied + sum(saved_by(name, fraction) for name in names))
        if not fraction:
            return None
        ranks: dict[int, list[str]] = {}
        for name in names:
            if saved_by(name, fraction):
                ranks.setdefault(rank(name, fraction), []).append(name)
        patterns = {rank: self._as_patterns(members) for rank, members in ranks.items()}
        return Plan("mixed" if groups else "low rank", self.ties(groups), low_rank=patterns)

    def _as_patterns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return patterns that match the given names and no others."""
        everything = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        alike: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            parts = name.split(".")
            place = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
            alike.setdefault((*parts[:place], "", *parts[place + 1 :]), []).append(name)
        patterns = [(as_range(members, everything), members) for members in alike.values()]
        return tuple(name for pattern, members in patterns for name in ([pattern] if pattern else members))

    def mixtures(self, verdicts: Sequence[Candidate], names: Sequence[str]) -> Iterator[Plan]:
        """Yield plans that tie the first groups whose error is below that of low rank, and use low rank elsewhere.

        Args:
            verdicts: these ties, the best first.
            names: names of the weights that may change.
        """
        grouping = Grouping(self.weights)
        for candidate in verdicts:
            if grouping.groups.keys().isdisjoint(candidate.names):
                grouping.add(candidate)
        groups = grouping.distinct()
        for count in dict.fromkeys(-(-len(groups) * part // 4) for part in range(1, 5)):
            tied = {name for group in groups[:count] for name in group.names}
            if count and (plan := self.lowered([name for name in names if name not in tied], groups[:count])):
                yield plan

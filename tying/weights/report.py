"""Report which weights are shared, what that saves, and what would break it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from tying.errors import ConfigurationError, listed
from tying.selection.index import clean_name
from tying.weights.derived import count_parameters, saved_bytes
from tying.weights.record import TieRecord, tie_records
from tying.weights.state_dict import derived_by_others
from tying.weights.tie import tied

OTHERS = "shared, by others"


@dataclass(frozen=True)
class TieReport:
    """What :func:`audit` found.

    Attributes:
        groups: all names of each weight that has several, the source first.
        relations: how each group is tied: ``"shared"``, or the relations that stand in it.
        unique: number of parameter values that are stored.
        virtual: number of values the model computes with: each use counts.
        saved_bytes: by how much the weights that the model computes with exceed what is stored; gradients and optimizer
            states come on top.
        problems: what is wrong now, each with its remedy.
        limits: what would take the ties apart, or store copies, each with its remedy.
    """

    groups: tuple[tuple[str, ...], ...]
    relations: tuple[str, ...]
    unique: int
    virtual: int
    saved_bytes: int
    problems: tuple[str, ...]
    limits: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{' = '.join(names)} ({how})" for names, how in zip(self.groups, self.relations, strict=True)]
        return "\n".join([*lines, self.counts(), *self.remarks()])

    def counts(self) -> str:
        """Return the numbers, in a sentence."""
        numbers = f"{self.unique:,} unique parameters, {self.virtual:,} counting each use"
        saved = f"{self.saved_bytes:,} bytes saved" if self.saved_bytes >= 0 else f"{-self.saved_bytes:,} bytes more"
        return f"{numbers}; {saved} by sharing."

    def remarks(self) -> list[str]:
        """Return problems and limits, a line each."""
        return [f"Problem: {problem}." for problem in self.problems] + [f"Limit: {limit}." for limit in self.limits]


def audit(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> TieReport:
    """Report which weights of a model are one, what that saves, what is wrong and what would break.

    Args:
        model: any module; also finds sharing that :func:`tying.hard.tie` has not made.
        optimizers: what trains it, to find parameters that are missing, listed twice or no longer the model's.

    Example:
        >>> from tying.hard import tie
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight"])
        >>> report = audit(model)
        >>> report.groups, report.unique, report.virtual, report.saved_bytes
        ((('0.weight', '1.weight'),), 8, 12, 16)
        >>> report.problems
        ()
    """
    found = {shared.names: _how(shared) for shared in tie_records(model)}
    known = {name for names in found for name in names}
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(clean_name(name))
    for names in aliases.values():
        if len(names) > 1 and not known.issuperset(names):
            found[tuple(names)] = OTHERS
    unique, virtual = count_parameters(model)
    problems = [*_broken(model), *_on_one_storage(model), *_in_optimizers(model, optimizers)]
    groups, relations, limits = tuple(found), tuple(found.values()), tuple(_limits(model, found))
    return TieReport(groups, relations, unique, virtual, saved_bytes(model), tuple(problems), limits)


def _how(shared: TieRecord) -> str:
    return "; ".join(dict.fromkeys(str(relation) for relation in shared.relations if relation.steps)) or "shared"


def _broken(model: nn.Module) -> Iterable[str]:
    try:
        tied(model)
    except ConfigurationError as error:
        yield str(error)


def _on_one_storage(model: nn.Module) -> Iterable[str]:
    holders: dict[int, list[tuple[int, int, str]]] = {}  # by storage: first byte, the byte behind the last, name
    for raw, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.numel() or hasattr(parameter, "full_tensor"):
            continue
        name = clean_name(raw)
        begin = parameter.data_ptr()
        reach = sum((n - 1) * stride for n, stride in zip(parameter.shape, parameter.stride(), strict=True))
        end = begin + (reach + 1) * parameter.element_size()
        known = holders.setdefault(parameter.untyped_storage().data_ptr(), [])
        other = next((holder for low, high, holder in known if begin < high and low < end), None)
        known.append((begin, end, name))
        if other is not None:
            yield (
                f"{other!r} and {name!r} are two parameters on one storage: they look tied, but an "
                "optimizer steps both, and moving parts them. Tie them by tying.hard.tie"
            )


def _in_optimizers(model: nn.Module, optimizers: Iterable[Optimizer]) -> Iterable[str]:
    optimizers = list(optimizers)
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    trained = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    if twice := [names[key] for key, count in trained.items() if count > 1 and key in names]:
        yield (
            f"{listed(twice)} stands twice in the optimizers, and would be stepped and decayed twice. Build them from "
            "model.parameters(), which yields each weight once"
        )
    if orphans := sum(key not in names for key in trained):
        yield (
            f"{orphans} tensors in the optimizers are not the model's: the ties were made, or undone, after the "
            "optimizers. Tie first"
        )
    missing = [names[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in trained]
    if optimizers and missing:
        yield f"{listed(missing)} is in no optimizer, and is not trained. Build the optimizers after tying"


def _limits(model: nn.Module, groups: Mapping[tuple[str, ...], str]) -> Iterable[str]:
    if computed := [*derived_by_others(model)]:
        yield (
            f"{listed(computed)}: computed from other parameters. A model that does not compute them loads "
            "tying.hard.bake(model) only; if by a parametrization, or in a class that hash_weights makes, pickling the "
            "model refuses"
        )
    apart = []
    for names, how in groups.items():
        owners = list(dict.fromkeys(name.rpartition(".")[0] or "the model" for name in names))
        if len(owners) > 1 and how != OTHERS:
            apart.append(f"fully_shard([{', '.join(owners)}])")
        if "->" in how:
            yield (
                f"pickling the model refuses, and ONNX stores copies of {names[0]}: keep its state_dict, or "
                "tying.hard.bake(model)"
            )
    if apart:
        more = f" and so for {len(apart) - 1} more groups," if len(apart) > 1 else ""
        yield f"FSDP must shard the modules of a group together: {apart[0]},{more} or a module that holds them all"
    if groups:
        yield (
            "formats without sharing, such as safetensors, refuse or store copies: save tying.hard.bake(model), and "
            "load it by load_state_dict"
        )
        yield (
            "after to_empty, or load_state_dict(assign=True) of a part, the weights are apart until a state dict is "
            "loaded into the whole model"
        )

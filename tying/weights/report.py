"""Report which weights are shared or computed, how much memory that saves, and what would break it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tying.errors import listed
from tying.selection.index import clean_name
from tying.selection.relation import Relation
from tying.weights.derived import (
    count_parameters,
    derived_by_others,
    derived_weights,
    effective_weight,
    effective_weights,
    eval_mode,
    links_in,
    locate_parameters,
    names_by_weight,
)
from tying.weights.optimizers import shared_in
from tying.weights.sharding import is_sharded
from tying.weights.state_dict import tie_records
from tying.weights.tie import broken

OTHERS = "shared, by others"


@dataclass(frozen=True)
class WeightRow:
    """A weight that is shared or computed, or modules whose weights are all shared in the same way.

    Attributes:
        names: names of the weight or of the modules, the source first.
        how: ``"shared"``, a relation, or the description of a derived weight.
        shape: shape of the weight, in the source's layout; empty for modules.
        stored: number of values of the parameters, which other rows may share.
        used: number of values that the forward pass uses: each use counts.
        weights: number of weights in each module; 1 for a weight.
    """

    names: tuple[str, ...]
    how: str
    shape: tuple[int, ...]
    stored: int
    used: int
    weights: int = 1

    def __str__(self) -> str:
        size = self.shape if self.weights == 1 else f"({self.weights} weights)"
        return f"{' = '.join(self.names)} {size}: {self.used:,} values from {self.stored:,}, {self.how}"


@dataclass(frozen=True)
class TieReport:
    """The shared and computed weights of a model, and the memory that they save; see :func:`audit`.

    Attributes:
        groups: the names of each shared weight, the source first.
        relations: how each group is tied: ``"shared"``, or its relations.
        unique: number of stored parameter values.
        virtual: number of values that the forward pass uses: each use counts.
        saved_bytes: size of the values that the forward pass uses minus the size of the stored values, without
            gradients and optimizer states.
        problems: present mistakes, each with its remedy.
        limits: operations that would undo the ties or store copies, each with its remedy.
        rows: one for each group, then one for each weight that is computed without a tie. Modules whose weights are all
            shared in the same way form one row.
    """

    groups: tuple[tuple[str, ...], ...]
    relations: tuple[str, ...]
    unique: int
    virtual: int
    saved_bytes: int
    problems: tuple[str, ...]
    limits: tuple[str, ...]
    rows: tuple[WeightRow, ...] = ()

    def __str__(self) -> str:
        return "\n".join([*map(str, self.rows), self.counts(), *self.remarks()])

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain dictionaries, tuples, strings and numbers, ready for JSON."""
        return asdict(self)

    def counts(self) -> str:
        """Return the counts as a sentence."""
        computed = any(row.how not in self.relations for row in self.rows)
        ways = ["sharing"] * (bool(self.groups) or not computed) + ["computing weights"] * computed
        saved = (
            f"{abs(self.saved_bytes):,} bytes {'saved' if self.saved_bytes >= 0 else 'more'} by {' and '.join(ways)}"
        )
        return f"{self.unique:,} unique parameters, {self.virtual:,} counting each use; {saved}."

    def remarks(self) -> list[str]:
        """Return problems and limits, one per line."""
        return [f"Problem: {problem}." for problem in self.problems] + [f"Limit: {limit}." for limit in self.limits]


def audit(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> TieReport:
    """Report which weights of a model are shared or computed, the memory saved, mistakes and limits.

    The problems name each tie that is broken, as ``to_empty`` breaks those of a model on the meta device:
    ``restore(model)`` repairs them, and so does loading a state dict into the whole model. The limits name the weights
    to which in-place writes are lost.

    Args:
        model: any module. Weights that were shared without :func:`tying.hard.tie` are found too.
        optimizers: the model's optimizers, to find parameters that are missing, listed twice or no longer the model's.

    Example:
        >>> from tying.hard import tie
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight"])
        >>> print(audit(model).rows[0])
        0.weight = 1.weight (2, 2): 8 values from 4, shared
        >>> report = audit(model)
        >>> report.groups, report.unique, report.virtual, report.saved_bytes
        ((('0.weight', '1.weight'),), 8, 12, 16)
        >>> report.problems
        ()
    """
    groups = _tied_names(model)
    known = {name for names in groups for name in names}
    parameters = {clean_name(name): weight for name, weight in model.named_parameters(remove_duplicate=False)}
    aliases: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    groups |= {(*names,): OTHERS for names in aliases.values() if len(names) > 1 and not known.issuperset(names)}
    computed = _name_computed(model, groups, parameters)
    shared = [
        WeightRow(names, how, (*(source := parameters[names[0]]).shape,), source.numel(), source.numel() * len(names))
        for names, how in groups.items()
        if names[0] in parameters and names not in computed
    ]
    unique, virtual = count_parameters(model)
    return TieReport(
        groups=tuple(groups),
        relations=tuple(groups.values()),
        unique=unique,
        virtual=virtual,
        saved_bytes=sum(t.nbytes for t in effective_weights(model)) - sum(t.nbytes for t in model.parameters()),
        problems=(*broken(model), *_on_one_storage(model), *_in_optimizers(model, [*optimizers])),
        limits=tuple(_limits(model, groups)),
        rows=(*_folded(shared, parameters), *_derived_rows(model)),
    )


def _tied_names(model: nn.Module) -> dict[tuple[str, ...], str]:
    """Return the names that ties made one weight and that still are, and how they are tied."""
    records = tie_records(model)
    locations = locate_parameters(model) if records else {}
    groups = {}
    for record in records:
        together: dict[nn.Parameter, dict[str, Relation]] = {}  # several if other code has parted some of the names
        for name, relation in zip(record.names, record.relations, strict=True):
            if name in locations and locations[name].relation == relation:
                together.setdefault(locations[name].parameter, {})[name] = relation
        for names in (names for names in together.values() if len(names) > 1):
            groups[(*names,)] = "; ".join(dict.fromkeys(str(link) for link in names.values() if link.steps)) or "shared"
    return groups


def _name_computed(
    model: nn.Module, groups: dict[tuple[str, ...], str], parameters: Mapping[str, nn.Parameter]
) -> set[tuple[str, ...]]:
    """Name each computed weight of several names in place of the parameters from which it is computed.

    Args:
        model: any module.
        groups: the names of each shared parameter, and how it is tied; changed in place.
        parameters: the parameters of the model, by name.

    Returns:
        The names of each of these weights.
    """
    weights = derived_by_others(model)
    shared = {names for names in names_by_weight(weights) if len(names) > 1}
    for names in shared:
        inputs = {id(tensor) for tensor in weights[names[0]].inputs}
        parts = [group for group in groups if len(group) == len(names) and id(parameters.get(group[0])) in inputs]
        groups[names] = [*(groups.pop(part) for part in parts), OTHERS][0]
    return shared


def _folded(rows: Iterable[WeightRow], names: Iterable[str]) -> Iterable[WeightRow]:
    """Return rows of weights, with one row for modules whose weights are all shared in the same way."""
    alike = {(row.names, row.how): row for row in rows}
    below: dict[str, list[str]] = {}  # the parts of the names after the name of each module
    for name in names:
        for position, letter in enumerate(name):
            if letter == ".":
                below.setdefault(name[:position], []).append(name[position:])

    @cache
    def whole(modules: tuple[str, ...], how: str) -> tuple[set[tuple[tuple[str, ...], str]], WeightRow] | None:
        """Return the row of modules, and the keys of the rows that it replaces, if all their weights are alike."""
        if len({*modules}) < len(modules):  # several weights of one module
            return None
        keys = {(tuple(module + rest for module in modules), how) for rest in below[modules[0]]}
        if len(keys) == 1 or not keys <= alike.keys():
            return None
        stored, used = (sum(getattr(alike[part], count) for part in keys) for count in ("stored", "used"))
        return keys, WeightRow(modules, how, (), stored, used, len(keys))

    folded = {}
    for key, row in alike.items():
        for depth in range(min(name.count(".") for name in row.names), 0, -1):  # the outermost modules first
            module_row = whole(tuple(name.rsplit(".", depth)[0] for name in row.names), row.how)
            if module_row and key in module_row[0]:
                row = module_row[1]
                break
        folded[row.names] = row
    return folded.values()


def _derived_rows(model: nn.Module) -> Iterator[WeightRow]:
    """Yield a row for each weight that is computed from parameters of its own."""
    with eval_mode(model):
        weights = derived_by_others(model)
        for names in names_by_weight(weights):
            derived = weights[names[0]]
            step: Any = derived.steps[-1]
            weight = effective_weight(derived)
            shape = weight.shape
            if hasattr(step, "describe_weight"):
                how = step.describe_weight(weight)
            else:
                how = step.describe() if hasattr(step, "describe") else f"{type(step).__name__}({step.extra_repr()})"
            stored = sum(parameter.numel() for parameter in derived.originals)
            yield WeightRow(names, how, (*shape,), stored, shape.numel() * len(names))


def _on_one_storage(model: nn.Module) -> Iterable[str]:
    spans: dict[int, list[tuple[int, int, str]]] = {}  # for each storage: first byte, end byte (exclusive), name
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.numel() or is_sharded(parameter):
            continue
        begin = parameter.data_ptr()
        last = sum((n - 1) * stride for n, stride in zip(parameter.shape, parameter.stride(), strict=True))
        end = begin + (last + 1) * parameter.element_size()
        spans.setdefault(parameter.untyped_storage().data_ptr(), []).append((begin, end, clean_name(name)))
    for on_one in spans.values():
        reach, first = 0, ""  # the furthest end so far, and whose it is
        for begin, end, name in sorted(on_one, key=itemgetter(0)):  # stable: of equal ones, the model's first is first
            if begin < reach:
                yield (
                    f"{first!r} and {name!r} are two parameters on one storage: they look tied, but an optimizer steps "
                    "both, and moving the model separates them. Tie them by tying.hard.tie"
                )
            if end > reach:
                reach, first = end, name


def _in_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterable[str]:
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    names |= {id(parameter): shared for parameter, shared in shared_in(model, model.parameters()).items()}
    trained = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    if twice := [names[key] for key, count in trained.items() if count > 1 and key in names]:
        yield (
            f"{listed(twice)} occurs twice in the optimizers, so each step updates and decays it twice. Build them "
            "from model.parameters(), which yields each weight once"
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
            "tying.hard.bake(model) only; quantize_dynamic and adapters need it too"
        )
    if lost := [*computed, *_copied_links(model)]:
        yield (
            f"{listed(lost)}: in-place writes (.data, nn.init, an adapter's merge) are lost. Assign the weight, or "
            "load tying.hard.bake(model) into the untied model first"
        )
    for names, how in groups.items():
        if "->" in how:
            yield (
                f"ONNX and safetensors store copies of {names[0]}, and quantize_dynamic refuses the layers that "
                "compute it: load tying.hard.bake(model) into the untied model first"
            )
    owners = [
        dict.fromkeys(name.rpartition(".")[0] or "the model" for name in names)
        for names, how in groups.items()
        if how != OTHERS
    ]
    if several := [f"fully_shard([{', '.join(modules)}])" for modules in owners if len(modules) > 1]:
        more = f" and so for {len(several) - 1} more groups," if len(several) > 1 else ""
        yield f"FSDP must shard the modules of a group together: {several[0]},{more} or a module that holds them all"
    if groups:
        yield (
            "formats without sharing raise errors or store copies: save tying.hard.bake(model), and load it by "
            "load_state_dict; safetensors' own save_model and load_model keep the ties"
        )
        yield (
            "after to_empty, or load_state_dict(assign=True) of a submodule, the weights are separate: call "
            "tying.hard.restore(model), or load a state dict into the whole model"
        )


def _copied_links(model: nn.Module) -> Iterator[str]:
    """Yield the names of weights that a relation copies from their source; writes to the others reach the source."""
    for name, derived in derived_weights(model, aliases=True).items():
        link = links_in(derived.owner).get(derived.name)
        if link is not None:
            source = torch.empty(derived.originals[0].shape, device="cpu")  # the original may be sharded, or on meta
            if link(source).untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
                yield name

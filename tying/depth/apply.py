"""Put merges into the residual blocks of a model, and remove them."""

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import nn

from tying.depth.merge import Merge, Residual, Sum
from tying.depth.recurrent import Recurrent
from tying.depth.transformer_block import MergedTransformerEncoderLayer
from tying.errors import ConfigurationError, check_range, listed, nearest
from tying.selection.index import clean_name
from tying.selection.patterns import Pattern
from tying.weights.derived import swap_class


def keep_schedule(first: float, last: float, count: int) -> list[float]:
    """Return keep probabilities from first to last, both included, in equal steps.

    For L blocks and a merge with keep probability p, ``apply_merge(..., keep="linear")`` computes
    ``keep_schedule(1 - (1 - p) / L, p, L)``: block n has ``1 − (1 − p) n/L``.

    Args:
        first: keep probability of the first block.
        last: keep probability of the last block, also if it is the only block.
        count: number of blocks.

    Raises:
        ConfigurationError: a probability is not in [0, 1], or ``count`` is below 1.

    Example:
        >>> keep_schedule(1.0, 0.5, 3)
        [1.0, 0.75, 0.5]
    """
    check_range("count", count, "[1, inf)")
    check_range("first", first, "[0, 1]")
    check_range("last", last, "[0, 1]")
    return [*(first + (last - first) * block / (count - 1) for block in range(count - 1)), last]


def apply_merge(
    model: nn.Module,
    blocks: str | Sequence[str],
    merge: nn.Module,
    keep: float | Iterable[float] | Literal["linear", "uniform"] | None = None,
) -> int:
    """Put a merge into residual blocks of a model; return the number of blocks.

    Blocks are :class:`tying.depth.Residual`, torchvision's ``BasicBlock`` and ``Bottleneck``, and torch's
    ``TransformerEncoderLayer``, in which the merge combines both branches. Names and values in the model's state dict
    stay the same.

    Args:
        model: changed in place.
        blocks: a pattern of module names, or several.
        merge: each block gets a copy, called as ``merge(shortcut, branch)``.
        keep: keep probabilities of the blocks. ``None`` or ``"uniform"``: the merge's. ``"linear"``: block n of L drops
            n/L of the merge's drop probability: each keep probability p becomes ``1 − (1 − p) n/L``. A number
            replaces every keep probability of the merge; a list has one number for each block, in the model's order.

    Raises:
        ConfigurationError: a pattern matches nothing, or a module that is not a residual block; a block already has a
            merge; the number of keeps is not the number of blocks, or one is not in [0, 1]. The model is then
            unchanged.

    Example:
        >>> from tying.depth import StochasticDepth, Swapout
        >>> model = nn.Sequential(Residual(nn.Linear(2, 2)), Residual(nn.Linear(2, 2)))
        >>> apply_merge(model, "*", StochasticDepth(keep=0.5), keep=[0.9, 0.8])
        2
        >>> model[1].merge
        StochasticDepth(keep=0.8, mode='batch', scale='test')
    """
    matches = residual_blocks(model, blocks)
    return put_merges(model, matches, _merge_per_block(merge, keep, [*matches]))


def _merge_per_block(merge: object, keep: object, names: Sequence[str]) -> Sequence[nn.Module]:
    """Return the merge of each block, by the argument ``keep`` of :func:`apply_merge`."""
    if not isinstance(merge, nn.Module):
        value = f"the class {merge.__name__}" if isinstance(merge, type) else repr(merge)
        raise ConfigurationError(f"merge must be a module, called as merge(shortcut, branch), not {value}")
    if keep is None or (isinstance(keep, str) and keep == "uniform"):
        return [merge] * len(names)
    if not isinstance(merge, Merge):
        raise ConfigurationError(f"keep needs a tying.depth.Merge, which {type(merge).__name__} is not")
    if isinstance(keep, str) and keep == "linear":
        count, probabilities = len(names), [getattr(merge, name) for name in merge.prob_names]
        schedules = [keep_schedule(1 - (1 - p) / count, p, count) for p in probabilities]
        return [
            merge.with_probabilities(
                {name: keeps[block] for name, keeps in zip(merge.prob_names, schedules, strict=True)}
            )
            for block in range(count)
        ]
    try:
        keeps = [float(k) for k in keep] if isinstance(keep, Iterable) else [float(keep)] * len(names)  # type: ignore[arg-type]  # the except clause checks it
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"keep must be a number, one for each block, 'linear' or 'uniform', not {keep!r}"
        ) from None
    if len(keeps) != len(names):
        raise ConfigurationError(f"{len(keeps)} keeps for {len(names)} blocks: {listed(names)}")
    return [merge.with_keep(k) for k in keeps]


def put_merges(model: nn.Module, blocks: Mapping[str, nn.Module], merges: Sequence[nn.Module]) -> int:
    """Give each residual block a copy of its merge; return the number of blocks.

    Args:
        model: changed in place.
        blocks: the blocks by name.
        merges: the merge of each block.

    Raises:
        ConfigurationError: a block already has a merge. The model is then unchanged.
    """
    if merged := [
        f"{name} ({type(block.merge).__name__})"
        for name, block in blocks.items()
        if "_merge_before" in block.__dict__ or (isinstance(block, Residual) and type(block.merge) is not Sum)
    ]:
        raise ConfigurationError(
            f"{listed(merged)}: merged already: leave out merge= where the model creates its blocks, or remove what "
            "apply_merge or ResidualMerging applied by remove_merge"
        )
    for block, merge in zip(blocks.values(), [copy.deepcopy(merge) for merge in merges], strict=True):
        merge.train(block.training)
        block.__dict__["_merge_before"] = getattr(block, "merge", None)  # bypasses nn.Module: not a submodule
        swap_class(block, _merged_classes().get(type(block), type(block)))
        block.merge = merge
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and {*encoder.layers} & {*blocks.values()}:
            encoder.__dict__.setdefault("_nested_before", encoder.use_nested_tensor)
            encoder.use_nested_tensor = False  # nested tensors would hide the padding from its layers in evaluation
    return len(blocks)


def remove_merge(model: nn.Module) -> int:
    """Remove all merges that :func:`apply_merge` put into blocks of a model; return the number of blocks.

    Example:
        >>> from tying.depth import Swapout
        >>> model = nn.Sequential(Residual(nn.Linear(2, 2)))
        >>> apply_merge(model, "0", Swapout(0.5, 0.5)), remove_merge(model), model[0].merge
        (1, 1, Sum())
    """
    plain_classes = {merged: plain for plain, merged in _merged_classes().items()}
    for module in model.modules():
        module.__dict__.pop("_merged_by", None)
        if "_nested_before" in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop("_nested_before")
    blocks = [module for module in model.modules() if "_merge_before" in module.__dict__]
    for block in blocks:
        swap_class(block, plain_classes.get(type(block), type(block)))
        if (merge := block.__dict__.pop("_merge_before")) is None:
            del block.merge
        else:
            block.merge = merge
    return len(blocks)


def _merged_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Map each block class of torch and torchvision to its subclass with a merge."""
    classes: dict[type[nn.Module], type[nn.Module]] = {nn.TransformerEncoderLayer: MergedTransformerEncoderLayer}
    if "torchvision.models.resnet" in sys.modules:  # importing it is slow
        from tying.depth.torchvision_blocks import CLASSES

        classes |= CLASSES
    if "timm.models" in sys.modules:
        from tying.depth.timm_blocks import CLASSES as TIMM_CLASSES

        classes |= TIMM_CLASSES
    return classes


def residual_blocks(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the residual blocks whose names match patterns, by name in the model's order; each block appears once.

    A pattern that matches a :class:`tying.depth.Recurrent` selects the blocks of all its steps.

    Raises:
        ConfigurationError: a pattern matches nothing, or a module that is not a residual block.
    """
    modules = {clean_name(name): module for name, module in model.named_modules() if name}
    if not (texts := [patterns] if isinstance(patterns, str) else patterns):
        raise ConfigurationError("blocks must be a pattern of module names, or several, not []")
    names: set[str] = set()
    for pattern in map(Pattern, texts):
        if not (matches := {name for name in modules if pattern.match(name) is not None}):
            raise ConfigurationError(
                f"blocks: pattern {pattern.text!r} matches no module.{nearest(pattern.text, modules)}"
            )
        names |= matches
    for name, module in modules.items():  # parents first, since a step may be recurrent itself
        if name in names and isinstance(module, Recurrent):
            names |= {f"{name}.blocks.{step}" for step in range(len(module.blocks))}
    blocks = {name: m for name, m in modules.items() if name in names and not isinstance(m, Recurrent)}
    known = {cls for pair in _merged_classes().items() for cls in pair}
    if others := [
        f"{name!r} is a {type(block).__name__} of {type(block).__module__.split('.')[0]}"
        for name, block in blocks.items()
        if not isinstance(block, Residual) and type(block) not in known
    ]:
        raise ConfigurationError(
            f"blocks: {listed(others)}, whose branch and shortcut cannot be told apart: supported are "
            "tying.depth.Residual, BasicBlock and Bottleneck of torchvision, and TransformerEncoderLayer of torch. "
            "Write such a block as tying.depth.Residual(branch, shortcut, activation=...), or name only the blocks"
        )
    return blocks

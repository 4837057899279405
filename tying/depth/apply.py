"""Put merges into blocks of a model, and remove them."""

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MethodType
from typing import Literal, NamedTuple

from torch import nn

from tying.depth.addition_watch import ResidualNotice
from tying.depth.blocks import BlockState, MergedBlock, Notices, block_state, merged_class
from tying.depth.drop_paths import common_rate, drop_paths, restore_drop_paths, silence
from tying.depth.generated_classes import original_class
from tying.depth.loop import plain_block_class, swap_block_class
from tying.depth.merge import Merge, Residual, Sum
from tying.depth.recurrent import Recurrent
from tying.depth.sample_watch import SampleNotice
from tying.depth.stages import absent_shortcut, children, match_modules
from tying.depth.transformer_block import MergedTransformerEncoderLayer
from tying.errors import ConfigurationError, check_choice, check_count, check_range, listed
from tying.selection.index import clean_name


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
    check_count("count", count, "[1, inf)")
    check_range("first", first, "[0, 1]")
    check_range("last", last, "[0, 1]")
    return [*(first + (last - first) * block / (count - 1) for block in range(count - 1)), last]


def drop_scale(preset: Literal["early", "late"], step: int, total: int) -> float:
    """Return the factor on drop probabilities at a step of early or late stochastic depth.

    ``"early"`` decreases linearly from 1 to 0 over the first sixth of training, and stays 0. ``"late"`` is 0 for five
    sixths of training, and then 1.

    Args:
        preset: ``"early"`` or ``"late"``.
        step: number of optimizer steps before this one.
        total: number of optimizer steps of the whole training.

    Raises:
        ConfigurationError: the preset is unknown.

    Example:
        >>> [drop_scale("early", step, 12) for step in (0, 1, 2, 12)]
        [1.0, 0.5, 0.0, 0.0]
        >>> [drop_scale("late", step, 12) for step in (0, 9, 10, 12)]
        [0.0, 0.0, 1.0, 1.0]

    Source: Z. Liu, Z. Xu, J. Jin, Z. Shen and T. Darrell, Dropout reduces underfitting, 2023.
    """
    check_choice("preset", preset, ("early", "late"))
    return max(0.0, 1 - 6 * step / total) if preset == "early" else float(6 * step >= 5 * total)


def apply_merge(
    model: nn.Module,
    blocks: str | Sequence[str],
    merge: nn.Module,
    keep: float | Iterable[float] | Literal["linear", "uniform", "model"] | None = None,
    whole: bool = False,
) -> int:
    """Put a merge into blocks of a model; return the number of blocks.

    A block is any module that keeps the shape of its input x, the first tensor among its arguments, and returns a
    tensor, or a tuple whose first item is one: it is ``x + F(x)`` with ``F(x) = block(x) − x``. Samples lie along the
    first dimension; in torch's recurrent and transformer layers, along the second without ``batch_first``. Blocks whose
    branches are known get a draw for each branch: modules with children of class :class:`tying.depth.Merge`, which the
    merge replaces; :class:`tying.depth.Residual` is one; torch's ``TransformerEncoderLayer``; and some of torchvision
    and timm. Names and values in the state dict stay the same.

    Args:
        model: changed in place. DropPath and StochasticDepth modules in its blocks return their input from now on.
        blocks: a pattern of module names, or several; a leading ``!`` excludes.
        merge: each block gets a copy, called as ``merge(shortcut, branch)``.
        keep: keep probabilities of the blocks. ``None`` or ``"uniform"``: the merge's. ``"linear"``: block n of L drops
            n/L of the merge's drop probability: each keep probability p becomes ``1 − (1 − p) n/L``. ``"model"``:
            1 minus the drop probability of the block's DropPath or StochasticDepth modules. A number replaces every
            keep probability of the merge; a list has one number for each block, in the model's order.
        whole: merge blocks as a whole, also where their branches are known: LayerDrop.

    Raises:
        ConfigurationError: a pattern matches nothing, or no block; a block lies within another, or has a merge; the
            number of keeps is not the number of blocks, or one is not in [0, 1]. The model is then unchanged. In use:
            a block changes the shape, or would have to be skipped although it computes further outputs.

    Example:
        >>> from tying.depth import StochasticDepth
        >>> model = nn.Sequential(Residual(nn.Linear(2, 2)), nn.TransformerEncoderLayer(2, 1, 2))
        >>> apply_merge(model, "*", StochasticDepth(keep=0.5), keep=[0.9, 0.8]), model[1].merge.keep
        (2, 0.8)

    Source: A. Fan, E. Grave and A. Joulin, Reducing transformer depth on demand with structured dropout, 2020.
    """
    matches = residual_blocks(model, blocks)
    rates = {name: drop_paths(block) for name, block in matches.items()}
    takes_rates = isinstance(keep, str) and keep == "model"
    keeps = [1 - common_rate(*item) for item in rates.items()] if takes_rates else keep
    count = put_merges(model, matches, _merge_per_block(merge, keeps, [*matches]), whole)
    silence(rates.values(), notice=not takes_rates)
    return count


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
            f"keep must be a number, one for each block, 'linear', 'uniform' or 'model', not {keep!r}"
        ) from None
    if len(keeps) != len(names):
        raise ConfigurationError(f"{len(keeps)} keeps for {len(names)} blocks: {listed(names)}")
    return [merge.with_keep(k) for k in keeps]


def put_merges(
    model: nn.Module, blocks: Mapping[str, nn.Module], merges: Sequence[nn.Module], whole: bool = False
) -> int:
    """Give each block a copy of its merge; return the number of blocks.

    Args:
        model: changed in place.
        blocks: the blocks by name.
        merges: the merge of each block.
        whole: merge blocks as a whole, also where their branches are known.

    Raises:
        ConfigurationError: a block already has a merge. The model is then unchanged.
    """
    if merged := [
        f"{name} ({type(former).__name__})"
        for name, block in blocks.items()
        for former in merges_in(block).values()
        if "_merge_before" in block.__dict__ or type(former) is not Sum
    ]:
        raise ConfigurationError(
            f"{listed(dict.fromkeys(merged))}: merged already: leave out merge= where the model creates its blocks, or "
            "remove what apply_merge or ResidualMerging applied by remove_merge"
        )
    notices, known = Notices(ResidualNotice(), SampleNotice()), _merged_classes()
    sites = [_merge_site(name, block, whole, known, notices) for name, block in blocks.items()]
    copies = [{name: _copied(merge) for name in site.names} for site, merge in zip(sites, merges, strict=True)]
    for block, site, by_name in zip(blocks.values(), sites, copies, strict=True):
        # both bypass nn.Module: former merges are not submodules
        block.__dict__["_merge_before"] = {name: getattr(block, name, None) for name in site.names}
        block.__dict__.update({"_block_state": site.state} if site.state else {})
        swap_block_class(block, site.cls)
        for name, merge in by_name.items():
            setattr(block, name, merge.train(block.training))
            if isinstance(merge, Merge) and site.state is None:
                merge.attach(block)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and {*encoder.layers} & {*blocks.values()}:
            encoder.__dict__.setdefault("_nested_before", encoder.use_nested_tensor)
            encoder.use_nested_tensor = False  # nested tensors would hide the padding from its layers in evaluation
    return len(blocks)


def _copied(merge: nn.Module) -> nn.Module:
    """Return a copy of a merge that belongs to no block: of one of another model, without its block."""
    copied = copy.deepcopy(merge, {id(vars(merge).get("_block")): None})
    vars(copied).pop("_block", None)
    return copied


class _MergeSite(NamedTuple):
    """Where a block takes a merge.

    Attributes:
        cls: the class of the block with the merge.
        names: the attribute names of the merge and of its copies.
        state: of a block that is merged as a whole, else None.
    """

    cls: type[nn.Module]
    names: Sequence[str]
    state: BlockState | None = None


def _merge_site(
    name: str, block: nn.Module, whole: bool, known: Mapping[type[nn.Module], type[nn.Module]], notices: Notices
) -> _MergeSite:
    """Return where a block takes a merge: in place of its own merges, in a known class, or as a whole."""
    plain, merges = plain_block_class(block), merges_in(block)
    if merges and not whole:
        return _MergeSite(plain, [*merges])
    if plain in known and not whole:
        return _MergeSite(known[plain], ["merge"])
    state = block_state(block, MethodType(plain.forward, block), f"{name} ({plain.__name__})", notices)
    return _MergeSite(merged_class(plain), [state.merge], state)


def merges_in(block: nn.Module) -> dict[str, nn.Module]:
    """Return the merges of a block by attribute name: those that were put into it, or its own.

    Example:
        >>> merges_in(Residual(nn.Linear(2, 2))), merges_in(nn.Linear(2, 2))
        ({'merge': Sum()}, {})
    """
    if "_merge_before" in block.__dict__:
        return {name: getattr(block, name) for name in block.__dict__["_merge_before"]}
    return {**own_merges(block), **({"merge": block.merge} if isinstance(block, Residual) else {})}


def own_merges(block: nn.Module) -> dict[str, Merge]:
    """Return the children of a block that are a :class:`tying.depth.Merge`, by attribute name."""
    return {name: child for name, child in children(block) if isinstance(child, Merge)}


def remove_merge(model: nn.Module) -> int:
    """Remove all merges that :func:`apply_merge` put into blocks of a model; return the number of blocks.

    Raises:
        ConfigurationError: the class of a block has changed since. The model is then unchanged.

    Example:
        >>> from tying.depth import Swapout
        >>> model = nn.Sequential(Residual(nn.Linear(2, 2)))
        >>> apply_merge(model, "0", Swapout(0.5, 0.5)), remove_merge(model), model[0].merge
        (1, 1, Sum())
    """
    known = {merged: plain for plain, merged in _merged_classes().items()}
    blocks = {name: module for name, module in model.named_modules() if "_merge_before" in module.__dict__}
    classes = [_class_before(name, block, known) for name, block in blocks.items()]
    restore_drop_paths(model)
    for module in model.modules():
        module.__dict__.pop("_merged_by", None)
        if "_nested_before" in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop("_nested_before")
    for block, cls in zip(blocks.values(), classes, strict=True):
        swap_block_class(block, cls)
        block.__dict__.pop("_block_state", None)
        for name, merge in block.__dict__.pop("_merge_before").items():
            if merge is None:
                delattr(block, name)
            else:
                setattr(block, name, merge)
    return len(blocks)


def _class_before(name: str, block: nn.Module, known: Mapping[type[nn.Module], type[nn.Module]]) -> type[nn.Module]:
    """Return the class that a block had before it got a merge.

    Args:
        name: the name of the block, for errors.
        block: a block with a merge.
        known: the plain class of each class of known branches.
    """
    merged = plain_block_class(block)
    if merged in known:
        return known[merged]
    if issubclass(merged.__bases__[0], MergedBlock):
        return original_class(merged)
    if issubclass(merged, (MergedBlock, *known)):
        raise ConfigurationError(
            f"the class of {name!r} has changed to {merged.__name__} after it got its merge, which cannot be removed "
            "now: call remove_merge before what changes the class, such as fully_shard"
        )
    return merged  # its own merge was replaced


def _merged_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Map each block class whose branches are known to its subclass with a merge."""
    classes: dict[type[nn.Module], type[nn.Module]] = {nn.TransformerEncoderLayer: MergedTransformerEncoderLayer}
    if "torchvision.models.resnet" in sys.modules:  # importing it is slow
        from tying.depth.torchvision_blocks import CLASSES

        classes |= CLASSES
    if "timm.models" in sys.modules:
        from tying.depth.timm_blocks import CLASSES as TIMM_CLASSES

        classes |= TIMM_CLASSES
    return classes


def residual_blocks(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the blocks whose names match patterns, by name in the model's order; each block appears once.

    A pattern that matches a :class:`tying.depth.Recurrent` selects the blocks of all its steps.

    Raises:
        ConfigurationError: a pattern matches nothing; or a module that is no block, or lies within another match.
    """
    modules = {clean_name(name): m for name, m in model.named_modules() if name and not isinstance(m, Merge)}
    names = {*match_modules(model, patterns)}
    for name, module in modules.items():  # parents first, since a step may be recurrent itself
        if name in names and isinstance(module, Recurrent):
            names |= {f"{name}.blocks.{step}" for step in range(len(module.blocks))}
    blocks = {name: m for name, m in modules.items() if name in names and not isinstance(m, Recurrent)}
    _check_blocks(blocks)
    return blocks


def _check_blocks(blocks: Mapping[str, nn.Module]) -> None:
    """Raise a ConfigurationError if a module is no block, or lies within another."""
    outer = ""
    for name, block in blocks.items():
        problem = None
        if type(block).forward is nn.Module.forward:
            problem = "has no forward: name the blocks within it"
        elif "forward" in block.__dict__:
            problem = "has a patched forward, which is not that of its class: undo that first"
        elif hasattr(block, "backward_pass"):  # of Reformer, whose gradients would be those of the plain block
            problem = "is reversible, and computes its gradients without a merge: name modules within it"
        elif not merges_in(block) and next(block.parameters(), None) is None:
            problem = (
                "has no parameters, so that there is nothing to skip: name the block around it, or exclude it by '!'"
            )
        elif absent_shortcut(block):
            problem = "has no shortcut, since its output has another shape than its input: exclude it by '!'"
        elif outer and name.startswith(f"{outer}."):
            problem = f"lies within {outer!r}, which matches, too: name one of them"
        if problem:
            raise ConfigurationError(f"blocks: the {type(block).__name__} {name!r} {problem}")
        outer = outer if outer and name.startswith(f"{outer}.") else name

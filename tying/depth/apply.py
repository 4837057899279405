"""Put merges into the residual blocks of a model, and take them out again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.merge import Branch, Merge, Residual, Sum
from tying.depth.recurrent import Recurrent
from tying.errors import ConfigurationError, listed, nearest
from tying.selection.index import clean_name
from tying.selection.patterns import Pattern


class MergedTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch's TransformerEncoderLayer with a merge, which combines each of its branches with its shortcut."""

    merge: nn.Module

    @override
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        samples = 0 if self.self_attn.batch_first else 1
        if src.ndim == 2:  # one sample alone
            src, alone = src.unsqueeze(samples), src
            padding = None if src_key_padding_mask is None else src_key_padding_mask.unsqueeze(0)
            return self(src, src_mask, padding, is_causal).view_as(alone)  # type: ignore[no-any-return]  # a module
        padding, mask = (_additive(one, src.dtype) for one in (src_key_padding_mask, src_mask))
        own = mask is not None and mask.ndim == 3  # a mask for each sample and head
        if mask is not None and own:
            mask = mask.view(-1, self.self_attn.num_heads, *mask.shape[1:])

        def attend(x: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor:
            mask = mask.flatten(0, 1) if mask is not None and own else mask
            return self._sa_block(self.norm1(x) if self.norm_first else x, mask, padding, is_causal=is_causal)

        def feed(x: Tensor) -> Tensor:
            return self._ff_block(self.norm2(x) if self.norm_first else x)

        first = [self.norm1] if self.norm_first else []
        second = [self.norm2] if self.norm_first else []
        inputs = [(src, samples), (padding, 0), (mask, 0 if own else None)]
        x: Tensor = self.merge(src, Branch(attend, inputs, [*first, self.self_attn]))
        x = x if self.norm_first else self.norm1(x)
        x = self.merge(x, Branch(feed, [(x, samples)], [*second, self.linear1, self.linear2]))
        return x if self.norm_first else self.norm2(x)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def merged_kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """Return, for each kind of block, the one that has a merge."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {nn.TransformerEncoderLayer: MergedTransformerEncoderLayer}
    if "torchvision.models.resnet" in sys.modules:  # or else there is none of its blocks; it takes a second to import
        from tying.depth.torchvision_blocks import KINDS

        kinds |= KINDS
    return kinds


def keep_schedule(first: float, last: float, count: int) -> list[float]:
    """Return probabilities from first to last, both included, in equal steps.

    Args:
        first: of the first block.
        last: of the last block; of one alone.
        count: number of blocks.

    Raises:
        ConfigurationError: a probability is none, or there is no block.

    Example:
        >>> keep_schedule(1.0, 0.5, 3)
        [1.0, 0.75, 0.5]
    """
    if count < 1:
        raise ConfigurationError(f"count must be 1 or more, not {count}")
    if not (0 <= first <= 1 and 0 <= last <= 1):
        raise ConfigurationError(f"keeps are probabilities, from 0 to 1, not {first} and {last}")
    return [first + (last - first) * place / (count - 1) for place in range(count)] if count > 1 else [last]


def apply_merge(
    model: nn.Module, blocks: str | Sequence[str], merge: nn.Module, keep: float | Iterable[float] | None = None
) -> int:
    """Let a merge combine branch and shortcut in residual blocks of a model; return how many blocks there are.

    Blocks are :class:`tying.depth.Residual`, torchvision's ``BasicBlock`` and ``Bottleneck``, and torch's
    ``TransformerEncoderLayer``, in which the merge combines both branches. Names and values of the model's state stay.

    Args:
        model: changed in place.
        blocks: a pattern of names of modules, or several.
        merge: each block gets a copy; called as ``merge(shortcut, branch)``.
        keep: probability in place of all that the merge has: one, or one for each block in the model's order.

    Raises:
        ConfigurationError: a pattern matches nothing, or something that is no residual block, or one that has a merge
            already; there are not as many keeps as blocks, or one is no probability. Nothing is changed then.

    Example:
        >>> from tying.depth import StochasticDepth, Swapout
        >>> model = nn.Sequential(Residual(nn.Linear(2, 2)), Residual(nn.Linear(2, 2)))
        >>> apply_merge(model, "*", StochasticDepth(keep=0.5), keep=[0.9, 0.8])
        2
        >>> model[1].merge
        StochasticDepth(keep=0.8, mode='batch', scale='test')
    """
    found = residual_blocks(model, blocks)
    _check_merge(merge)
    if keep is None:
        return put_merges(model, found, [merge] * len(found))
    if not isinstance(merge, Merge):
        raise ConfigurationError(f"keep needs a tying.depth.Merge, which {type(merge).__name__} is not")
    keeps = _keeps(keep, len(found))
    if len(keeps) != len(found):
        raise ConfigurationError(f"{len(keeps)} keeps for {len(found)} blocks: {listed(found)}")
    return put_merges(model, found, [merge.with_keep(one) for one in keeps])


def _check_merge(merge: object) -> None:
    if not isinstance(merge, nn.Module):
        told = f"the class {merge.__name__}" if isinstance(merge, type) else repr(merge)
        raise ConfigurationError(f"merge is a module, called as merge(shortcut, branch), not {told}")


def _keeps(keep: object, count: int) -> list[float]:
    try:
        return [float(one) for one in keep] if isinstance(keep, Iterable) else [float(keep)] * count  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigurationError(f"keep is a number, or one for each block, not {keep!r}") from None


def put_merges(model: nn.Module, blocks: Mapping[str, nn.Module], merges: Sequence[nn.Module]) -> int:
    """Give each of a model's residual blocks, by name, a copy of its merge; return how many blocks there are.

    Raises:
        ConfigurationError: a block has a merge already. Nothing is changed then.
    """
    if taken := [f"{name} ({type(merge).__name__})" for name, block in blocks.items() if (merge := merge_of(block))]:
        raise ConfigurationError(
            f"{listed(taken)}: merged already: leave out merge= where the "
            "model makes its own, and take out by remove_merge what apply_merge, or ResidualMerging, put in"
        )
    kinds = merged_kinds()
    copies = [copy.deepcopy(merge) for merge in merges]
    for block, own in zip(blocks.values(), copies, strict=True):
        own.train(block.training)
        if isinstance(block, Residual):
            block.__dict__["_merge_before"] = block.merge  # past nn.Module, which would make it a part of the block
        else:
            block.__class__ = kinds[type(block)]
        block.merge = own
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and {*encoder.layers} & {*blocks.values()}:
            encoder.__dict__.setdefault("_nested_before", encoder.use_nested_tensor)
            encoder.use_nested_tensor = False  # its layers would get samples without padding in evaluation
    return len(blocks)


def remove_merge(model: nn.Module) -> int:
    """Take all merges out that :func:`apply_merge` has put into blocks of a model; return how many blocks that were.

    Example:
        >>> from tying.depth import Swapout
        >>> model = nn.Sequential(Residual(nn.Linear(2, 2)))
        >>> apply_merge(model, "0", Swapout(0.5, 0.5)), remove_merge(model), model[0].merge
        (1, 1, Sum())
    """
    count, plain = 0, {merged: kind for kind, merged in merged_kinds().items()}
    for module in [*model.modules()]:
        module.__dict__.pop("_merged_by", None)
        if "_merge_before" in module.__dict__:
            module.merge = module.__dict__.pop("_merge_before")
        elif type(module) in plain:
            del module.merge
            module.__class__ = plain[type(module)]
        else:
            if "_nested_before" in module.__dict__:
                module.use_nested_tensor = module.__dict__.pop("_nested_before")
            continue
        count += 1
    return count


def merge_of(block: nn.Module) -> nn.Module | None:
    """Return the merge of a residual block; nothing where that is a sum, which another may replace."""
    if isinstance(block, Residual) and type(block.merge) is Sum and "_merge_before" not in block.__dict__:
        return None
    merged = isinstance(block, Residual) or type(block) in merged_kinds().values()
    return cast(nn.Module, block.merge) if merged else None


def residual_blocks(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the residual blocks that patterns of names match, in the model's order; one of several names once.

    Of a :class:`tying.depth.Recurrent`, which is matched as one, these are the blocks of all steps.

    Raises:
        ConfigurationError: a pattern matches nothing, or a module that is no residual block.
    """
    names = {clean_name(name): module for name, module in model.named_modules() if name}
    chosen = [Pattern(text) for text in ([patterns] if isinstance(patterns, str) else patterns)]
    if not chosen:
        raise ConfigurationError("blocks must be a pattern of names of modules, or several, not []")
    matched: set[str] = set()
    for pattern in chosen:
        own = {name for name in names if pattern.match(name) is not None}
        if not own:
            close = nearest(pattern.text, names)
            raise ConfigurationError(f"blocks: pattern {pattern.text!r} matches no module.{close}")
        matched |= own
    for name, module in names.items():  # parents first: a block may be recurrent itself
        if name in matched and isinstance(module, Recurrent):
            matched |= {f"{name}.blocks.{step}" for step in range(len(module.blocks))}
    found = {name: m for name, m in names.items() if name in matched and not isinstance(m, Recurrent)}
    kinds = merged_kinds()
    known = {*kinds, *kinds.values()}
    other = {name: type(m) for name, m in found.items() if not isinstance(m, Residual) and type(m) not in known}
    if other:
        told = listed(
            f"{name!r} is a {kind.__name__} of {kind.__module__.split('.')[0]}" for name, kind in other.items()
        )
        raise ConfigurationError(
            f"blocks: {told}, whose branch and shortcut cannot be told apart: there are tying.depth.Residual, "
            "BasicBlock and Bottleneck of torchvision, and TransformerEncoderLayer of torch. Write such a block as "
            "tying.depth.Residual(branch, shortcut, activation=...), or name the blocks alone"
        )
    return found

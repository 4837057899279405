"""Train stages of equal blocks as recurrent blocks."""

from torch import nn
from typing_extensions import override

from tying.callbacks.base import counted
from tying.callbacks.transform import ModelTransform, arguments_of
from tying.depth import Recurrent, recur
from tying.depth.recurrent import check_steps
from tying.errors import listed
from tying.selection.index import clean_name
from tying.selection.patterns import Pattern


class RecurrentDepth(ModelTransform):
    """Turn stages of equal blocks into recurrent blocks, before the optimizers are made; see :func:`tying.depth.recur`.

    List it before callbacks that act on weights of the blocks: names in the model change.

    Args:
        blocks: a pattern of names of modules, or several; each run of consecutive blocks becomes one
            :class:`tying.depth.Recurrent`.
        steps: the number of steps of each; default: the number of its blocks.
        per_step_norm: whether each step has separate normalisation layers and statistics.

    Raises:
        ConfigurationError: ``steps`` is below 1; when the model is set up, see ``recur``.

    Example:
        >>> RecurrentDepth("network.layer3.{1..5}").per_step_norm
        True
    """

    distinguished_by = "blocks"

    def __init__(self, blocks: str | list[str], steps: int | None = None, per_step_norm: bool = True) -> None:
        self.blocks = blocks if isinstance(blocks, str) else [*blocks]
        self.steps = steps if steps is None else check_steps(steps)
        self.per_step_norm = per_step_norm

    @override
    def change(self, model: nn.Module) -> list[str]:
        former = {*_recurrent_blocks(model).values()}
        recur(model, self.blocks, self.steps, self.per_step_norm)
        for recurrent in _recurrent_blocks(model).values():
            if recurrent not in former:
                recurrent.made_by = arguments_of(self)
        return self.changed(model)

    @override
    def adopt(self, model: nn.Module) -> None:
        patterns = [Pattern(text) for text in ([self.blocks] if isinstance(self.blocks, str) else self.blocks)]
        for path, recurrent in _recurrent_blocks(model).items():
            if self.steps in (None, recurrent.steps) and any(pattern.match(path) is not None for pattern in patterns):
                recurrent.made_by = recurrent.made_by or arguments_of(self)

    @override
    def changed(self, model: nn.Module) -> list[str]:
        return [
            f"{path}.{clean_name(name)}"
            for path, recurrent in self._made(model).items()
            for name, _ in recurrent.named_parameters(remove_duplicate=False)
        ]

    @override
    def is_applied(self, model: nn.Module) -> bool:
        return bool(self._made(model))

    @override
    def describe(self, model: nn.Module) -> str:
        stages = [f"{path} ({recurrent.steps} steps)" for path, recurrent in self._made(model).items()]
        return f"{counted(len(stages), 'recurrent block')}: {listed(stages)}"

    def _made(self, model: nn.Module) -> dict[str, Recurrent]:
        """Return the recurrent blocks that this callback, or an equal one, has made."""
        arguments = arguments_of(self)  # not names, which other stages change
        return {path: block for path, block in _recurrent_blocks(model).items() if block.made_by == arguments}


def _recurrent_blocks(model: nn.Module) -> dict[str, Recurrent]:
    return {clean_name(name): module for name, module in model.named_modules() if isinstance(module, Recurrent)}

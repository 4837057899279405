"""Train stages of equal blocks as recurrent blocks."""

from torch import nn
from typing_extensions import override

from tying.callbacks.transform import ModelTransform
from tying.depth import Recurrent, recur
from tying.depth.recurrent import check_steps
from tying.errors import listed
from tying.selection.index import clean_name
from tying.weights.derived import derived_weights


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

    def __init__(self, blocks: str | list[str], steps: int | None = None, per_step_norm: bool = True) -> None:
        self.blocks = blocks if isinstance(blocks, str) else [*blocks]
        self.steps = steps if steps is None else check_steps(steps)
        self.per_step_norm = per_step_norm

    @override
    def change(self, model: nn.Module) -> list[str]:
        former = {*_recurrent_blocks(model).values()}
        recur(model, self.blocks, self.steps, self.per_step_norm)
        return [
            clean_name(f"{path}.{name}")
            for path, recurrent in _recurrent_blocks(model).items()
            if recurrent not in former
            for name, _ in recurrent.named_parameters(remove_duplicate=False)
        ]

    @override
    def is_applied(self, model: nn.Module) -> bool:
        if not (names := self.changed(model)):
            return False
        weights = {clean_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
        return {*names} <= weights | derived_weights(model, aliases=True).keys()

    @override
    def describe(self, model: nn.Module) -> str:
        names = {*self.changed(model)}
        stages = [
            f"{path} ({recurrent.steps} steps)"
            for path, recurrent in _recurrent_blocks(model).items()
            if any(name.startswith(f"{path}.") for name in names)
        ]
        return f"{len(stages)} recurrent blocks: {listed(stages)}"


def _recurrent_blocks(model: nn.Module) -> dict[str, Recurrent]:
    return {clean_name(name): module for name, module in model.named_modules() if isinstance(module, Recurrent)}

"""A block that is applied repeatedly: a residual network whose blocks share their weights is a recurrent network."""

import copy
from collections.abc import Sequence
from inspect import signature
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from typing_extensions import override

from tying.depth.merge import zero_gradients
from tying.depth.stages import indices_in, shift_indices
from tying.depth.stochastic_depth import BATCH_NORMS
from tying.errors import ConfigurationError, listed
from tying.torch_workarounds import is_jit_tracing, is_proxy
from tying.weights.tie import Init, make_ties

NORMS = (
    *BATCH_NORMS,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


class Recurrent(nn.Module):
    """Apply a block several times, ``h_{t+1} = block(h_t)``; all applications share its weights.

    Every step gets the further arguments of the call. If the block returns a tuple, its first item is ``h_{t+1}``, and
    the output is the tuple of the last step. Layer indices in the copies of a block, such as transformers'
    ``layer_idx``, count up, so that each step has its own cache of keys and values.

    Args:
        block: maps its input to an output of the same shape; it becomes the first entry of ``blocks``.
        steps: number of applications, T.
        per_step_norm: whether each step has separate normalisation layers and statistics; if False, all steps use the
            first step's.

    ``steps`` may be changed later, even to more than the initial number: additional steps use the normalisation layers
    of the last step.

    Shape: the output has the shape of the input.

    Raises:
        ConfigurationError: ``steps`` is below 1, the weights of the block are parametrized, or, in use, the block
            changes the shape.

    Example:
        >>> import torch
        >>> recurrent = Recurrent(nn.Linear(4, 4), steps=3)
        >>> sum(p.numel() for p in recurrent.parameters()), recurrent(torch.zeros(2, 4)).shape
        (20, torch.Size([2, 4]))

    Source: Q. Liao and T. Poggio, Bridging the gaps between residual learning, recurrent neural networks and visual
    cortex, 2016.
    """

    former_keys: tuple[str, ...] = ()  # of the blocks in their container, where recur has replaced them
    made_by = ""  # the arguments of the callback that called recur

    def __init__(self, block: nn.Module, steps: int, per_step_norm: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])
        self._steps = check_steps(steps)
        if parametrized := [name for name, part in block.named_modules() if isinstance(part, ParametrizationList)]:
            raise ConfigurationError(
                f"Recurrent takes a block whose weights are parameters, not {listed(parametrized)}: parametrize the "
                "Recurrent instead of the block"
            )
        if per_step_norm or indices_in(block):
            copies = [copy.deepcopy(block) for _ in range(steps - 1)]
            for step, copied in enumerate(copies, 1):
                shift_indices(copied, step)
            self._share([block, *copies], per_step_norm)

    @classmethod
    def of_blocks(cls, blocks: Sequence[nn.Module], per_step_norm: bool, init: Init) -> Self:
        """Return a module whose steps are these blocks, which share their weights from now on."""
        recurrent = cls(blocks[0], 1)
        recurrent._share(blocks, per_step_norm, init)
        recurrent.steps = len(blocks)
        return recurrent

    def _share(self, blocks: Sequence[nn.Module], per_step_norm: bool, init: Init = "source") -> None:
        """Take these blocks as steps and share their weights: the first step's, or the mean."""
        self.blocks = nn.ModuleList(blocks)
        norms = norms_in(blocks[0])
        shared = [
            name
            for name, parameter in blocks[0].named_parameters()
            if not (per_step_norm and name.rpartition(".")[0] in norms)
            and any(block.get_parameter(name) is not parameter for block in blocks)
        ]
        if shared:
            make_ties(self, [f"blocks.*.{name}" for name in shared], init)
        for name, norm in norms.items() if not per_step_norm else ():
            for block in blocks[1:]:
                block.set_submodule(name, norm)  # with its statistics

    @property
    def steps(self) -> int:
        """Number of applications of the block."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        if check_steps(steps) > len(self.blocks) and (indices := indices_in(self.blocks[0])):
            path, attribute = next(iter(indices))
            raise ConfigurationError(
                f"steps={steps} would use the last of {len(self.blocks)} blocks repeatedly, and with it one cache of "
                f"keys and values, by the {attribute} of {path!r}: undo recur by unrecur, and call it with more steps"
            )
        self._steps = steps

    @override
    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the last step."""
        if is_proxy(args):  # where torch.fx begins with this module; what it is called with is x
            args, kwargs = (), {}
        if x is None:
            x = kwargs.pop(next(iter(signature(self.blocks[0].forward).parameters)))
        for step in range(self.steps):
            out = self.blocks[min(step, len(self.blocks) - 1)](x, *args, **kwargs)
            if isinstance(out, tuple | list) and step < self.steps - 1:
                _check_states(out, (*args, *kwargs.values()))
            x = _same_shape(x, out[0] if isinstance(out, tuple | list) else out)
        unused = self.blocks[self.steps :]
        if unused and self.training:
            x = zero_gradients(x, unused.parameters())
            return (x, *out[1:]) if isinstance(out, tuple | list) else x
        return out

    @override
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            blocks = vars(self).get("_modules", {}).get("blocks")
            block = blocks[0] if blocks else None
            if block is not None and name[0] != "_" and name != "parametrizations":
                attributes = vars(block) | dict(block.named_children())  # callers of a stage read some of its layers
                if name in attributes:
                    return attributes[name]
            raise

    @override
    def extra_repr(self) -> str:
        return f"steps={self.steps}"


def _check_states(out: Sequence[Any], arguments: Sequence[Any]) -> None:
    """Raise a ConfigurationError if a further output replaces an argument, as in a block of two states.

    The next step gets the hidden state of this one, and the same further arguments.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    for number, value in enumerate(out[1:], 2):
        if not isinstance(value, Tensor) or is_proxy(value) or any(value is tensor for tensor in tensors):
            continue
        if any((value.shape, value.dtype) == (tensor.shape, tensor.dtype) for tensor in tensors):
            raise ConfigurationError(
                f"a recurrent block must have one state, and its output {number} seems to be a second one: it has the "
                f"shape of an argument, {tuple(value.shape)}, and would not replace it in the next step. Tie the "
                "weights of the blocks by tying.hard.tie instead"
            )


def _same_shape(x: Any, out: Any) -> Any:
    """Return the output of a step, after checking that it has the shape of its input x."""
    if is_proxy(x) or is_jit_tracing() or (isinstance(x, Tensor) and x.is_nested):  # whose shapes are not known
        return out
    if not isinstance(out, Tensor) or not isinstance(x, Tensor) or out.shape != x.shape:
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else f"a {type(v).__name__}" for v in (out, x)]
        raise ConfigurationError(
            f"a recurrent block must keep the shape of its input, a tensor: it returns {shapes[0]} for {shapes[1]}"
        )
    return out


def check_steps(steps: int) -> int:
    """Return the number of steps, after checking that it is an integer of 1 or more."""
    if not isinstance(steps, int) or steps < 1:
        raise ConfigurationError(f"steps must be an integer, 1 or more, not {steps!r}")
    return steps


def norms_in(block: nn.Module) -> dict[str, nn.Module]:
    """Return the normalisation layers of a block by name, with those that libraries write, such as LlamaRMSNorm."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, NORMS)
        or (
            "norm" in type(module).__name__.lower()
            and not [*module.children()]
            and all(parameter.ndim <= 1 for parameter in module.parameters())
        )
    }

"""Merges on whole blocks: a block that keeps the shape of its input x is ``x + F(x)`` with ``F(x) = block(x) − x``."""

import copy
import copyreg
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from tying.depth.merge import Branch
from tying.depth.rows import named_tensors, rows_obstacle, take_arguments, take_rows
from tying.depth.stochastic_depth import StochasticDepth
from tying.depth.tracing import LeafModule
from tying.errors import ConfigurationError, listed
from tying.torch_workarounds import is_jit_tracing, is_recorded

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
SHARED = {"cache_position"}  # positions along a sequence, the same for all samples


class GeneratedType(ABCMeta):
    """The class of generated classes, which are pickled as calls of :func:`generate_class`."""


GENERATED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def generate_class(behaviour: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a module's class that behaves as another class says; the same in each call.

    Example:
        >>> [cls.__name__ for cls in generate_class(MergedBlock, nn.Linear).__mro__[:4]]
        ['MergedLinear', 'MergedBlock', 'LeafModule', 'Linear']
    """
    if (bases := (behaviour, plain)) not in GENERATED:
        name = f"{behaviour.__name__.removesuffix('Block')}{plain.__name__}"
        GENERATED[bases] = cast(type[nn.Module], GeneratedType(name, bases, {"__module__": __name__}))
    return GENERATED[bases]


def _reduce(cls: GeneratedType) -> tuple[Callable[..., Any], tuple[type, ...]]:
    return generate_class, cls.__bases__


copyreg.pickle(GeneratedType, _reduce)


def original_class(generated: type[nn.Module]) -> type[nn.Module]:
    """Return the class from which :func:`generate_class` made another."""
    return cast(type[nn.Module], generated.__bases__[1])


@dataclass
class ResidualNotice:
    """Warns once if a block does not add its input to its output; all blocks of one ``apply_merge`` share it."""

    given: bool = False

    def give(self, block: str) -> None:
        """Warn, unless that has been done."""
        if not self.given:
            self.given = True
            warnings.warn(
                f"{block} does not add its input to its output, as residual blocks do. A merge takes it for one, since "
                "it keeps the shape of its input; if that is not what you want, name other blocks",
                stacklevel=2,
            )


@dataclass(frozen=True)
class FurtherOutputs:
    """The outputs of a block after the first: what a skipped block returns for them.

    Attributes:
        container: makes the outputs from a list; None if the block returns a single tensor.
        constants: None, numbers and strings, by the number of the output; the second output has number 2.
        passed: the labels of arguments that the block passes on.
        computed: descriptions of what only the block can compute.
    """

    container: Callable[[list[Any]], Any] | None = None
    constants: dict[int, Any] = field(default_factory=dict)
    passed: dict[int, str] = field(default_factory=dict)
    computed: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, outputs: Any, arguments: Mapping[str, Any]) -> "FurtherOutputs":
        """Return where the outputs of a call with the given arguments come from."""
        if isinstance(outputs, Tensor):
            return cls()
        further = cls(container_of(outputs))
        for number, value in enumerate(outputs[1:], 2):
            if value is None or isinstance(value, (bool, int, float, str)):
                further.constants[number] = value
            elif label := next((label for label, argument in arguments.items() if argument is value), None):
                further.passed[number] = label
            else:
                further.computed[number] = f"output {number} ({describe(value)})"
        return further

    def around(self, hidden: Tensor, arguments: Mapping[str, Any]) -> Any:
        """Return the outputs of a block: the hidden state, and what the block passes on."""
        if self.container is None:
            return hidden
        further = self.constants | {number: arguments[label] for number, label in self.passed.items()}
        return self.container([hidden, *(further[number] for number in sorted(further))])


@dataclass
class BlockState:
    """What a block with a merge knows beside its merge.

    Attributes:
        name: the name of the block in the model, and its class.
        merge: the attribute name of the merge.
        parameters: the names of the block's positional parameters.
        returns_tensor: whether the block declares to return a tensor alone, and has returned nothing else.
        notice: warns if the block proves not to be residual; None once that is known.
        further: the further outputs, by the kinds of arguments.
    """

    name: str
    merge: str
    parameters: tuple[str, ...]
    returns_tensor: bool
    notice: ResidualNotice | None
    further: dict[object, FurtherOutputs] = field(default_factory=dict)


def block_state(block: nn.Module, name: str, notice: ResidualNotice) -> BlockState:
    """Return the state of a block that has no merge yet; the name stands in errors."""
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    declared = signature(block.forward)
    positional = tuple(parameter.name for parameter in declared.parameters.values() if parameter.kind in kinds)
    returns_tensor = declared.return_annotation in (Tensor, "Tensor", "torch.Tensor")
    merge = "block_merge" if hasattr(block, "merge") else "merge"
    return BlockState(name, merge, positional, returns_tensor, notice)


class MergedBlock(LeafModule):
    """First base of the generated class of a block: a merge decides whether, and for which samples, to compute it.

    ``torch.fx`` records the block as one node.
    """

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: BlockState | None = self.__dict__.get("_block_state")
        if state is None:  # a module that someone made by calling the class of a block
            return super().forward(*args, **kwargs)
        merge = getattr(self, state.merge)
        branch = BlockBranch(self, state, super().forward, args, kwargs)
        if merge.training and not is_recorded():
            branch.check_caches()
            if may_skip(merge):
                branch.check_skippable()
        return branch.complete(merge(branch.x, branch), merge)


class MergedList(MergedBlock):
    """A block that iterates over its children, such as ``nn.Sequential``: the merge is none of them."""

    def __iter__(self) -> Iterator[nn.Module]:
        state = self.__dict__.get("_block_state")
        return (child for name, child in self.named_children() if state is None or name != state.merge)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def merged_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the class that blocks of a plain class have while they have a merge."""
    return generate_class(MergedList if issubclass(plain, (nn.Sequential, nn.ModuleList)) else MergedBlock, plain)


def may_skip(merge: nn.Module) -> bool:
    """Return whether a merge may skip a block, or compute it for some samples only, whatever the block is."""
    return isinstance(merge, StochasticDepth) and merge.mode in ("batch", "subset") and merge.keep_prob("keep") < 1


class BlockBranch(Branch):
    """The branch F of a whole block: its output minus its first tensor argument.

    Args:
        block: the block.
        state: the state of the block.
        compute: the plain forward of the block.
        args: the arguments of the block.
        kwargs: the keyword arguments of the block.
    """

    def __init__(
        self,
        block: nn.Module,
        state: BlockState,
        compute: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.block, self.state, self.args, self.kwargs = block, state, args, kwargs
        self.x = self._first_tensor()
        self.outputs: Any = None  # for all samples, once they are computed
        self.watch: AdditionWatch | None = None
        super().__init__(compute, [(self.x, 0)], [block], whole=True)

    @override
    def output(self, rows: Tensor | None = None) -> Tensor:
        if rows is None:
            self.outputs = self._call(self.x, self.args, self.kwargs)
            return cast(Tensor, first_output(self.outputs))
        x = take_rows(self.x, rows)
        taken = [
            value if name in SHARED else x if value is self.x else take_arguments(value, rows, len(self.x), name)
            for name, value in self._named_arguments()
        ]
        args, kwargs = taken[: len(self.args)], dict(zip(self.kwargs, taken[len(self.args) :], strict=True))
        return cast(Tensor, first_output(self._call(x, args, kwargs)))

    @override
    def obstacle(self) -> str | None:
        if further := self._further().computed:
            return (
                f"cannot select samples of {self.state.name}, which computes {listed(further.values())}: use mode='row'"
            )
        tensors = (
            item
            for name, value in self._named_arguments()
            if value is not self.x and name not in SHARED
            for item in named_tensors(value, f"{name} of {self.state.name}")
        )
        return next((text for name, tensor in tensors if (text := rows_obstacle(tensor, len(self.x), name))), None)

    @override
    def unused(self) -> Iterable[Tensor]:
        yield from self.block.parameters()
        yield from (value for value in self._arguments().values() if isinstance(value, Tensor) and value is not self.x)

    def complete(self, merged: Tensor, merge: nn.Module) -> Any:
        """Return the outputs of the block, with the merged hidden state as the first."""
        if self.watch is not None and self.state.notice is not None:
            if not self.watch.has_added:
                self.state.notice.give(self.state.name)
            self.state.notice = None
        if self.outputs is None and (not merge.training or is_recorded()):
            self.output()  # its caches and further outputs are needed, although its hidden state is not
        if self.outputs is None:
            self.check_skippable()
            return self._further().around(merged, self._arguments())
        return merged if isinstance(self.outputs, Tensor) else container_of(self.outputs)([merged, *self.outputs[1:]])

    def check_skippable(self) -> None:
        """Raise a ConfigurationError if a skipped block would have to invent an output."""
        if computed := self._further().computed:
            raise ConfigurationError(
                f"{self.state.name} cannot be skipped, since it alone computes {listed(computed.values())}, which "
                "later blocks or the model may need. Leave it out of blocks, by a leading '!' for example, or use "
                "mode='row', which computes it for all samples"
            )

    def check_caches(self) -> None:
        """Raise a ConfigurationError if a key-value cache holds earlier positions: a skipped block adds none to it."""
        for name, value in self._named_arguments():
            if is_filled_cache(name, value, self.block):
                raise ConfigurationError(
                    f"{self.state.name} is called with a filled cache, {name!r}, in training mode: a block that is "
                    "skipped adds no positions to it. Call model.eval() to generate, or train with use_cache=False"
                )

    def _call(self, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the plain forward; check what it returns for the given hidden state."""
        outputs: Any
        watches = self.block.training and not torch.compiler.is_compiling() and not is_recorded()
        with AdditionWatch(x) if watches and self.state.notice is not None else nullcontext() as self.watch:
            outputs = self.compute(*args, **kwargs)
        if not isinstance(hidden := first_output(outputs), Tensor):
            raise ConfigurationError(
                f"{self.state.name} returns {describe(outputs)}: a merge needs a block that returns a tensor, or a "
                "tuple whose first item is one. Name other blocks"
            )
        if not isinstance(outputs, Tensor):
            self.state.returns_tensor = False
        if not is_jit_tracing() and hidden.shape != x.shape:
            raise ConfigurationError(
                f"{self.state.name} maps {tuple(x.shape)} to {tuple(hidden.shape)}: a merge needs a block that keeps "
                "the shape of its first tensor argument. Name only such blocks"
            )
        return outputs

    def _further(self) -> FurtherOutputs:
        """Return the outputs after the first, by what the block declares, or by a former call or a first one."""
        return FurtherOutputs() if self.state.returns_tensor else self._observed()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's; it stores what it observes
    def _observed(self) -> FurtherOutputs:
        """Return the further outputs for arguments of this kind; the first time, compute the block and forget it."""
        kind = tuple(
            (label, value if isinstance(value, (bool, str)) else type(value))
            for label, value in self._arguments().items()
        )
        if kind not in self.state.further:
            buffers = [(buffer, buffer.clone()) for buffer in self.block.buffers()]
            args = tuple(copied_cache(value) for value in self.args)
            kwargs = {name: copied_cache(value) for name, value in self.kwargs.items()}
            branch = BlockBranch(self.block, self.state, self.compute, args, kwargs)
            with torch.no_grad(), torch.random.fork_rng([self.x.device] if self.x.is_cuda else []):
                branch.output()
                for buffer, value in buffers:
                    buffer.copy_(value)
            torch.clear_autocast_cache()  # it holds weights that were cast without gradients
            self.state.further[kind] = FurtherOutputs.of(branch.outputs, branch._arguments())
        return self.state.further[kind]

    def _first_tensor(self) -> Tensor:
        in_order = (
            *self.args,
            *(self.kwargs[name] for name in (*self.state.parameters, *self.kwargs) if name in self.kwargs),
        )
        for value in in_order:
            if isinstance(value, Tensor):
                return value
        raise ConfigurationError(
            f"{self.state.name} is called without a tensor: a merge needs a block whose first tensor argument is the "
            "hidden state. Name other blocks"
        )

    def _named_arguments(self) -> Iterator[tuple[str, Any]]:
        for number, value in enumerate(self.args):
            yield (
                self.state.parameters[number] if number < len(self.state.parameters) else f"argument {number + 1}",
                value,
            )
        yield from self.kwargs.items()

    def _arguments(self) -> dict[str, Any]:
        """Return all arguments, and the parts of tuples, lists and dicts, by label."""
        return dict(parts for name, value in self._named_arguments() for parts in labelled_parts(name, value))


class AdditionWatch(TorchFunctionMode):
    """Observes whether a tensor is added to another.

    Args:
        x: the tensor; views of it count.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.has_added = x, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function; remember if it adds the tensor."""
        if getattr(func, "__name__", "") in ADDITIONS:
            self.has_added |= any(is_view(value, self.x) for value in (*args, *(kwargs or {}).values()))
        return func(*args, **(kwargs or {}))


def is_view(value: object, x: Tensor) -> bool:
    """Return whether a value is a tensor, or a view of it.

    Example:
        >>> x = torch.ones(2, 3)
        >>> is_view(x.flatten(), x), is_view(x + 1, x)
        (True, False)
    """
    if value is x or type(value) is not Tensor or type(x) is not Tensor:
        return value is x
    return value.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def first_output(outputs: Any) -> Any:
    """Return the first item of a tuple or list, or another output as it is."""
    return outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs


def container_of(outputs: Any) -> Callable[[list[Any]], Any]:
    """Return the function that makes a tuple, named tuple or list like the given one from a list."""
    return cast(Callable[[list[Any]], Any], getattr(outputs, "_make", type(outputs)))


def labelled_parts(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a value and its label, and those of its parts if it is a tuple, list or dict.

    Example:
        >>> [*labelled_parts("pair", (1, 2))]
        [('pair', (1, 2)), ('pair[0]', 1), ('pair[1]', 2)]
    """
    yield label, value
    if isinstance(value, (tuple, list, dict)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from labelled_parts(f"{label}[{key!r}]", part)


def describe(value: Any) -> str:
    """Describe an output in an error.

    Example:
        >>> describe(torch.ones(2, 3)), describe({})
        ('a tensor of shape (2, 3)', 'a dict')
    """
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class TensorsAsTheyAre(TorchFunctionMode):
    """Lets ``copy.deepcopy`` keep the tensors within what it copies: those of a graph cannot be copied."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, unless it copies a tensor."""
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def copied_cache(value: Any) -> Any:
    """Return a copy of a key-value cache, with the same tensors, or another argument as it is."""
    if not hasattr(value, "get_seq_length"):
        return value
    with TensorsAsTheyAre():
        return copy.deepcopy(value)


def is_filled_cache(name: str, value: Any, block: nn.Module) -> bool:
    """Return whether an argument of a block is a key-value cache with entries of the block.

    Caches are recognised by the methods of transformers' ``Cache``; older ones are tuples of tensors.
    """
    if isinstance(value, (tuple, list)):
        return "past" in name and any(True for _ in named_tensors(value, name))
    if not hasattr(value, "get_seq_length"):
        return False
    indices = (getattr(module, "layer_idx", None) for module in block.modules())
    index = next((index for index in indices if isinstance(index, int)), 0)
    try:
        return bool(value.get_seq_length(index) > 0)
    except ValueError:  # the layer has a state instead of a sequence
        return bool(value.has_previous_state(index))

"""Merges on whole blocks: a block that keeps the shape of its input x is ``x + F(x)`` with ``F(x) = block(x) − x``."""

import copy
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from tying.depth.addition_watch import AdditionWatch, ResidualNotice
from tying.depth.further_outputs import FurtherOutputs, container_of, describe, first_output, labelled_parts
from tying.depth.generated_classes import generate_class
from tying.depth.merge import Branch
from tying.depth.rows import named_tensors, rows_obstacle, take_arguments, take_rows
from tying.depth.sample_watch import SampleNotice
from tying.depth.stochastic_depth import StochasticDepth
from tying.depth.tracing import LeafModule
from tying.errors import ConfigurationError, listed
from tying.torch_workarounds import count_writes, is_jit_tracing, is_recorded, recorded_parts

SHARED = {"cache_position"}  # positions along a sequence, the same for all samples
POSITIONAL = ("rope", "rot", "pos", "freqs", "rel_")  # parts of names of tables with a row for each position
LAYER_NUMBERS = ("layer_idx", "layer_id")  # of a block in a key-value cache of transformers; GPT-Neo has the other
SEQUENCE_LAYERS = (
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.RNNBase,
    nn.MultiheadAttention,
)


class Notices(NamedTuple):
    """The warnings of the blocks of one ``apply_merge``, each given once."""

    residual: ResidualNotice
    samples: SampleNotice


@dataclass
class BlockState:
    """The state of a block with a merge, beside the merge itself.

    Attributes:
        name: the name of the block in the model, and its class.
        merge: the attribute name of the merge.
        parameters: the names of the block's positional parameters.
        returns_tensor: whether the block declares to return a tensor alone, and has returned nothing else.
        keeps_shape: whether the block has returned a hidden state of its input's shape.
        notice: warns if the block proves not to be residual; None once that is known.
        samples: warns if the samples prove to depend on each other.
        further: the further outputs, by the kinds of arguments.
    """

    name: str
    merge: str
    parameters: tuple[str, ...]
    returns_tensor: bool
    notice: ResidualNotice | None
    samples: SampleNotice
    further: dict[object, FurtherOutputs] = field(default_factory=dict)
    keeps_shape: bool = False


def block_state(block: nn.Module, forward: Callable[..., Any], name: str, notices: Notices) -> BlockState:
    """Return the state of a block that has no merge yet, given its plain forward and a name for errors."""
    returns_tensor = signature(forward).return_annotation in (Tensor, "Tensor", "torch.Tensor")
    merge = "block_merge" if hasattr(block, "merge") else "merge"
    return BlockState(name, merge, positional_parameters(forward), returns_tensor, *notices)


def positional_parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the positional parameters of a function.

    Example:
        >>> positional_parameters(nn.Linear(2, 2).forward)
        ('input',)
    """
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in signature(function).parameters.values() if parameter.kind in kinds)


def first_tensor(parameters: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    """Return the position or the name of the first tensor among arguments; None if there is none.

    Args:
        parameters: the names of the positional parameters, by which keyword arguments are ordered.
        args: the positional arguments.
        kwargs: the keyword arguments.

    Example:
        >>> first_tensor(["x", "mask"], [], {"mask": torch.ones(1), "x": torch.ones(1)})
        'x'
    """
    names = [name for name in (*parameters, *kwargs) if name in kwargs]
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *((name, kwargs[name]) for name in names)]
    return next((place for place, value in arguments if isinstance(value, Tensor)), None)


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
            if state.samples.is_due(self, merge):
                branch.check_samples()
            if may_skip(merge):
                branch.check_skippable()
        return branch.complete(merge(branch.x, branch), merge)


class MergedList(MergedBlock):
    """A block that iterates over its children, such as ``nn.Sequential``: the merge is none of them."""

    def __iter__(self) -> Iterator[nn.Module]:
        merge, names = merge_name(self), self.__dict__["_modules"]  # by name: torch.export puts proxies in their place
        return (child for name, child in zip(names, super().__iter__(), strict=True) if name != merge)  # type: ignore[misc]  # the plain class's

    def __len__(self) -> int:
        return sum(1 for _ in self)


class MergedDict(MergedBlock):
    """A block that is an ``nn.ModuleDict``: the merge is none of its values."""

    def items(self) -> ItemsView[str, nn.Module]:
        """Return the items but the merge."""
        merge = merge_name(self)
        return {key: child for key, child in super().items() if key != merge}.items()  # type: ignore[misc]  # the plain class's

    def keys(self) -> KeysView[str]:
        """Return the keys but the merge's."""
        return dict(self.items()).keys()

    def values(self) -> ValuesView[nn.Module]:
        """Return the values but the merge."""
        return dict(self.items()).values()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.items())


def merge_name(block: nn.Module) -> str | None:
    """Return the name of the merge in a whole block; None in a module that a call of the block's class has made."""
    state: BlockState | None = block.__dict__.get("_block_state")
    return None if state is None else state.merge


def merged_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the class that blocks of a plain class have while they have a merge."""
    if issubclass(plain, nn.ModuleDict):
        return generate_class(MergedDict, plain)
    return generate_class(MergedList if issubclass(plain, (nn.Sequential, nn.ModuleList)) else MergedBlock, plain)


def sample_dim(block: nn.Module, x: Tensor) -> int:
    """Return the dimension of samples of a block's input: the second in torch's layers without ``batch_first``.

    Example:
        >>> layer, x = nn.TransformerDecoderLayer(4, 2), torch.zeros(5, 3, 4)
        >>> sample_dim(layer, x), sample_dim(nn.Linear(4, 4), x)
        (1, 0)
    """
    if x.ndim != 3 or not isinstance(block, SEQUENCE_LAYERS):
        return 0
    inner = next((module for module in block.modules() if hasattr(module, "batch_first")), None)
    return int(inner is not None and not inner.batch_first)


def is_table(name: str, tensor: Tensor, count: int) -> bool:
    """Return whether an argument is a table of positions, with as many rows as there are samples by chance.

    Example:
        >>> is_table("rope", torch.zeros(4, 8), 4), is_table("states", torch.zeros(4, 8), 4)
        (True, False)
    """
    by_name = any(part in name for part in POSITIONAL)
    return by_name and tensor.ndim == 2 and tensor.is_floating_point() and len(tensor) == count > 1


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
        self.further: FurtherOutputs | None = None  # once they are asked for
        self.writes = count_writes(self.x)
        self.watch: AdditionWatch | None = None
        super().__init__(compute, [(self.x, sample_dim(block, self.x))], [block], whole=True)

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
        if recorded := recorded_parts():
            return (
                f"cannot select samples of {self.state.name} while transformers records {listed(recorded)} of all "
                "samples within it: do not ask the model for these, or use mode='row'"
            )
        if self.dim:
            return (
                f"cannot select samples of {self.state.name} along dimension {self.dim}: make it with "
                "batch_first=True, or use mode='row'"
            )
        tensors = [
            (name, *item)
            for name, value in self._named_arguments()
            if value is not self.x and name not in SHARED
            for item in named_tensors(value, f"{name} of {self.state.name}")
        ]
        if table := next((text for name, text, tensor in tensors if is_table(name, tensor, len(self.x))), None):
            return f"cannot select samples of {table}, a table with a row for each position: use mode='row'"
        return next((text for _, name, tensor in tensors if (text := rows_obstacle(tensor, len(self.x), name))), None)

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
        needs_input = merged is not first_output(self.outputs) and self.writes is not None
        if needs_input and count_writes(self.x) not in (None, self.writes):
            raise ConfigurationError(
                f"{self.state.name} overwrites its input, which the merge needs afterwards: set inplace=False in the "
                "first operation of the block, or write it to another tensor"
            )
        if self.outputs is None and (not merge.training or is_recorded()):
            self.output()  # its caches and further outputs are needed, although its hidden state is not
        if self.outputs is None:
            self.check_skippable()
            if not self.state.keeps_shape:
                self._observed()  # a block that was never computed may change the shape
            return self._further().around(merged, self._arguments())
        return merged if isinstance(self.outputs, Tensor) else container_of(self.outputs)([merged, *self.outputs[1:]])

    def check_skippable(self) -> None:
        """Raise a ConfigurationError if a skipped block would have to invent an output."""
        if computed := self._further().computed:
            raise ConfigurationError(
                f"{self.state.name} cannot be skipped, since only it computes {listed(computed.values())}, which "
                "later blocks or the model may need. Leave it out of blocks, by a leading '!' for example, or use "
                "mode='row', which computes it for all samples"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's; it branches on values
    def check_samples(self) -> None:
        """Warn if the samples along the first dimension depend on each other."""
        if self.dim == 0:
            self.state.samples.check(
                self.block, self.state.name, self.x, lambda x: cast(Tensor, first_output(self._tried(x).outputs))
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
        self.state.keeps_shape = True
        return outputs

    def _further(self) -> FurtherOutputs:
        """Return the outputs after the first, by what the block declares, or by a former call or a first one."""
        if self.further is None:
            declared = self.state.returns_tensor and self.state.keeps_shape
            self.further = FurtherOutputs() if declared else self._observed()
        return self.further

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's; it stores what it observes
    def _observed(self) -> FurtherOutputs:
        """Return the further outputs for arguments of this kind; the first time, compute the block and forget it."""
        kind = tuple(
            (label, value if isinstance(value, (bool, str)) else type(value))
            for label, value in self._arguments().items()
        )
        if kind not in self.state.further:
            branch = self._tried(self.x)
            self.state.further[kind] = FurtherOutputs.of(branch.outputs, branch._arguments())
        return self.state.further[kind]

    def _tried(self, x: Tensor) -> "BlockBranch":
        """Return a branch that has computed the block for x without side effects."""
        buffers = [(buffer, buffer.clone()) for buffer in self.block.buffers()]
        args = tuple(self._copied(value, x) for value in self.args)
        kwargs = {name: self._copied(value, x) for name, value in self.kwargs.items()}
        branch = BlockBranch(self.block, self.state, self.compute, args, kwargs)
        with torch.no_grad(), torch.random.fork_rng([self.x.device] if self.x.is_cuda else []):
            branch.output()
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # others may be saved for a backward pass
                    buffer.copy_(value)
        torch.clear_autocast_cache()  # it holds weights that were cast without gradients
        return branch

    def _copied(self, value: Any, x: Tensor) -> Any:
        """Return a copy of what a block may write to, its input and a key-value cache, or another argument as it is."""
        if value is self.x:
            return x.clone()
        if not hasattr(value, "get_seq_length"):
            return value
        with TensorsAsTheyAre():
            return copy.deepcopy(value)

    def _first_tensor(self) -> Tensor:
        place = first_tensor(self.state.parameters, self.args, self.kwargs)
        if place is None:
            raise ConfigurationError(
                f"{self.state.name} is called without a tensor: a merge needs a block whose first tensor argument is "
                "the hidden state. Name other blocks"
            )
        return cast(Tensor, self.args[place] if isinstance(place, int) else self.kwargs[place])

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


class TensorsAsTheyAre(TorchFunctionMode):
    """Lets ``copy.deepcopy`` keep the tensors within what it copies: those of a graph cannot be copied."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, unless it copies a tensor."""
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def is_cache(name: str, value: Any) -> bool:
    """Return whether an argument of a block is a key-value cache.

    Caches are recognised by the methods of transformers' ``Cache``; older ones are tuples of tensors.
    """
    return "past" in name if isinstance(value, (tuple, list)) else hasattr(value, "get_seq_length")


def is_filled_cache(name: str, value: Any, block: nn.Module) -> bool:
    """Return whether an argument of a block is a key-value cache with entries of the block."""
    if not is_cache(name, value):
        return False
    if isinstance(value, (tuple, list)):
        return any(True for _ in named_tensors(value, name))
    indices = (getattr(module, name, None) for module in block.modules() for name in LAYER_NUMBERS)
    index = next((index for index in indices if isinstance(index, int)), 0)
    try:
        return bool(value.get_seq_length(index))  # some return None for an empty one
    except ValueError:  # the layer has a state instead of a sequence
        return bool(value.has_previous_state(index))

"""Loops: consecutive blocks of a model that run several times, as 3 4 5 3 4 5."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import override

from tying.depth.blocks import BlockState, first_tensor, is_cache, is_filled_cache, positional_parameters
from tying.depth.further_outputs import container_of, describe, first_output
from tying.depth.generated_classes import generate_class, original_class
from tying.depth.merge import zero_gradients
from tying.depth.recurrent import norms_in
from tying.depth.rows import promoted
from tying.depth.stages import Stage, children, find_stages
from tying.depth.tracing import LeafModule, find_tracer
from tying.errors import ConfigurationError, check_choice, listed
from tying.selection.index import check_shape, clean_name
from tying.torch_workarounds import count_writes, in_backward, is_jit_tracing, is_recorded
from tying.weights.derived import plain_class, swap_plain_class

PerPass = Literal["norm", "scale"] | None


class BlockCall(NamedTuple):
    """The arguments of a call of a block, without its hidden state.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
        places: positions or names of the hidden state among them; several in ``attention(x, x, x)``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: tuple[int | str, ...]

    def with_hidden(self, hidden: Tensor | None) -> "BlockCall":
        """Return the call with another hidden state."""
        return self._replace(
            args=tuple(hidden if place in self.places else value for place, value in enumerate(self.args)),
            kwargs={name: hidden if name in self.places else value for name, value in self.kwargs.items()},
        )

    def others(self) -> list[Any]:
        """Return the arguments other than the hidden state."""
        arguments = (*enumerate(self.args), *self.kwargs.items())
        return [value for place, value in arguments if place not in self.places]


class Loop:
    """A run of consecutive blocks that a model computes several times; :func:`loop` makes it.

    Attributes:
        names: the names of the blocks in the model that ``loop`` was given.
        blocks: the blocks.
        per_pass: what the passes do not share: ``"norm"``, ``"scale"`` or None.
        norms: the normalisation layers that hold copies for further passes.
        further: the number of passes after the first that have norms or scales, if any.
    """

    _number: int | None  # of the pass that a block computes
    _calls: list[BlockCall]  # of the first pass, so far
    _remembered: WeakTensorKeyDictionary  # the calls of first passes, by the last block's input

    def __init__(self, names: Sequence[str], blocks: Sequence[nn.Module], passes: int, per_pass: PerPass) -> None:
        self.names, self.blocks, self.per_pass = tuple(names), tuple(blocks), per_pass
        self.norms: list[PerPassNorm] = []
        self.passes, self.further = passes, passes - 1
        self._positional = [parameters_of(block) for block in blocks]
        self._forget()

    @property
    def passes(self) -> int:
        """The number of passes. It may be set at any time, also beyond the initial number.

        Additional passes use the norms or scales of the last pass that has some.
        """
        return self._passes

    @passes.setter
    def passes(self, passes: int) -> None:
        self._passes = check_passes(passes)

    @property
    def scales(self) -> list[nn.Parameter]:
        """The scales of each block, one for each further pass."""
        return [cast(nn.Parameter, block.pass_scale) for block in self.blocks] if self.per_pass == "scale" else []

    def grow(self, passes: int) -> None:
        """Raise the number of passes; the norms or scales of a new pass begin with the values of the pass before it.

        Call it during training. To resume, set ``passes`` instead: the checkpoint has the values.
        """
        for number in range(self.passes + 1, check_passes(passes) + 1):
            self._begin(number)
        self.passes = passes

    @torch.no_grad()
    def _begin(self, number: int) -> None:
        """Give the norms or scales of a pass the values of the pass before it; the first pass has the scale 1."""
        if number - 1 > self.further:
            return
        for norm in self.norms:
            norm.passes[number - 2].load_state_dict(own_state(norm if number == 2 else norm.passes[number - 3]))
        for scale in self.scales:
            scale[number - 2] = 1.0 if number == 2 else scale[number - 3]

    def call(self, block: nn.Module, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs of a call of a block by the model; after the last block's own pass, those of all passes.

        Args:
            block: the block, or what stands for it while the model is exported.
            position: its position in the run.
            args: the arguments of the call.
            kwargs: the keyword arguments of the call.
        """
        if self.passes == 1:
            return call_block(block, args, kwargs)
        call, hidden = self._separated(block, position, args, kwargs)
        if position == 0:
            self._calls = []
        if len(self._calls) == position:
            self._remember(call)
        outputs = self._checked(position, hidden, call_block(block, args, kwargs))
        if position == len(self.blocks) - 1:
            calls = self._calls_before(hidden)
            for number in range(2, self.passes + 1):
                for place, repeated in enumerate(calls):
                    outputs = self._repeat(place, repeated, first_output(outputs), number)
        return outputs

    def _separated(
        self, block: nn.Module, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[BlockCall, Tensor]:
        """Return a call of a block without its hidden state and caches, and the hidden state."""
        name, parameters = self.names[position], self._positional[position]
        place = self._hidden_place(position, args, kwargs)
        hidden = argument(place, args, kwargs)
        labels = [*parameters[: len(args)], *(f"argument {n + 1}" for n in range(len(parameters), len(args)))]
        for label, value in (*zip(labels, args, strict=True), *kwargs.items()):
            if is_filled_cache(label, value, block):
                raise ConfigurationError(
                    f"{name!r} is called with a filled cache, {label!r}, which holds keys and values of its first pass "
                    "only. Call the model, and its generate, with use_cache=False"
                )
        positions: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        further = (at for at, value in positions if at != place and is_same(value, hidden))
        call = BlockCall(
            tuple(None if is_cache(label, value) else value for label, value in zip(labels, args, strict=True)),
            {label: None if is_cache(label, value) else value for label, value in kwargs.items()},
            (place, *further),
        )
        return call, hidden

    def _remember(self, call: BlockCall) -> None:
        """Remember a call of the first pass, without its hidden state."""
        if self._calls and (first := self._calls[0]).places[1:]:
            source = argument(first.places[0], first.args, first.kwargs)
            if any(is_same(value, source) for value in call.others()):  # the first block begins with the memory
                self._calls[0] = first._replace(places=first.places[:1])
        keeps = not self._calls and call.places[1:] and len(self.blocks) > 1  # later calls show what it is
        self._calls.append(call if keeps else call.with_hidden(None))

    def _hidden_place(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
        """Return the position or the name of the hidden state, the first tensor, among the arguments of a call."""
        if (place := first_tensor(self._positional[position], args, kwargs)) is None:
            raise ConfigurationError(
                f"{self.names[position]!r} is called without a tensor: a loop needs blocks whose first tensor argument "
                "is the hidden state. Name other blocks"
            )
        return place

    def _repeat(self, position: int, call: BlockCall, hidden: Tensor, number: int) -> Any:
        """Return the outputs of a block in a further pass of a given number."""
        repeated = call.with_hidden(hidden)
        kwargs = {**repeated.kwargs, "loop_pass": number} if self.per_pass else repeated.kwargs
        return self._checked(position, hidden, call_block(self.blocks[position], repeated.args, kwargs))

    def _checked(self, position: int, hidden: Tensor, outputs: Any) -> Any:
        """Return the outputs of a block, after checking that they begin with a hidden state of the same shape."""
        after = first_output(outputs)
        if not isinstance(after, Tensor):
            raise ConfigurationError(
                f"{self.names[position]!r} returns {describe(outputs)}: a loop needs blocks that return a tensor, or a "
                "tuple whose first item is one. Name other blocks"
            )
        if not (is_jit_tracing() or after.is_nested) and after.shape != hidden.shape:
            raise ConfigurationError(
                f"{self.names[position]!r} maps {tuple(hidden.shape)} to {tuple(after.shape)}: a loop needs blocks "
                "that keep the shape of their first tensor argument. Name only such blocks"
            )
        return outputs

    def _calls_before(self, hidden: Tensor) -> list[BlockCall]:
        """Return the calls of all blocks in the first pass that has reached the last block.

        Gradient checkpointing around single blocks calls the last one again in the backward pass, alone: the calls
        before it are remembered for as long as its input exists.
        """
        calls, self._calls = [call.with_hidden(None) for call in self._calls], []
        keeps = len(self.blocks) > 1 and not (torch.compiler.is_compiling() or is_recorded())
        if len(calls) == len(self.blocks):
            if keeps:
                self._remembered[hidden] = calls
            return calls
        remembered = cast(Mapping[Tensor, list[BlockCall]], self._remembered if keeps else {})
        for former, former_calls in remembered.items():
            if former.data_ptr() == hidden.data_ptr() and former.shape == hidden.shape:  # or a detached copy of it
                return former_calls
        missing = self.names[len(calls)]
        raise ConfigurationError(
            f"the model calls {self.names[-1]!r} without calling {missing!r} before: a loop needs all of its blocks, "
            "in order. Turn off what skips blocks, such as layerdrop, or name the blocks in the order of their calls"
        )

    def scaled(
        self,
        position: int,
        compute: Callable[..., Any],
        factor: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the outputs of a block for x, with ``x + factor · (y − x)`` for its y; bitwise y for the factor 1."""
        x = argument(self._hidden_place(position, args, kwargs), args, kwargs)
        writes = count_writes(x)
        outputs = compute(*args, **kwargs)
        if count_writes(x) != writes:
            raise ConfigurationError(
                f"{self.names[position]!r} overwrites its input, which per_pass='scale' needs afterwards: set "
                "inplace=False in the first operation of the block, or use per_pass='norm'"
            )
        x, y = promoted(x, first_output(self._checked(position, x, outputs)))
        return with_first(outputs, torch.lerp(x, y, factor.to(y.dtype)))

    def unused(self, block: nn.Module) -> list[nn.Parameter]:
        """Return the norms and scales of a block that no pass uses; distributed training waits for their gradients."""
        if self.passes > self.further:
            return []
        norms = [module for module in block.modules() if isinstance(module, PerPassNorm)]
        unused = [weight for norm in norms for part in norm.passes[self.passes - 1 :] for weight in part.parameters()]
        return [*unused, cast(nn.Parameter, block.pass_scale)] if self.per_pass == "scale" else unused

    @contextmanager
    def computing(self, block: nn.Module, number: int) -> Iterator[None]:
        """Let the normalisation layers of a block be those of a pass.

        torch's encoder layer calls them then, instead of reading the weights of the first pass.
        """
        former, self._number = self._number, number
        fused = vars(block).get("activation_relu_or_gelu", 0) if number > 1 else 0
        if fused:
            vars(block)["activation_relu_or_gelu"] = 0
        try:
            yield
        finally:
            self._number = former
            if fused:
                vars(block)["activation_relu_or_gelu"] = fused

    def norm_of(self, norm: "PerPassNorm") -> nn.Module | None:
        """Return the copy of a normalisation layer for the pass that runs; None for the layer itself."""
        if self._number is None and not torch.compiler.is_compiling() and in_backward():
            raise ConfigurationError(
                f"gradient checkpointing within a block of the loop {listed(self.names)} recomputes a normalisation "
                "layer when its pass is no longer known: checkpoint whole blocks, or use per_pass='scale'"
            )
        further = min((self._number or 1) - 1, self.further)
        return norm.passes[further - 1] if further else None

    def _forget(self) -> None:
        """Forget what belongs to a running forward or backward pass."""
        self._number = None
        self._calls = []
        self._remembered = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_number", "_calls", "_remembered")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @override
    def __repr__(self) -> str:
        return f"Loop({listed(self.names)}, passes={self.passes}, per_pass={self.per_pass!r})"


class LoopedBlock(LeafModule):
    """First base of the generated class of a block in a loop.

    The repeats are around the call of a block, and not within its forward: what wraps the forward, such as gradient
    checkpointing, hooks and sharding, does so in each pass. ``torch.fx`` records the block as one node.
    """

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        loop, position = self.__dict__.get("_loop_place", (None, 0))
        if loop is None or find_tracer((*args, *kwargs.values())):
            return super().__call__(*args, **kwargs)
        return loop.call(self, position, args, kwargs)


class PerPassBlock(LoopedBlock):
    """A block in a loop whose passes differ by their normalisation layers or scales.

    The number of the pass is an argument of the forward, so that gradient checkpointing recomputes the same pass. The
    parameters of all passes are used within the forward, as sharding needs.
    """

    @override
    def forward(self, *args: Any, loop_pass: int = 1, **kwargs: Any) -> Any:
        loop, position = self.__dict__.get("_loop_place", (None, 0))
        if loop is None:
            return super().forward(*args, **kwargs)
        further = min(loop_pass - 1, loop.further) if loop.per_pass == "scale" else 0
        with loop.computing(self, loop_pass):
            if further:
                factor = cast(nn.Parameter, self.pass_scale)[further - 1]
                outputs = loop.scaled(position, super().forward, factor, args, kwargs)
            else:
                outputs = super().forward(*args, **kwargs)
        unused = loop.unused(self) if loop_pass == 1 and self.training else []
        return with_first(outputs, zero_gradients(first_output(outputs), unused)) if unused else outputs


class PerPassNorm(nn.Module):
    """First base of the generated class of a normalisation layer that holds copies for further passes."""

    passes: nn.ModuleList

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        loop: Loop | None = self.__dict__.get("_loop")
        norm = None if loop is None else loop.norm_of(self)
        return super().forward(*args, **kwargs) if norm is None else norm(*args, **kwargs)


def call_block(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a block in a loop once, as the plain model would."""
    return super(LoopedBlock, block).__call__(*args, **kwargs)  # type: ignore[misc]  # the block is a LoopedBlock


def argument(place: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the tensor among arguments at a position, or of a name."""
    return cast(Tensor, args[place] if isinstance(place, int) else kwargs[place])


def is_same(value: Any, tensor: Tensor) -> bool:
    """Return whether a value is a tensor; a checkpoint that recomputes detaches each of its arguments."""
    if value is tensor or not isinstance(value, Tensor) or torch.compiler.is_compiling() or not in_backward():
        return value is tensor
    return value.is_set_to(tensor)


def parameters_of(block: nn.Module) -> tuple[str, ...]:
    """Return the names of the positional parameters of a block, which may have a merge."""
    state: BlockState | None = vars(block).get("_block_state")
    return positional_parameters(block.forward) if state is None else state.parameters


def with_first(outputs: Any, hidden: Tensor) -> Any:
    """Return the outputs of a block with another hidden state."""
    return hidden if isinstance(outputs, Tensor) else container_of(outputs)([hidden, *outputs[1:]])


def own_state(norm: nn.Module) -> dict[str, Any]:
    """Return the state dict of a normalisation layer without its copies for further passes."""
    return {name: value for name, value in norm.state_dict().items() if not name.startswith("passes.")}


def check_per_pass(per_pass: PerPass) -> None:
    """Raise a ConfigurationError unless the value says what passes do not share."""
    check_choice("per_pass, if given,", "norm" if per_pass is None else per_pass, ("norm", "scale"))


def check_passes(passes: int) -> int:
    """Return the number of passes, after checking that it is an integer of 1 or more."""
    if not isinstance(passes, int) or passes < 1:
        raise ConfigurationError(f"passes must be an integer, 1 or more, not {passes!r}")
    return passes


def loop(model: nn.Module, blocks: str | Sequence[str], passes: int, per_pass: PerPass = None) -> int:
    """Let consecutive blocks of a model run several times, as 3 4 5 3 4 5; return the number of loops.

    The blocks of each container are one loop: after its last block, all of its blocks run again, with the hidden state
    that the last one returned, wherever a block gets it, and the further arguments of their first calls. The loop
    returns the outputs of the last pass. Blocks stay where they are, and keep their names in the state dict. As in
    :func:`apply_merge`, a block returns a tensor, or a tuple whose first item is one, of the shape of its first tensor
    argument, the hidden state.

    Args:
        model: changed in place.
        blocks: a pattern of names of modules, or several; a leading ``!`` excludes.
        passes: how often the blocks run; 1: as in the plain model. It may be changed by :attr:`Loop.passes`.
        per_pass: what passes do not share. ``"norm"``: copies of the normalisation layers, and their statistics;
            ``"scale"``: a factor s for each block, initially 1, in ``lerp(x, block(x), s)``. Default: nothing.

    Raises:
        ConfigurationError: a pattern matches nothing; blocks in one container are not consecutive; a block is in a loop
            already; ``passes`` is below 1; there is no normalisation layer for ``per_pass="norm"``. The model is then
            unchanged. In use: a block changes the shape, is not called by the model, or is called with a filled cache.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
        >>> x = torch.ones(1, 2)
        >>> expected = nn.Sequential(*(model[place] for place in (0, 1, 2, 3, 2, 3, 4)))(x)
        >>> loop(model, "[23]", passes=2), torch.equal(model(x), expected), unloop(model)
        (1, True, 1)
    """
    check_per_pass(per_pass)
    check_passes(passes)
    stages = find_stages(model, blocks, any_parent=True)
    _check_gaps(stages)
    for stage in stages:
        _check_blocks(model, stage, per_pass)
    for stage in stages:
        _make_loop(stage, passes, per_pass)
    return len(stages)


def unloop(model: nn.Module) -> int:
    """Let all blocks of a model run once again; return the number of loops.

    What passes had of their own is dropped.

    Raises:
        ConfigurationError: the class of a block has changed since. The model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> loop(model, "*", 2, per_pass="norm"), len(model.state_dict()), unloop(model), len(model.state_dict())
        (1, 6, 1, 4)
    """
    loops = loops_in(model)
    for undone in loops:
        for name, block in zip(undone.names, undone.blocks, strict=True):
            if plain_class(block).__bases__[0] not in (LoopedBlock, PerPassBlock):
                raise ConfigurationError(
                    f"the class of {name!r} has changed to {plain_class(block).__name__} after the loop was made, "
                    "which cannot be undone now: call unloop before what changes the class, such as fully_shard"
                )
    for undone in loops:
        for block in undone.blocks:
            del block.__dict__["_loop_place"]
            swap_plain_class(block, original_class(plain_class(block)))
            if undone.per_pass == "scale":
                del block.pass_scale
        for norm in undone.norms:
            del norm.__dict__["_loop"], norm.passes
            swap_plain_class(norm, original_class(plain_class(norm)))
    return len(loops)


def loops_in(model: nn.Module) -> list[Loop]:
    """Return the loops of a model, in its order.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
        >>> loop(model, ["0", "1"], passes=2), loops_in(model)
        (1, [Loop(0, 1, passes=2, per_pass=None)])
    """
    blocks = [module for module in model.modules() if isinstance(module, LoopedBlock) and "_loop_place" in vars(module)]
    return [*dict.fromkeys(vars(block)["_loop_place"][0] for block in blocks)]


def plain_block_class(block: nn.Module) -> type[nn.Module]:
    """Return the class of a block without its loop."""
    cls = plain_class(block)
    return original_class(cls) if "_loop_place" in vars(block) and isinstance(block, LoopedBlock) else cls


def swap_block_class(block: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a block; its loop stays."""
    looped = plain_class(block)
    is_looped = "_loop_place" in vars(block) and isinstance(block, LoopedBlock)
    swap_plain_class(block, generate_class(looped.__bases__[0], cls) if is_looped else cls)


def _check_gaps(stages: Sequence[Stage]) -> None:
    """Raise a ConfigurationError if there are several runs of blocks in one container."""
    for former, stage in pairwise(stages):
        if former.path == stage.path:
            keys = [key for key, _ in children(stage.container)][former.start + len(former.names) : stage.start]
            between = [f"{stage.path}.{clean_name(key)}".lstrip(".") for key in keys]
            raise ConfigurationError(
                f"blocks: {former.names[-1]!r} and {stage.names[0]!r} are not consecutive: {listed(map(repr, between))}"
                " between them would not be repeated. Name it, too, or call loop once for each run"
            )


def _check_blocks(model: nn.Module, stage: Stage, per_pass: PerPass) -> None:
    """Raise a ConfigurationError unless the blocks of a stage can be a loop."""
    for name, block in zip(stage.names, stage.blocks, strict=True):
        problem = None
        if type(block).forward is nn.Module.forward:
            problem = "has no forward: name the blocks within it"
        elif stage.blocks.count(block) > 1:
            problem = "occurs several times in the model: name blocks that occur once"
        elif hasattr(block, "backward_pass"):  # of Reformer, whose gradients would be those of one pass
            problem = "is reversible, and computes its gradients without the loop: name other blocks"
        elif per_pass and "forward" in vars(block):
            problem = "has a patched forward, which is not that of its class: undo that first, or leave per_pass out"
        elif per_pass and (encoder := _nested(model, block)):
            problem = (
                f"gets nested tensors from {encoder!r} in evaluation, on which per_pass has no effect: make the "
                "TransformerEncoder with enable_nested_tensor=False"
            )
        elif other := next((other for other in loops_in(model) if _overlaps(other, block)), None):
            problem = f"is in a loop already, or overlaps with one, of {listed(other.names)}: call unloop first"
        if problem:
            raise ConfigurationError(f"blocks: the {type(block).__name__} {name!r} {problem}")
        for norm_name, norm in norms_in(block).items() if per_pass == "norm" else ():
            for key, parameter in norm.named_parameters():
                check_shape(".".join(filter(None, (name, norm_name, key))), parameter, "per_pass='norm': ")
    if per_pass == "norm" and not any(norms_in(block) for block in stage.blocks):
        raise ConfigurationError(
            f"per_pass='norm': {listed(map(repr, stage.names))} contain no normalisation layer: use per_pass='scale', "
            "or leave per_pass out"
        )


def _nested(model: nn.Module, block: nn.Module) -> str | None:
    """Return the name of the torch encoder that may call a block with nested tensors, or None."""
    return next(
        (
            name or "the model"
            for name, encoder in model.named_modules()
            if isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor and block in {*encoder.layers}
        ),
        None,
    )


def _overlaps(other: Loop, block: nn.Module) -> bool:
    """Return whether a block is one of a loop's, or lies within one, or contains one."""
    return any(block in {*looped.modules()} or looped in {*block.modules()} for looped in other.blocks)


def _make_loop(stage: Stage, passes: int, per_pass: PerPass) -> None:
    """Make a loop of the blocks of a stage."""
    made = Loop(stage.names, stage.blocks, passes, per_pass)
    if per_pass == "norm":
        norms = dict.fromkeys(norm for block in stage.blocks for norm in norms_in(block).values())
        for norm in norms:
            copies = nn.ModuleList(copy.deepcopy(norm) for _ in range(passes - 1))
            swap_plain_class(norm, generate_class(PerPassNorm, plain_class(norm)))
            norm.passes, norm.__dict__["_loop"] = copies, made
        made.norms = cast(list[PerPassNorm], [*norms])
    behaviour = PerPassBlock if per_pass else LoopedBlock
    for position, block in enumerate(stage.blocks):
        if per_pass == "scale":
            like = next((weight for weight in block.parameters() if weight.is_floating_point()), torch.empty(0))
            block.pass_scale = nn.Parameter(torch.ones(passes - 1, dtype=like.dtype, device=like.device))
        block.__dict__["_loop_place"] = (made, position)
        swap_plain_class(block, generate_class(behaviour, plain_class(block)))


def scheduled_passes(step: int, total: int, passes: int, start: float = 0.0, grow: float | None = None) -> int:
    """Return the number of passes at a step of training; pass p ≥ 2 begins at the fraction ``start + (p − 2) · grow``.

    Args:
        step: number of optimizer steps before this one.
        total: number of optimizer steps of the whole training.
        passes: the final number of passes.
        start: the fraction of training after which there are several passes.
        grow: the fraction of training after which there is one more; None: all begin at ``start``.

    Example:
        >>> [scheduled_passes(step, 100, passes=3, start=0.35, grow=0.2) for step in (0, 34, 35, 54, 55, 99)]
        [1, 1, 2, 2, 3, 3]
    """
    begins = [start + number * (grow or 0.0) for number in range(passes - 1)]  # rounded, since 0.35 + 0.2 > 0.55
    return 1 + sum(step >= round(fraction * total, 6) for fraction in begins)

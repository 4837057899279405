"""Record a module or function as one node of a ``torch.fx`` graph, so that it draws when the graph runs."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import nn
from torch.fx import Proxy, Tracer

from tying.errors import ConfigurationError
from tying.torch_workarounds import breaks_graph_at_rnn, is_proxy, is_recorded

P = ParamSpec("P")
R = TypeVar("R")


class LeafModule(nn.Module):
    """A module that ``torch.fx`` calls as one node, like the layers of ``torch.nn``, instead of tracing its forward.

    A trace of the forward would fix the random decisions of Python and the training mode.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, nn.RNNBase):
            cls.__call__ = _outside_graphs(cls.__call__)  # type: ignore[method-assign]  # also of generated classes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, or record the call if an argument is a ``torch.fx.Proxy``."""
        tracer = find_tracer(args) or (find_tracer(kwargs.values()) if kwargs else None)
        return super().__call__(*args, **kwargs) if tracer is None else record_module(tracer, self, args, kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which calls this method and would compile the forward of a base class."""
        raise ConfigurationError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.export, torch.compile or torch.jit.trace"
        )


def _outside_graphs(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``torch.compile`` break its graph at a call of a recurrent layer, as it does at those of torch.

    Tracing into the call fails if the class of the layer is not in torch's own files.
    """
    eager = torch.compiler.disable(call)  # type: ignore[no-untyped-call]  # torch's

    @wraps(call)
    def call_outside(*args: Any, **kwargs: Any) -> Any:
        return (eager if breaks_graph_at_rnn() else call)(*args, **kwargs)

    return call_outside


def record_module(tracer: Tracer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy:
    """Record a call of a module as one node, within the tracer's scope of the module, which names the node."""

    def node(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)

    return cast(Proxy, tracer.call_module(module, node, args, kwargs))


def leaf_function(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``torch.fx`` record calls of a function as one node.

    ``torch.fx.wrap`` patches the function in the module that calls ``wrap``, but not in modules that have imported it.

    Example:
        >>> import torch, tying.depth
        >>> class Mean(torch.nn.Module):
        ...     def forward(self, x):
        ...         return tying.depth.fractal_join([x, 3 * x])
        >>> torch.fx.symbolic_trace(Mean())(torch.ones(2))
        tensor([2., 2.])
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        tracer = find_tracer(args) or (find_tracer(kwargs.values()) if kwargs else None)
        if tracer is None:
            return function(*args, **kwargs)
        return cast(R, tracer.create_proxy("call_function", call, args, kwargs))

    return call


def find_tracer(values: Iterable[object]) -> Tracer | None:
    """Return the tracer of the first ``torch.fx.Proxy`` among values, lists and tuples, or None."""
    for value in values:
        if isinstance(value, Proxy):
            return cast(Tracer, value.tracer)
        if isinstance(value, (list, tuple)) and (tracer := find_tracer(value)) is not None:
            return tracer
    return None


def tracer_of(x: object) -> Tracer | None:
    """Return the tracer of x if it is a ``torch.fx.Proxy``, which stands for a tensor during a trace."""
    return cast(Tracer, x.tracer) if isinstance(x, Proxy) else None


def in_graph(x: object) -> bool:
    """Return whether operations on x become part of a graph or transform: decisions must be masks, not Python's."""
    return is_proxy(x) or is_recorded()

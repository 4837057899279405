"""Mixins that add callbacks to a LightningModule by inheritance.

Each callback ``SomeCallback`` has a mixin ``SomeCallbackMixin``: the class attribute ``some_callback`` of a model holds
the callback's keyword arguments, and may be left out if all of them have defaults. :class:`TyingMixin` adds any
callbacks, several of a class too. For all mixins:

- Each instance of a model has its own callbacks.
- Callbacks that change the model do so in ``configure_model``, hence also in ``load_from_checkpoint``.
- A class that overrides a hook without ``super()`` keeps the callbacks, and the order of the bases does not matter.
- A callback replaces the Trainer's of the same class and name, with a warning; the Trainer's others stay. Classes
  without a name are compared by their patterns.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ClassVar

import torch

from tying.callbacks import (
    AnchorTying,
    BoundaryPlot,
    Coupling,
    GeneratedWeights,
    HardTying,
    Looping,
    LowRankWeights,
    MixtureTying,
    RandomState,
    RecurrentDepth,
    RelaxedTying,
    ResidualMerging,
    SlopeAnnealing,
    SoftTying,
    TemplateWeights,
    TyingCallback,
    TyingMonitor,
    TyingSummary,
    Unrolling,
    UntiedBiases,
    WeightClustering,
    WeightHashing,
    ZoneoutStates,
)
from tying.callbacks.base import Callback, accept_need, needs
from tying.callbacks.conflicts import acting_on
from tying.callbacks.transform import ModelTransform
from tying.errors import ConfigurationError, misnamed
from tying.lightning_namespace import check_namespace, pl
from tying.lightning_workarounds import callbacks_of


class Mixin(pl.LightningModule):
    """The base of the mixins. ``class SomeMixin(Mixin, callback=SomeCallback)`` defines the mixin of a callback.

    Raises:
        ConfigurationError: a class inherits a mixin and a LightningModule of the other Lightning; or a model does not
            set the mixin's attribute to a dictionary of the callback's arguments.

    Example:
        >>> class StrongTying(SoftTying):
        ...     pass
        >>> class StrongTyingMixin(Mixin, callback=StrongTying):
        ...     pass
        >>> class Model(StrongTyingMixin):
        ...     strong_tying = {"ties": ["encoder.weight ~ decoder.weight"], "strength": 10.0}
        >>> Model().configure_callbacks()[0].strength
        10.0
    """

    # of a class that is a mixin: the class of its callback; None for TyingMixin, which adds callbacks of any class
    _callback: ClassVar[type[Callback] | None]

    def __init_subclass__(cls, callback: type[Callback] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_namespace(cls, next(base.__name__ for base in cls.__mro__ if _is_mixin(base) or base is Mixin))
        if callback is not None:
            cls._callback = callback
        if _is_mixin(cls):
            for hook, complete in _completions(cls).items():
                setattr(cls, hook, _completed(vars(cls).get(hook, _inherited(cls, hook)), cls, complete))
        for mixin in filter(_is_mixin, reversed(cls.__mro__[1:])):
            for hook, complete in _completions(mixin).items():
                if _is_hidden(cls, mixin, hook):
                    setattr(cls, hook, _completed(vars(cls).get(hook, _inherited(cls, hook)), mixin, complete))


def _is_mixin(cls: type) -> bool:
    return "_callback" in vars(cls)


def _is_hidden(cls: type, mixin: type[Mixin], hook: str) -> bool:
    """Return whether a class, or one of its bases before a mixin, may override the mixin's hook without ``super()``."""
    before = cls.__mro__[: cls.__mro__.index(mixin)]
    overriding = next((base for base in before if hook in vars(base) and not _is_mixin(base)), None)
    return overriding is cls or (overriding is not None and not issubclass(overriding, mixin))  # else it is completed


def _completions(mixin: type[Mixin]) -> dict[str, Callable[..., Any]]:
    """Return the functions that complete the hooks of a mixin's models, by hook."""
    kind = mixin._callback
    hooks: dict[str, Callable[..., Any]] = {"configure_callbacks": _add_callbacks}
    if kind is None or issubclass(kind, ModelTransform):
        hooks["configure_model"] = _change_model
    if kind is None or (issubclass(kind, TyingCallback) and kind.prepare is not TyingCallback.prepare):
        hooks |= {"on_save_checkpoint": _name_needs, "on_load_checkpoint": _prepare}
    return hooks


def _inherited(mixin: type[Mixin], hook: str) -> Callable[..., Any]:
    """Return the hook of the classes after a mixin."""
    return lambda module, *arguments: getattr(super(mixin, module), hook)(*arguments)


def _completed(hook: Callable[..., Any], mixin: type[Mixin], complete: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook whose result a mixin completes."""

    @wraps(hook)
    def completed(module: Mixin, *arguments: Any) -> Any:
        return complete(module, mixin, hook(module, *arguments), *arguments)

    return completed


def _add_callbacks(module: Mixin, mixin: type[Mixin], inherited: Any) -> list[pl.Callback]:
    """Complete ``configure_callbacks``."""
    callbacks = [inherited] if isinstance(inherited, pl.Callback) else [*inherited]
    added = [callback for callback in _callbacks(module, mixin) if callback not in callbacks]
    kinds = {type(callback) for callback in added}
    beside = kept_beside(module, [other for other in _trainers_callbacks(module) if type(other) in kinds])
    return [*callbacks, *(other for other in beside if other not in callbacks), *added]


def _change_model(module: Mixin, mixin: type[Mixin], inherited: None) -> None:
    """Complete ``configure_model``."""
    for callback in _callbacks(module, mixin):
        if isinstance(callback, ModelTransform):
            callback.apply_among(module, mixin_callbacks(module))
            accept_need(module, callback)
            if callback not in vars(module).setdefault("_changed_by", []):
                vars(module)["_changed_by"].append(callback)


def _name_needs(module: Mixin, mixin: type[Mixin], inherited: None, checkpoint: dict[str, Any]) -> None:
    """Complete ``on_save_checkpoint``: let a model without the mixin refuse the checkpoint by name.

    torch lists unexpected keys in its error; nothing else of the checkpoint is shown to a model without callbacks.
    """
    for callback in _callbacks(module, mixin):
        if isinstance(callback, TyingCallback) and callback.is_needed(module):
            checkpoint["state_dict"][needs(callback, f"{mixin.__module__}.{mixin.__name__}")] = torch.empty(0)


def _prepare(module: Mixin, mixin: type[Mixin], inherited: None, checkpoint: dict[str, Any]) -> None:
    """Complete ``on_load_checkpoint``: prepare for weights that a callback has replaced since training began.

    Without a Trainer, nothing else restores the number of passes with which loops were trained.
    """
    for callback in _callbacks(module, mixin):
        if isinstance(callback, Looping) and (state := checkpoint.get("callbacks", {}).get(callback.final_state_key)):
            callback.load_state_dict(state)
        is_read = "state_dict" in checkpoint  # a sharded checkpoint has been loaded by now
        if is_read and isinstance(callback, TyingCallback) and type(callback).prepare is not ModelTransform.prepare:
            with acting_on(module, callback, mixin_callbacks(module)):
                callback.prepare(module, checkpoint["state_dict"])
            accept_need(module, callback)


def _callbacks(module: pl.LightningModule, mixin: type[Mixin]) -> list[pl.Callback]:
    """Return the callbacks of one mixin, the same objects in all calls: they may count steps."""
    callbacks: dict[type[Mixin], list[pl.Callback]] = module.__dict__.setdefault("_mixin_callbacks", {})
    if mixin not in callbacks:
        kind = mixin._callback
        callbacks[mixin] = _copied(module) if kind is None else [_constructed(module, mixin, kind)]
    if "_is_extracted" in vars(module):  # by tying.depth.extract, from a model that these callbacks have changed
        return [callback for callback in callbacks[mixin] if callback not in vars(module).get("_changed_by", ())]
    return callbacks[mixin]


def _constructed(module: pl.LightningModule, mixin: type[Mixin], kind: type[Callback]) -> Callback:
    """Return a callback with the arguments that a model's attribute holds."""
    attribute = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
    required = any(
        parameter.default is Parameter.empty and parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
        for parameter in signature(kind).parameters.values()
    )
    arguments = deepcopy(getattr(module, attribute, None if required else {}))
    if not isinstance(arguments, Mapping):
        raise ConfigurationError(
            f"{type(module).__name__} inherits {mixin.__name__} and must set {attribute} to a dictionary of "
            f"{kind.__name__}'s arguments, not {arguments!r}"
        )
    try:
        return kind(**arguments)
    except TypeError as error:
        close = misnamed(kind, arguments)
        raise ConfigurationError(f"{type(module).__name__}.{attribute}: {error}{close and '.' + close}") from None


def _copied(module: pl.LightningModule) -> list[pl.Callback]:
    """Return copies of the callbacks that a model's ``tying`` lists."""
    callbacks = getattr(module, "tying", None)
    if not isinstance(callbacks, Sequence) or not all(isinstance(callback, pl.Callback) for callback in callbacks):
        raise ConfigurationError(
            f"{type(module).__name__} inherits TyingMixin and must set tying to a list of callbacks, such as "
            f"[SoftTying(...), HardTying(...)], not {callbacks!r}"
        )
    return [*deepcopy(callbacks)]


def mixin_callbacks(module: pl.LightningModule) -> list[pl.Callback]:
    """Return the callbacks that mixins add to a module."""
    mixins = filter(_is_mixin, reversed(type(module).__mro__)) if isinstance(module, Mixin) else ()
    return [callback for mixin in mixins for callback in _callbacks(module, mixin)]


def kept_beside(module: pl.LightningModule, others: Sequence[pl.Callback]) -> list[pl.Callback]:
    """Return the Trainer's callbacks to keep beside those of a module's mixins, of the same classes.

    Args:
        module: the model. Lightning would drop every callback of a class that the model adds.
        others: callbacks of the Trainer.

    Warns:
        UserWarning: one does not differ from a mixin's in the argument that distinguishes them, and is replaced.
    """
    added = [callback for callback in mixin_callbacks(module) if isinstance(callback, Callback)]
    kept: list[pl.Callback] = []
    for other in others:
        alike = [callback for callback in added if type(callback) is type(other)]
        same = [callback for callback in alike if callback.is_same(other)]
        if alike and not same:
            kept.append(other)
        elif same and other not in same:
            label, argument = same[0].label, same[0].distinguished_by
            remedy = f", or give each its own {argument}" if argument else ""
            warnings.warn(
                f"the {label} of {type(module).__name__} replaces the {label} of the Trainer, which has the same "
                f"{argument or 'class'}: leave one of them out{remedy}",
                stacklevel=2,
            )
    return kept


def _trainers_callbacks(module: pl.LightningModule) -> list[pl.Callback]:
    try:
        return callbacks_of(module.trainer)
    except RuntimeError:  # there is no trainer yet
        return []


class TyingMixin(Mixin):
    """Adds the callbacks in ``tying``, a list, to a model: of any classes, and several of a class.

    ``tying`` is an attribute of the class, or of the instance, set in ``__init__``. Each instance of the model has
    copies of the callbacks. Those that change the model do so in the order of the list. A subclass extends the list by
    ``tying = [*Base.tying, ...]``.

    Raises:
        ConfigurationError: ``tying`` is not set, or is not a list of callbacks.

    Example:
        >>> class Model(TyingMixin):
        ...     tying = [
        ...         SoftTying(["encoder.weight ~ decoder.weight"], strength=1e-3, name="weights"),
        ...         SoftTying(["encoder.bias ~ decoder.bias"], strength=1e-2, name="biases"),
        ...         LowRankWeights(["head.weight"], rank=4),
        ...     ]
        >>> [callback.label for callback in Model().configure_callbacks()]
        ['SoftTying weights', 'SoftTying biases', 'LowRankWeights']
    """

    _callback = None


class AnchorTyingMixin(Mixin, callback=AnchorTying):
    """Adds :class:`tying.callbacks.AnchorTying` to a model; ``anchor_tying`` holds its keyword arguments.

    Example:
        >>> class Model(AnchorTyingMixin):
        ...     anchor_tying = {"parameters": ["backbone.**"], "strength": 0.1}
        >>> Model().configure_callbacks()[0].anchor
        'initial'
    """


class BoundaryPlotMixin(Mixin, callback=BoundaryPlot):
    """Adds :class:`tying.callbacks.BoundaryPlot` to a model; ``boundary_plot`` holds its keyword arguments.

    The model may leave out ``boundary_plot``: all arguments have defaults.

    Example:
        >>> class Model(BoundaryPlotMixin):
        ...     boundary_plot = {"characters": 160}
        >>> Model().configure_callbacks()[0].characters
        160
    """


class CouplingMixin(Mixin, callback=Coupling):
    """Adds :class:`tying.callbacks.Coupling` to a model; ``coupling`` holds its keyword arguments.

    Example:
        >>> class Model(CouplingMixin):
        ...     coupling = {"first": "classifier.encoder", "second": "autoencoder.encoder", "alpha": 0.4}
        >>> Model().configure_callbacks()[0].alpha
        0.4
    """


class GeneratedWeightsMixin(Mixin, callback=GeneratedWeights):
    """Adds :class:`tying.callbacks.GeneratedWeights` to a model; ``generated_weights`` holds its keyword arguments.

    Example:
        >>> import torch
        >>> class Model(GeneratedWeightsMixin):
        ...     generated_weights = {"parameters": ["network.weight"], "in_channels": 2, "out_channels": 2}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Conv2d(4, 4, 3)
        >>> model = Model()
        >>> model.configure_model()
        >>> type(model.network.parametrizations.weight[0]).__name__
        'HyperWeight'
    """


class HardTyingMixin(Mixin, callback=HardTying):
    """Adds :class:`tying.callbacks.HardTying` to a model; ``hard_tying`` holds its keyword arguments.

    A model without the mixin loads its checkpoints with equal, but separate weights.

    Example:
        >>> import torch
        >>> class Model(HardTyingMixin):
        ...     hard_tying = {"ties": ["encoder.weight ~ decoder.weight"]}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.decoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> model = Model()
        >>> model.configure_model()
        >>> model.encoder.weight is model.decoder.weight
        True
    """


class LoopingMixin(Mixin, callback=Looping):
    """Adds :class:`tying.callbacks.Looping` to a model; ``looping`` holds its keyword arguments.

    Example:
        >>> import torch
        >>> from tying.depth import loops_in
        >>> class Model(LoopingMixin):
        ...     looping = {"blocks": "network.[12]", "passes": 3}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
        >>> model = Model()
        >>> model.configure_model()
        >>> [(loop.names, loop.passes) for loop in loops_in(model)]
        [(('network.1', 'network.2'), 3)]
    """


class LowRankWeightsMixin(Mixin, callback=LowRankWeights):
    """Adds :class:`tying.callbacks.LowRankWeights` to a model; ``low_rank_weights`` holds its keyword arguments.

    Example:
        >>> import torch
        >>> class Model(LowRankWeightsMixin):
        ...     low_rank_weights = {"parameters": ["network.weight"], "rank": 2}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Linear(8, 8)
        >>> model = Model()
        >>> model.configure_model()
        >>> [tuple(factor.shape) for factor in model.network.parametrizations.weight.parameters()]
        [(8, 2), (2, 8)]
    """


class MixtureTyingMixin(Mixin, callback=MixtureTying):
    """Adds :class:`tying.callbacks.MixtureTying` to a model; ``mixture_tying`` holds its keyword arguments.

    Example:
        >>> class Model(MixtureTyingMixin):
        ...     mixture_tying = {"parameters": ["network.**"], "components": 17, "start_epoch": 10}
        >>> Model().configure_callbacks()[0].components
        17
    """


class RandomStateMixin(Mixin, callback=RandomState):
    """Adds :class:`tying.callbacks.RandomState` to a model; ``random_state`` holds its keyword arguments.

    The model may leave out ``random_state``: all arguments have defaults.

    Example:
        >>> class Model(RandomStateMixin):
        ...     random_state = {}
        >>> Model().configure_callbacks()[0].state_dict().keys()
        dict_keys(['processes'])
    """


class RecurrentDepthMixin(Mixin, callback=RecurrentDepth):
    """Adds :class:`tying.callbacks.RecurrentDepth` to a model; ``recurrent_depth`` holds its keyword arguments.

    Example:
        >>> import torch
        >>> class Model(RecurrentDepthMixin):
        ...     recurrent_depth = {"blocks": "network.*"}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
        >>> model = Model()
        >>> model.configure_model()
        >>> [(type(module).__name__, module.steps) for module in model.network]
        [('Recurrent', 3)]
    """


class RelaxedTyingMixin(Mixin, callback=RelaxedTying):
    """Adds :class:`tying.callbacks.RelaxedTying` to a model; ``relaxed_tying`` holds its keyword arguments.

    Calibration needs a Trainer: weights that ``configure_model`` relaxes before it has one are not calibrated.

    Example:
        >>> import torch
        >>> from tying.hard import LowRankResidual, relaxed
        >>> class Model(RelaxedTyingMixin):
        ...     relaxed_tying = {"ties": ["network.*"], "residual": LowRankResidual(rank=1)}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> model = Model()
        >>> model.configure_model()
        >>> relaxed(model)[0].names
        ('network.0.weight', 'network.1.weight', 'network.2.weight')
    """


class ResidualMergingMixin(Mixin, callback=ResidualMerging):
    """Adds :class:`tying.callbacks.ResidualMerging` to a model; ``residual_merging`` holds its keyword arguments.

    Example:
        >>> import torch
        >>> from tying.depth import Residual, StochasticDepth
        >>> class Model(ResidualMergingMixin):
        ...     residual_merging = {"blocks": "network.*", "merge": StochasticDepth(keep=0.5)}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Sequential(Residual(torch.nn.Linear(2, 2)), Residual(torch.nn.Linear(2, 2)))
        >>> model = Model()
        >>> model.configure_model()
        >>> [block.merge.keep for block in model.network]
        [0.75, 0.5]
    """


class SlopeAnnealingMixin(Mixin, callback=SlopeAnnealing):
    """Adds :class:`tying.callbacks.SlopeAnnealing` to a model; ``slope_annealing`` holds its keyword arguments.

    The model may leave out ``slope_annealing``: all arguments have defaults.

    Example:
        >>> class Model(SlopeAnnealingMixin):
        ...     slope_annealing = {"rate": 0.1}
        >>> Model().configure_callbacks()[0].rate
        0.1
    """


class SoftTyingMixin(Mixin, callback=SoftTying):
    """Adds :class:`tying.callbacks.SoftTying` to a model; ``soft_tying`` holds its keyword arguments.

    Example:
        >>> class Model(SoftTyingMixin):
        ...     soft_tying = {"ties": ["encoder.weight ~ decoder.weight"], "strength": 1e-3}
        >>> Model().configure_callbacks()[0].strength
        0.001
    """


class TemplateWeightsMixin(Mixin, callback=TemplateWeights):
    """Adds :class:`tying.callbacks.TemplateWeights` to a model; ``template_weights`` holds its keyword arguments.

    Example:
        >>> import torch
        >>> class Model(TemplateWeightsMixin):
        ...     template_weights = {"parameters": ["network.*.weight"], "templates": 2}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> model = Model()
        >>> model.configure_model()
        >>> sum(weight.numel() for weight in model.parameters())
        168
    """


class TyingMonitorMixin(Mixin, callback=TyingMonitor):
    """Adds :class:`tying.callbacks.TyingMonitor` to a model; ``tying_monitor`` holds its keyword arguments.

    The model may leave out ``tying_monitor``: all arguments have defaults.

    Example:
        >>> class Model(TyingMonitorMixin):
        ...     tying_monitor = {"max_lines": 4}
        >>> Model().configure_callbacks()[0].max_lines
        4
    """


class TyingSummaryMixin(Mixin, callback=TyingSummary):
    """Adds :class:`tying.callbacks.TyingSummary` to a model; ``tying_summary`` holds its keyword arguments.

    The model may leave out ``tying_summary``: all arguments have defaults.

    Example:
        >>> class Model(TyingSummaryMixin):
        ...     tying_summary = {"max_rows": 10}
        >>> Model().configure_callbacks()[0].max_rows
        10
    """


class UnrollingMixin(Mixin, callback=Unrolling):
    """Adds :class:`tying.callbacks.Unrolling` to a model; ``unrolling`` holds its keyword arguments.

    Example:
        >>> class Model(UnrollingMixin):
        ...     unrolling = {"extra": [-1, 0, 1]}
        >>> Model().configure_callbacks()[0].extra
        [-1, 0, 1]
    """


class UntiedBiasesMixin(Mixin, callback=UntiedBiases):
    """Adds :class:`tying.callbacks.UntiedBiases` to a model; ``untied_biases`` holds its keyword arguments.

    Example:
        >>> import torch
        >>> class Model(UntiedBiasesMixin):
        ...     untied_biases = {"parameters": ["network.bias"], "input_size": [3, 8, 8]}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Conv2d(3, 4, 3)
        ...     def forward(self, x):
        ...         return self.network(x)
        >>> model = Model()
        >>> model.configure_model()
        >>> model.network.bias.shape
        torch.Size([4, 6, 6])
    """


class WeightClusteringMixin(Mixin, callback=WeightClustering):
    """Adds :class:`tying.callbacks.WeightClustering` to a model; ``weight_clustering`` holds its keyword arguments.

    Example:
        >>> class Model(WeightClusteringMixin):
        ...     weight_clustering = {"parameters": ["network.*.weight"], "clusters": 32, "start_epoch": 10}
        >>> Model().configure_callbacks()[0].clusters
        32
    """


class WeightHashingMixin(Mixin, callback=WeightHashing):
    """Adds :class:`tying.callbacks.WeightHashing` to a model; ``weight_hashing`` holds its keyword arguments.

    Example:
        >>> import torch
        >>> class Model(WeightHashingMixin):
        ...     weight_hashing = {"parameters": ["network.weight"], "table_ratio": 0.25}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Linear(8, 8)
        >>> model = Model()
        >>> model.configure_model()
        >>> model.network.table.shape
        torch.Size([16])
    """


class ZoneoutStatesMixin(Mixin, callback=ZoneoutStates):
    """Adds :class:`tying.callbacks.ZoneoutStates` to a model; ``zoneout_states`` holds its keyword arguments.

    Example:
        >>> import torch
        >>> class Model(ZoneoutStatesMixin):
        ...     zoneout_states = {"modules": "lstm", "cell": 0.5, "hidden": 0.05}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lstm = torch.nn.LSTM(4, 3)
        >>> model = Model()
        >>> model.configure_model()
        >>> model.lstm
        ZoneoutLSTM(4, 3, zoneout_cell=0.5, zoneout_hidden=0.05)
    """

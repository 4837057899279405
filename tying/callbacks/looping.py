"""Run consecutive blocks of a model several times, from a fraction of training on."""

from typing import Any

from torch import nn
from typing_extensions import override

from tying.callbacks.base import is_fresh_run, optimizer_steps, training_steps
from tying.callbacks.transform import ModelTransform, arguments_of
from tying.depth.loop import Loop, PerPass, check_passes, check_per_pass, loop, loops_in, scheduled_passes
from tying.errors import ConfigurationError, check_range, listed
from tying.lightning_namespace import pl
from tying.selection.patterns import Pattern


class Looping(ModelTransform):
    """Run consecutive blocks several times in a row, as 3 4 5 3 4 5, from a fraction of training on.

    The blocks stay where they are and keep their names in the state dict; see :func:`tying.depth.loop`. Before
    ``start`` the model computes what it would without the callback. The number of passes is a function of the step, so
    a resumed run continues with it. Validation during training uses the current number; tests and predictions use the
    number of the last training step, also that of a checkpoint, or else ``passes``. Logs ``tying/passes``.

    Args:
        blocks: a pattern of names of modules, or several. Those in one container are one loop and must be consecutive.
        passes: the final number of passes.
        start: the fraction of training after which the blocks run more than once, in [0, 1).
        per_pass: ``"norm"``: further passes have separate normalisation layers, which start as copies of those of the
            pass before; ``"scale"``: they have a learned factor on what each block adds, which starts at 1.
        grow: the fraction of training after which one more pass begins: pass p at ``start + (p − 2) · grow``; default:
            all passes begin at ``start``.

    Raises:
        ConfigurationError: an argument is out of range, or the last pass would begin after training; when the model is
            set up, see ``loop``; when training starts, its length is unknown, which ``start`` and ``grow`` need.

    Example:
        >>> Looping("transformer.h.{3..5}", passes=2, start=0.35).passes
        2
    """

    distinguished_by = "blocks"

    def __init__(
        self,
        blocks: str | list[str],
        passes: int,
        start: float = 0.0,
        per_pass: PerPass = None,
        grow: float | None = None,
    ) -> None:
        check_passes(passes)
        check_range("start", start, "[0, 1)")
        check_per_pass(per_pass)
        check_range("grow", 0.5 if grow is None else grow, "(0, 1)")
        if (last := start + (passes - 2) * (grow or 0.0)) >= 1:
            raise ConfigurationError(
                f"pass {passes} would begin at start + (passes - 2) * grow = {last:g} of training, not before its end: "
                "lower start, grow or passes"
            )
        self.blocks = blocks if isinstance(blocks, str) else [*blocks]
        self.passes, self.start, self.per_pass, self.grow = passes, start, per_pass, grow
        self._trained: int | None = None  # the number of passes of the last training step
        self._total_steps = 0
        self._loops: list[Loop] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"passes": self._trained}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trained = state_dict["passes"]
        for made in self._loops:
            made.passes = self._trained or made.passes

    @override
    def is_applied(self, model: nn.Module) -> bool:
        return bool(self._made(model))

    @override
    def adopt(self, model: nn.Module) -> None:
        patterns = [Pattern(text) for text in ([self.blocks] if isinstance(self.blocks, str) else self.blocks)]
        for made in loops_in(model):
            fits = made.per_pass == self.per_pass and made.further == self.passes - 1
            if fits and all(any(pattern.match(name) is not None for pattern in patterns) for name in made.names):
                for block in made.blocks:
                    block.__dict__.setdefault("_looped_by", arguments_of(self))

    @override
    def apply(self, model: nn.Module) -> int:
        self.adopt(model)
        if not self.is_applied(model):
            former = {id(block) for made in loops_in(model) for block in made.blocks}
            loop(model, self.blocks, self.passes, self.per_pass)
            for block in (block for made in loops_in(model) for block in made.blocks if id(block) not in former):
                block.__dict__["_looped_by"] = arguments_of(self)
        self._loops = self._made(model)
        return len(self._loops)

    def _made(self, model: nn.Module) -> list[Loop]:
        """Return the loops that this callback, or an equal one, has made."""
        arguments = arguments_of(self)
        return [made for made in loops_in(model) if made.blocks[0].__dict__.get("_looped_by") == arguments]

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if is_fresh_run(trainer, stage):
            self._trained = None
        passes = scheduled_passes(0, 1, self.passes, self.start, self.grow) if stage == "fit" else self.passes
        for made in self._loops:
            made.passes = self._trained or passes

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.start or self.grow:
            grow = f", grow={self.grow}" if self.grow else ""
            self._total_steps = training_steps(trainer, f"{self.label}: start={self.start}{grow}")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        step = optimizer_steps(trainer)
        self._trained = scheduled_passes(step, self._total_steps, self.passes, self.start, self.grow)
        for made in self._loops:
            made.grow(self._trained)
        pl_module.log("tying/passes", float(self._trained))

    @override
    def describe(self, model: nn.Module) -> str:
        start = f", from {self.start:g} of training on" if self.start else ""
        growth = f", one more after each {self.grow:g}" if self.grow else ""
        loops = [" to ".join(dict.fromkeys((made.names[0], made.names[-1]))) for made in self._made(model)]
        return f"{self.passes} passes through {listed(loops)}{start}{growth}"

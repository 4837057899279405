"""Callbacks for hierarchical multiscale LSTMs: anneal the slope in training, and plot detected boundaries."""

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tying.callbacks.base import Callback, counted
from tying.callbacks.figures import log_figure
from tying.depth import HMLSTM, HMOutput
from tying.errors import ConfigurationError, check_count, check_range
from tying.figures import MARKERS, SMALL, WIDTH, legend_below, new_figure
from tying.lightning_namespace import pl

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an optional package


class SlopeAnnealing(Callback):
    """Raise the slope of the boundary detectors of :class:`tying.depth.HMLSTM`: ``min(maximum, 1 + rate · epoch)``.

    It replaces the slope with which the layer was constructed.

    Args:
        rate: increase of the slope per epoch, ≥ 0.
        maximum: largest slope, ≥ 1.

    Raises:
        ConfigurationError: an argument is out of range; when training starts, the model has no HMLSTM.

    Example:
        >>> SlopeAnnealing().maximum
        5.0

    Source: J. Chung, S. Ahn and Y. Bengio, Hierarchical multiscale recurrent neural networks, 2017.
    """

    def __init__(self, rate: float = 0.04, maximum: float = 5.0) -> None:
        check_range("rate", rate, "[0, inf)")
        check_range("maximum", maximum, "[1, inf)")
        self.rate, self.maximum = rate, maximum

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # also here: a run that resumes within an epoch has no first batch
        self._set_slope(trainer)
        layers, slope = counted(len(self._layers), "layer"), self._layers[0].slope
        pl.utilities.rank_zero_info(
            f"SlopeAnnealing: {layers}, slope {slope:g}, raised by {self.rate:g} each epoch up to {self.maximum:g}"
        )

    def _set_slope(self, trainer: pl.Trainer) -> None:
        self._layers = [module for module in trainer.lightning_module.modules() if isinstance(module, HMLSTM)]
        if not self._layers:
            raise ConfigurationError("SlopeAnnealing: the model has no tying.depth.HMLSTM")
        for layer in self._layers:
            layer.slope = min(self.maximum, 1 + self.rate * trainer.current_epoch)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # Lightning skips on_train_epoch_start in a run that resumes at the end of an epoch
            self._set_slope(trainer)


LINE = 80  # characters
BLANKS = str.maketrans({"\n": "↵", "\t": "→", " ": "␣"})


class BoundaryPlot(Callback):
    """Draw the boundaries that a :class:`tying.depth.HMLSTM` finds in the first characters of the test text.

    The picture ``boundaries`` (see :func:`tying.callbacks.figures.log_figure`) has, below each character, a mark for
    each layer that detects a boundary there. Logs the fraction of steps with a boundary for each layer, as
    ``test/boundaries/1`` and so on.

    Args:
        characters: number of characters to draw, from the first sample of the first batch and of the following batches.

    Raises:
        ConfigurationError: ``characters`` is below 1; when testing starts, the model has no HMLSTM or several, or the
            data module has no method ``text`` that maps indices to characters, see :meth:`tying.data.Text.text`.

    Example:
        >>> BoundaryPlot(characters=160).characters
        160

    Source: J. Chung, S. Ahn and Y. Bengio, Hierarchical multiscale recurrent neural networks, 2017.
    """

    def __init__(self, characters: int = 400) -> None:
        check_count("characters", characters, "[1, inf)")
        self.characters = characters
        self._hook: RemovableHandle | None = None

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = [module for module in pl_module.modules() if isinstance(module, HMLSTM)]
        if len(layers) != 1:
            raise ConfigurationError(f"BoundaryPlot draws one tying.depth.HMLSTM; the model has {len(layers)}")
        if not callable(getattr(trainer.datamodule, "text", None)):  # type: ignore[attr-defined]  # untyped
            raise ConfigurationError(
                "BoundaryPlot: the data module has no method text(ids) that maps indices to characters, as "
                "tying.data.Text has"
            )
        self._sum, self._steps = torch.zeros(()), 0  # of the boundaries: (layers − 1,) after the first batch
        self._drawn: list[tuple[Tensor, Tensor]] = []  # characters of the first sample, and their boundaries
        self._hook = layers[0].register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: HMLSTM, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(output, HMOutput):  # the layer returns outputs of its top layer alone
            output = module.run(*args, **kwargs)
        if not isinstance(output.boundaries, Tensor) or output.boundaries.ndim != 3:
            raise ConfigurationError(
                "BoundaryPlot needs padded batches: the HMLSTM got packed sequences or a single one"
            )
        boundaries = output.boundaries.detach().float()
        self._last = boundaries.transpose(0, 1) if module.batch_first else boundaries  # (steps, batch, layers − 1)

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._sum = self._sum + self._last.sum(dim=(0, 1))
        self._steps += self._last.shape[0] * self._last.shape[1]
        if sum(len(ids) for ids, _ in self._drawn) < self.characters:
            self._drawn.append((batch[0][0].cpu(), self._last[:, 0].cpu()))

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for layer, count in enumerate(self._sum / self._steps, start=1):
            pl_module.log(f"test/boundaries/{layer}", count, sync_dist=True)
        ids, marks = (torch.cat(parts)[: self.characters] for parts in zip(*self._drawn, strict=True))
        text = trainer.datamodule.text(ids)  # type: ignore[attr-defined]  # untyped
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # matplotlib draws a box for a character that the font lacks
            log_figure(trainer, partial(boundary_figure, text, marks), "boundaries")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "test")  # Lightning skips it after an exception

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()


def boundary_figure(text: str, boundaries: Tensor) -> "Figure":
    """Return a figure of a text and, below each character, of its boundaries.

    Args:
        text: the characters.
        boundaries: 0 or 1, (characters, layers).
    """
    layers = boundaries.shape[1]
    height = 1 + 0.5 * layers  # of a line
    lines = -(-len(text) // LINE)
    figure = new_figure(WIDTH, 0.22 * height * lines + 0.2, "A text, and below it the boundaries of each layer")
    axes = figure.add_subplot(xlim=(-1, LINE), ylim=(-height * lines, 0.7))
    axes.axis("off")
    for position, letter in enumerate(text.translate(BLANKS)):
        line, column = divmod(position, LINE)
        axes.text(column, -height * line, letter, family="monospace", size=SMALL, ha="center", parse_math=False)
    for layer in range(layers):
        positions = boundaries[:, layer].nonzero().flatten()
        heights = -height * (positions // LINE) - 0.35 - 0.5 * layer
        style: dict[str, Any] = {"color": f"C{layer}", "marker": MARKERS[layer % len(MARKERS)], "markersize": 3}
        axes.plot(positions % LINE, heights, linestyle="none", label=f"boundaries of layer {layer + 1}", **style)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure

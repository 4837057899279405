"""``tying advise``: report which weights of a checkpoint may be tied."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tying.callbacks.transform import ModelTransform
from tying.cli.inspect import effective_callbacks, load_checkpoint
from tying.errors import ConfigurationError
from tying.lightning_namespace import pl
from tying.lightning_workarounds import MisconfigurationException

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Batches:
    """The batches of a loader, as a model receives them; it can be read several times.

    Args:
        loader: the loader.
        model: the model.
        datamodule: the data module that the loader comes from, if it is not the model.
        count: how many batches to read, at most; None for all.
    """

    def __init__(
        self, loader: Any, model: pl.LightningModule, datamodule: pl.LightningDataModule | None, count: int | None
    ) -> None:
        self.loader, self.model, self.datamodule, self.count = loader, model, datamodule, count

    def __iter__(self) -> Iterator[Any]:
        for batch in islice(self.loader, self.count):
            for hook in HOOKS:  # of the data module if it overrides them, as in Lightning
                is_overridden = getattr(type(self.datamodule), hook, None) not in (
                    None,
                    getattr(pl.LightningDataModule, hook),
                )
                source = self.datamodule if is_overridden else self.model
                arguments = (self.model.device, 0) if hook.startswith("transfer") else (0,)
                batch = getattr(source, hook)(batch, *arguments)
            yield batch


def prepare(
    model: pl.LightningModule, callbacks: Sequence[pl.Callback], checkpoint: Path | None, weights_only: bool | None
) -> None:
    """Let callbacks change a model as they do in training, and load the weights of a checkpoint if there is one.

    Raises:
        ConfigurationError: the file is not a checkpoint of Lightning, or does not fit.
    """
    model.configure_model()
    effective = effective_callbacks(model, callbacks)
    if checkpoint is not None:
        load_checkpoint(model, effective, checkpoint, weights_only)
        return
    for callback in effective:
        if isinstance(callback, ModelTransform):
            callback.apply_among(model, effective)


def batches_of(
    model: pl.LightningModule, datamodule: pl.LightningDataModule | None, count: int
) -> tuple[Batches, Batches]:
    """Return batches to compare outputs on, of the validation data, and batches to distil on, of the training data.

    Where one of the two is missing, the other serves for both.

    Args:
        model: the model.
        datamodule: the data; default: the model's loaders.
        count: number of batches to compare outputs on, at most.

    Raises:
        ConfigurationError: there are no data.
    """
    source = model if datamodule is None else datamodule
    source.prepare_data()
    source.setup("fit")
    training, validation = (_loader(source, name) for name in ("train_dataloader", "val_dataloader"))
    if training is None and validation is None:
        raise ConfigurationError(f"{type(source).__name__} has neither training nor validation data to advise on")
    return (
        Batches(training if validation is None else validation, model, datamodule, count),
        Batches(validation if training is None else training, model, datamodule, None),
    )


def _loader(source: pl.LightningModule | pl.LightningDataModule, name: str) -> Any:
    """Return a loader of some data; of several loaders the first; None if there is none."""
    try:
        loader = getattr(source, name)()
    except (MisconfigurationException, NotImplementedError):  # it is not defined
        return None
    loader = getattr(loader, "iterables", loader)  # several that Lightning combines
    if isinstance(loader, dict):
        loader = [*loader.values()]
    return next(iter(loader), None) if isinstance(loader, list | tuple) else loader

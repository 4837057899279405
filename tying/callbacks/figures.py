"""Hand pictures to the trainer's loggers, or write them into the run's folder."""

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tying.errors import ConfigurationError
from tying.files import save_figure
from tying.lightning_namespace import pl

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an optional package


def log_figure(trainer: pl.Trainer, draw: "Callable[[], Figure]", name: str) -> None:
    """Draw a picture and hand it to each logger that takes figures; if none does, write it as a PNG.

    The loggers of TensorBoard, W&B, MLflow and Comet take figures; their picture is called ``tying/<name>``, that of
    MLflow ``<name>.png``. The PNG is ``<name>.png`` in the run's own folder, see :func:`run_folder`. It replaces no
    file: the next ones are ``<name>-v1.png``, ``<name>-v2.png`` and so on.

    Only the first process draws, and none does with ``fast_dev_run``. Training goes on if a logger or the folder fails,
    if the folder is an address such as ``s3://bucket``, or if matplotlib is missing or broken; one line says so.

    Args:
        trainer: the trainer, in training or testing.
        draw: returns the figure.
        name: name of the picture, such as ``"importance"``.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # untyped
        return
    try:
        figure = draw()
        taken = [_hand_over(logger, figure, name, trainer.global_step) for logger in trainer.loggers]
        if not any(taken):
            _write(figure, run_folder(trainer), name)
    except (ConfigurationError, ImportError) as error:  # matplotlib imports parts of itself when it writes
        pl.utilities.rank_zero_info(f"the picture {name} is not drawn: {error}")


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of a run: its logger's, of this version, or else the trainer's ``default_root_dir``.

    Call it in the first process: others may not know the logger's version.

    Raises:
        ConfigurationError: the folder is an address, such as ``s3://bucket``.
    """
    root = trainer.default_root_dir
    folder = next((logger.log_dir for logger in trainer.loggers if logger.log_dir), None)
    if folder is None and trainer.loggers:
        logger = trainer.loggers[0]  # as for ModelCheckpoint
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(logger.save_dir or root, str(logger.name), version)
    folder = folder or root
    if "://" in str(folder):
        raise ConfigurationError(
            f"{folder} is not a local folder: add a logger that takes figures, such as TensorBoardLogger"
        )
    return Path(folder)


def _hand_over(logger: Any, figure: "Figure", name: str, step: int) -> bool:
    """Hand a figure to a logger, and return whether the logger has taken it."""
    kinds = {kind.__name__ for kind in type(logger).__mro__}  # their packages need not be installed
    tag = f"tying/{name.removeprefix('tying_')}"
    try:
        if "WandbLogger" in kinds:
            logger.log_image(tag, [figure], step=step)
        elif "MLFlowLogger" in kinds:
            logger.experiment.log_figure(logger.run_id, figure, f"{name}.png")
        elif "CometLogger" in kinds:
            logger.experiment.log_figure(tag, figure, step=step)
        elif hasattr(getattr(logger, "experiment", None), "add_figure"):  # TensorBoard's
            logger.experiment.add_figure(tag, figure, step)
        else:
            return False
    except Exception as error:  # of any package, or of the network
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{type(logger).__name__} could not log the picture {name} ({reason})", stacklevel=4)
        return False
    return True


def _write(figure: "Figure", folder: Path, name: str) -> None:
    """Write a figure into a folder, as a new file."""
    try:
        path = _new_file(folder, name)
        try:
            save_figure(figure, path)
        except (OSError, ImportError):
            path.unlink()
            raise
    except OSError as error:
        reason = error.strerror or error
        # from this line, so that Python shows it once, however many pictures there are
        warnings.warn(f"pictures are not saved, since {folder} cannot be written: {reason}", stacklevel=1)
    else:
        pl.utilities.rank_zero_info(f"the picture {name} is {path}")


def _new_file(folder: Path, name: str) -> Path:
    """Create an empty file for a picture, which no other process can have created."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in count():
        path = folder / f"{name}{f'-v{number}' if number else ''}.png"
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError  # not reached: count has no end

"""The command line: LightningCLI with ``inspect`` and ``bake``."""

from __future__ import annotations

import os
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

import tying.callbacks
import tying.cli.bake
import tying.data
import tying.models  # with the two above: their classes can be named without a path
from tying.cli.errors import explain
from tying.cli.inspect import inspect
from tying.errors import ConfigurationError, NonFiniteError
from tying.files import check_whole, newest_intact
from tying.lightning_workarounds import callbacks_of


class Trainer(pl.Trainer):
    """Lightning's Trainer, which can also say what a configuration ties."""

    def inspect(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = True,
        plot: str | None = None,
    ) -> None:
        """Print, without training, which weights each tie matches, and which weights no tie matches.

        Args:
            model: what to inspect.
            datamodule: not used; what the configuration of a training run holds.
            ckpt_path: take the weights of this checkpoint, or of the newest, ``"last"``.
            weights_only: unpickle nothing but tensors and plain types from it.
            plot: write how hashes use their tables to this PNG: heat maps and histograms.

        Raises:
            ConfigurationError: ties do not fit the model; those that do are printed first.
        """
        checkpoint = None if ckpt_path is None else Path(ckpt_path)
        if ckpt_path == "last" and (checkpoint := newest_checkpoint(self)) is None:
            raise ConfigurationError("ckpt_path=last: there is no checkpoint of this name yet")
        inspect(model, callbacks_of(self), checkpoint, weights_only, None if plot is None else Path(plot))


class SaveConfig(SaveConfigCallback):
    """Save the configuration beside what a logger writes; without a logger, nowhere."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class TyingCLI(LightningCLI):
    """LightningCLI for any LightningModule and any LightningDataModule, with the subcommand ``inspect``."""

    trainer: Trainer

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "inspect": {"model", "datamodule"}}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**{"exit_on_error": False, **kwargs})  # main tells the error, in fewer words

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # without Lightning's warning where a program passes its own arguments
        own = self.config.get(str(self.config.get("subcommand")), {})
        if own.get("weights_only", False) is None:
            own.weights_only = True  # Lightning itself would unpickle anything that comes from a URL
        path = own.get("ckpt_path")
        if path and path not in ("last", "best", "hpc", "registry") and "://" not in path and not Path(path).is_dir():
            check_whole(path, "ckpt_path")
            if not zipfile.is_zipfile(path):
                raise ConfigurationError(f"ckpt_path: {path} is not a checkpoint, or is truncated")

    @override
    def _parse_ckpt_path(self) -> None:
        """Leave the model as it is configured: Lightning would let a checkpoint's own arguments override that."""

    def before_fit(self) -> None:
        """Let ``--ckpt_path last`` mean the newest checkpoint of any earlier run of this name; without one, begin anew.

        Lightning itself looks only where this run will write, which is a new directory for each run.
        """
        self._find_last("fit")

    def before_validate(self) -> None:
        """Let ``--ckpt_path last`` mean the newest checkpoint of any run of this name, of which there must be one."""
        self._find_last("validate")

    def before_test(self) -> None:
        """As :meth:`before_validate`."""
        self._find_last("test")

    def before_predict(self) -> None:
        """As :meth:`before_validate`."""
        self._find_last("predict")

    def _find_last(self, subcommand: str) -> None:
        config = self.config_init[subcommand]
        if config.ckpt_path != "last":
            return
        warnings.filterwarnings("ignore", "The dirpath has changed")  # each run has a directory of its own
        found, where = newest_checkpoint(self.trainer), " or ".join(_places(self.trainer))
        unseen = " (only folders of this machine are searched)" if "://" in where else ""  # nor does Lightning see it
        if found is None and (unseen or subcommand != "fit"):
            raise ConfigurationError(f"ckpt_path: no run in {where} has a checkpoint{unseen}; give its path")
        config.ckpt_path = None if found is None else str(found)
        if found is None:
            rank_zero_info(f"no earlier run is in {where}: training begins anew")
        else:
            rank_zero_info(f"{'going on from' if subcommand == 'fit' else 'taking the weights of'} {found}")


def newest_checkpoint(trainer: pl.Trainer) -> Path | None:
    """Return the newest checkpoint of any run of this name, or in a folder that a callback is told to save in."""
    return newest_intact(path for place, files in _places(trainer).items() for path in Path(place).glob(files))


def _places(trainer: pl.Trainer) -> dict[str, str]:
    """Return in which folders runs of this name leave checkpoints, where Lightning puts them, and their paths there."""
    own = {str(trainer.default_root_dir): "checkpoints/*.ckpt"}
    if logger := trainer.logger:
        own = {os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name)): "*/checkpoints/*.ckpt"}
    told = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return own | {str(folder): "*.ckpt" for folder in told if folder}


def parse(args: Sequence[str] | None = None, run: bool = False) -> TyingCLI:
    """Return trainer, model and data as the arguments say; with ``run``, the first of these is a subcommand to run.

    Example:
        >>> model = ["--model=Autoencoder", "--model.sizes=[8, 4]"]
        >>> parse(["--seed_everything=0", "--trainer.logger=false", *model]).model.hparams["sizes"]
        [8, 4]
    """
    return TyingCLI(
        trainer_class=Trainer,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},  # in the logger's own directory
        args=None if args is None else [*args],
        run=run,
    )


def _load(args: Sequence[str]) -> tuple[pl.Trainer, pl.LightningModule]:
    cli = parse(args)
    return cli.trainer, cli.model


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake in what was asked for is told in a paragraph, with exit status 2."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a module of one's own can be named
    given = sys.argv[1:] if args is None else [*args]
    try:
        if given[:1] == ["bake"]:
            tying.cli.bake.main(given[1:], _load)
        else:
            parse(given, run=True)
    except NonFiniteError as error:
        print(f"tying: error: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        told = explain(error, of_checkpoint=any(argument.startswith("--ckpt_path") for argument in given))
        if told is None:
            raise
        print(f"tying: error: {told}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

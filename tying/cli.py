"""The command line: LightningCLI, with ``inspect`` and ``bake``."""

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

import tying.bake
import tying.callbacks
import tying.data
import tying.models  # with the two above: their classes can be named without a path
from tying.callbacks.base import callbacks_of
from tying.checkpoints import check_whole, newest_intact
from tying.errors import ConfigurationError, NonFiniteError
from tying.explanation import explain
from tying.inspection import inspect


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

    def before_fit(self) -> None:
        """Let ``--ckpt_path last`` mean the newest checkpoint of any earlier run of this name; without one, begin anew.

        Lightning itself looks only where this run will write, which is a new directory for each run.
        """
        if self.config_init.fit.ckpt_path == "last":
            found = self._newest()
            self.config_init.fit.ckpt_path = None if found is None else str(found)
            where = getattr(self.trainer.logger, "root_dir", None)
            rank_zero_info(f"going on from {found}" if found else f"no earlier run is in {where}: training begins anew")

    def _newest(self) -> Path | None:
        warnings.filterwarnings("ignore", "The dirpath has changed")  # each run has a directory of its own
        return newest_checkpoint(self.trainer)

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
        if config.ckpt_path == "last":
            if (found := self._newest()) is None:
                where = getattr(self.trainer.logger, "root_dir", None)
                raise ConfigurationError(f"ckpt_path: no run in {where} has a checkpoint; give its path")
            config.ckpt_path = str(found)
            rank_zero_info(f"taking the weights of {found}")


def newest_checkpoint(trainer: pl.Trainer) -> Path | None:
    """Return the newest checkpoint beside the trainer's log directory, in any version of it."""
    root = getattr(trainer.logger, "root_dir", None)
    return newest_intact(Path(root).glob("*/checkpoints/*.ckpt")) if root else None


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
            tying.bake.main(given[1:], _load)
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

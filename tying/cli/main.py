"""The command line: LightningCLI with ``inspect``, ``advise``, ``bake`` and ``demo``."""

import os
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

import tying.callbacks
import tying.data
import tying.models  # with the two above: their classes can be named without a path
from tying.advice import advise
from tying.cli.advise import batches_of, prepare
from tying.cli.bake import export
from tying.cli.config import Parser, SectionsParser, check_variables
from tying.cli.demo import demo
from tying.cli.errors import explain
from tying.cli.inspect import inspect
from tying.errors import ConfigurationError, NonFiniteError, check_count
from tying.files import check_whole, newest_intact
from tying.lightning_namespace import pl
from tying.lightning_workarounds import callbacks_of


class Trainer(pl.Trainer):
    """Lightning's Trainer, which can also report what a configuration ties, and advise on what to tie."""

    def inspect(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = True,
        plot: Path | None = None,
        json: bool = False,
    ) -> None:
        """Print, without training, which weights each tie matches, and which weights no tie matches.

        Args:
            model: the model to inspect.
            datamodule: not used; accepted because configurations of training runs have it.
            ckpt_path: path of a checkpoint to load weights from, or ``"last"`` for the newest.
            weights_only: unpickle only tensors and plain types from the checkpoint.
            plot: path of a PNG for heat maps and histograms of how hashes use their tables.
            json: print one JSON document instead of text.

        Raises:
            ConfigurationError: ties do not fit the model. The ties that fit are printed first, as text only.
        """
        inspect(model, callbacks_of(self), _checkpoint_path(self, ckpt_path), weights_only, plot, json, self)

    def advise(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = True,
        budget: float = 0.5,
        steps: int = 0,
        batches: int = 8,
        parameters: list[str] = ["**"],  # noqa: B006  # not changed
        rate: float = 1e-3,
        out: Path | None = None,
    ) -> None:
        """Print which weights of a trained model may be tied: what ties do to its outputs, beside low rank.

        Args:
            model: the model.
            datamodule: its data; default: the model's own loaders.
            ckpt_path: path of a checkpoint to load weights from, or ``"last"`` for the newest.
            weights_only: unpickle only tensors and plain types from the checkpoint.
            budget: share of the parameters that may remain, in (0, 1).
            steps: number of steps of distillation of each plan, on training data.
            batches: number of batches of validation data, or else training data, on which outputs are compared.
            parameters: patterns of the parameters among which to save; a leading ``!`` excludes.
            rate: learning rate of the distillation.
            out: folder for tables, picture, YAML and what is measured; an interrupted run goes on there.

        Raises:
            ConfigurationError: the checkpoint does not fit, there are no data, or ties do not reach the budget.
        """
        check_count("batches", batches)
        checkpoint = _checkpoint_path(self, ckpt_path)
        prepare(model, callbacks_of(self), checkpoint, weights_only)
        compared, training = batches_of(model, datamodule, batches)
        advice = advise(model, compared, budget, steps, out=out, parameters=parameters, training=training, rate=rate)
        print(f"{advice}\nThe best plan, as a configuration{f' ({out}/ties.yaml)' if out else ''}:\n\n{advice.yaml()}")


def _checkpoint_path(trainer: pl.Trainer, ckpt_path: str | None) -> Path | None:
    """Return the path of a checkpoint, which may be given as ``"last"``."""
    if "://" in (ckpt_path or ""):
        raise ConfigurationError(
            f"ckpt_path: only fit and test read a URL such as {ckpt_path}: download it, and give the path of the file"
        )
    if ckpt_path != "last":
        return None if ckpt_path is None else Path(ckpt_path)
    if (newest := newest_checkpoint(trainer)) is None:
        raise ConfigurationError("ckpt_path=last: no run of this name has a checkpoint yet")
    return newest


class SaveConfig(pl.cli.SaveConfigCallback):
    """Save the configuration in the logger's directory; do nothing without a logger."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class TyingCLI(pl.cli.LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule, with ``inspect``, ``advise``, ``bake``, ``demo``.

    Hyperparameters stored in the checkpoint are ignored; your config decides.
    """

    trainer: Trainer
    file_parser: ClassVar[type[Parser]] = Parser

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        needs = {"model", "datamodule"}
        return {**pl.cli.LightningCLI.subcommands(), "inspect": needs, "advise": needs}

    @override
    def init_parser(self, **kwargs: Any) -> pl.cli.LightningArgumentParser:
        return super().init_parser(**{"exit_on_error": False, **kwargs})  # main prints shorter errors

    @override
    def parse_arguments(self, parser: pl.cli.LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # Lightning would warn about arguments that a program passes
        options = self.config.get(str(self.config.get("subcommand")), {})
        if options.get("weights_only", False) is None:
            options.weights_only = True  # Lightning would unpickle any object from a URL
        path = self._ckpt_path = options.get("ckpt_path")
        if path and path not in ("last", "best", "hpc", "registry") and "://" not in path and not Path(path).is_dir():
            check_whole(path, "ckpt_path")
            if not zipfile.is_zipfile(path):
                raise ConfigurationError(f"ckpt_path: {path} is not a checkpoint, or is truncated")
        if path:
            options.ckpt_path = None  # Lightning would let hyperparameters in the checkpoint override the configuration

    @override
    def before_instantiate_classes(self) -> None:
        if self._ckpt_path:
            self.config[self.subcommand].ckpt_path = self._ckpt_path

    @override
    def instantiate_classes(self) -> None:
        if self.subcommand == "bake":
            options = self.config.bake
            export(options.ckpt, options.out, options.config, load)
            self.subcommand = None  # nothing is left to run
        elif self.subcommand == "demo":
            demo(self.config.demo.out, self.config.demo.epochs, parse)
            self.subcommand = None
        else:
            super().instantiate_classes()

    @override
    def after_instantiate_classes(self) -> None:
        """Replace ``--ckpt_path last`` by the newest checkpoint of any earlier run of this name.

        Lightning itself searches only the directory of this run, which is new for each run. Without a checkpoint,
        ``fit`` begins anew, and the other subcommands raise an error.
        """
        options: Any = self.config_init[self.subcommand] if self.subcommand else {}
        if options.get("ckpt_path") != "last":
            return
        warnings.filterwarnings("ignore", "The dirpath has changed")  # each run has a directory of its own
        newest, where = newest_checkpoint(self.trainer), " or ".join(_places(self.trainer))
        unseen = " (only folders of this machine are searched)" if "://" in where else ""
        if newest is None and (unseen or self.subcommand != "fit"):
            raise ConfigurationError(f"ckpt_path: no run in {where} has a checkpoint{unseen}: give the path of one")
        options.ckpt_path = None if newest is None else str(newest)
        use = "going on from" if self.subcommand == "fit" else "taking the weights of"
        pl.utilities.rank_zero_info(
            f"no earlier run is in {where}: training begins anew" if newest is None else f"{use} {newest}"
        )


def newest_checkpoint(trainer: pl.Trainer) -> Path | None:
    """Return the newest checkpoint of any run of this name, or in the ``dirpath`` of a checkpoint callback."""
    return newest_intact(path for place, files in _places(trainer).items() for path in Path(place).glob(files))


def _places(trainer: pl.Trainer) -> dict[str, str]:
    """Return the checkpoint folders of runs of this name, each with the pattern of its checkpoints."""
    places = {str(trainer.default_root_dir): "checkpoints/*.ckpt"}
    if logger := trainer.logger:
        places = {os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name)): "*/checkpoints/*.ckpt"}
    return places | {
        str(folder): "*.ckpt"
        for callback in trainer.checkpoint_callbacks
        if (folder := getattr(callback, "dirpath", None))
    }


def parse(args: Sequence[str] | None = None, run: bool = False, cli: type[TyingCLI] = TyingCLI) -> TyingCLI:
    """Parse arguments and instantiate trainer, model and data; with ``run``, the first argument is a subcommand to run.

    Names such as ``configs/base.yaml`` that do not exist in the current folder are those of this package.

    Example:
        >>> model = ["--model=Autoencoder", "--model.sizes=[8, 4]"]
        >>> parse(["--seed_everything=0", "--trainer.logger=false", *model]).model.hparams["sizes"]
        [8, 4]
    """
    return cli(
        trainer_class=Trainer,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},  # in the logger's own directory
        parser_class=cli.file_parser,
        parser_kwargs={"prog": "tying", "version": tying.__version__},
        args=[*map(_locate_config, sys.argv[1:] if args is None else args)],
        run=run,
    )


class Loading(TyingCLI):
    """Instantiate the classes of a run's configuration, and run no subcommand."""

    file_parser = SectionsParser

    @override
    def after_instantiate_classes(self) -> None:
        self.subcommand = None


def load(configs: Sequence[str]) -> TyingCLI:
    """Return the trainer and the model that the configurations of a run, of any subcommand, describe."""
    return parse(["inspect", *(f"--config={config}" for config in configs), "--ckpt_path=null"], run=True, cli=Loading)


def _locate_config(argument: str) -> str:
    """Return an argument with the path of this package's ``configs/``, if it names a file of these that is not here."""
    option, equals, path = argument.rpartition("=")
    packaged = Path(tying.__file__).parent / path
    is_packaged = path.startswith("configs/") and packaged.is_file() and not Path(path).exists()
    return f"{option}{equals}{packaged}" if is_packaged else argument


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; mistakes of the user are explained in a paragraph, with exit status 2."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: modules in the current folder can be named
    given = sys.argv[1:] if args is None else [*args]
    try:
        for argument in given:
            check_variables(argument)
        parse(given, run=True)
    except Exception as error:
        explanation = (
            str(error)
            if isinstance(error, NonFiniteError)
            else explain(error, of_checkpoint=any(argument.startswith("--ckpt_path") for argument in given))
        )
        if explanation is None:
            raise
        print(f"tying: error: {explanation}", file=sys.stderr)
        sys.exit(1 if isinstance(error, NonFiniteError) else 2)

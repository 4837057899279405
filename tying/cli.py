"""The command line: LightningCLI, and ``inspect``."""

from __future__ import annotations

import os
import re
import sys
import warnings
import zipfile
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

import tying.bake
import tying.callbacks
import tying.data
import tying.models  # with the two above: their classes can be named without a path
from tying.callbacks import HardTying, WeightClustering
from tying.callbacks.base import ChangesModel, TyingCallback, averaging_before, callbacks_of
from tying.callbacks.summary import print_summary
from tying.errors import ConfigurationError
from tying.hard import audit
from tying.hashing import plot_loads, report
from tying.names import clean_name
from tying.selection import resolve, resolve_each
from tying.ties import TiedGroup

UNION = "Does not validate against any of the Union subtypes"  # how the parser begins, where it tried several types
VAIN = ("Expected a <class 'NoneType'>", "Not a valid subclass", "Expected a path")  # what it then tells in addition


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
            ckpt_path: take the weights of this checkpoint.
            weights_only: unpickle nothing but tensors and plain types from it.
            plot: write how hashes use their tables to this PNG: heat maps and histograms.

        Raises:
            ConfigurationError: ties do not fit the model; those that do are printed first.
        """
        model.configure_model()
        own = model.configure_callbacks()
        own = [*own] if isinstance(own, Sequence) else [own]
        replaced = {type(callback) for callback in own}
        for hidden in replaced & {type(callback) for callback in callbacks_of(self)}:
            print(f"{hidden.__name__} of the configuration is replaced by that of {type(model).__name__} itself")
        callbacks = [*(c for c in callbacks_of(self) if type(c) not in replaced), *own]
        changing = [callback for callback in callbacks if isinstance(callback, ChangesModel)]
        if ckpt_path is not None:
            for change in changing:
                change.apply(model)
            path = newest_checkpoint(self) if ckpt_path == "last" else Path(ckpt_path)
            if path is None:
                raise ConfigurationError("ckpt_path=last: there is no checkpoint of this name yet")
            _load_weights(model, callbacks, path, weights_only)
        groups: list[tuple[str, TiedGroup]] = []
        errors: list[str] = []
        for callback in callbacks:
            if not isinstance(callback, TyingCallback):
                continue
            kind = type(callback).__name__
            if isinstance(callback, HardTying) and callback.is_applied(model):  # by the model itself
                groups += [(kind, group) for group in callback.apply(model)]
                continue
            found = resolve_each(model, callback.ties)
            for tie, result in zip(callback.ties, found, strict=True):
                if not isinstance(result, ConfigurationError):
                    weights, count = sum(map(len, result)), len(result)
                    print(f"{kind}: '{tie}' matches {weights} weights in {count} group{'s' * (count > 1)}")
            wrong = [str(result) for result in found if isinstance(result, ConfigurationError)]
            try:
                tied = [] if wrong else resolve(model, callback.ties)
                callback.check(tied)
                groups += [(kind, group) for group in tied]
            except ConfigurationError as error:
                wrong.append(str(error))
            errors += wrong
        if errors:
            raise ConfigurationError("; ".join(errors))
        print_summary(model, groups, max_rows=None)
        held = {id(parameter) for _, group in groups for parameter in group.parameters}
        free = [clean_name(name) for name, parameter in model.named_parameters() if id(parameter) not in held]
        print(f"Not matched by any tie: {len(free)}: {', '.join(free)}" if free else "Every parameter is tied.")
        wrong = [averaging_before(callback, callbacks) for callback in changing]
        for change in changing:
            change.apply(model)
            if told := change.told(model):
                print(f"{type(change).__name__}: {told}")
        audited, hashed = audit(model), report(model)
        if hashed.weights:
            print(f"Hashed: {hashed}")
            if plot is not None:
                plot_loads(model, Path(plot))
        elif plot is not None:
            raise ConfigurationError("plot: no weight of the model is hashed")
        if changing:
            print(f"With {', '.join(type(callback).__name__ for callback in changing)}: {audited.counts()}")
        for line in [*(f"Problem: {problem}." for problem in wrong if problem), *audited.remarks()]:
            print(line)


def _load_weights(
    model: pl.LightningModule, callbacks: Sequence[pl.Callback], path: Path, weights_only: bool | None
) -> None:
    try:
        state_dict = torch.load(path, "cpu", weights_only=weights_only)["state_dict"]
        for callback in callbacks:
            if isinstance(callback, WeightClustering):
                callback.prepare(model, state_dict)
        model.load_state_dict(state_dict)
    except (RuntimeError, KeyError) as error:
        raise ConfigurationError(f"ckpt_path: {path} does not fit the model: {error}") from None


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
        path = self.config.get(f"{self.config.get('subcommand')}.ckpt_path")
        if path and path not in ("last", "best", "hpc", "registry") and ":" not in path:
            if not Path(path).exists():
                raise ConfigurationError(f"ckpt_path: there is no checkpoint {path}; give a path, 'last' or 'best'")
            if Path(path).is_file() and not zipfile.is_zipfile(path):
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


def newest_intact(checkpoints: Iterable[Path]) -> Path | None:
    """Return the newest checkpoint that is whole: a kill truncates one where temporary files lie on another disk."""
    newest_first = sorted(checkpoints, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next(filter(_is_whole, newest_first), None)


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


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
    except (ArgumentError, ValueError, MisconfigurationException) as error:
        told = explain(error)
        if told is None:
            raise
        print(f"tying: error: {told}", file=sys.stderr)
        sys.exit(2)


def explain(error: BaseException) -> str | None:
    """Return what is wrong with what was asked for, in a paragraph; ``None`` for an error of another kind."""
    chain = _causes(error)
    mistakes = (ArgumentError, ConfigurationError, MisconfigurationException)
    if not any(isinstance(cause, mistakes) or str(cause).startswith(UNION) for cause in chain):
        return None
    return _told_briefly(chain)


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and what caused it, down to the first cause."""
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _told_briefly(chain: Sequence[BaseException]) -> str:
    """Return where a mistake is, and its first cause, without what the parser also tried in vain.

    Example:
        >>> outer, inner = ValueError('Parser key "data": ...'), ValueError("batch_size must be 1 or more, not 0")
        >>> _told_briefly([outer, inner])
        'data: batch_size must be 1 or more, not 0'
    """
    cause = next((error for error in chain if isinstance(error, ConfigurationError)), chain[-1])
    heads = [re.match(r"""(?:Parser key|Problem with given class_path) ["']([^"']+)["']""", str(e)) for e in chain]
    places = [*dict.fromkeys(head[1] for head in heads if head)]
    alternatives = [re.sub(r"^Parser key \S+:\s*", "", str(cause).strip())]
    union = str(chain[chain.index(cause) - 1])
    if union.startswith(UNION) and not isinstance(cause, ConfigurationError):
        tried = re.split(r"\n  - ", union.split("\nGiven value")[0])[1:]
        alternatives += [re.sub(r"\s+", " ", attempt) for attempt in tried if not attempt.startswith(VAIN)][1:]
    told = ": ".join([*places, "; or: ".join(alternatives)])
    return told + (" (infinity is written .inf)" if told.endswith("Got value: inf") else "")


if __name__ == "__main__":
    main()

"""The command line: LightningCLI, and ``inspect``."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import tying.callbacks
import tying.data
import tying.models  # noqa: F401  # with the two above: their classes can be named without a path
from tying.callbacks.summary import callbacks_of, print_summary
from tying.errors import ConfigurationError
from tying.names import clean_name
from tying.selection import TiedGroup, resolve


class Trainer(pl.Trainer):
    """Lightning's Trainer, which can also say what a configuration ties."""

    def inspect(self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None = None) -> None:
        """Print, without training, which weights each tie matches, and which weights no tie matches.

        Raises:
            ConfigurationError: a tie does not fit the model; raised after the others have been printed.
        """
        model.configure_model()
        own = model.configure_callbacks()
        own = [*own] if isinstance(own, Sequence) else [own]
        replaced = {type(callback) for callback in own}
        callbacks = [*(c for c in callbacks_of(self) if type(c) not in replaced), *own]
        groups: list[tuple[str, TiedGroup]] = []
        errors: list[str] = []
        for callback in callbacks:
            kind, ties = type(callback).__name__, getattr(callback, "ties", [])
            for tie in ties:
                try:
                    found = resolve(model, [tie])
                    print(f"{kind}: '{tie}' matches {sum(map(len, found))} weights in {len(found)} groups")
                except ConfigurationError as error:
                    errors.append(str(error))
            if ties and not errors:
                groups += [(kind, group) for group in resolve(model, ties)]
        print_summary(model, groups, max_rows=None)
        tied = {id(parameter) for _, group in groups for parameter in group.parameters}
        free = [clean_name(name) for name, parameter in model.named_parameters() if id(parameter) not in tied]
        print("\n".join([f"Not matched by any tie: {len(free)}", *free]))
        if errors:
            raise ConfigurationError("\n\n".join(errors))


class TyingCLI(LightningCLI):
    """LightningCLI for any LightningModule and any LightningDataModule, with the subcommand ``inspect``."""

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

    @override
    def before_instantiate_classes(self) -> None:
        path = self._get(self.config, "ckpt_path")
        if path and path not in ("last", "best", "hpc", "registry") and ":" not in path and not Path(path).exists():
            raise ConfigurationError(f"ckpt_path: there is no checkpoint {path}; give a path, 'last' or 'best'")


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
        save_config_kwargs={"overwrite": True},
        args=None if args is None else [*args],
        run=run,
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake in what was asked for is told in a paragraph, with exit status 2."""
    try:
        parse(args, run=True)
    except (ArgumentError, ValueError, MisconfigurationException) as error:
        chain = _causes(error)
        mistakes = (ArgumentError, ConfigurationError, MisconfigurationException)
        if not any(isinstance(cause, mistakes) for cause in chain):
            raise
        print(f"tying: error: {_told_briefly(chain)}", file=sys.stderr)
        sys.exit(2)


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
    told = [*dict.fromkeys(head[1] for head in heads if head), re.sub(r"^Parser key \S+:\s*", "", str(cause).strip())]
    before = str(chain[chain.index(cause) - 1])
    union = re.match(r"Does not validate against any of the Union subtypes\nSubtypes: \[(.*)\]\n", before)
    accepted = f" (accepted: {union[1]})" if union and not isinstance(cause, ConfigurationError) else ""
    return ": ".join(told) + accepted


if __name__ == "__main__":
    main()

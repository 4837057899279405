"""``tying bake``: export the plain weights of a checkpoint."""

import re
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tying.cli.inspect import effective_callbacks, load_weights
from tying.errors import ConfigurationError
from tying.files import NEED, atomically, read
from tying.hard import bake
from tying.lightning_namespace import pl
from tying.lightning_workarounds import callbacks_of
from tying.selection.index import unwrapped

HELP = "Write the plain weights of a checkpoint, which load without this package."


def bake_parser() -> pl.cli.LightningArgumentParser:
    """Return the parser of the arguments of :func:`export`."""
    parser = pl.cli.LightningArgumentParser(description=HELP, exit_on_error=False)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint of Lightning, or a state dict")
    parser.add_argument("--seed_everything", type=bool, default=False, help=SUPPRESS)  # Lightning requires it
    parser.add_argument("--out", type=Path, required=True, help="a file of torch, or of safetensors by its suffix")
    parser.add_argument(
        "--config", action="append", default=[], help="the run's configuration, where the model computes weights"
    )
    return parser


def export(
    checkpoint: Path, out: Path, configs: Sequence[str], load: Callable[[Sequence[str]], pl.cli.LightningCLI]
) -> None:
    """Write the plain weights of a checkpoint.

    Args:
        checkpoint: a checkpoint of Lightning, or a state dict.
        out: a file of torch, or of safetensors by its suffix.
        configs: configurations of the run; required if the model computes weights.
        load: function from configurations to the command line, which has their trainer and model.

    Raises:
        ConfigurationError: the checkpoint is missing or holds no weights, or needs a configuration.
    """
    if re.match(r"\w+:/", str(checkpoint)):  # a path has lost one of the slashes
        raise ConfigurationError(f"--ckpt: {checkpoint} is a URL: download it, and give the path of the file")
    content = read(checkpoint, "--ckpt")
    weights = _state_dict(content, checkpoint)
    if any("parametrizations." in key or key.endswith("_extra_state") for key in weights):
        if not configs:
            raise ConfigurationError(f"{checkpoint} holds weights that the model computes: give the run's --config")
        cli = load(configs)
        cli.model.configure_model()
        callbacks = effective_callbacks(cli.model, callbacks_of(cli.trainer))
        load_weights(cli.model, callbacks, weights, f"--config {', '.join(configs)}: {checkpoint}")
        weights = bake(cli.model)
    plain = {
        unwrapped(key): value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in weights.items()
        if not key.startswith(NEED)
    }
    save: Callable[..., object] = torch.save
    if out.suffix == ".safetensors":
        try:
            from safetensors.torch import save_file as save
        except ImportError:
            raise ConfigurationError("a .safetensors file needs the package: pip install safetensors") from None
    try:
        with atomically(out) as partial:
            save(plain, partial)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
        raise ConfigurationError(f"--out: {out} cannot be written: {error}") from None
    print(f"{len(plain)} tensors, {sum(value.nbytes for value in plain.values()):,} bytes: {out}")
    _print_notes(content.get("callbacks", {}))


def _print_notes(states: Mapping[str, Any]) -> None:
    """Print how a plain model computes differently, by the callbacks' states in a checkpoint."""
    for callback, state in states.items():
        merges = str(state.get("merges")) if callback.startswith("ResidualMerging") else ""
        if merges and "scale='train'" not in merges and "schedule=early" not in merges:
            print(
                f"Note: the file holds only weights, trained with {merges}. These merges also scale the\n"
                "branches that they keep: a plain model without them computes something else."
            )
        if callback.startswith("Looping") and (passes := state["passes"] or 1) > 1:
            print(
                f"Note: the file holds only weights, trained with {passes} passes ({callback}). A plain model\n"
                "runs the blocks once, and computes something else."
            )
        if callback.startswith("ZoneoutStates") and any(state["rates"]):
            cell, hidden = state["rates"]
            print(
                f"Note: the file holds only weights, trained with zoneout, cell={cell:g} and hidden={hidden:g}\n"
                f"({callback}). A plain LSTM does not average its states, and computes something else."
            )


def _state_dict(content: object, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in the content of a checkpoint."""
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise ConfigurationError(f"--ckpt: {checkpoint} holds no state dict")
    return weights

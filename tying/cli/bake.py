"""``tying bake``: export the plain weights of a checkpoint."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor

from tying.cli.inspect import load_weights
from tying.errors import ConfigurationError
from tying.files import atomically, read
from tying.hard import bake
from tying.lightning_workarounds import callbacks_of
from tying.selection.index import unwrapped

SECTIONS = ("seed_everything", "trainer", "model", "data")  # of a run's config.yaml; the rest are arguments of `fit`


def main(args: Sequence[str], load: Callable[[Sequence[str]], tuple[pl.Trainer, pl.LightningModule]]) -> None:
    """Write the plain weights of a checkpoint.

    Args:
        args: of the command.
        load: returns the trainer and the model that arguments describe.

    Raises:
        ConfigurationError: the checkpoint is missing or holds no weights, or they cannot be had without the model.
    """
    parser = argparse.ArgumentParser(prog="tying bake", description=__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint of Lightning, or a state dict")
    parser.add_argument("--out", type=Path, required=True, help="a file of torch, or of safetensors by its ending")
    parser.add_argument("--config", action="append", default=[], help="of the run; where weights are computed")
    known = parser.parse_args(args)
    content = read(known.ckpt, "--ckpt")
    weights = _weights(content, known.ckpt)
    if any("parametrizations." in key or key.endswith("_extra_state") for key in weights):
        weights = _computed(weights, known.config, known.ckpt, load)
    own = {unwrapped(key): value.detach() for key, value in weights.items()}
    plain = {key: value.clone(memory_format=torch.contiguous_format) for key, value in own.items()}
    _save(plain, known.out)
    size = sum(value.numel() * value.element_size() for value in plain.values())
    print(f"{len(plain)} tensors, {size:,} bytes: {known.out}")
    for callback, state in (content.get("callbacks", {}) if isinstance(content, dict) else {}).items():
        if callback.startswith("ResidualMerging") and "scale='train'" not in str(state):
            print(f"Note: these are weights alone, and were trained with {state.get('merges')}: a plain model without")
            print("such merges, which also scale what they kept in training, computes something else from them.")


def _weights(content: object, path: Path) -> dict[str, Tensor]:
    held = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise ConfigurationError(f"--ckpt: {path} holds no state dict")
    return held


def _computed(
    weights: dict[str, Tensor],
    configs: Sequence[str],
    path: Path,
    load: Callable[[Sequence[str]], tuple[pl.Trainer, pl.LightningModule]],
) -> dict[str, Tensor]:
    if not configs:
        raise ConfigurationError(f"{path} holds weights that the model computes: give the --config of its run")
    with tempfile.TemporaryDirectory() as folder:
        arguments = []
        for number, config in enumerate(configs):
            kept = Path(folder) / f"{number}.yaml"
            try:
                content = yaml.safe_load(Path(config).read_text())
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise ConfigurationError(f"--config: {config} cannot be read: {error}") from None
            if not isinstance(content, dict):
                raise ConfigurationError(f"--config: {config} must hold keys and values")
            kept.write_text(yaml.safe_dump({key: content[key] for key in SECTIONS if key in content}))
            arguments.append(f"--config={kept}")
        trainer, model = load(arguments)
    model.configure_model()
    load_weights(model, callbacks_of(trainer), weights, f"--config {', '.join(configs)}: {path}")
    return bake(model)


def _save(weights: dict[str, Tensor], path: Path) -> None:
    save: Callable[[Any, Any], object] = torch.save
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import save_file as save
        except ImportError:
            raise ConfigurationError("a .safetensors file needs the package: pip install safetensors") from None
    try:
        with atomically(path) as aside:
            save(weights, aside)
    except (OSError, RuntimeError) as error:  # torch's writer knows of no OSError
        raise ConfigurationError(f"--out: {path} cannot be written: {error}") from None
